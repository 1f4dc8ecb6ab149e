"""Autoencoder -> programs: latents to pixels, and back; rows are places, line by line.

Row spaces are resolutions: `s0` the coarsest, that of latents, then each twice as fine. What
depends on a picture's size, and how a convolution reads its surroundings, comes as indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from squall import program as p
from squall.blocks import Blocks
from squall.roles import roles
from squall.spec import Activation, AutoEncoder

Int32 = NDArray[np.int32]
# Inputs and outputs. Latents are unscaled; pixels are about -1 to 1; moments are means of latents,
# then logarithms of their variances.
LATENTS, PIXELS, MOMENTS = "latents", "pixels", "moments"
# What each row of the coarsest space sees: all of them.
SPANS = p.Index("spans", "s0", 2)
_NONE = -(1 << 30)  # twice it is an int32, and no place makes it positive; -1 in the end


def compile_decoder(spec: AutoEncoder, names: p.Names) -> p.Program:
    c = _coder(spec, names, "decoder")
    given = x = c.builder.value(LATENTS, spec.latent, "s0")
    x = c.plain(x, "mix") if spec.mixes else x
    x = c.middle(c.convolution(x, "conv_in"))
    for level in reversed(range(len(spec.widths))):
        for block in range(spec.blocks + 1):
            x = c.residual(x, f"levels.{level}.{block}")
        if level:
            x = c.convolution(x, f"levels.{level}.resize", _finer(x.rows))
    x = c.norm_groups(x, "norm_out", "silu")
    return c.builder.build(c.convolution(x, "conv_out", name=PIXELS), inputs=[given])


def compile_encoder(spec: AutoEncoder, names: p.Names) -> p.Program:
    c, levels = _coder(spec, names, "encoder"), len(spec.widths)
    given = x = c.builder.value(PIXELS, 3, f"s{levels - 1}")
    x = c.convolution(x, "conv_in")
    for level in range(levels):
        for block in range(spec.blocks):
            x = c.residual(x, f"levels.{level}.{block}")
        if level < levels - 1:
            x = c.convolution(x, f"levels.{level}.resize", _coarser(x.rows))
    x = c.norm_groups(c.middle(x), "norm_out", "silu")
    x = c.convolution(x, "conv_out", name="unmixed" if spec.mixes else MOMENTS)
    return c.builder.build(c.plain(x, "mix", name=MOMENTS) if spec.mixes else x, inputs=[given])


def decoder_inputs(spec: AutoEncoder, lines: int, columns: int) -> dict[str, Int32]:
    """The indices of the decoder for latents of this size."""
    found = _around(spec, lines, columns)
    for space in range(len(spec.widths) - 1):
        size = lines << space, columns << space
        found[_finer(f"s{space}").name] = _taps(*size, *(_twice(n) for n in size))
    return found


def encoder_inputs(spec: AutoEncoder, lines: int, columns: int) -> dict[str, Int32]:
    """The indices of the encoder for latents, not pixels, of this size."""
    found = _around(spec, lines, columns)
    for space in range(1, len(spec.widths)):
        size = lines << space, columns << space
        found[_coarser(f"s{space}").name] = _taps(*size, *(_half(n) for n in size))
    return found


def _around(spec: AutoEncoder, lines: int, columns: int) -> dict[str, Int32]:
    """What both have: attention's spans, and convolutions that keep the size."""
    spans = np.zeros((2, lines * columns), np.int32)
    spans[1] = lines * columns
    found = {SPANS.name: spans} if spec.attends else {}
    for space in range(len(spec.widths)):
        size = lines << space, columns << space
        found[_same(f"s{space}").name] = _taps(*size, *(_each(n) for n in size))
    return found


# ---- indices: of each row, those that the 9 taps of a convolution read ----


def _same(space: str) -> p.Index:
    return p.Index(f"taps.{space}", space, 9)


def _finer(space: str) -> p.Index:
    """Of a picture of twice the size, in which each place is there four times."""
    space = f"s{int(space[1:]) + 1}"
    return p.Index(f"finer.{space}", space, 9)


def _coarser(space: str) -> p.Index:
    """Of every other place, with zeros after the last line and column alone."""
    space = f"s{int(space[1:]) - 1}"
    return p.Index(f"coarser.{space}", space, 9)


