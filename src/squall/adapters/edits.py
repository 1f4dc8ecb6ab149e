"""Edits of programs: what adapters need of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from squall import program as p

SCALINGS = "scalings"


def adaptable(
    program: p.Program, columns: Mapping[p.Site, int] | None = None, width: int = 0
) -> p.Program:
    """The program with adapters for every matrix; rows without one are computed as before.

    columns: the weights of adapters come with the run, as an input "scalings" [tokens, width]:
        where those of a site begin. A site that is not named has no adapters.
    """
    values, ops = list(program.values), list(program.ops)
    scalings: dict[str, p.Value] = {}
    if columns is not None:
        given = p.Value(len(values), SCALINGS, width)
        values.append(given)
        scalings["tokens"] = given
        chosen = next((op for op in ops if isinstance(op, p.GatherRows)), None)
        if chosen is not None:
            rows = p.Value(len(values), f"{SCALINGS}.outputs", width, chosen.out.rows)
            values.append(rows)
            scalings[rows.rows] = rows
            ops.insert(0, p.GatherRows(rows, given, chosen.index))
    edited = tuple(_edited(op, columns, scalings) for op in ops)
    inputs = (*program.inputs, *(v for v in scalings.values() if v.name == SCALINGS))
    return replace(program, ops=edited, values=tuple(values), inputs=inputs)


def _edited(
    op: p.Op, columns: Mapping[p.Site, int] | None, scalings: Mapping[str, p.Value]
) -> p.Op:
    if not isinstance(op, p.Embed | p.Linear | p.GatedLinear | p.MixtureOfExperts):
        return op
    at = op.index if isinstance(op, p.Embed) else op.x
    mixture = p.Index("mixture" if at.rows == "tokens" else f"mixture.{at.rows}", at.rows)
    if columns is None:
        return replace(op, adapters=p.Adapters(at, mixture))
    named = tuple(columns.get(site, -1) for site in p.sites(op))
    if max(named) < 0:
        return op
    return replace(op, adapters=p.Adapters(at, mixture, scalings[at.rows], named))
