"""`squall adapters`, and what other commands do with adapters."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny_models import write_adapter, write_folder
from typer.testing import CliRunner, Result

from squall import Model
from squall.cli.app import app
from squall.errors import SquallError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters for it."""
    root = tmp_path_factory.mktemp("adapters")
    base = write_folder(root / "base")
    for seed, name in enumerate(("law", "sql")):
        write_adapter(root / "adapters" / name, base, seed)
    return root


@pytest.fixture(autouse=True)
def _there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def invoke(line: str) -> Result:
    return CliRunner().invoke(app, shlex.split(line), input="Hi")


def answer(line: str) -> str:
    done = invoke(f"run {line} --temperature 0 --max-tokens 8 --raw Hello")
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_list() -> None:
    listed = json.loads(invoke("adapters list adapters adapters/sql --json").stdout)
    assert [item["path"] for item in listed] == ["adapters/law", "adapters/sql", "adapters/sql"]
    law = listed[0]
    assert (law["peft_type"], law["r"], law["lora_alpha"]) == ("LORA", 4, 8)
    assert law["bytes"] == Path("adapters/law/adapter_model.safetensors").stat().st_size
    assert "adapters/law" in invoke("adapters list adapters").stdout
    assert "no adapter_config.json in base, nor" in str(invoke("adapters list base").exception)


def test_names_in_files_steer_no_terminal(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "\x1b[2J", "r": [1]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    out = invoke(f"adapters list {tmp_path}").stdout
    assert "\x1b" not in out
    assert "[2J" in out


@pytest.mark.parametrize("command", ["inspect", "adapters inspect"])
def test_inspect(command: str) -> None:
    out = invoke(f"{command} adapters/law").stdout
    assert "lora_alpha" in out
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj .* 4 .* 0-1 ", out)
    assert "lora_A" not in out
    report = json.loads(invoke(f"{command} adapters/law --json").stdout)
    assert any(tensor["name"].endswith("q_proj.lora_A.weight") for tensor in report["tensors"])
    assert {"rank": 4, "layers": [0, 1]}.items() <= report["modules"][0].items()
    assert not report["runs"]
    assert report["obstacle"].endswith("squall run MODEL --adapter adapters/law")


def test_an_adapter_is_no_model() -> None:
    done = invoke("run adapters/law Hello")
    assert "is a LoRA adapter: open the model that it is for" in str(done.exception)
    done = invoke("run base --adapter base Hello")
    assert "'base' has no adapter_config.json; name the folder of" in str(done.exception)
    done = invoke("run base --adapter adapters Hello")
    assert str(done.exception).endswith("there are 'adapters/law', 'adapters/sql'")


def test_run() -> None:
    plain, law = answer("base"), answer("base --adapter adapters/law")
    assert plain != law
    assert answer("base --adapter adapters/law --merge --weights f32") == answer(
        "base --adapter adapters/law --weights f32"
    )
    assert answer("base --adapter adapters/law@0") == plain
    both = answer("base --adapter adapters/law@0.5 --adapter b=adapters/sql@2")
    assert both not in (plain, law)
    done = invoke("run base --adapter ./none Hello")
    assert "there is no adapter './none'" in str(done.exception)
    assert "is the prompt" not in str(done.exception)
    done = invoke("run base --merge Hello")
    assert "nothing to merge" in str(done.exception)


def test_merge_to_a_folder() -> None:
    done = invoke("adapters merge base adapters/law@0.5 adapters/sql -o merged")
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout == "merged: base with law, sql\n"
    adapters = {"law": "adapters/law", "sql": "adapters/sql"}
    with (
        Model.open("merged", weights="f32") as written,
        Model.open("base", weights="f32", adapters=adapters, active={"law": 0.5}, merge=True) as m,
    ):
        assert written.generate("Hello", temperature=0, max_tokens=8).read() == (
            m.generate("Hello", temperature=0, max_tokens=8).read()
        )
        assert not m.adapters.list()
    done = invoke("adapters merge base adapters/law -o merged")
    assert isinstance(done.exception, SquallError)
    assert "exists" in str(done.exception)


def test_merge_to_a_file() -> None:
    done = invoke("adapters merge base adapters/law -o merged.gguf --isq Q8_0")
    assert done.exit_code == 0, (done.output, done.exception)
    assert answer("merged.gguf") == answer("base --adapter adapters/law --merge --isq Q8_0")
    again = "adapters merge base adapters/law@0.5 -o merged.gguf --isq Q8_0"
    assert "--force" in str(invoke(again).exception)
    assert invoke(f"{again} --force").exit_code == 0
    for line, problem in (
        ("base adapters/law -o new --isq Q4K", "a folder has floats"),
        ("merged.gguf adapters/law -o new", "no folder"),
        ("base ./adapters/none -o new", "there is no adapter"),
        ("base adapters/law a/law -o new", "a name of its own"),
    ):
        done = invoke(f"adapters merge {line}")
        assert problem in str(done.exception), line
        assert not Path("new").exists()


def test_adapters_beside_a_model() -> None:
    adapters = {"law": "adapters/law", "sql": "adapters/sql"}
    told: list[tuple[int, int]] = []
    with Model.open(
        "base", adapters=adapters, active={"sql": 2}, progress=lambda *at: told.append(at)
    ) as model:
        assert [info.name for info in model.adapters.list()] == ["law", "sql"]
        assert model.adapters.active == ("sql",)
        assert told[-2:] == [(1, 2), (2, 2)]
        own = model.generate("Hello", temperature=0, max_tokens=8, adapters=[]).read()
        assert own == model.generate("Hello", temperature=0, max_tokens=8, adapters={}).read()
        assert own != model.generate("Hello", temperature=0, max_tokens=8).read()
    with Model.open("base", adapters=adapters, adapter_bytes=1 << 20) as model:
        assert model.adapters.limit_bytes == 1 << 20
    with pytest.raises(SquallError, match="there is no adapter 'none'"):
        Model.open("base", adapters={"a": "none"})
    with pytest.raises(SquallError, match="'b'"):
        Model.open("base", adapters=adapters, active={"b": 1})
