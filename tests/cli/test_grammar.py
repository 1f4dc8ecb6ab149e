"""Flags, kinds of models and prompts: what `Model.open` is asked for, and what is refused."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from squall import assembly, model
from squall.adapters.xlora import XLora
from squall.cli.app import app
from squall.cli.selectors import SELECTORS
from squall.cli.serve import server
from squall.engine.memory import KvSize
from squall.errors import SquallError
from squall.opening import Opening

COMMANDS = ("run", "serve", "bench", "perplexity")
ORDER = '{"order": ["x"], "preload_adapters": [{"name": "y", "adapter_model_id": "adapters/y"}]}'
FILES = (
    "adapters/x/adapter_config.json", "adapters/y/adapter_config.json", "odd=name/config.json",
    "a.gguf", "b.gguf", "old.bin", "folder/config.json", "folder/x.uqff", "text.txt",
    "y.yaml",
)  # fmt: skip
WHICH = '[model]\nquantized_model_id = "."\nquantized_filename = "old.bin"\ngqa = 8\n'
# What is typed after `squall` -> what is opened, and some of the options.
OPENED: dict[str, tuple[str, dict[str, Any]]] = {
    "run -f a.gguf Hi": ("a.gguf", {}),
    "run Hi -f a.gguf --context 99": ("a.gguf", {"context": 99}),
    "run -m folder": ("folder", {}),
    "run plain -m folder --isq q4k Why?": ("folder", {"isq": "q4k", "dtype": "auto"}),
    "run --isq q4k plain -m folder Why?": ("folder", {"isq": "q4k"}),
    "run --isq q4k plain -m folder --isq q8_0": ("folder", {"isq": "q8_0"}),
    "run --topology y.yaml plain -m folder": ("folder", {"topology": Path("y.yaml")}),
    "run a.gguf": ("a.gguf", {}),
    "run a.gguf Hi --context 9": ("a.gguf", {"context": 9}),
    "run ./folder --isq Q4_K_M Hi -c chatml": (
        "folder", {"isq": "Q4_K_M", "chat_template": "chatml"},
    ),
    "run --threads 1 owner/name:Q4_K_M Hi": ("owner/name:Q4_K_M", {"threads": 1}),
    "run none.gguf Hi": ("none.gguf", {}),
    "serve a.gguf --host 127.0.0.1 --port 0": ("a.gguf", {}),
    "serve --port 0 owner/name": ("owner/name", {}),
    "bench folder -p 8": ("folder", {}),
    "perplexity a.gguf --text text.txt": ("a.gguf", {"context": 1024}),
    "run plain -m folder -a ARCH -d bf16 -t t.json -o moqe Hi --kv-dtype f32": (
        "folder",
        {"architecture": "arch", "dtype": "bf16", "tokenizer_json": "t.json", "kv_dtype": "f32",
         "experts_only": True},
    ),
    "run plain -m folder -f x.uqff Hi": ("folder", {"from_uqff": "x.uqff"}),
    "run gguf -f b.gguf - --threads 2": ("b.gguf", {"threads": 2}),
    "run ggml -m . -f old.bin -g 4 Hi": ("old.bin", {"gqa": 4}),
    "run toml -f which.toml Hi": ("old.bin", {"gqa": 8}),
    "run -f a.gguf -- plain": ("a.gguf", {}),
    "run -f a.gguf -- -5": ("a.gguf", {}),
    "serve plain -m folder --port 0 --context 8": ("folder", {"context": 8, "kv": KvSize()}),
    "serve gguf -f a.gguf --pa-gpu-mem 3 --pa-gpu-mem-usage 0.5 --pa-blk-size 32 --port 0": (
        "a.gguf",
        {"kv": KvSize(bytes=3 * 2**20, fraction=0.5, block_size=32)},
    ),
    "serve --port 0 -i toml -f which.toml": ("old.bin", {"gqa": 8}),
    "bench -c 1 gguf -f a.gguf -p 8": ("a.gguf", {}),
    "bench plain -m folder --depth 3 --isq 4": ("folder", {"isq": "4"}),
    "bench -g 4 ggml -m . -f old.bin -g 2": ("old.bin", {"gqa": 2}),
    "perplexity --text text.txt plain -m folder -a ARCH": ("folder", {"architecture": "arch"}),
    "perplexity plain -m folder --text text.txt": ("folder", {"context": 1024}),
    "run folder --adapter adapters/x Hi": (
        "folder", {"adapters": {"x": "adapters/x"}, "active": {"x": 1.0}, "merge": False},
    ),
    "run folder --adapter law=adapters/x@0.5 --adapter owner/name@-2 Hi": (
        "folder",
        {"adapters": {"law": "adapters/x", "name": "owner/name"},
         "active": {"law": 0.5, "name": -2.0}},
    ),
    "run folder --adapter odd=name --adapter b=c=d@1 --merge": (
        "folder",
        {"adapters": {"odd=name": "odd=name", "b": "c=d"}, "active": {"odd=name": 1.0, "b": 1.0},
         "merge": True},
    ),
    "serve folder --adapter law=adapters/x --adapter-memory 3 --port 0": (
        "folder",
        {"adapters": {"law": "adapters/x"}, "active": None, "adapter_bytes": 3 << 20},
    ),
    "serve folder --adapter law=adapters/x@0.5 --merge --port 0": (
        "folder", {"active": {"law": 0.5}, "merge": True},
    ),
    "serve -i folder --adapter law=adapters/x@0.5": ("folder", {"active": {"law": 0.5}}),
    "run lora -m folder -a adapters --arch ARCH -t t.json Hi": (
        "folder",
        {"adapters": {"x": "adapters/x", "y": "adapters/y"}, "active": {"x": 1.0, "y": 1.0},
         "merge": None, "architecture": "arch", "tokenizer_json": "t.json"},
    ),
    "run lora -m folder -a adapters -o order.json Hi": (
        "folder",
        {"adapters": {"x": "adapters/x", "y": "adapters/y"}, "active": {"x": 1.0}, "merge": False},
    ),
    "run lora -m folder -a adapters/x --adapter adapters/y Hi": (
        "folder", {"active": {"x": 1.0, "y": 1.0}, "merge": False},
    ),
    "run lora -m folder -a adapters/x --merge Hi": ("folder", {"merge": True}),
    "serve --port 0 lora-gguf -m . -f b.gguf -t t -a adapters/x": (
        "b.gguf", {"adapters": {"x": "adapters/x"}, "active": {"x": 1.0}, "merge": False},
    ),
    "bench -c 1 lora-ggml -m . -f old.bin -g 2 -a adapters/x": ("old.bin", {"gqa": 2}),
    "run x-lora -m folder -x adapters -o order.json -a ARCH --tgt-non-granular-index 4": (
        "folder", {"xlora": XLora("adapters", "order.json", 4), "architecture": "arch"},
    ),
    "run x-lora-gguf -m . -f a.gguf -x adapters": ("a.gguf", {"xlora": XLora("adapters")}),
    "run x-lora-ggml -m . -f old.bin -x adapters": ("old.bin", {"xlora": XLora("adapters")}),
}  # fmt: skip
WRONG = {
    "run -f a.gguf plain -m folder": "-f, -m and a kind each name a model",
    "run -f a.gguf -m folder": "-f, -m and a kind each name a model",
    "run gguf -f a.gguf --isq q4k": "has its number formats already",
    "run plain -m folder -d f8": "--dtype is 'f8'; it must be one of",
    "run -f a.gguf b.gguf Hi": "-f, -m and a kind each name a model",
    "serve -f a.gguf b.gguf": "-f, -m and a kind each name a model",
    "run toml -f none.toml": "cannot read none.toml",
    "bench plain -m folder -w new.uqff --isq 4": "squall quantize does",
    "bench folder --adapter adapters/x": "give -c 1",
    "run folder --adapter a=adapters/x --adapter a=adapters/y": "a name of its own",
    "serve folder --adapter law=adapters/x@0.5": "requests choose the weights",
    "run lora -a adapters/x": "which model?",
    "run lora -m other/model -a adapters -o none.json": "no ordering file 'none.json'",
}
USAGE = {
    "run plain": "--model-id",
    "run plain Hi": "--model-id",
    "run plain -m folder --file a.gguf": "--file",
    "run Hi there": "there",
    "run Why is the sky blue?": "'Why is the sky blue?'",
    "serve gguuf": "Did you mean gguf?",
    "serve lama3": "Did you mean llama3?",
    "serve something": "Did you mean -f FILE",
    "bench a.gguf b.gguf": "b.gguf",
    "serve plain -m folder Hi": "Hi",
    "perplexity": "--text",
}


class Opened(SquallError):
    """Instead of opening: what was asked for."""


@pytest.fixture(autouse=True)
def _no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "which.toml").write_text(WHICH)
    (tmp_path / "order.json").write_text(ORDER)
    monkeypatch.chdir(tmp_path)

    def stop(opening: Opening) -> None:
        raise Opened(opening)

    monkeypatch.setattr(model.Model, "open_with", stop)
    monkeypatch.setattr(assembly, "prepare", stop)


def invoke(line: str, command: typer.Typer = app) -> Result:
    return CliRunner().invoke(command, shlex.split(line), input="Hi")


@pytest.mark.parametrize(("line", "wanted"), OPENED.items(), ids=OPENED.keys())
def test_what_is_opened(line: str, wanted: tuple[str, dict[str, Any]]) -> None:
    done = invoke(line)
    assert isinstance(done.exception, Opened), (done.output, done.exception)
    (opening,) = done.exception.args
    path, options = wanted
    assert Path(opening.path) == Path(path)
    assert {name: getattr(opening, name) for name in options} == options


@pytest.mark.parametrize(("line", "problem"), WRONG.items(), ids=WRONG.keys())
def test_what_is_refused(line: str, problem: str) -> None:
    done = invoke(line)
    assert not isinstance(done.exception, Opened)
    assert problem in str(done.exception)


@pytest.mark.parametrize(("line", "problem"), USAGE.items(), ids=USAGE.keys())
def test_wrong_usage(line: str, problem: str) -> None:
    done = invoke(line)
    assert done.exit_code == 2
    assert problem in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_every_kind(command: str) -> None:
    text = invoke(f"{command} --help").stdout
    assert all(f" {word} " in text for word in SELECTORS)
    for word in SELECTORS:
        text = invoke(f"{command} {word} -h").stdout
        assert "--kv-dtype" in text
        assert "--file" in text if word == "toml" else "--model " not in text.split("Options")[2]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("run Hi", "Hi"), ("run", None), ("run -- plain", "plain"), ("run gguf plain", "plain"),
        ("run --seed 1 -- -x", "-x"), ("run gguf", None), ("run PROMPT", "PROMPT"),
        ("run --stop -- Hi", "Hi"), ("run a.gguf", None), ("run a.gguf Hi", "Hi"),
        ("run -- a.gguf", "a.gguf"), ("run -f a.gguf b.gguf", "b.gguf"), ("run 24/7", "24/7"),
        ("run owner/name a.gguf", "a.gguf"), ("run 'and so on/off'", "and so on/off"),
    ],
)  # fmt: skip
def test_prompts(line: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from squall.cli import run

    asked: list[str | None] = []
    monkeypatch.setattr(run, "_converse", lambda _, flags: asked.append(flags.prompt))
    monkeypatch.setattr(run, "_asked", lambda prompt: prompt)
    monkeypatch.setattr(run.RunFlags, "open", lambda *_: Nothing())
    done = invoke(line)
    assert done.exit_code == 0, done.output
    assert asked == [wanted]


class Nothing:
    """An open model that is none."""

    def __enter__(self) -> None:
        """Nothing to open."""

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


def test_the_server_by_its_other_name() -> None:
    done = invoke("--port 0 -i plain -m folder", server)
    assert isinstance(done.exception, Opened)
    assert invoke("", server).exit_code == 2
