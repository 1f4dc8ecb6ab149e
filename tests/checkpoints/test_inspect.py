"""Inspection: complete, short, and harmless to print."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from checkpoints import gguf_builder as b
from squall.checkpoints import Inspection, describe, open_gguf, read_header
from squall.checkpoints.inspect import escape


def inspect(tmp_path: Path, file: b.File) -> Inspection:
    path = tmp_path / "model.gguf"
    path.write_bytes(file.to_bytes())
    return describe(read_header(path))


def test_totals(tmp_path: Path) -> None:
    found = inspect(tmp_path, b.small())
    assert found.version == 3
    assert found.parts == (found.path,)
    assert found.size_bytes == (tmp_path / "model.gguf").stat().st_size
    assert found.parameters == 40
    assert [(t.name, t.format, t.shape, t.nbytes) for t in found.tensors] == [
        ("a", "f32", (2, 4), 32),
        ("b", "q8_0", (32,), 34),
    ]
    totals = {f.format: (f.tensors, f.parameters, f.nbytes) for f in found.formats}
    assert totals == {"q8_0": (1, 32, 34), "f32": (1, 8, 32)}
    assert describe(open_gguf(tmp_path / "model.gguf")) == found


def test_values_as_text(tmp_path: Path) -> None:
    shown = {field.key: str(field) for field in inspect(tmp_path, b.small()).metadata}
    assert shown["general.architecture"] == "llama"
    assert shown["flag"] == "True"
    assert shown["wide"] == str(-(1 << 40))
    assert shown["real"] == "0.25"
    assert shown["tokens"] == "text[4] a, bc, , ü"
    assert shown["types"] == "int32[3] 1, -2, 3"


def test_long_values_are_cut(tmp_path: Path) -> None:
    numbers = np.arange(1000, dtype=np.int32)
    fields = [
        ("numbers", b.array(b.I32, numbers.tobytes(), 1000)),
        ("tokens", b.strings(["t" * 500] * 50)),
        ("template", b.string("x" * 5000)),
        ("none", b.strings([])),
    ]
    found = {field.key: field for field in inspect(tmp_path, b.File(fields)).metadata}
    assert str(found["numbers"]) == "int32[1000] 0, 1, 2, 3, 4, 5..."
    assert (found["numbers"].length, found["numbers"].cut) == (1000, True)
    assert str(found["template"]) == "x" * 200 + "..."
    assert str(found["none"]) == "text[0]"
    assert len(str(found["tokens"])) < 2000
    assert (found["tokens"].length, found["tokens"].cut) == (50, True)


@pytest.mark.parametrize(
    "attack",
    [
        "\x1b[2J",
        "\x1b]0;title\x07",
        "a\rb",
        "a\nb",
        "\x9b31m",
        "\u202eevil",
        "\u2028",
        "\x00",
        "\x7f",
    ],
)
def test_nothing_steers_the_terminal(tmp_path: Path, attack: str) -> None:
    fields = [
        (f"key{attack}", b.string(attack)),
        ("tokens", b.strings([attack, attack.encode() + b"\xff"])),
    ]
    tensors = [b.TensorEntry(f"t{attack}", (2,))]
    found = inspect(tmp_path, b.File(fields, tensors, bytes(8)))
    texts = [str(field) for field in found.metadata] + [field.key for field in found.metadata]
    texts += [tensor.name for tensor in found.tensors]
    assert all(text.isprintable() for text in texts)
    assert len(texts) == 5


def test_a_path_is_escaped_too(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2J.gguf"
    path.write_bytes(b.small().to_bytes())
    assert describe(read_header(path)).path.endswith("a\\x1b[2J.gguf")


def test_escape_leaves_text_alone() -> None:
    assert escape("Ġ ▁größe 🙂 \\n") == "Ġ ▁größe 🙂 \\n"
    assert escape("\udcff") == "\\udcff"
