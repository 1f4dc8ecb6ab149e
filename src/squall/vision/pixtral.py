"""Pixtral and Mistral 3: pictures at their own size, line by line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from squall.vision.axial import axial_rows
from squall.vision.family import Processed
from squall.vision.pixels import MOST_EDGE, Scale, resample
from squall.vision.squares import section, settings


@dataclass(frozen=True, slots=True)
class Pixtral:
    """See `Family`. most: of its height and width. line, end: tokens after lines, and the last one.

    patch: pixels of a patch's side; merge: patches of a row's.
    """

    scale: Scale
    filter: Image.Resampling
    most: tuple[int, int]
    patch: int = 16
    merge: int = 1
    placeholder: str = "[IMG]"
    token: str = "[IMG]"
    line: str = "[IMG_BREAK]"
    end: str = "[IMG_END]"
    mutual: bool = False
    cost: str = (
        "one token for each 16 x 16 pixels, of Mistral 3 for each 28 x 28, and one for each line"
    )

    @classmethod
    def of(
        cls, config: Mapping[str, Any], processor: Mapping[str, Any], kind: str = "llava"
    ) -> Pixtral:
        """By config.json and preprocessor_config.json. kind: of the model."""
        v, found = section(config, "vision_config", "pixtral"), settings(processor)
        edge = processor.get("max_edge") or MOST_EDGE
        keys = ["size.longest_edge"] * 2
        if found.has("size.height") and not found.has(keys[0]):
            keys = ["size.height", "size.width"]
        height, width = (min(found.count(key, 1024, high=MOST_EDGE), edge) for key in keys)
        merge = section(config, "", kind).count("spatial_merge_size", 1, high=16)
        return cls(
            Scale.of(processor), resample(processor), (height, width),
            v.count("patch_size", high=1 << 10), merge,
        )  # fmt: skip

    def process(self, image: Image.Image) -> Processed:
        """The whole picture, made smaller where it is too large."""
        most, side = self.most, self.patch * self.merge
        by = max(image.height / most[0], image.width / most[1], 1.0)
        lines, columns = (max(-(-int(n / by) // side), 1) for n in (image.height, image.width))
        tile = self.scale(image.resize((columns * side, lines * side), self.filter))
        row = self.token * columns
        text = (row + self.line) * (lines - 1) + row + self.end
        return Processed(axial_rows(tile, self.patch, self.merge), text, lines * columns)
