"""Pixtral and Mistral 3: pictures at their own size, line by line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from squall.vision.family import Family, Processed
from squall.vision.pixels import CLIP_MEAN, CLIP_STD, MOST_EDGE, count, resample, scale
from squall.vision.rows import axial_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixtral(Family):
    """See `Family`. most: of its height and width. line, end: tokens after lines, and the last one.

    patch: pixels of a patch's side; merge: patches of a row's.
    """

    most: tuple[int, int]
    patch: int = 16
    merge: int = 1
    placeholder: str = "[IMG]"
    token: str = "[IMG]"
    line: str = "[IMG_BREAK]"
    end: str = "[IMG_END]"
    cost: str = (
        "one token for each 16 x 16 pixels, of Mistral 3 for each 28 x 28, and one for each line"
    )

    @classmethod
    def of(cls, config: Mapping[str, Any], processor: Mapping[str, Any], merge: int = 1) -> Pixtral:
        """By config.json and preprocessor_config.json. merge: see above, by default."""
        size = processor.get("size") or {"longest_edge": 1024}
        if size.get("longest_edge"):
            size = dict.fromkeys(("height", "width"), size["longest_edge"])
        edge = processor.get("max_edge") or MOST_EDGE
        height, width = (min(count(size, key, high=MOST_EDGE), edge) for key in ("height", "width"))
        return cls(
            scale=scale(processor, CLIP_MEAN, CLIP_STD), filter=resample(processor),
            most=(height, width),
            patch=count(config["vision_config"], "patch_size", 16, high=1 << 10),
            merge=count(config, "spatial_merge_size", merge, high=16),
        )  # fmt: skip

    def read(self, image: Image.Image) -> Processed:
        most, side = self.most, self.patch * self.merge
        by = max(image.height / most[0], image.width / most[1], 1.0)
        lines, columns = (max(-(-int(n / by) // side), 1) for n in (image.height, image.width))
        tile = self.scale(image.resize((columns * side, lines * side), self.filter))
        row = self.token * columns
        text = (row + self.line) * (lines - 1) + row + self.end
        return Processed(axial_rows(tile, self.patch, self.merge), text, lines * columns)
