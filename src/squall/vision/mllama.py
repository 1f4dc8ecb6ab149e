"""Llama 3.2 Vision: a picture in up to so many tiles, which is recalled instead of read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from squall.errors import InvalidCheckpoint
from squall.vision.family import Family, Processed
from squall.vision.pixels import MOST_EDGE, MOST_PIXELS, Floats, count, patches, resample, scale

# Rows of a tile are filled up to a multiple of it.
FULL = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Mllama(Family):
    """See `Family`. size: of a tile's edge.

    shapes: of pictures, in tiles, by the number less 1 that the tower knows them by. room: tiles
        that the tower reads, whether there is something in them or not.
    """

    size: int
    patch: int
    shapes: tuple[tuple[int, int], ...]
    room: int
    placeholder: str = "<|image|>"
    token: str = "<|image|>"
    cost: str = (
        "one token; whatever its size 4 tiles are read, which stay in memory beside the cache"
    )

    @classmethod
    def of(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Mllama:
        v, edges = config["vision_config"], processor.get("size") or {}
        size = count(v, "image_size", 448, high=MOST_EDGE)
        room = count(v, "max_num_tiles", 4, high=MOST_PIXELS // size**2)
        if [count(edges, side, 224) for side in ("height", "width")] != [size] * 2:
            raise InvalidCheckpoint(f"size in preprocessor_config.json must be a tile's, {size}")
        tiles = count(processor, "max_image_tiles", 4, high=room)
        sides = range(1, tiles + 1)
        shapes = tuple((h, w) for h in sides for w in sides if h * w <= tiles)
        return cls(
            scale=scale(processor), filter=resample(processor, 2), size=size, shapes=shapes,
            patch=count(v, "patch_size", 14, high=size), room=room,
            max_edge=processor.get("max_edge"),
        )  # fmt: skip

    def read(self, image: Image.Image) -> Processed:
        """The picture in the upper left of its tiles."""
        high, wide = shape = self.shape(image)
        canvas = Image.new("RGB", (wide * self.size, high * self.size))
        canvas.paste(image.resize(self.fitted(image, shape), self.filter))
        tiles = patches(self.scale(canvas), self.size).reshape(-1, 3, self.size, self.size)
        cut = np.stack([patches(tile, self.patch) for tile in tiles])
        rows, real = self.rows(cut, self.shapes.index(shape) + 1)
        recalled = (real, len(rows["merged"]) - real)
        return Processed(rows, self.token, 1, recalled=recalled)

    def shape(self, image: Image.Image) -> tuple[int, int]:
        """The tiles, down and across, that make least of it larger, or most of it smaller."""

        scales = [
            min(h * self.size / image.height, w * self.size / image.width) for h, w in self.shapes
        ]
        larger = [found for found in scales if found >= 1]
        best = min(larger) if larger else max(scales)
        fits = [shape for shape, found in zip(self.shapes, scales, strict=True) if found == best]
        return min(fits, key=math.prod)

    def fitted(self, image: Image.Image, shape: tuple[int, int]) -> tuple[int, int]:
        """Width and height in these tiles, of which it fills one at least in one direction."""
        high, wide = (
            min(max(length, self.size), count * self.size)
            for length, count in zip((image.height, image.width), shape, strict=True)
        )
        down, across = high / image.height, wide / image.width
        if across < down:
            return wide, min(int(image.height * across) or 1, high)
        return min(int(image.width * down) or 1, wide), high

    def rows(self, tiles: Floats, shape: int) -> tuple[dict[str, NDArray[np.generic]], int]:
        """Tiles [tiles, patches, patch] as the tower reads them, and how many rows are theirs.

        Those stand before what fills up tiles and the room, which they see, but not it itself.
        """
        count, each = len(tiles), tiles.shape[1] + 1
        tile, place = np.indices((self.room, -(-each // FULL) * FULL), np.int32).reshape(2, -1)
        there = (tile < count) & (place < each)
        order = np.argsort(~there, kind="stable")
        tile, place, real = tile[order], place[order], int(there.sum())
        own, full = np.arange(len(tile), dtype=np.int32), place < each
        ends = np.where(own < real, np.int32(len(own)), np.int32(real))
        given = np.zeros((len(tile), tiles.shape[2]), np.float32)
        filled = there[order] & (place > 0)
        given[filled] = tiles[tile[filled], place[filled] - 1]
        place = np.where(full, place, 0)
        at = shape * self.room + tile
        return {
            "patches": given,
            "patch": np.where(place | ~full, own, -1),
            "class": np.zeros_like(own),
            "positions": place,
            "tile": at,
            "place": at * each + place,
            "full": np.where(full, own, -1),
            "spans": np.stack([np.zeros_like(own), ends]),
            "merged": own[full],
        }, real
