"""The decoder's programs: well-formed for every combination of options, fused, and readable."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import TypeVar

import pytest

import squall.decoder
from squall.decoder import compile
from squall.program import (
    Add,
    Attend,
    Linear,
    Matrix,
    Names,
    Op,
    Program,
    RopeAngles,
    Slice,
    Value,
    Vector,
)
from squall.recipes import KNOWN
from squall.roles import roles
from squall.spec import Attention, Decoder, Layer, LinearScaling, Mlp, Moe, Norm, Rope, Wiring

NORM = Norm("rms", 1e-5)
ATTENTION = Attention(4, 2, 8, 8**-0.5, Rope(1e4, 8))
MLP = Mlp(48, "silu")


def decoder(*layers: Layer, **changes: object) -> Decoder:
    base = Decoder(vocab=50, hidden=32, context=64, layers=layers, norm=NORM)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def names_of(d: Decoder) -> Names:
    """A checkpoint with one tensor a role."""
    sizes = {role: shape[0] * (shape[1] if shape[2:] else 1) for role, shape in roles(d).items()}
    return {role: (Slice(role, 0, size),) for role, size in sizes.items()}


def program(d: Decoder) -> Program:
    return compile(d, names_of(d), context=64)


def inputs(op: Op) -> list[Value]:
    items = [getattr(op, f.name) for f in dataclasses.fields(op) if f.name != "out"]
    return [item for item in items if isinstance(item, Value)]


T = TypeVar("T")


def ops(kind: type[T], of: Program) -> list[T]:
    return [op for op in of.ops if isinstance(op, kind)]


LAYERS = [
    Layer(dataclasses.replace(ATTENTION, qkv_bias=bias, out_bias=bias, rope=rope), f, NORM, wiring)
    for wiring, f, bias, rope in itertools.product(
        ("pre", "sandwich", "post", "parallel"),
        (MLP, Mlp(48, "gelu", gated=False, bias=True), Moe(4, 2, 24, "silu", normalize=True)),
        (True, False),
        (Rope(1e4, 8), None),
    )
]


@pytest.mark.parametrize("layer", LAYERS, ids=range(len(LAYERS)))
def test_programs_are_well_formed(layer: Layer) -> None:
    """Values are made once, before use; names are unique; every weight is used, and whole."""
    d = decoder(layer, layer, logit_softcap=30.0)
    found = program(d)
    made: set[Value] = set()
    for op in found.ops:
        assert made.issuperset(inputs(op))
        assert op.out not in made
        made.add(op.out)
    assert made == set(found.values)
    assert len({value.name for value in found.values}) == len(found.values)
    used = {part.tensor for weight in found.weights() for part in weight.slices}
    assert used == set(roles(d))
    for weight in found.weights():
        rows = weight.size if isinstance(weight, Vector) else weight.experts * weight.rows
        assert rows == sum(part.stop - part.start for part in weight.slices)


@pytest.mark.parametrize(
    ("wiring", "adds"), [("pre", 0), ("parallel", 0), ("post", 2), ("sandwich", 2)]
)
def test_residuals_are_fused_where_the_wiring_allows(wiring: Wiring, adds: int) -> None:
    found = program(decoder(Layer(ATTENTION, MLP, NORM, wiring), residual_scale=0.5))
    assert len(ops(Add, found)) == adds
    fused = [op for op in ops(Linear, found) if op.residual is not None]
    assert len(fused) == 2 - adds
    assert {op.scale for op in fused} <= {0.5}


@pytest.mark.parametrize("layer", LAYERS, ids=range(len(LAYERS)))
def test_only_wanted_rows_go_on_from_the_last_attention(layer: Layer) -> None:
    found = program(decoder(layer, layer, logit_softcap=30.0))
    last = found.ops.index(ops(Attend, found)[-1])
    assert {op.out.rows for op in found.ops[: last + 1]} == {"tokens"}
    assert {op.out.rows for op in found.ops[last + 1 :]} == {"outputs"}


def test_a_tied_head_is_the_embedding_table() -> None:
    found = program(decoder(Layer(ATTENTION, MLP, NORM), tied=True))
    tables = [w for w in found.weights() if isinstance(w, Matrix) and w.rows == 50]
    assert [table.role for table in tables] == ["embed", "head"]
    assert tables[0].slices == tables[1].slices


def test_angles_are_made_once_a_kind() -> None:
    near, far = Rope(1e4, 8), Rope(1e6, 8, scaling=LinearScaling(8.0))
    layers = [
        Layer(dataclasses.replace(ATTENTION, rope=rope), MLP, NORM)
        for rope in (near, far, near, None, far)
    ]
    assert len(ops(RopeAngles, program(decoder(*layers)))) == 2


def test_each_layer_has_its_cache() -> None:
    wide = dataclasses.replace(ATTENTION, kv_heads=4)
    found = program(decoder(Layer(ATTENTION, MLP, NORM), Layer(wide, MLP, NORM)))
    assert [cache.kv_heads for cache in found.caches] == [2, 4]
    assert [op.cache for op in ops(Attend, found)] == [0, 1]


def test_describe_has_a_line_an_op() -> None:
    found = program(decoder(Layer(ATTENTION, MLP, NORM)))
    lines = found.describe().splitlines()
    assert len(lines) == len(found.ops)
    assert re.match(
        r" +0 Embed +embed\[tokens,32\]  index=tokens table=embed.weight\[50,32\]", lines[0]
    )


def test_the_decoder_knows_no_architecture() -> None:
    source = Path(squall.decoder.__file__).read_text(encoding="utf-8").lower()
    assert [name for name in KNOWN if re.search(rf"\b{name}\b", source)] == []
