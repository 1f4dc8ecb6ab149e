"""Idefics 2, Idefics 3 and SmolVLM: pictures of any shape, whole and in pieces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from squall.errors import InvalidCheckpoint
from squall.vision.family import Family, Processed
from squall.vision.pixels import count, cut, resample, scale
from squall.vision.rows import Inputs, rows, windows

FAKE = "<fake_token_around_image>"
MOST = 4096  # pixels of an edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Idefics2(Family):
    """See `Family`. edges: the least and the most pixels of an edge. split: four quarters, too.

    side: learned positions in a row. latents: rows of a picture.
    """

    edges: tuple[int, int]
    split: bool
    patch: int
    side: int
    latents: int
    cost: str = "64 and 2 around them; where pictures are split 320 and 6"

    @classmethod
    def of(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Idefics2:
        patch, side = _patches(config)
        size = processor.get("size") or {"shortest_edge": 378, "longest_edge": 980}
        least, most = (count(size, f"{edge}est_edge", high=MOST) for edge in ("short", "long"))
        if not patch <= least <= most:
            raise InvalidCheckpoint(
                f"size is from {least} to {most}; it must hold a patch, of {patch} pixels"
            )
        latents = count(config.get("perceiver_config") or {}, "resampler_n_latents", 64)
        return cls(
            scale=scale(processor), filter=resample(processor, 2), edges=(least, most),
            split=bool(processor.get("do_image_splitting")), patch=patch, side=side,
            latents=latents, max_edge=processor.get("max_edge"),
        )  # fmt: skip

    def read(self, image: Image.Image) -> Processed:
        """Its quarters and the whole, of each as many patches as it is wide and high."""
        parts = [*(_quarters(image) if self.split else []), image]
        found = [self.scale(part.resize(self._size(part), self.filter)) for part in parts]
        inputs = rows(found, self.patch, self.side)
        text = FAKE + (self.token * self.latents + FAKE) * len(parts)
        inputs = self._read(inputs, len(parts))
        return Processed(inputs, text, self.latents * len(parts), seam=FAKE)

    def _size(self, image: Image.Image) -> tuple[int, int]:
        least, most = self.edges
        size = _fitted(image, most) if max(image.size) > most else image.size
        return max(size[0], least), max(size[1], least)

    def _read(self, inputs: Inputs, pictures: int) -> Inputs:
        """What latents read: a picture's rows, and themselves after them."""
        each, merged, latent, read = self.latents, [], [], []
        for n, (start, end) in enumerate(np.unique(inputs["spans"], axis=1).T.tolist()):
            merged += [*range(start, end), *[start] * each]
            latent += [-1] * (end - start) + [*range(n * each, (n + 1) * each)]
            read += [(start + n * each, end + (n + 1) * each)] * each
        more = {
            "merged": np.array(merged, np.int32),
            "latent": np.array(latent, np.int32),
            "latents": np.tile(np.arange(each, dtype=np.int32), pictures),
            "read": np.ascontiguousarray(np.array(read, np.int32).T),
        }
        return inputs | more


def _patches(config: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels of a patch's edges, and learned positions in a row."""
    vision = config.get("vision_config") or {}
    patch = count(vision, "patch_size", 32)
    return patch, max(count(vision, "image_size", 224) // patch, 1)


def _fitted(image: Image.Image, edge: int) -> tuple[int, int]:
    """Width and height with the longer one so long."""
    ratio = image.width / image.height
    if image.width >= image.height:
        return edge, int(edge / ratio)
    return int(edge * ratio), edge


def _quarters(image: Image.Image) -> list[Image.Image]:
    """Row by row; where there is one pixel only, it is in both."""
    across, down = (
        ((0, max(size // 2, 1)), (min(size // 2, size - 1), size)) for size in image.size
    )
    return [image.crop((x[0], y[0], x[1], y[1])) for y in down for x in across]


@dataclass(frozen=True, slots=True, kw_only=True)
class Idefics3(Family):
    """See `Family`. longest: pixels of the longer edge. tile: pixels of a tile's edges.

    split: into tiles, and a small picture of all. merge: patches in a row that become one.
    """

    longest: int
    tile: int
    split: bool
    patch: int
    side: int
    merge: int
    cost: str = "169 (Idefics 3), 81 or 64 (SmolVLM) and 2 for each tile and for the whole picture"

    @classmethod
    def of(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Idefics3:
        (patch, side), merge = _patches(config), count(config, "scale_factor", 2, high=64)
        longest, tile = (
            count(processor.get(key) or {"longest_edge": default}, "longest_edge", high=MOST)
            for key, default in (("size", 4 * 364), ("max_image_size", 364))
        )
        if tile < patch or tile // patch % merge or longest > 16 * tile:
            raise InvalidCheckpoint(
                f"max_image_size is {tile}; it must hold a multiple of {merge} patches of {patch} "
                f"pixels, and be at least a 16th of {longest}"
            )
        return cls(
            scale=scale(processor), filter=resample(processor, 1), longest=longest, tile=tile,
            split=bool(processor.get("do_image_splitting", True)), patch=patch, side=side,
            merge=merge,
        )  # fmt: skip

    def read(self, image: Image.Image) -> Processed:
        """Tiles row by row, then the whole picture as one."""
        image = image.resize(self._size(image), self.filter)
        tile, parts, text = self.tile, [], ""
        each = self.token * (tile // self.patch // self.merge) ** 2
        if self.split:
            size = _fitted(image, math.ceil(max(image.size) / tile) * tile)
            across, down = (max(math.ceil(edge / tile), 1) for edge in size)
            image = image.resize((across * tile, down * tile), self.filter)
            if across * down > 1:
                parts = cut(image, tile)
                text = _places(across, down, each)
        whole = image.resize((tile, tile), self.filter)
        inputs = rows([self.scale(part) for part in (*parts, whole)], self.patch, self.side)
        inputs["merged"] = windows(len(parts) + 1, tile // self.patch, self.merge)
        text += f"{FAKE}<global-img>{each}{FAKE}"
        return Processed(inputs, text, text.count(self.token))

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """The longer edge as it must be, the other even."""
        width, height = _fitted(image, self.longest)
        if image.width >= image.height:
            return width, max(height + height % 2, 1)
        return max(width + width % 2, 1), height


def _places(across: int, down: int, tokens: str) -> str:
    """The text of tiles, which says where they are."""
    lines = (
        "".join(f"{FAKE}<row_{y + 1}_col_{x + 1}>{tokens}" for x in range(across))
        for y in range(down)
    )
    return "\n".join([*lines, "\n"])
