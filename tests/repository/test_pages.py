"""What pages tell people to type: commands parse and run, code runs, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import painter
import pytest
import typer.main
from fastapi.testclient import TestClient
from pictures import draw
from project import PAGES, ROOT, blocks, lines
from tiny_flux import pipeline
from tiny_models import TEMPLATE, write_adapter, write_bert, write_folder, write_gguf, write_xlora
from tiny_seers import write_seer
from typer.testing import CliRunner

from squall import Embedder, ImageModel, Model, embedded
from squall.cli.app import app
from squall.cli.serve import server
from squall.server import run
from squall.server.app import create_app
from squall.text.chat import NAMED

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FIND = embedded.find
APPS = {"squall": app, "squall-server": server}
made = cache(typer.main.get_command)
# These are only parsed: they need GPUs, the hub, another server, or files that take long to make.
ELSEWHERE = re.compile(
    r"cuda|tensor-parallel|-n [0-9']|:Q4_K_M|--url|--t5 |mmproj|qwen3:"
    r"|squall (pull|list|rm|show|tune)\b"
)
# Parts of files, and code that a type checker does not pass: untyped, or of several programs.
PARTS = ("adding-a-model", "adding-a-format")
UNTYPED = ("sampling", "clients", *PARTS)
# Pages whose code takes the default model, in whose answers is Paris.
ANSWERING = ("README", "python-api", "structured-output")
TESTED_ELSEWHERE = ("serving", "clients")  # in tests/server
FLUX = "black-forest-labs/FLUX.1-schnell"
SEARCH = """
from mcp.server.mcpserver import MCPServer

server = MCPServer("far")


@server.tool()
def search(text: str) -> str:
    return "nothing new"


