"""Tower and connector -> program: pixels of one image in, rows for a decoder out.

What depends on an image's size comes as indices: where patches are, what they see, and which rows
become one.
"""

from __future__ import annotations

from collections.abc import Callable

from squall.blocks import Blocks, Reach
from squall.program import Add, Embed, GatherRows, Index, Names, Overlay, Program, Value
from squall.roles import roles
from squall.spec import Connector, Layer, Perceiver, Tower

TOWER, CONNECTOR = "tower.", "connector."
# The input, [rows, patch]: pixels in the order of the weight's columns; a class token has zeros.
PATCHES = "patches"
# Of each row: its patch, which is itself, or negative: a class token; that token; its learned
# position; where it is for its rotary embedding; what it sees, and what in layers that see less.
PATCH, CLASS = Index("patch", "rows"), Index("class", "rows")
POSITIONS, ROTARY = Index("positions", "rows"), Index("rotary", "rows", 2)
SPANS, LOCAL = Index("spans", "rows", 2), Index("local", "rows", 2)
# Of each merged row the rows that become it. MERGED has as many axes as the connector merges.
MERGED = "merged"
# Of each row that goes to the decoder: the merged one, or negative: a newline; and which.
TAKEN, NEWLINE = Index("taken", "image"), Index("newline", "image")
# Of each row that a perceiver gives: which latent it begins as; the merged rows that it reads. Of
# each merged row: which of those rows stands there, or negative: none.
LATENTS, READ = Index("latents", "image"), Index("read", "image", 2)
LATENT = Index("latent", "merged")
# The output, [rows for the decoder, width].
IMAGE = "image"


def compile(tower: Tower, connector: Connector | Perceiver, names: Names) -> Program:
    """The program of both."""
    shapes = {TOWER + role: shape for role, shape in roles(tower).items()}
    shapes |= {CONNECTOR + role: shape for role, shape in roles(connector).items()}
    b = Blocks(names, shapes, ROTARY)
    patches = b.builder.value(PATCHES, tower.patch, "rows")
    x = _layers(b, tower, embed(b, tower, patches))
    out = (
        perceive(b, connector, x) if isinstance(connector, Perceiver) else connect(b, connector, x)
    )
    return b.builder.build(out, inputs=[patches])


def embed(b: Blocks, tower: Tower, patches: Value) -> Value:
    """The rows that layers begin with."""
    new = b.builder.value
    x = b.linear(patches, f"{TOWER}patches", "embedded", bias=tower.bias)
    if tower.class_token:
        token = _learned(b, f"{TOWER}class", CLASS)
        x = b.builder.emit(Overlay(new("classed", x.width, "rows"), token, x, PATCH))
    if tower.positions:
        places = _learned(b, f"{TOWER}positions", POSITIONS)
        x = b.builder.emit(Add(new("placed", x.width, "rows"), x, places))
    return x if tower.pre_norm is None else b.norm(x, f"{TOWER}pre_norm", tower.pre_norm)


def _layers(b: Blocks, tower: Tower, x: Value) -> Value:
    for index, layer in enumerate(tower.layers):
        reach = Reach(LOCAL if index in tower.local else SPANS)
        x = b.layer(x, f"{TOWER}layers.{index}", layer, reach)
    return x if tower.norm is None else b.norm(x, f"{TOWER}norm", tower.norm)


def connect(b: Blocks, c: Connector, x: Value) -> Value:
    """The rows that the decoder gets."""
    if c.norm is not None and not c.mean:
        x = b.norm(x, f"{CONNECTOR}norm", c.norm)
    width = x.width if c.mean else x.width * c.merge
    index = Index(MERGED, MERGED, c.merge)
    x = b.builder.emit(GatherRows(b.builder.value("gathered", width, MERGED), x, index, c.mean))
    if c.norm is not None and c.mean:
        x = b.norm(x, f"{CONNECTOR}norm", c.norm)
    if c.early:
        x = _newlines(b, c, x)
    last = len(c.widths) - 1
    for number in range(len(c.widths)):
        role = f"{CONNECTOR}linear{number}"
        name = IMAGE if number == last and (c.early or not c.newlines) else role
        activation = None if number == last else c.activation
        x = b.linear(x, role, name, bias=c.bias, activation=activation)
    return x if c.early else _newlines(b, c, x)


def perceive(b: Blocks, p: Perceiver, x: Value) -> Value:
    """Latents that have read."""
    context = b.feed_forward(x, f"{CONNECTOR}mlp", f"{CONNECTOR}mlp", p.mlp)
    out = b.builder.value("context", p.hidden, MERGED)
    context = b.builder.emit(GatherRows(out, context, Index(MERGED, MERGED)))
    x = _learned(b, f"{CONNECTOR}latents", LATENTS)
    for index, layer in enumerate(p.layers):
        name = f"{CONNECTOR}layers.{index}"
        x = b.layer(x, name, layer, Reach(READ, read=_beside(b, context, name, layer)))
    return b.norm(x, f"{CONNECTOR}norm", p.norm, out=IMAGE)


def _beside(b: Blocks, context: Value, name: str, layer: Layer) -> Callable[[Value], Value]:
    """Makes the rows that latents read: the context, and they themselves."""

    def read(latents: Value) -> Value:
        normed = b.norm(context, f"{name}.attention.context_norm", layer.norm)
        out = b.builder.value(f"{name}.attention.read", context.width, MERGED)
        return b.builder.emit(Overlay(out, normed, latents, LATENT))

    return read


def _newlines(b: Blocks, c: Connector, x: Value) -> Value:
    """With learned rows where the image's lines end."""
    if not c.newlines:
        return x
    line = _learned(b, f"{CONNECTOR}newline", NEWLINE)
    name = "lined" if c.early else IMAGE
    return b.builder.emit(Overlay(b.builder.value(name, x.width, IMAGE), line, x, TAKEN))


def _learned(b: Blocks, role: str, index: Index) -> Value:
    table = b.matrix(role)
    return b.builder.emit(Embed(b.builder.value(role, table.cols, index.rows), index, table))