def _taps(lines: int, columns: int, down: Int32, across: Int32) -> Int32:
    """[9, rows] of which lines and columns, [3, size] each, the taps of each place read."""
    down = np.where((down >= 0) & (down < lines), down * np.int32(columns), np.int32(_NONE))
    across = np.where((across >= 0) & (across < columns), across, np.int32(_NONE))
    found = (down[:, None, :, None] + across[None, :, None, :]).reshape(9, -1)
    return np.maximum(found, -1, out=found)


def _each(size: int) -> Int32:
    return np.arange(size, dtype=np.int32) + np.arange(-1, 2, dtype=np.int32)[:, None]


def _twice(size: int) -> Int32:
    return _each(2 * size) // 2


def _half(size: int) -> Int32:
    return np.arange(0, size - 1, 2, dtype=np.int32) + np.arange(3, dtype=np.int32)[:, None]


# ---- layers ----


def _coder(spec: AutoEncoder, names: p.Names, side: str) -> _Coder:
    shapes = {f"vae.{role}": shape for role, shape in roles(spec).items()}
    return _Coder(Blocks(names, shapes, SPANS), spec, f"vae.{side}.")


@dataclass(frozen=True, slots=True)
class _Coder:
    """Makes the ops of the encoder or the decoder, whose roles begin with `prefix`."""

    blocks: Blocks
    spec: AutoEncoder
    prefix: str

    @property
    def builder(self) -> p.Builder:
        return self.blocks.builder

    def residual(self, x: p.Value, role: str) -> p.Value:
        """The shortcut comes first: then x is needed no more once it is normed."""
        narrow = f"{self.prefix}{role}.shortcut.weight" in self.blocks.shapes
        kept = self.plain(x, f"{role}.shortcut") if narrow else x
        h = self.convolution(self.norm_groups(x, f"{role}.norm1", "silu"), f"{role}.conv1")
        h = self.norm_groups(h, f"{role}.norm2", "silu")
        return self.convolution(h, f"{role}.conv2", residual=kept)

    def middle(self, x: p.Value) -> p.Value:
        x = self.residual(x, "middle.0")
        return self.residual(self.attention(x) if self.spec.attends else x, "middle.1")

    def attention(self, x: p.Value) -> p.Value:
        h, role = self.norm_groups(x, "middle.attention.norm"), "middle.attention."
        q, k, v = (self.plain(h, f"{role}{part}") for part in "qkv")
        out = self.builder.value(f"{self.prefix}{role}seen", x.width, x.rows)
        how = (None, 1, 1, x.width, x.width**-0.5, None, None)
        return self.plain(
            self.builder.emit(p.Attend(out, q, k, v, SPANS, *how)), f"{role}out", residual=x
        )

    def plain(
        self, x: p.Value, role: str, *, name: str = "", residual: p.Value | None = None
    ) -> p.Value:
        """A linear of each place by itself."""
        role = self.prefix + role
        return self.blocks.linear(x, role, name or role, bias=True, residual=residual)

    def convolution(
        self,
        x: p.Value,
        role: str,
        taps: p.Index | None = None,
        *,
        name: str = "",
        residual: p.Value | None = None,
    ) -> p.Value:
        role, taps = self.prefix + role, taps or _same(x.rows)
        rows, channels, *size = self.blocks.shapes[f"{role}.weight"]
        weight = p.Matrix(
            self.blocks.names[f"{role}.weight"], rows, channels * int(np.prod(size)), role=role
        )
        out, bias = (
            self.builder.value(name or role, rows, taps.rows),
            self.blocks.vector(f"{role}.bias"),
        )
        return self.builder.emit(p.Linear(out, x, weight, bias, residual=residual, taps=taps))

    def norm_groups(self, x: p.Value, role: str, activation: Activation | None = None) -> p.Value:
        role = self.prefix + role
        weight, bias = (self.blocks.vector(f"{role}.{kind}") for kind in ("weight", "bias"))
        out = self.builder.value(role, x.width, x.rows)
        how = (self.spec.groups, self.spec.eps, activation)
        return self.builder.emit(p.GroupNormalize(out, x, weight, bias, *how))
