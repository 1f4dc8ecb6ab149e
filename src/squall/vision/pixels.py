"""Pixels as Pillow makes them and transformers' processors do: resized, cut, and normalized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from squall.errors import InvalidCheckpoint, InvalidRequest

Floats = NDArray[np.float32]
MOST_EDGE, MOST_PIXELS = 1 << 13, 1 << 26  # of what images are resized to
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Scale:
    """Bytes to the numbers that a tower reads: (x * factor - mean) / std, by channel."""

    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> Scale:
        """As a preprocessor_config.json says, or these."""
        factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
        mean, std = config.get("image_mean", mean), config.get("image_std", std)
        if not config.get("do_normalize", True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        for name, values in (("image_mean", mean), ("image_std", std)):
            if not _numbers(values, 3):
                raise InvalidCheckpoint(f"{name} is {values!r:.99}; it must be 3 numbers")
        return cls(float(factor), tuple(map(float, mean)), tuple(map(float, std)))

    def __call__(self, image: Image.Image) -> Floats:
        """float32 [3, height, width]."""
        levels = (np.arange(256) * self.factor).astype(np.float32)
        mean, std = (np.array(values)[:, None] for values in (self.mean, self.std))
        scaled = ((levels - mean) / std).astype(np.float32)
        pixels = np.asarray(image)
        return np.stack([scaled[c].take(pixels[..., c]) for c in range(3)])


def scale(
    processor: Mapping[str, Any], mean: Sequence[float] = HALF, std: Sequence[float] = HALF
) -> Scale:
    """Of a preprocessor_config.json, which must be to resize; by default from -1 to 1."""
    if not processor.get("do_resize", True):
        raise InvalidCheckpoint("do_resize in preprocessor_config.json is false; it must be true")
    return Scale.of(processor, mean, std)


def _numbers(values: object, count: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(v, int | float) for v in values)
    )


def resample(config: Mapping[str, Any], default: int = 3) -> Image.Resampling:
    """The filter that `resample` names: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box."""
    return Image.Resampling(config.get("resample", default))


def count(
    config: Mapping[str, Any], key: str, default: int | None = None, *, high: int = 1 << 16
) -> int:
    """An integer in `1..high`; null is as if it were not there."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise InvalidCheckpoint(f"{key} is {value!r:.99}; it must be an integer in 1..{high}")
    return value


def shrunk(image: Image.Image, edge: int | None) -> Image.Image:
    """The picture, its longer side at most `edge` pixels."""
    by = max(image.size) / (edge or max(image.size))
    if by <= 1:
        return image
    width, height = (max(round(side / by), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def edges(
    config: Mapping[str, Any], key: str, default: int, *, square: bool
) -> tuple[int, int] | int:
    """A height and width, or how long the shortest edge is; square: an int alone is both."""
    value = config.get(key)
    if value is None or isinstance(value, int):
        edge = count(config, key, default, high=MOST_EDGE)
        return (edge, edge) if square else edge
    if isinstance(value, Mapping) and value.keys() == {"shortest_edge"}:
        return count(value, "shortest_edge", high=MOST_EDGE)
    if not isinstance(value, Mapping) or value.keys() != {"height", "width"}:
        raise InvalidCheckpoint(
            f"{key} is {value!r:.99}; it must have a height and a width, or a shortest_edge"
        )
    height, width = (count(value, edge, high=MOST_EDGE) for edge in ("height", "width"))
    return height, width


def resized(
    image: Image.Image, size: tuple[int, int] | int, filter: Image.Resampling
) -> Image.Image:
    """With this height and width, or shortest edge."""
    if isinstance(size, int):
        short, long = sorted(image.size)
        longest = int(size * long / short)
        size = (size, longest) if image.width > image.height else (longest, size)
    check_size(image, *size)
    return image.resize(size[::-1], filter)


def check_size(image: Image.Image, height: int, width: int) -> None:
    """Raise InvalidRequest where what an image would become does not fit."""
    if height * width > MOST_PIXELS:
        raise InvalidRequest(
            f"an image of {image.width} x {image.height} pixels is too long for its width: it "
            f"would become {width} x {height} pixels; at most {MOST_PIXELS} are possible"
        )


def cut(image: Image.Image, edge: int) -> list[Image.Image]:
    """Its squares with this edge, line by line."""
    corners = ((x, y) for y in range(0, image.height, edge) for x in range(0, image.width, edge))
    return [image.crop((x, y, x + edge, y + edge)) for x, y in corners]


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle, with black around what is smaller."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def patches(tile: Floats, size: int) -> Floats:
    """[3, height, width] -> [patches, 3 * size * size], line by line; what is over is left out."""
    channels, height, width = tile.shape[0], *(edge // size for edge in tile.shape[1:])
    cut = tile[:, : height * size, : width * size].reshape(channels, height, size, width, size)
    return np.ascontiguousarray(cut.transpose(1, 3, 0, 2, 4)).reshape(-1, channels * size * size)
