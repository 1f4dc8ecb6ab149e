"""`squall inspect`, on a good file, an unsupported one and a broken one."""

from __future__ import annotations

import json
from pathlib import Path

from command import squall

from checkpoints import gguf_builder


def write(path: Path, architecture: str) -> Path:
    fields = [("general.architecture", gguf_builder.string(architecture))]
    path.write_bytes(gguf_builder.File(fields, [], b"").to_bytes())
    return path


def test_default_model() -> None:
    report = json.loads(squall("inspect", "--json").stdout)
    assert report["runs"]
    assert {total["format"] for total in report["formats"]} >= {"f32", "q4_1"}
    out = squall("inspect").stdout
    assert "general.architecture" in out
    assert "Squall can run it: yes" in out


def test_unsupported(tmp_path: Path) -> None:
    path = write(tmp_path / "new.gguf", "[red]brand-new")
    done = squall("inspect", str(path))
    assert done.returncode == 0
    assert "[red]brand-new" in done.stdout
    assert "no: unknown architecture" in done.stdout
    assert not json.loads(squall("inspect", str(path), "--json").stdout)["runs"]


def test_broken(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03")
    done = squall("inspect", str(tmp_path / "broken.gguf"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
