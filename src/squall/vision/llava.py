"""LLaVA: one square picture, a row for each of its patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from squall.vision.family import Processed, clip_rows
from squall.vision.pixels import Scale, center_crop, patches, resample


@dataclass(frozen=True, slots=True)
class Llava:
    """See `Family`. size: of the shortest edge. crop: height and width of what is left.

    full: the class token is a row too.
    """

    scale: Scale
    filter: Image.Resampling
    size: int
    crop: tuple[int, int]
    patch: int
    full: bool
    pad: bool
    placeholder: str = "<image>"
    token: str = "<image>"
    mutual: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Llava:
        """By config.json and preprocessor_config.json."""
        size = processor.get("size", {"shortest_edge": 224})
        crop = processor.get("crop_size", {"height": 224, "width": 224})
        return cls(
            Scale.of(processor), resample(processor), size["shortest_edge"],
            (crop["height"], crop["width"]), config["vision_config"]["patch_size"],
            config.get("vision_feature_select_strategy", "default") == "full",
            processor.get("do_pad", False),
        )  # fmt: skip

    def process(self, image: Image.Image) -> Processed:
        """The middle of the picture."""
        short, long = sorted(image.size)
        longest = int(self.size * long / short)
        wide = image.width > image.height
        size = (longest, self.size) if wide else (self.size, longest)
        tile = self.scale(center_crop(image.resize(size, self.filter), *self.crop))
        inputs = clip_rows(patches(tile, self.patch)[None])
        rows = len(inputs["merged"])
        return Processed(inputs, self.token * rows, rows)
