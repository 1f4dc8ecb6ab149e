"""The transformer of FLUX.1 -> program: patches of latents and a text in, their velocity out.

Row spaces: `text` and `picture`, `all` rows of both in this order, and `one` for what is said of
the picture as a whole.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from squall import program as p
from squall.blocks import Blocks
from squall.roles import roles
from squall.spec import Activation, Flux, Norm

Int32 = NDArray[np.int32]
# Inputs: patches of latents, rows of T5, of CLIP one; and sinusoids of time and guidance.
PICTURE, TEXT, POOLED, TIME, GUIDANCE = "picture", "text", "pooled", "time", "guidance"
SINUSOID = 256
# The output, [picture, patch].
VELOCITY = "velocity"
# Where each row is: 0, line, column; what it sees: all. Which of all rows those of each space are.
POSITIONS, SPANS = p.Index("positions", "all", 3), p.Index("spans", "all", 2)
OF_TEXT, OF_PICTURE = p.Index("words", "text"), p.Index("chosen", "picture")
_EPS = 1e-6
_QK_NORM = Norm("rms", _EPS)


def compile(spec: Flux, names: p.Names) -> p.Program:
    layers = _Layers(spec, names)
    made, given = layers.b.builder.value, []

    def input(name: str, width: int, rows: str) -> p.Value:
        given.append(made(name, width, rows))
        return given[-1]

    picture = input(PICTURE, spec.patch, "picture")
    text = input(TEXT, spec.text, "text")
    said = [layers.told("time", input(TIME, SINUSOID, "one"))]
    if spec.guidance:
        said.append(layers.told("guidance", input(GUIDANCE, SINUSOID, "one")))
    said.append(layers.told("pooled", input(POOLED, spec.pooled, "one")))
    layers.listen(said)
    picture = layers.linear(picture, "picture_in", "placed.picture")
    text = layers.linear(text, "text_in", "placed.text")
    for index in range(spec.double):
        text, picture = layers.double(f"layers.{index}", text, picture)
    x = layers.both("joined", text, picture)
    for index in range(spec.double, spec.double + spec.single):
        x = layers.single(f"layers.{index}", x)
    return layers.b.builder.build(layers.final(x), inputs=given)


class _Layers:
    """Makes the ops of layers."""

    def __init__(self, spec: Flux, names: p.Names) -> None:
        self.b = Blocks(names, roles(spec), POSITIONS, prefix="flux.")
        self._spec, self._value, self._emit = spec, self.b.builder.value, self.b.builder.emit
        angles = [spec.theta ** (-2 * i / n) for n in spec.axes for i in range(n // 2)]
        axes = [axis for axis, n in enumerate(spec.axes) for _ in range(n // 2)]
        out = self._value("angles", spec.head_dim, "all")
        turned = p.RopeAngles(out, POSITIONS, tuple(angles), axes=tuple(axes))
        self._angles = self._emit(turned)

    def linear(
        self, x: p.Value, role: str, out: str = "", activation: Activation | None = None
    ) -> p.Value:
        return self.b.linear(x, role, out or role, bias=True, activation=activation)

    def told(self, role: str, x: p.Value) -> p.Value:
        """A row that says something of the whole picture."""
        return self.linear(self.linear(x, f"{role}.in", activation="silu"), f"{role}.out")

    def listen(self, said: list[p.Value]) -> None:
        """What all modulations are made of: the sum of such rows, activated."""
        x = said[0]
        for number, more in enumerate(said[1:], start=2):
            how: Activation | None = "silu" if number == len(said) else None
            out = self._value(f"said.{number}", x.width, "one")
            x = self._emit(p.Add(out, x, more, activation=how))
        self._said = x

    def both(self, name: str, text: p.Value, picture: p.Value) -> p.Value:
        out = self._value(name, text.width, "all")
        return self._emit(p.ConcatenateRows(out, text, picture))

    def of(self, x: p.Value, index: p.Index) -> p.Value:
        """Of all rows those of a space."""
        out = self._value(f"{x.name}.{index.rows}", x.width, index.rows)
        return self._emit(p.GatherRows(out, x, index))

    def double(self, name: str, text: p.Value, picture: p.Value) -> tuple[p.Value, p.Value]:
        """A layer in which text and picture have weights of their own, and see each other."""
        streams = {"text": (text, OF_TEXT), "picture": (picture, OF_PICTURE)}
        by = {kind: self.linear(self._said, f"{name}.{kind}.modulation") for kind in streams}
        made = []
        for kind, (x, _) in streams.items():
            h = self._modulated(x, by[kind], 0, f"{name}.{kind}.attention.norm")
            made.append(self._heads(h, f"{name}.{kind}.attention"))
        joined = [
            self.both(f"{name}.attention.{part}", *pair)
            for part, *pair in zip("qkv", *made, strict=True)
        ]
        attended = self._attend(joined, f"{name}.attention")
        out = []
        for kind, (x, index) in streams.items():
            stem = f"{name}.{kind}"
            y = self.linear(self.of(attended, index), f"{stem}.attention.out")
            x = self._gated(x, y, by[kind], 2, f"{stem}.attention")
            h = self._modulated(x, by[kind], 3, f"{stem}.feed_forward.norm")
            h = self.linear(h, f"{stem}.feed_forward.up", activation="gelu_tanh")
            y = self.linear(h, f"{stem}.feed_forward.down")
            # The picture comes last, so that a program can be cut after it.
            out.append(self._gated(x, y, by[kind], 5, name if kind == "picture" else stem))
        return out[0], out[1]

    def single(self, name: str, x: p.Value) -> p.Value:
        """A layer of all rows, whose attention and feed-forward are side by side."""
        by = self.linear(self._said, f"{name}.modulation")
        h = self._modulated(x, by, 0, f"{name}.norm")
        attended = self._attend(self._heads(h, f"{name}.attention"), f"{name}.attention")
        inner = self.linear(h, f"{name}.feed_forward.up", activation="gelu_tanh")
        out = self._value(f"{name}.sides", attended.width + inner.width, "all")
        y = self.linear(self._emit(p.Concatenate(out, attended, inner)), f"{name}.out")
        return self._gated(x, y, by, 2, name)

    def final(self, x: p.Value) -> p.Value:
        parts = (self.linear(self._said, f"final.{part}") for part in ("shift", "scale"))
        by = self._emit(p.Concatenate(self._value("final.by", 2 * x.width, "one"), *parts))
        h = self._modulated(self.of(x, OF_PICTURE), by, 0, "final.norm")
        return self.linear(h, "final.out", VELOCITY)

    def _heads(self, h: p.Value, name: str) -> list[p.Value]:
        q, k, v = (self.linear(h, f"{name}.{part}") for part in "qkv")
        size = self._spec.head_dim
        return [
            self.b.norm(q, f"{name}.q_norm", _QK_NORM, size),
            self.b.norm(k, f"{name}.k_norm", _QK_NORM, size),
            v,
        ]

    def _attend(self, qkv: list[p.Value], name: str) -> p.Value:
        heads, size = self._spec.heads, self._spec.head_dim
        q, k = (
            self._emit(p.Rotate(
                self._value(f"{x.name}.turned", x.width, "all"), x, self._angles, heads, size, True
            ))
            for x in qkv[:2]
        )  # fmt: skip
        out, how = self._value(f"{name}.heads", q.width, "all"), (heads, heads, size, size**-0.5)
        return self._emit(p.Attend(out, q, k, qkv[2], SPANS, None, *how, None, None))

    def _modulated(self, x: p.Value, by: p.Value, first: int, name: str) -> p.Value:
        """first: of the rows' widths in `by`, where shift is; scale is the next one."""
        out, at = self._value(name, x.width, x.rows), first * x.width
        return self._emit(p.Modulate(out, x, by, at, at + x.width, _EPS))

    def _gated(self, x: p.Value, y: p.Value, by: p.Value, which: int, name: str) -> p.Value:
        out = self._value(name, x.width, x.rows)
        return self._emit(p.Add(out, x, y, gate=by, column=which * x.width))


def inputs(text_rows: int, lines: int, columns: int) -> dict[str, Int32]:
    """The indices of a run, for a picture of so many patches."""
    rows = text_rows + lines * columns
    positions = np.zeros((3, rows), np.int32)
    positions[1:, text_rows:] = np.indices((lines, columns), np.int32).reshape(2, -1)
    chosen = np.arange(rows, dtype=np.int32)
    spans = np.stack([np.zeros(rows, np.int32), np.full(rows, rows, np.int32)])
    return {
        POSITIONS.name: positions, SPANS.name: spans,
        OF_TEXT.name: chosen[:text_rows], OF_PICTURE.name: chosen[text_rows:],
    }  # fmt: skip
