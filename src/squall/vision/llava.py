"""LLaVA: a square picture, a row for each of its patches; and LLaVA-Next: its tiles beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from squall.errors import InvalidCheckpoint
from squall.vision import pixels
from squall.vision.family import Family, Processed, clip_rows, line_ends, tiled
from squall.vision.pixels import Floats, Scale, count, edges

Size = tuple[int, int]
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Llava(Family):
    """See `Family`.

    size: what pictures are resized to, a height and width or the shortest edge. crop: height and
        width of the middle that is left. Either may be None: nothing is done.
    pad: the colour that makes pictures square before.
    side: patches in a line of what is left, which has `patch` pixels each.
    class_token, skipped: see `clip_rows`.
    """

    size: Size | int | None
    crop: Size | None
    pad: tuple[int, ...] | None
    side: int
    patch: int
    class_token: bool
    skipped: int
    cost: str = "one a patch: 576 for 336 x 336 pixels in patches of 14"

    @classmethod
    def of(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> Llava:
        vision, scale = config["vision_config"], Scale.of(processor)
        class_token = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
        image_size = count(vision, "image_size", 336 if class_token else 224)
        patch = count(vision, "patch_size", 14 if class_token else 16)
        size, crop = (
            edges(processor, key, 224, square=key == "crop_size")
            if processor.get(do, True)
            else None
            for key, do in (("size", "do_resize"), ("crop_size", "do_center_crop"))
        )
        means = Scale.of({**processor, "do_normalize": True}).mean
        pad = tuple(int(mean * 255) for mean in means) if processor.get("do_pad") else None
        left = crop or ((size, size) if isinstance(size, int) and pad is not None else size)
        side, lines = image_size // patch, _lines(left, patch) if isinstance(left, tuple) else ()
        if isinstance(crop, int) or lines != (side, side):
            raise InvalidCheckpoint(
                f"size and crop_size leave {left} of a picture; its tower reads {image_size} x "
                f"{image_size} pixels in patches of {patch}"
            )
        skipped = int(config.get("vision_feature_select_strategy", "default") == "default")
        return cls(
            scale=scale, filter=pixels.resample(processor), size=size, crop=crop, pad=pad,
            side=side, patch=patch, class_token=class_token, skipped=skipped,
            max_edge=processor.get("max_edge"),
        )  # fmt: skip

    def read(self, image: Image.Image) -> Processed:
        if self.pad is not None:
            image = square(image, self.pad)
        return self.rows(self.tile(image)[None])

    def tile(self, image: Image.Image) -> Floats:
        """What is left of a picture, in patches."""
        if self.size is not None:
            image = pixels.resized(image, self.size, self.filter)
        if self.crop is not None:
            image = pixels.center_crop(image, *self.crop)
        return pixels.patches(self.scale(image), self.patch)

    def rows(self, tiles: Floats) -> Processed:
        """[tiles, patches, patch] as the tower reads them."""
        inputs = clip_rows(tiles, class_token=self.class_token, skipped=self.skipped)
        rows = len(inputs["merged"])
        return Processed(inputs, self.token * rows, rows)


def _lines(size: Size, patch: int) -> Size:
    height, width = size
    return height // patch, width // patch


def square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """In the middle of a square of this color."""
    edge = max(image.size)
    pixels.check_size(image, edge, edge)
    made = Image.new("RGB", (edge, edge), color)
    made.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaNext(Family):
    """See `Family`: anyres, where a picture is followed by tiles with more detail.

    whole: how the picture and a tile are read. pinpoints: heights and widths of pictures in tiles.
    cut: height and width of a tile. base: what the whole picture is resized to.
    """

    whole: Llava
    pinpoints: tuple[Size, ...]
    cut: int
    base: Size
    cost: str = "one a patch of the picture and of up to 4 tiles, without their edges: 576 to 2928"

    @classmethod
    def of(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> LlavaNext:
        size = edges(processor, "size", 224, square=False)
        crop = edges(processor, "crop_size", 224, square=True)
        base = (size, size) if isinstance(size, int) else size
        cut = crop[0] if isinstance(crop, tuple) else 0
        key = "image_grid_pinpoints"
        points = processor.get(key) or config.get(key) or PINPOINTS
        sizes = [(point[0], point[1]) for point in points[:256] if _fits(point, cut)]
        if len(sizes) < len(points):
            raise InvalidCheckpoint(
                f"{key} must be up to 256 heights and widths of tiles of {cut} pixels; it is "
                f"{points!r:.99}"
            )
        whole = Llava.of(config, {**processor, "do_pad": True})  # all that it reads is square
        if whole.class_token != bool(whole.skipped):
            raise InvalidCheckpoint("vision_feature_select_strategy must leave whole lines of rows")
        return cls(
            scale=whole.scale, filter=whole.filter, max_edge=whole.max_edge, whole=whole,
            pinpoints=tuple(sizes), cut=cut, base=base,
        )  # fmt: skip

    def read(self, image: Image.Image) -> Processed:
        """The whole picture, and line by line that in tiles, each line with a newline."""
        best = best_size(image, self.pinpoints)
        canvas = _fitted(image, best, self.filter)
        lines, columns = _lines(best, self.cut)
        whole = image.resize(self.base[::-1], self.filter)
        tiles = (whole, *pixels.cut(canvas, self.cut))
        read = self.whole.rows(np.stack([self.whole.tile(tile) for tile in tiles]))
        side = self.whole.side
        grid = unpadded(tiled(side, lines, columns, side * side), image)
        taken = np.concatenate([np.arange(side * side, dtype=np.int32), line_ends(grid)])
        inputs = {**read.inputs, "taken": taken, "newline": np.zeros_like(taken)}
        return Processed(inputs, self.token * len(taken), len(taken))


def _fits(point: object, cut: int) -> bool:
    if not isinstance(point, list) or len(point) != 2:
        return False
    return all(isinstance(n, int) and n in range(cut, 17 * cut, cut) for n in point)


def best_size(image: Image.Image, sizes: tuple[Size, ...]) -> Size:
    """The height and width that keep most of a picture's pixels, and of these the smallest."""

    def kept(size: Size) -> tuple[int, int]:
        height, width = size
        scale = min(width / image.width, height / image.height)
        inside = int(image.width * scale) * int(image.height * scale)
        most = min(inside, image.width * image.height)
        return most, most - height * width

    return max(sizes, key=kept)


def _fitted(image: Image.Image, size: Size, filter: Image.Resampling) -> Image.Image:
    """As large as it can be within this height and width, in the middle of black."""
    height, width = size
    across, down = width / image.width, height / image.height
    if across < down:
        fitted = (width, min(math.ceil(image.height * across), height))
    else:
        fitted = (min(math.ceil(image.width * down), width), height)
    canvas = Image.new("RGB", (width, height))
    at = ((width - fitted[0]) // 2, (height - fitted[1]) // 2)
    canvas.paste(image.resize(fitted, filter), at)
    return canvas


def unpadded(grid: NDArray[np.int32], image: Image.Image) -> NDArray[np.int32]:
    """A grid of rows without those of the black around a picture.

    Rounded as transformers does it, in the model and in the count of tokens.
    """
    height, width = grid.shape
    if image.width / image.height > width / height:
        lines = int(round(image.height * (width / image.width), 7))
        edge = (height - lines) // 2
        return grid[edge : height - edge]
    columns = int(round(image.width * (height / image.height), 7))
    edge = (width - columns) // 2
    return grid[:, edge : width - edge]
