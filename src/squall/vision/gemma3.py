"""Gemma 3: a square picture, and squares cut from one that is long."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from squall.errors import InvalidCheckpoint
from squall.vision.family import Family, Processed
from squall.vision.pixels import count, edges, resample, scale
from squall.vision.rows import rows, windows


@dataclass(frozen=True, slots=True)
class Scan:
    """Crops of a picture whose edges are at least 1 : `ratio`. least: pixels of a crop's edges."""

    least: int
    most: int
    ratio: float

    def crops(self, image: Image.Image) -> list[Image.Image]:
        """In order from the left, or from the top."""
        short, long = sorted(image.size)
        count = min(max(2, min(long // self.least, math.floor(long / short + 0.5))), self.most)
        step = math.ceil(long / count)
        if long / short < self.ratio or min(step, short) < self.least:
            return []
        ends = [(at * step, min((at + 1) * step, long)) for at in range(count)]
        if image.width >= image.height:
            return [image.crop((start, 0, stop, short)) for start, stop in ends]
        return [image.crop((0, start, short, stop)) for start, stop in ends]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3(Family):
    """See `Family`. side: patches in a row of a picture. tokens: of a picture. scan: None: off."""

    side: int
    patch: int
    tokens: int
    scan: Scan | None = None
    placeholder: str = "<start_of_image>"
    token: str = "<image_soft_token>"
    mutual: bool = True
    cost: str = "256 and 4 around them; with pan and scan as much for each crop of a long picture"

    @classmethod
    def of(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Gemma3:
        vision, size = config["vision_config"], edges(processor, "size", 224, square=True)
        patch = count(vision, "patch_size", 16)
        side = count(vision, "image_size", 224) // patch
        if size != (patch * side,) * 2:
            raise InvalidCheckpoint(f"size is {size}; the tower reads {side * patch} pixels")
        scan = Scan(
            count(processor, "pan_and_scan_min_crop_size", 256),
            count(processor, "pan_and_scan_max_num_crops", 4, high=64),
            float(processor.get("pan_and_scan_min_ratio_to_activate") or 1.2),
        )
        if scan.least < scan.most:
            raise InvalidCheckpoint(
                "pan_and_scan_min_crop_size is below pan_and_scan_max_num_crops"
            )
        return cls(
            scale=scale(processor), filter=resample(processor, 2), side=side, patch=patch,
            tokens=count(config, "mm_tokens_per_image", 256),
            scan=scan if processor.get("do_pan_and_scan") else None,
        )  # fmt: skip

    def read(self, image: Image.Image) -> Processed:
        crops = self.scan.crops(image) if self.scan else []
        size = (self.side * self.patch,) * 2
        pictures = [self.scale(part.resize(size, self.filter)) for part in (image, *crops)]
        inputs = rows(pictures, self.patch, self.side)
        merge = self.side // math.isqrt(self.tokens)
        inputs["merged"] = windows(len(pictures), self.side, merge)
        text = f"\n\n{self.placeholder}{self.token * self.tokens}<end_of_image>\n\n"
        if crops:
            said = (
                f"Here is the original image {text} and here are some crops to help you see better"
            )
            text = " ".join([said, *[text] * len(crops)])
        return Processed(inputs, text, self.tokens * len(pictures))
