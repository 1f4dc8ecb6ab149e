"""Autoencoder -> programs: latents to pixels, and back; rows are places, line by line.

Row spaces are resolutions: `s0` the coarsest, that of latents, then each twice as fine. Where
convolutions read, and with it all that depends on a picture's size, comes as indices.
"""

from __future__ import annotations

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
# Taps of the i-th place on an axis read (step * i + 0, 1 and 2 - before) // share: of the same
# space, of one half as fine, and of one twice as fine, where zeros are after the last alone.
_READS = {"same": (1, 1, 1), "finer": (1, 1, 2), "coarser": (2, 0, 1)}
_OUTSIDE = -(1 << 30)  # twice it is an int32, and no place makes it positive


def compile_decoder(spec: AutoEncoder, names: p.Names) -> p.Program:
    b, space = _blocks(spec, names), 0
    given = x = b.builder.value(LATENTS, spec.latent, "s0")
    x = _middle(b, spec, _convolve(b, x, "decoder.conv_in"), "decoder.mid")
    for level in reversed(range(len(spec.widths))):
        for block in range(spec.blocks + 1):
            x = _residual(b, spec, x, f"decoder.up.{level}.block.{block}")
        if level:
            space += 1
            x = _convolve(b, x, f"decoder.up.{level}.upsample.conv", _taps("finer", space))
    x = _norm(b, spec, x, "decoder.norm_out", "silu")
    return b.builder.build(_convolve(b, x, "decoder.conv_out", name=PIXELS), inputs=[given])


def compile_encoder(spec: AutoEncoder, names: p.Names) -> p.Program:
    b, space = _blocks(spec, names), len(spec.widths) - 1
    given = x = b.builder.value(PIXELS, 3, f"s{space}")
    x = _convolve(b, x, "encoder.conv_in")
    for level in range(len(spec.widths)):
        for block in range(spec.blocks):
            x = _residual(b, spec, x, f"encoder.down.{level}.block.{block}")
        if space:
            space -= 1
            x = _convolve(b, x, f"encoder.down.{level}.downsample.conv", _taps("coarser", space))
    x = _norm(b, spec, _middle(b, spec, x, "encoder.mid"), "encoder.norm_out", "silu")
    return b.builder.build(_convolve(b, x, "encoder.conv_out", name=MOMENTS), inputs=[given])


def decoder_inputs(spec: AutoEncoder, lines: int, columns: int) -> dict[str, Int32]:
    """The indices of the decoder for latents of this size."""
    return _inputs(spec, lines, columns, "finer", range(1, len(spec.widths)))


def encoder_inputs(spec: AutoEncoder, lines: int, columns: int) -> dict[str, Int32]:
    """The indices of the encoder for latents, not pixels, of this size."""
    return _inputs(spec, lines, columns, "coarser", range(len(spec.widths) - 1))


def _inputs(
    spec: AutoEncoder, lines: int, columns: int, resize: str, spaces: range
) -> dict[str, Int32]:
    given = [("same", space) for space in range(len(spec.widths))]
    given += [(resize, space) for space in spaces]
    found = {
        _taps(kind, space).name: _rows_read(kind, lines << space, columns << space)
        for kind, space in given
    }
    spans = np.array([[0], [lines * columns]], np.int32).repeat(lines * columns, axis=1)
    return found | {SPANS.name: spans} if spec.attends else found


def _rows_read(kind: str, lines: int, columns: int) -> Int32:
    """[9, rows] of a picture that is made: the rows that each of its places reads, or -1."""
    step, before, share = _READS[kind]
    down, across = (
        (step * np.arange(size, dtype=np.int32) + np.arange(-before, 3 - before)[:, None]) // share
        for size in (lines, columns)
    )
    lines, columns = lines * step // share, columns * step // share
    down = np.where((down >= 0) & (down < lines), down * columns, _OUTSIDE).astype(np.int32)
    across = np.where((across >= 0) & (across < columns), across, _OUTSIDE).astype(np.int32)
    found: Int32 = (down[:, None, :, None] + across[None, :, None, :]).reshape(9, -1)
    return np.maximum(found, -1, out=found)


def _taps(kind: str, space: int) -> p.Index:
    return p.Index(f"{kind}.s{space}", f"s{space}", 9)


def _blocks(spec: AutoEncoder, names: p.Names) -> Blocks:
    return Blocks(names, roles(spec), SPANS, prefix="vae.")


def _residual(b: Blocks, spec: AutoEncoder, x: p.Value, role: str) -> p.Value:
    """The shortcut comes first: then x is needed no more once it is normed."""
    kept, shortcut = x, f"{role}.nin_shortcut"
    if f"{shortcut}.weight" in b.shapes:
        kept = b.linear(x, shortcut, shortcut, bias=True)
    h = _convolve(b, _norm(b, spec, x, f"{role}.norm1", "silu"), f"{role}.conv1")
    return _convolve(b, _norm(b, spec, h, f"{role}.norm2", "silu"), f"{role}.conv2", residual=kept)


def _middle(b: Blocks, spec: AutoEncoder, x: p.Value, role: str) -> p.Value:
    x, name = _residual(b, spec, x, f"{role}.block_1"), f"{role}.attn_1"
    if spec.attends:
        h = _norm(b, spec, x, f"{name}.norm")
        q, k, v = (b.linear(h, f"{name}.{part}", f"{name}.{part}", bias=True) for part in "qkv")
        out = b.builder.value(f"{name}.seen", x.width, x.rows)
        how = (None, 1, 1, x.width, x.width**-0.5, None, None)
        h = b.builder.emit(p.Attend(out, q, k, v, SPANS, *how))
        x = b.linear(h, f"{name}.proj_out", name, bias=True, residual=x)
    return _residual(b, spec, x, f"{role}.block_2")


def _convolve(
    b: Blocks,
    x: p.Value,
    role: str,
    taps: p.Index | None = None,
    *,
    name: str = "",
    residual: p.Value | None = None,
) -> p.Value:
    taps = taps or _taps("same", int(x.rows[1:]))
    return b.linear(x, role, name or role, bias=True, residual=residual, taps=taps)


def _norm(
    b: Blocks, spec: AutoEncoder, x: p.Value, role: str, activation: Activation | None = None
) -> p.Value:
    weight, bias = b.vector(f"{role}.weight"), b.vector(f"{role}.bias")
    out = b.builder.value(role, x.width, x.rows)
    how = (spec.groups, spec.eps, activation)
    return b.builder.emit(p.GroupNormalize(out, x, weight, bias, *how))
