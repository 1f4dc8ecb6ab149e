"""Idefics 2, Idefics 3 and SmolVLM: pictures of any shape, whole and in pieces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from squall.errors import InvalidCheckpoint
from squall.recipes.clip_towers import side
from squall.vision.family import Processed
from squall.vision.pixels import Scale, resample, shrunk
from squall.vision.squares import HALF, Inputs, edge, rows, section, settings, windows

FAKE = "<fake_token_around_image>"
MOST = 4096  # pixels of an edge of Idefics 3's pictures, whatever their files say


@dataclass(frozen=True, slots=True)
class Idefics2:
    """See `Family`. edges: the least and the most pixels of an edge. split: four quarters, too.

    side: learned positions in a row. latents: rows of a picture. max_edge: see `families.family`.
    """

    scale: Scale
    filter: Image.Resampling
    edges: tuple[int, int]
    split: bool
    patch: int
    side: int
    latents: int
    max_edge: int | None = None
    placeholder: str = "<image>"
    token: str = "<image>"
    mutual: bool = False
    cost: str = "64 and 2 around them; where pictures are split 320 and 6"

    @classmethod
    def of(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Idefics2:
        """By config.json and preprocessor_config.json."""
        found, vision = settings(processor), section(config, "vision_config", "idefics2_vision")
        perceiver = section(config, "perceiver_config", "idefics2_perceiver")
        edges = (
            edge(processor, "size", "shortest_edge", 378),
            edge(processor, "size", "longest_edge", 980),
        )
        patch = vision.count("patch_size")
        if not patch <= edges[0] <= edges[1]:
            raise InvalidCheckpoint(
                f"size is from {edges[0]} to {edges[1]}; it must hold a patch, of {patch} pixels"
            )
        return cls(
            Scale.of(processor, HALF, HALF), resample(processor, 2), edges,
            found.flag("do_image_splitting", False), patch, side(vision),
            perceiver.count("resampler_n_latents", high=1 << 16), processor.get("max_edge"),
        )  # fmt: skip

    def process(self, image: Image.Image) -> Processed:
        """Its quarters and the whole, of each as many patches as it is wide and high."""
        image = shrunk(image, self.max_edge)
        parts = [*(_quarters(image) if self.split else []), image]
        found = [self.scale(part.resize(self._size(part), self.filter)) for part in parts]
        inputs = rows(found, self.patch, self.side)
        text = FAKE + (self.token * self.latents + FAKE) * len(parts)
        inputs = self._read(inputs, len(parts))
        return Processed(inputs, text, self.latents * len(parts), seam=FAKE)

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """Width and height."""
        (width, height), (least, most) = image.size, self.edges
        ratio = width / height
        if width >= height and width > most:
            width, height = most, int(most / ratio)
        elif height > width and height > most:
            width, height = int(most * ratio), most
        return max(width, least), max(height, least)

    def _read(self, inputs: Inputs, pictures: int) -> Inputs:
        """What latents read: a picture's rows, and themselves after them."""
        ends = np.unique(inputs["spans"][1])
        starts = np.concatenate([[0], ends[:-1]])
        merged, latent, read = [], [], []
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            first = number * self.latents
            own = np.arange(first, first + self.latents)
            merged.append(np.concatenate([np.arange(start, end), np.full(self.latents, start)]))
            latent.append(np.concatenate([np.full(end - start, -1), own]))
            read += [(start + first, end + own[-1] + 1)] * self.latents
        more = {
            "merged": np.concatenate(merged),
            "latent": np.concatenate(latent),
            "latents": np.tile(np.arange(self.latents), pictures),
            "read": np.ascontiguousarray(np.array(read).T),
        }
        return inputs | {name: index.astype(np.int32) for name, index in more.items()}


