"""`squall pull`, `list`, `show` and `rm`, on a hub played by a server here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from checkpoints import gguf_builder
from checkpoints.hub_server import TOKEN, Repository, Server, playing
from squall import Model, embedded
from squall.checkpoints.hub import Hub
from squall.cli.app import app
from squall.cli.several import embeds

MODEL = embedded.find().read_bytes()
UNKNOWN = gguf_builder.File(
    [("general.architecture", gguf_builder.string("brand-new"))], [], b""
).to_bytes()


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    files = {"SmolLM2-135M-Instruct-Q4_K_M.gguf": MODEL, "README.md": b"no"}
    with playing({"bartowski/SmolLM2-135M-Instruct-GGUF": files}, tmp_path, monkeypatch) as played:
        played.repositories["o/new"] = Repository({"new.gguf": UNKNOWN})
        yield played


def squall(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def listed() -> dict[str, dict[str, object]]:
    found = {model["name"]: model for model in json.loads(squall("list", "--json").stdout)}
    assert found.pop("default")["format"] == "gguf"
    return found


def test_from_pull_to_rm(server: Server) -> None:
    assert not listed()
    done = squall("pull", "smollm2:135m")
    assert (done.exit_code, done.stderr) == (0, "")
    name, _, path = done.stdout.strip().partition(": ")
    assert name == "smollm2:135m"
    assert Path(path).read_bytes() == MODEL
    assert server.downloads() == ["SmolLM2-135M-Instruct-Q4_K_M.gguf"]
    (model,) = listed().values()
    assert (model["path"], model["bytes"]) == (path, len(MODEL))
    table = squall("list").stdout
    assert "smollm2:135m" in table
    assert f"{len(MODEL) / 2**20:.1f}" in table

    refused = squall("rm", "smollm2:135m")
    assert (refused.exit_code, Path(path).exists()) == (1, True)
    assert "give --yes" in refused.stderr
    done = squall("rm", "--yes", "smollm2:135m")
    assert done.stdout == f"smollm2:135m: {len(MODEL) / 2**20:.1f} MiB are free again\n"
    assert not listed()
    assert not Path(path).exists()


def test_what_show_tells() -> None:
    squall("pull", "smollm2:135m")
    absent = squall("show", "smollm2").exception
    assert str(absent) == "'smollm2' is not here. squall pull smollm2 gets it"
    told = squall("show", "smollm2:135m").stdout
    assert told.startswith("Squall runs it: llama, 134.5 million parameters, q4_1")
    for row in ("context:       8192 tokens", "license:       apache-2.0", "93.8 MiB, gguf"):
        assert row in told
    report = json.loads(squall("show", "smollm2:135m", "--json").stdout)
    assert report["name"] == "smollm2:135m"
    assert report["verdict"]["runs"]
    assert report["verdict"]["context"] == 8192
    assert json.loads(squall("show", "--json").stdout)["name"] == "default"


def test_what_cannot_run_is_told_first() -> None:
    squall("pull", "o/new")
    told = squall("show", "o/new")
    assert told.exit_code == 0
    assert told.stdout.startswith("Squall cannot run it: unknown architecture 'brand-new'")
    assert not json.loads(squall("show", "o/new", "--json").stdout)["verdict"]["runs"]


def test_one_that_fails_does_not_stop_the_others() -> None:
    done = squall("pull", "nobody", "o/none", "o/new")
    assert done.exit_code == 1
    assert done.stderr.count("error: ") == 2
    assert done.stdout.startswith("o/new: ")
    done = squall("rm", "--yes", "nobody", "o/new", "/etc/passwd")
    assert (done.exit_code, done.stderr.count("error: ")) == (1, 2)
    assert not listed()
    assert "pip uninstall" in squall("rm", "--yes", "default").stderr


def test_rm_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    squall("pull", "o/new")
    monkeypatch.setattr("squall.cli.models._on_terminal", lambda: True)
    assert squall("rm", "o/new", stdin="n\n").exit_code == 1
    assert listed()
    assert squall("rm", "o/new", stdin="y\n").exit_code == 0
    assert not listed()


def test_nothing_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "installed", lambda: None)
    done = squall("list")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "squall pull NAME" in done.stderr
    assert squall("list", "--json").stdout == "[]\n"


def test_a_model_by_its_name_answers() -> None:
    told = squall("run", "smollm2:135m", "--max-tokens", "3", "--context", "64", "Hi")
    assert told.exit_code == 0, told.stderr
    assert told.stdout.strip()
    offline = ("bench", "-m", "smollm2:135m", "--offline", "-p", "4", "-g", "0", "-r", "1")
    assert squall(*offline).exit_code == 0
    assert json.loads(squall("inspect", "smollm2:135m", "--json").stdout)["runs"]
    with Model.open("smollm2:135m", context=64, hub=Hub(offline=True)) as model:
        assert model.checkpoint.path.name == "SmolLM2-135M-Instruct-Q4_K_M.gguf"


def test_a_model_that_embeds_is_known_by_its_name(server: Server) -> None:
    files = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"w"}
    server.repositories["sentence-transformers/all-MiniLM-L6-v2"] = Repository(files)
    assert not embeds("all-minilm")
    squall("pull", "all-minilm")
    assert embeds("all-minilm")
    assert not embeds("nobody/knows")


def test_a_name_that_is_nearly_right() -> None:
    done = squall("run", "smollm2:137m", "Hi")
    assert "Did you mean smollm2:135m" in str(done.exception)


def test_rm_of_a_copy_leaves_the_original(server: Server) -> None:
    """Copies of repositories have the same commits."""
    server.repositories["o/copy"] = Repository({"new.gguf": UNKNOWN})
    squall("pull", "o/new", "o/copy")
    assert squall("rm", "--yes", "o/copy").exit_code == 0
    assert {*listed()} == {"o/new:new.gguf"}
    assert squall("rm", "--yes", "o/new").exit_code == 0
    assert not listed()


@pytest.mark.parametrize("listed", [True, False])
def test_what_cannot_run_is_not_pulled(listed: bool, server: Server) -> None:
    config = {"model_type": "brand-new", "architectures": ["BrandNewForCausalLM"]}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": b"w"}
    known = {"config": config} if listed else {}
    server.repositories["o/newer"] = Repository(files, known=known)
    done = squall("pull", "o/newer")
    assert done.exit_code == 1
    assert "BrandNewForCausalLM" in done.stderr
    assert server.downloads() == ["config.json"] * (not listed)
    gguf = Repository({"t5.gguf": UNKNOWN}, known={"gguf": {"architecture": "brand-new"}})
    server.repositories["o/t5"] = gguf
    assert "unknown architecture" in squall("pull", "o/t5").stderr
    gguf.known = {"gguf": {"architecture": "t5encoder"}}  # for a model that makes pictures
    assert squall("pull", "o/t5").exit_code == 0


def test_inspect_and_quantize_use_the_hub_as_told(server: Server) -> None:
    server.repositories["o/gated"] = Repository({"new.gguf": UNKNOWN}, gated=True)
    for command in (("inspect", "o/gated"), ("quantize", "o/gated", "-o", "x.gguf", "--isq", "8")):
        assert "is gated" in str(squall(*command).exception)
        assert "--offline" in str(squall(*command, "--offline").exception)
    told = squall("inspect", "o/gated", "--token-source", f"literal:{TOKEN}", "--json")
    assert "a" * 40 in json.loads(told.stdout)["path"]
    assert json.loads(squall("inspect", "o/gated", "--offline", "--json").stdout)["kind"] == "gguf"
    told = squall("inspect", "o/new", "--revision", "v9")
    assert str(told.exception) == "the model o/new has no revision 'v9'"
