"""Tower and connector -> program: pixels of one image in, rows for a decoder out.

What depends on an image's size comes as indices: where patches are, what they see, and which rows
become one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from squall import program as p
from squall.blocks import Blocks, Reach
from squall.roles import roles
from squall.spec import Connector, Perceiver, Tiles, Tower

TOWER, CONNECTOR = "tower.", "connector."
# The input, [rows, patch]: pixels in the order of the weight's columns; a class token has zeros.
PATCHES = "patches"
# Of each row: its patch, which is itself, or negative: a class token; that token; its learned
# position; where it is for its rotary embedding; what it sees, and what in layers that see less.
PATCH, CLASS = p.Index("patch", "rows"), p.Index("class", "rows")
POSITIONS, ROTARY = p.Index("positions", "rows"), p.Index("rotary", "rows", 2)
SPANS, LOCAL = p.Index("spans", "rows", 2), p.Index("local", "rows", 2)
# Of each row of a picture in tiles: its tile, and its place in it, by shape; itself, or negative:
# it fills its tile up, with nothing in it.
TILE, PLACE, FULL = p.Index("tile", "rows"), p.Index("place", "rows"), p.Index("full", "rows")
# Of each merged row the rows that become it. MERGED has as many axes as the connector merges.
MERGED = "merged"
# Of each row that goes to the decoder: the merged one, or negative: a newline; and which.
TAKEN, NEWLINE = p.Index("taken", "image"), p.Index("newline", "image")
# Of each row that a perceiver gives: which latent it begins as; the merged rows that it reads. Of
# each merged row: which of those rows stands there, or negative: none.
LATENTS, READ = p.Index("latents", "image"), p.Index("read", "image", 2)
LATENT = p.Index("latent", "merged")
# The output, [rows for the decoder, width].
IMAGE = "image"


def compile(tower: Tower, connector: Connector | Perceiver, names: p.Names) -> p.Program:
    shapes = {TOWER + role: shape for role, shape in roles(tower).items()}
    shapes |= {CONNECTOR + role: shape for role, shape in roles(connector).items()}
    b = Blocks(names, shapes, ROTARY)
    patches = b.builder.value(PATCHES, tower.patch, "rows")
    x = _layers(b, tower, embed(b, tower, patches))
    out = (
        perceive(b, connector, x) if isinstance(connector, Perceiver) else connect(b, connector, x)
    )
    return b.builder.build(out, inputs=[patches])


def embed(b: Blocks, tower: Tower, patches: p.Value) -> p.Value:
    """The rows that layers begin with."""
    new, tiles = b.builder.value, tower.tiles
    x = embedded = b.linear(patches, f"{TOWER}patches", "embedded", bias=tower.bias)
    if tiles is not None:
        x = _tiled(b, x, "before", TILE, tiles.gates[0])
    if tower.class_token:
        token = _learned(b, f"{TOWER}class", CLASS)
        x = b.builder.emit(p.Overlay(new("classed", x.width, "rows"), token, x, PATCH))
    if tower.positions:
        places = _learned(b, f"{TOWER}positions", POSITIONS)
        share = 1.0 if tiles is None else 1.0 - tiles.gates[1]
        x = b.builder.emit(p.Add(new("placed", x.width, "rows"), x, places, share))
    if tiles is not None:
        x = _tiled(b, x, "places", PLACE, tiles.gates[1])
    x = x if tower.pre_norm is None else b.norm(x, f"{TOWER}pre_norm", tower.pre_norm)
    if tiles is None:
        return x
    return b.builder.emit(p.Overlay(new("filled", x.width, "rows"), embedded, x, FULL))


def _tiled(b: Blocks, x: p.Value, role: str, index: p.Index, gate: float) -> p.Value:
    learned = _learned(b, f"{TOWER}tiles.{role}.positions", index)
    out = b.builder.value(f"tiled.{role}", x.width, x.rows)
    return b.builder.emit(p.Add(out, x, learned, gate))


def _layers(b: Blocks, tower: Tower, x: p.Value) -> p.Value:
    states = [x]
    for index, layer in enumerate(tower.layers):
        reach = Reach(LOCAL if index in tower.local else SPANS)
        x = b.layer(x, f"{TOWER}layers.{index}", layer, reach)
        states.append(x)
    x = _joined(b, [states[at] for at in tower.read]) if tower.read else x
    x = x if tower.norm is None else b.norm(x, f"{TOWER}norm", tower.norm)
    return x if tower.tiles is None else _late(b, tower.tiles, x, states[1:])


def _joined(b: Blocks, values: list[p.Value]) -> p.Value:
    """Rows of several, side by side."""
    x = values[0]
    for value in values[1:]:
        out = b.builder.value(f"{x.name}+", x.width + value.width, x.rows)
        x = b.builder.emit(p.Concatenate(out, x, value))
    return x


def _late(b: Blocks, tiles: Tiles, x: p.Value, made: list[p.Value]) -> p.Value:
    """The layers after the norm, and what some of those before it made."""
    x = _tiled(b, x, "after", TILE, tiles.gates[2])
    for index, layer in enumerate(tiles.late):
        x = b.layer(x, f"{TOWER}late.{index}", layer, Reach(SPANS))
    width, count = x.width, len(tiles.read)
    if not count:
        return x
    x = _joined(b, [x, *(made[index] for index in tiles.read)])
    columns = np.arange(x.width, dtype="<u4")
    columns[width:] = columns[width:].reshape(count, width).T.reshape(-1)
    out = b.builder.value("read", x.width, "rows")
    return b.builder.emit(p.GatherColumns(out, x, columns.tobytes()))


def connect(b: Blocks, c: Connector, x: p.Value) -> p.Value:
    """The rows that the decoder gets."""
    if c.norm is not None and not c.mean:
        x = b.norm(x, f"{CONNECTOR}norm", c.norm)
    width = x.width if c.mean else x.width * c.merge
    index = p.Index(MERGED, MERGED, c.merge)
    x = b.builder.emit(p.GatherRows(b.builder.value("gathered", width, MERGED), x, index, c.mean))
    if c.norm is not None and c.mean:
        x = b.norm(x, f"{CONNECTOR}norm", c.norm)
    if c.mix:
        order = np.arange(width, dtype="<u4").reshape(c.merge, -1).T.tobytes()
        x = b.builder.emit(p.GatherColumns(b.builder.value("by channel", width, MERGED), x, order))
        x = b.linear(x, f"{CONNECTOR}mix", "mixed", bias=False)
    if c.early:
        x = _newlines(b, c, x)
    last = len(c.widths) - 1
    for number in range(len(c.widths)):
        role = f"{CONNECTOR}linear{number}"
        name = IMAGE if number == last and (c.early or not c.newlines) else role
        how, scale = (None, c.scale) if number == last else (c.activation, 1.0)
        x = b.linear(x, role, name, bias=c.bias, activation=how, scale=scale)
    return x if c.early else _newlines(b, c, x)


def perceive(b: Blocks, c: Perceiver, x: p.Value) -> p.Value:
    context = b.feed_forward(x, f"{CONNECTOR}mlp", f"{CONNECTOR}mlp", c.mlp)
    out = b.builder.value("context", c.hidden, MERGED)
    context = b.builder.emit(p.GatherRows(out, context, p.Index(MERGED, MERGED)))
    x = _learned(b, f"{CONNECTOR}latents", LATENTS)
    for index, layer in enumerate(c.layers):
        name = f"{CONNECTOR}layers.{index}"
        normed = b.norm(context, f"{name}.attention.context_norm", layer.norm)
        x = b.layer(x, name, layer, Reach(READ, read=partial(_beside, b, normed)))
    return b.norm(x, f"{CONNECTOR}norm", c.norm, out=IMAGE)


def _beside(b: Blocks, context: p.Value, latents: p.Value) -> p.Value:
    """The rows that latents read: the context, and they themselves."""
    out = b.builder.value(f"{context.name}.read", context.width, MERGED)
    return b.builder.emit(p.Overlay(out, context, latents, LATENT))


def _newlines(b: Blocks, c: Connector, x: p.Value) -> p.Value:
    """With learned rows where the image's lines end."""
    if not c.newlines:
        return x
    line = _learned(b, f"{CONNECTOR}newline", NEWLINE, 1.0 if c.early else c.scale)
    name = "lined" if c.early else IMAGE
    return b.builder.emit(p.Overlay(b.builder.value(name, x.width, IMAGE), line, x, TAKEN))


def _learned(b: Blocks, role: str, index: p.Index, scale: float = 1.0) -> p.Value:
    table = b.matrix(role)
    table = replace(table, rows=table.rows * table.experts, experts=1)
    out = b.builder.value(role, table.cols, index.rows)
    return b.builder.emit(p.Embed(out, index, table, scale))
