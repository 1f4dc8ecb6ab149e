"""Pixels as Pillow makes them and transformers' processors do: resized, cut, and normalized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from squall.errors import InvalidCheckpoint

Floats = NDArray[np.float32]
CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


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
        pixels = np.asarray(image, np.float64).transpose(2, 0, 1) * self.factor
        mean, std = (np.array(values)[:, None, None] for values in (self.mean, self.std))
        return np.ascontiguousarray(((pixels.astype(np.float32) - mean) / std), np.float32)


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


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle, with black around what is smaller."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def patches(tile: Floats, size: int) -> Floats:
    """[3, height, width] -> [patches, 3 * size * size], line by line."""
    channels, height, width = tile.shape
    cut = tile.reshape(channels, height // size, size, width // size, size)
    return np.ascontiguousarray(cut.transpose(1, 3, 0, 2, 4)).reshape(-1, channels * size * size)
