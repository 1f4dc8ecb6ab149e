"""Forty pictures of all shapes and modes, the same on every machine, as families get them: RGB."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]

# What is in a picture, its mode before it was made RGB, and its sizes.
_KINDS: tuple[tuple[str, str, tuple[tuple[int, int], ...]], ...] = (
    ("noise", "RGB", ((1, 1), (1, 2), (3, 1), (13, 17), (50, 50), (224, 224), (336, 336))),
    ("gradient", "RGB", ((337, 335), (640, 480), (480, 640), (1000, 50), (50, 1000), (1344, 672))),
    ("text", "RGB", ((4000, 30), (30, 4000), (672, 1344), (800, 600), (333, 334), (27, 29))),
    ("text", "RGB", ((2, 2),)),
    ("noise", "RGBA", ((31, 32), (500, 375))),
    ("gradient", "RGBA", ((100, 300),)),
    ("text", "L", ((28, 28), (427, 640), (7, 200))),
    ("noise", "L", ((449, 448),)),
    ("gradient", "LA", ((96, 97), (1, 40))),
    ("gradient", "P", ((120, 90), (365, 123))),
    ("text", "P+", ((64, 48), (700, 701))),
    ("text", "1", ((99, 33), (512, 512))),
    ("noise", "CMYK", ((65, 130), (384, 257))),
    ("gradient", "I;16", ((60, 70),)),
    ("gradient", "F", ((58, 41),)),
    ("gradient", "HSV", ((1008, 336),)),
)  # fmt: skip


def _noise(width: int, height: int) -> Bytes:
    rng = np.random.default_rng(width * 10007 + height)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def _gradient(width: int, height: int) -> Bytes:
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    across, down = x / max(width - 1, 1), y / max(height - 1, 1)
    rings = np.sin(np.hypot(x - width / 3, y - height / 2) / 9) / 2 + 0.5
    return np.round(255 * np.stack([across, rings, 1 - down * across], -1)).astype(np.uint8)


def _text(width: int, height: int) -> Bytes:
    """Dark strokes on white paper, in lines, some of them red."""
    rng = np.random.default_rng(width + 3 * height)
    page = np.full((height, width, 3), 255, np.uint8)
    for top in range(1, height, 11):
        for left in range(1, width, 6):
            strokes = np.kron(rng.random((4, 2)) < 0.5, np.ones((2, 2), bool))
            color = (200, 20, 30) if rng.random() < 0.1 else (15, 15, 25)
            letter = page[top : top + 8, left : left + 4]
            letter[strokes[: letter.shape[0], : letter.shape[1]]] = color
    return page


_DRAW = {"noise": _noise, "gradient": _gradient, "text": _text}


def _as(mode: str, image: Image.Image) -> Image.Image:
    """The picture in another mode, with holes where that can have some."""
    gray = np.asarray(image.convert("L"))
    match mode:
        case "RGBA" | "LA":
            made = image.convert(mode)
            made.putalpha(Image.fromarray(gray[::-1].copy()))
        case "P" | "P+":
            made = image.quantize(37)
            if mode == "P+":
                made.info["transparency"] = 3
        case "I;16":
            made = Image.fromarray(gray.astype(np.uint16))
        case "F":
            made = Image.fromarray(gray.astype(np.float32))
        case _:
            made = image.convert(mode)
    return made


def draw(kind: str, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture of noise, a gradient or text."""
    made = _as(mode, Image.fromarray(_DRAW[kind](width, height)))
    if made.mode == "P" and "transparency" in made.info:
        made = made.convert("RGBA")
    return made.convert("RGB")


class _Pictures(Mapping[str, Image.Image]):
    """By name; each is drawn when it is first looked at, since that takes seconds for all."""

    def __init__(self) -> None:
        self._asked = {
            f"{kind}-{mode}-{width}x{height}": (kind, width, height, mode)
            for kind, mode, sizes in _KINDS
            for width, height in sizes
        }
        self._drawn: dict[str, Image.Image] = {}

    def __getitem__(self, name: str) -> Image.Image:
        if name not in self._drawn:
            self._drawn[name] = draw(*self._asked[name])
        return self._drawn[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._asked)

    def __len__(self) -> int:
        return len(self._asked)


PICTURES = _Pictures()
assert len(PICTURES) == 40
