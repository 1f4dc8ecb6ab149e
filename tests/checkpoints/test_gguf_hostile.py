"""Hostile files: always our error, in under a second and under 50 MB."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoints import gguf_builder as b
from checkpoints.gguf_corpus import hostile
from squall.checkpoints import describe, open_gguf, read_header
from squall.errors import InvalidCheckpoint, ModelNotFound, SquallError, UnsupportedModel

PROBE = Path(__file__).with_name("gguf_probe.py")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hostile")
    paths = {}
    for number, (name, content) in enumerate(hostile()):
        paths[name] = folder / f"{number}.gguf"
        paths[name].write_bytes(content)
    return paths


def probe(*paths: Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(PROBE), *map(str, paths)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.serial
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_every_hostile_file_is_refused_quickly_and_in_little_memory(
    corpus: dict[str, Path],
) -> None:
    results = probe(*corpus.values())
    ours = {"InvalidCheckpoint", "UnsupportedModel"}
    wrong = {
        name: result
        for name, result in zip(corpus, results, strict=True)
        if result["error"] not in ours or result["seconds"] >= 1 or result["bytes"] >= 50_000_000
    }
    assert not wrong


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_probe_can_see_memory(tmp_path: Path) -> None:
    path = tmp_path / "valid.gguf"
    path.write_bytes(b.File([("k", b.strings(["ab"] * (1 << 20)))]).to_bytes())
    (result,) = probe(path)
    assert not result["error"]
    assert result["bytes"] > 50_000_000


def test_small_hostile_files_are_refused_by_the_header_reader_too(corpus: dict[str, Path]) -> None:
    for name, path in corpus.items():
        if path.stat().st_size > 1 << 20:
            continue
        try:
            describe(read_header(path))
        except SquallError:
            continue
        # Only formats that Squall does not run may pass: such a file can be inspected.
        with pytest.raises(UnsupportedModel, match="tensor 't'"):
            open_gguf(path)
        assert "type" in name, name


def test_errors_are_one_short_printable_line(corpus: dict[str, Path]) -> None:
    for name, path in corpus.items():
        with pytest.raises(SquallError) as caught:
            open_gguf(path)
        assert str(caught.value).isprintable(), name
        assert len(str(caught.value)) < 500, name


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    whole = b.small().to_bytes()
    path = tmp_path / "cut.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidCheckpoint):
            open_gguf(path)
    path.write_bytes(whole)
    assert set(open_gguf(path).tensors) == {"a", "b"}


def test_one_changed_byte_gives_a_checkpoint_or_our_error(tmp_path: Path) -> None:
    whole = b.small().to_bytes()
    path = tmp_path / "changed.gguf"
    for place in range(len(whole)):
        for value in (0, 1, 0x7F, 0x80, 0xFF, whole[place] ^ 1):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with contextlib.suppress(SquallError):
                describe(open_gguf(path))


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"GGUF\0\0\0\3", UnsupportedModel, "big-endian"),
        (b.small().with_(version=1).to_bytes(), UnsupportedModel, "version 1"),
        (b"version https://git-lfs.github.com/spec/v1", InvalidCheckpoint, "git lfs pull"),
        (
            b.File([], [b.TensorEntry("blk.0.x", (256,), 23)], bytes(136)).to_bytes(),
            UnsupportedModel,
            r"tensor 'blk.0.x'.*iq4_xs.*q4_k",
        ),
        (
            b.File([], [b.TensorEntry("x", (256,), 1234)], bytes(136)).to_bytes(),
            UnsupportedModel,
            r"tensor 'x'.*1234.*q4_k",
        ),
        (
            b.File([], [b.TensorEntry("x", (1, 1, 1, 1, 1))], bytes(64)).to_bytes(),
            InvalidCheckpoint,
            "'x' has 5 dimensions",
        ),
        (
            b.File([], [b.TensorEntry("x", (2**32, 2**31), 1234)], bytes(64)).to_bytes(),
            InvalidCheckpoint,
            "'x' has shape",
        ),
        (
            b.File(
                [],
                [b.TensorEntry("x", (33,), 24), b.TensorEntry("y", (1,), 24, 32)],
                bytes(64),
            ).to_bytes(),
            InvalidCheckpoint,
            "'x' and 'y' overlap",
        ),
        (
            b.File([("k", b.array(b.ARRAY, b"", 0))]).to_bytes(),
            UnsupportedModel,
            "'k' is an array of arrays",
        ),
        (
            b.File([("a\x1b[2Jb", b.scalar(b.BOOL, 7))]).to_bytes(),
            InvalidCheckpoint,
            r"'a\\x1b\[2Jb' has a bool with value 7",
        ),
    ],
)
def test_errors_say_what_is_wrong(
    tmp_path: Path, content: bytes, error: type[SquallError], words: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        open_gguf(path)


def test_what_is_not_a_file_is_not_found(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none.gguf", tmp_path / "pipe", "a\0b", "x" * 5000):
        with pytest.raises(ModelNotFound):
            open_gguf(path)