server.run()
"""
FAR = {"command": sys.executable, "args": ["search.py"]}
# As large as the tiny models, and quick.
SMALLER = {"4096": "64", "epochs = 100": "epochs = 1", "= 16384": "= 512"}
FILES = {
    "search.py": SEARCH,
    "mcp.json": json.dumps({"mcpServers": {"far": FAR}}),
    "layers.yaml": "0-1:\n  isq: Q3K\n",
    "wiki.txt": "The sea is deep and wide, and nobody has seen all of it. " * 8,
    "ordering.json": '{"order": ["one", "two"], "base_model_id": "FOLDER"}',
    "lora.json": '{"order": ["law"], "base_model_id": "FOLDER"}',
    "person.json": '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}}',
    "chat.jinja": TEMPLATE,
    "sum.y": blocks(ROOT / "docs/structured-output.md", "yacc")[0],
    "selection.toml": blocks(ROOT / "docs/commands.md", "toml")[0],
    "models.toml": blocks(ROOT / "docs/serving.md", "toml")[0],
    "anymoe.toml": blocks(ROOT / "docs/anymoe.md", "toml")[0],
    "prompts.json": blocks(ROOT / "docs/anymoe.md", "json")[0],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that pages name."""
    root = tmp_path_factory.mktemp("models")
    base = write_folder(root / "FOLDER", max_position_embeddings=1024)
    for name in ("MODEL", "models/mistral", "mistralai/Mistral-7B-Instruct-v0.1"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).symlink_to(base)
    (root / "HuggingFaceH4").mkdir()
    (root / "HuggingFaceH4/zephyr-7b-beta").symlink_to(base)
    file = write_gguf(root / "model.gguf", base)
    for name in ("DIR/model.gguf", "small.gguf", "other.gguf", "chat.gguf", "code.gguf"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(file)
    for name in ("adapters/law", "adapters/sql", "adapters/chess", "adapters/fr", "owner/name"):
        write_adapter(root / name, base, seed=len(name))
    for name in ("adapters/poems", "adapters/sums"):
        write_adapter(root / name, base, rank=16, target_modules=["up_proj", "down_proj"])
    write_xlora(root / "XLORA", base, ["one", "two"], "FOLDER")
    (root / "tokenizer.json").symlink_to(base / "tokenizer.json")
    write_seer(root / "llava-hf/llava-1.5-7b-hf")
    write_seer(root / "Qwen/Qwen2-VL-2B-Instruct", "qwen2vl")
    (root / "owner/vision-model").symlink_to(root / "Qwen/Qwen2-VL-2B-Instruct")
    write_bert(root / "sentence-transformers/all-MiniLM-L6-v2")
    write_seer(root / "microsoft/Phi-3.5-vision-instruct", "phi3v")
    pipeline(root / FLUX)
    for name in ("FLUX", "black-forest-labs/FLUX.1-dev"):
        (root / name).symlink_to(root / FLUX)
    for name in ("cat.png", "sketch.png"):
        draw("text", 60, 40).save(root / name)
    for name, text in FILES.items():
        for large, tiny in SMALLER.items():
            text = text.replace(large, tiny)
        (root / name).write_text(text)
    return root


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in that has the models; what is served is asked for its health."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def serve_on(served: Any, options: Any, listener: socket.socket, **_: Any) -> int:
        listener.close()
        with TestClient(create_app(served, options), base_url="http://127.0.0.1") as client:
            assert client.get("/health").text == "OK"
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("typer.testing._get_command", made)
    monkeypatch.setattr(painter.Painter, "max_prompt", 256)
    monkeypatch.setattr(run, "listen", lambda *_: socket.socket())
    monkeypatch.setattr(run, "serve_on", serve_on)
    monkeypatch.setattr(embedded, "find", lambda: models / "model.gguf")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def commands(page: Path) -> list[list[str]]:
    """Squall's commands on a page, as words, without what the shell does."""
    found = (re.split(r" [<>|&]( |$)", line)[0].replace("/srv/images", ".") for line in lines(page))
    words = [shlex.split(line) for line in found if not line.startswith(">")]
    return [["squall", *each[each.index("squall") + 1 :]] if each[0] == "torchrun" else each
            for each in words if each and each[0] in {*APPS, "torchrun"}]  # fmt: skip


def code(page: Path) -> str:
    """A page's Python, with names of what is here."""
    text = "\n".join(blocks(page, "python"))
    changes = {"https://example.org/": "", "4096": "64", "(FOLDER": '("FOLDER"'}
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def parametrize(found: Callable[[Path], object]) -> pytest.MarkDecorator:
    """By pages that have something."""
    having = [page for page in PAGES if found(page)]
    return pytest.mark.parametrize("page", having, ids=_name)


def _name(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")


@parametrize(commands)
def test_commands_parse(page: Path) -> None:
    for name, *arguments in commands(page):
        command = made(APPS[name])
        while arguments and hasattr(command, "commands"):
            at = next((i for i, word in enumerate(arguments) if word in command.commands), None)
            if at is None:
                break
            command.make_context(name, arguments[: at + 1])
            name, command = arguments[at], command.get_command(None, arguments[at])
            arguments = arguments[at + 1 :]
        command.make_context(name, arguments)


@pytest.mark.slow("pages have several commands, each of which opens a model")
@parametrize(commands)
@pytest.mark.usefixtures("place")
def test_commands_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, since they use each other's files."""
    for name, *arguments in commands(page):
        line = shlex.join([name, *arguments])
        if ELSEWHERE.search(line):
            continue
        with monkeypatch.context() as patch:
            if arguments[0] != "inspect":
                patch.setattr(ImageModel, "open_with", painter.opened)
            done = CliRunner().invoke(APPS[name], arguments, input="Hi\n")
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, (line, done.output)


@pytest.mark.slow("the default model answers")
@parametrize(partial(blocks, language="python"))
@pytest.mark.usefixtures("place")
def test_code_runs(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = code(page)
    compiled = compile(text, str(page), "exec")
    if page.stem in PARTS + TESTED_ELSEWHERE:
        return
    if page.stem in ANSWERING:
        monkeypatch.setattr(embedded, "find", FIND)
    exec(compiled, {"__name__": "shown"})
    assert page.stem not in ANSWERING or "Paris" in capsys.readouterr().out


@pytest.mark.slow("mypy reads openai and anthropic")
def test_what_is_shown_passes_a_type_checker(tmp_path: Path) -> None:
    """The code of pages, and the examples, by mypy's strictest rules."""
    texts = {page: code(page) for page in PAGES if page.stem not in UNTYPED}
    texts |= {path: path.read_text() for path in (ROOT / "examples").rglob("*.py")}
    for path, text in texts.items():
        if text:
            name = re.sub(r"\W", "_", str(path.relative_to(ROOT)))
            (tmp_path / f"shown_{name}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *tmp_path.glob("*.py")],
        capture_output=True, text=True, env=os.environ | {"MYPYPATH": str(ROOT / "src")},
        cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@parametrize(lambda page: [line for line in lines(page) if line.startswith("curl")])
def test_curl_gets_an_answer(page: Path, asked: TestClient) -> None:
    for line in lines(page):
        if line.startswith("curl "):
            words = shlex.split(line)
            url = next(word for word in words if "://" in word)
            path = re.sub(r"\w+://[^/]+", "", url)
            body = words[words.index("-d") + 1] if "-d" in words else None
            found = asked.request("GET" if body is None else "POST", path, content=body)
            assert found.status_code == 200, (line, found.text)
            if body is not None and json.loads(body).get("stream"):
                assert found.text.rstrip().endswith("data: [DONE]")


@pytest.fixture(scope="module")
def asked(models: Path) -> Iterator[TestClient]:
    """A server of a small model, one that makes pictures and one that embeds."""
    pictures = ImageModel(painter.Painter(), path=Path("flux"))  # type: ignore[arg-type]
    texts = Embedder.open(models / "sentence-transformers/all-MiniLM-L6-v2")
    with Model.open(models / "model.gguf") as model, pictures, texts:
        built = create_app({"small": model, "flux": pictures, "minilm": texts})
        with TestClient(built, base_url="http://127.0.0.1:8080") as client:
            yield client


@cache
def targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@parametrize(lines)
def test_the_rest_of_commands_exists(page: Path) -> None:
    """Targets of make, scripts of Python, extras of pip."""
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for line in lines(page):
        if found := re.match(r"make (\w+)", line):
            assert found[1] in targets()
        if found := re.match(r"python ([\w/.]+\.py)", line):
            assert (ROOT / found[1]).is_file()
        if found := re.search(r"pip install '?squall\[([\w,]+)\]", line):
            assert {*found[1].split(",")} <= {*extras, "all"}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / target).is_file(), target


def test_flags_of_the_migration_page_exist() -> None:
    """Those in the columns of Squall."""
    known: set[str] = set()
    for name in ("serve", "run", "bench"):
        command = made(app).get_command(None, name)
        for each in (command, command.get_command(None, "plain")):
            known |= {word for param in each.params for word in param.opts + param.secondary_opts}
    page = (ROOT / "docs/migrate.md").read_text()
    cells = [row.rstrip("|").rsplit(" | ", 1)[1] for row in re.findall(r"^\|.* \|$", page, re.M)]
    flags = {flag for cell in cells for flag in re.findall(r"(?<=[` ])--[a-z-]+", cell)}
    assert flags
    assert flags <= known


def test_templates_with_names_are_told() -> None:
    page = (ROOT / "docs/chat-templates.md").read_text()
    names = re.search(r"or a name:(.*?)\.", page, re.DOTALL)
    assert names is not None
    assert set(re.findall(r"`(\w+)`", names[1])) == {path.stem for path in NAMED.iterdir()}
