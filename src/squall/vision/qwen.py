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
from squall.vision.axial import axial_rows
from squall.vision.family import Processed
from squall.vision.pixels import Scale, resample, shrunk
from squall.vision.placing import Run
from squall.vision.squares import section, settings

MOST_ASPECT = 200


@dataclass(frozen=True, slots=True)
class Qwen:
    """See `Family`. pixels: the fewest and the most of a picture.

    patch: pixels of a patch's side; merge: patches of a row's. frames: the tower sees videos of so
    many. window: rows of a window's side; 0: there are none. max_edge: see `families.family`.
    """

    scale: Scale
    filter: Image.Resampling
    pixels: tuple[int, int]
    patch: int = 14
    merge: int = 2
    frames: int = 2
    window: int = 0
    max_edge: int | None = None
    placeholder: str = "<|vision_start|><|image_pad|><|vision_end|>"
    token: str = "<|image_pad|>"
    mutual: bool = False
    cost: str = "one token for each 28 x 28 pixels; `min_pixels` and `max_pixels` bound it"

    @classmethod
    def of(
        cls, config: Mapping[str, Any], processor: Mapping[str, Any], kind: str = "qwen2_vl_vision"
    ) -> Qwen:
        """By config.json and preprocessor_config.json. kind: of the tower."""
        v, found = section(config, "vision_config", kind), settings(processor)

        def bound(key: str, edge: str, default: int, high: int) -> int:
            keys = (key, f"size.{edge}", f"size.{key}")
            return found.count(next(filter(found.has, keys), key), default, high=high)

        patch, merge = v.count("patch_size", high=1 << 10), v.count("spatial_merge_size", high=16)
        window, side = v.optional_count("window_size") or 0, patch * merge
        if 0 < window < side:
            raise InvalidCheckpoint(f"window_size is {window}; it must be at least {side}")
        least = bound("min_pixels", "shortest_edge", 56 * 56, 1 << 24)
        most = bound("max_pixels", "longest_edge", 28 * 28 * 1280, 1 << 40)
        return cls(
            Scale.of(processor), resample(processor), (least, most), patch, merge,
            v.count("temporal_patch_size", high=16), window // side, processor.get("max_edge"),
        )  # fmt: skip

    def process(self, image: Image.Image) -> Processed:
        """The whole picture, at nearly its own size."""
        image = shrunk(image, self.max_edge)
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
