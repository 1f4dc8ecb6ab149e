"""Phi 3 Vision: a picture in crops of 336 x 336 pixels, and all of it in one more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from squall.vision.family import Family, Processed, clip_rows, line_ends, tiled
from squall.vision.pixels import Floats, Scale, count, patches

EDGE, PATCH, SIDE = 336, 14, 24
SUB, GLOBAL = 1, 0  # the newlines, after lines, and between the crops and the whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Phi3V(Family):
    """See `Family`. crops: at most so many.

    The model has no token for an image's rows; `token` is one of its tokenizer that nothing else
    uses. The makers' processor begins what follows an image as it begins a text: with `<s>`.
    """

    crops: int
    placeholder: str = "<|image_{}|>"
    token: str = "<|image|>"
    cost: str = "144 a crop and 144 for the whole picture, and its lines' ends: 313 to 2653"

    @classmethod
    def of(cls, _config: Mapping[str, Any], processor: Mapping[str, Any]) -> Phi3V:
        crops = count(processor, "num_crops", 1, high=64)
        scale = Scale.of(
            {key: processor[key] for key in ("image_mean", "image_std") if key in processor}
        )
        return cls(scale=scale, crops=crops, max_edge=processor.get("max_edge"))

    def read(self, image: Image.Image) -> Processed:
        """The crops, line by line, then the whole picture."""
        pixels = self.scale(crops(image, self.crops))
        lines, columns = pixels.shape[1] // EDGE, pixels.shape[2] // EDGE
        tiles = [bicubic(pixels, EDGE), *patches(pixels, EDGE).reshape(-1, 3, EDGE, EDGE)]
        inputs = clip_rows(np.stack([patches(tile, PATCH) for tile in tiles]))
        half = SIDE // 2
        quads = inputs["merged"].reshape(-1, half, 2, half, 2).transpose(2, 4, 0, 1, 3)
        sub = line_ends(tiled(half, lines, columns, half * half))
        whole = line_ends(tiled(half, 1, 1))
        taken = np.concatenate([sub, np.array([-1], np.int32), whole])
        newline = np.full(len(taken), SUB, np.int32)
        newline[len(sub)] = GLOBAL
        more = {
            "merged": np.ascontiguousarray(quads.reshape(4, -1)),
            "taken": taken,
            "newline": newline,
        }
        return Processed({**inputs, **more}, self.token * len(taken) + "<s>", len(taken))


def crops(image: Image.Image, most: int) -> Image.Image:
    """As wide as at most so many crops allow, with white above and below; upright ones on end."""
    upright = image.width < image.height
    if upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio, wide = image.width / image.height, 1
    while (wide + 1) * math.ceil((wide + 1) / ratio) <= most:
        wide += 1
    width, height = wide * EDGE, max(int(wide * EDGE / ratio), 1)
    made = Image.new("RGB", (width, math.ceil(height / EDGE) * EDGE), (255, 255, 255))
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    made.paste(resized, (0, (made.height - height) // 2))
    return made.transpose(Image.Transpose.TRANSPOSE) if upright else made


def bicubic(pixels: Floats, edge: int) -> Floats:
    """[3, height, width] -> [3, edge, edge], from 4 x 4 pixels around each, as PyTorch does it."""
    _, height, width = pixels.shape
    (rows, down), (columns, across) = _taps(height, edge), _taps(width, edge)
    lines = np.einsum("crtw,rt->crw", pixels[:, rows], down, optimize=True)
    made: Floats = np.einsum("crxt,xt->crx", lines[:, :, columns], across, optimize=True)
    return made


def _taps(size: int, edge: int) -> tuple[NDArray[np.intp], Floats]:
    """Of each of `edge` places the 4 pixels around it, and their weights."""
    at = (np.arange(edge) + 0.5) * (size / edge) - 0.5
    first = np.floor(at).astype(np.intp)
    away = np.abs((at - first)[:, None] - np.arange(-1, 3))
    a = -0.75
    near = ((a + 2) * away - (a + 3)) * away * away + 1
    far = ((a * away - 5 * a) * away + 8 * a) * away - 4 * a
    weights = np.where(away <= 1, near, far).astype(np.float32)
    return np.clip(first[:, None] + np.arange(-1, 3), 0, size - 1), weights
