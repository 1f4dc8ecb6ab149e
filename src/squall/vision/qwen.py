"""Qwen2-VL and Qwen2.5-VL: pictures at their own size, and positions with three axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from squall.errors import InvalidCheckpoint, InvalidRequest
from squall.vision.family import Family, Processed
from squall.vision.pixels import CLIP_MEAN, CLIP_STD, count, resample, scale
from squall.vision.placing import Run
from squall.vision.rows import axial_rows

MOST_ASPECT = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen(Family):
    """See `Family`. pixels: the fewest and the most of a picture.

    patch: pixels of a patch's side; merge: patches of a row's. frames: the tower sees videos of so
    many. window: rows of a window's side; 0: there are none.
    """

    pixels: tuple[int, int]
    patch: int = 14
    merge: int = 2
    frames: int = 2
    window: int = 0
    placeholder: str = "<|vision_start|><|image_pad|><|vision_end|>"
    token: str = "<|image_pad|>"
    cost: str = "one token for each 28 x 28 pixels; `min_pixels` and `max_pixels` bound it"

    @classmethod
    def of(
        cls, config: Mapping[str, Any], processor: Mapping[str, Any], window: int | None = None
    ) -> Qwen:
        """By config.json and preprocessor_config.json. window: pixels of its side, by default."""
        size, vision = processor.get("size") or {}, config["vision_config"]
        edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        bounds = {k: processor.get(k) or size.get(e) or size.get(k) for k, e in edges.items()}
        patch = count(vision, "patch_size", 14, high=1 << 10)
        merge = count(vision, "spatial_merge_size", 2, high=16)
        wide, side = window and count(vision, "window_size", window), patch * merge
        if wide is not None and wide < side:
            raise InvalidCheckpoint(f"window_size is {wide}; it must be at least {side}")
        least = count(bounds, "min_pixels", 56 * 56, high=1 << 24)
        most = count(bounds, "max_pixels", 28 * 28 * 1280, high=1 << 40)
        return cls(
            scale=scale(processor, CLIP_MEAN, CLIP_STD), filter=resample(processor),
            pixels=(least, most), patch=patch, merge=merge,
            frames=count(vision, "temporal_patch_size", 2, high=16), window=(wide or 0) // side,
            max_edge=processor.get("max_edge"),
        )  # fmt: skip

    def read(self, image: Image.Image) -> Processed:
        height, width = self.size(image.height, image.width)
        tile = self.scale(image.resize((width, height), self.filter))
        inputs = axial_rows(tile, self.patch, self.merge, self.window)
        frame = inputs["patches"].reshape(-1, len(tile), 1, self.patch**2)
        inputs["patches"] = frame.repeat(self.frames, axis=2).reshape(len(frame), -1)
        side = self.patch * self.merge
        grid = height // side, width // side
        text = self.placeholder.replace(self.token, self.token * math.prod(grid))
        return Processed(inputs, text, math.prod(grid), grid)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Whole rows, within bounds, nearly of the picture's proportions."""
        short, long = sorted((height, width))
        if long > MOST_ASPECT * short:
            raise InvalidRequest(
                f"an image has {width} x {height} pixels; this model reads those whose longer "
                f"side is at most {MOST_ASPECT} times the shorter one"
            )
        side, (least, most) = self.patch * self.merge, self.pixels
        rounded = round(height / side) * side, round(width / side) * side
        if math.prod(rounded) > most:
            by = math.sqrt(height * width / most)
            rounded = self._whole(height / by, math.floor), self._whole(width / by, math.floor)
        elif math.prod(rounded) < least:
            by = math.sqrt(least / (height * width))
            rounded = self._whole(height * by, math.ceil), self._whole(width * by, math.ceil)
        return rounded

    def _whole(self, length: float, rounded: Callable[[float], int]) -> int:
        side = self.patch * self.merge
        return max(rounded(length / side), 1) * side


def rope_positions(
    tokens: int, runs: Sequence[Run], grids: Sequence[tuple[int, int]]
) -> NDArray[np.int32]:
    """Where a prompt's tokens are: time, line and column, [3, tokens].

    An image's rows, on their `grids`, are at one time; what follows is after all of its lines and
    columns.
    """
    places = np.empty((3, tokens), np.int32)
    done = at = 0
    for run in runs:
        places[:, done : run.start] = np.arange(at, at + run.start - done)
        at += run.start - done
        places[0, run.start : run.stop] = at
        places[1:, run.start : run.stop] = np.indices(grids[run.image]).reshape(2, -1) + at
        at, done = at + max(grids[run.image]), run.stop
    places[:, done:] = np.arange(at, at + tokens - done)
    return places