def _quarters(image: Image.Image) -> list[Image.Image]:
    """Row by row; where there is one pixel only, it is in both."""
    across, down = (
        ((0, max(size // 2, 1)), (min(size // 2, size - 1), size)) for size in image.size
    )
    return [image.crop((x[0], y[0], x[1], y[1])) for y in down for x in across]


@dataclass(frozen=True, slots=True)
class Idefics3:
    """See `Family`. longest: pixels of the longer edge. tile: pixels of a tile's edges.

    split: into tiles, and a small picture of all. merge: patches in a row that become one.
    """

    scale: Scale
    filter: Image.Resampling
    longest: int
    tile: int
    split: bool
    patch: int
    side: int
    merge: int
    placeholder: str = "<image>"
    token: str = "<image>"
    mutual: bool = False
    cost: str = "169 (Idefics 3), 81 or 64 (SmolVLM) and 2 for each tile and for the whole picture"

    @classmethod
    def of(
        cls, config: Mapping[str, Any], processor: Mapping[str, Any], kind: str = "idefics3"
    ) -> Idefics3:
        """By config.json and preprocessor_config.json."""
        found, vision = settings(processor), section(config, "vision_config", f"{kind}_vision")
        longest = edge(processor, "size", "longest_edge", 4 * 364, 1 << 16)
        tile, patch = (
            edge(processor, "max_image_size", "longest_edge", 364),
            vision.count("patch_size"),
        )
        merge = section(config, "", kind).count("scale_factor", high=64)
        if tile < patch or tile // patch % merge or min(longest, MOST) > 16 * tile:
            raise InvalidCheckpoint(
                f"max_image_size is {tile}; it must hold a multiple of {merge} patches of {patch} "
                f"pixels, and be at least a 16th of {longest}"
            )
        return cls(
            Scale.of(processor, HALF, HALF), resample(processor, 1), longest, tile,
            found.flag("do_image_splitting", True), patch, side(vision), merge,
        )  # fmt: skip

    def process(self, image: Image.Image) -> Processed:
        """Tiles row by row, then the whole picture as one."""
        image = image.resize(self._size(image), self.filter)
        height, width = 1, 1
        if self.split:
            width, height = self._tiles(image)
            image = image.resize((width * self.tile, height * self.tile), self.filter)
        parts = self._cut(image, width, height) if width * height > 1 else []
        if parts or not self.split:
            image = image.resize((self.tile, self.tile), self.filter)
        inputs = rows([self.scale(part) for part in (*parts, image)], self.patch, self.side)
        inputs["merged"] = windows(len(parts) + 1, self.tile // self.patch, self.merge)
        count = (self.tile // self.patch // self.merge) ** 2
        text = self._text(width, height, self.token * count) if parts else ""
        text += f"{FAKE}<global-img>{self.token * count}{FAKE}"
        return Processed(inputs, text, count * (len(parts) + 1))

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """Width and height with the longer edge as it must be, the other even."""
        width, height = image.size
        ratio, long = width / height, self.longest
        if width >= height:
            short = int(long / ratio)
            width, height = long, short + short % 2
        else:
            short = int(long * ratio)
            width, height = short + short % 2, long
        width, height = max(width, 1), max(height, 1)
        ratio = width / height
        if width >= height and width > MOST:
            width, height = MOST, int(MOST / ratio)
        elif height > width and height > MOST:
            width, height = int(MOST * ratio), MOST
        return max(width, 1), max(height, 1)

    def _tiles(self, image: Image.Image) -> tuple[int, int]:
        """How many tiles wide and high."""
        width, height = image.size
        ratio = width / height
        if width >= height:
            across = math.ceil(width / self.tile)
            return across, math.ceil(int(across * self.tile / ratio) / self.tile)
        down = math.ceil(height / self.tile)
        return math.ceil(int(down * self.tile * ratio) / self.tile), down

    def _cut(self, image: Image.Image, width: int, height: int) -> list[Image.Image]:
        corners = [(x * self.tile, y * self.tile) for y in range(height) for x in range(width)]
        return [image.crop((x, y, x + self.tile, y + self.tile)) for x, y in corners]

    def _text(self, width: int, height: int, tokens: str) -> str:
        """Of the tiles, which say where they are."""
        lines = (
            "".join(f"{FAKE}<row_{y + 1}_col_{x + 1}>{tokens}" for x in range(width)) + "\n"
            for y in range(height)
        )
        return "".join(lines) + "\n"
