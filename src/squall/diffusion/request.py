"""What can be asked of a model that makes pictures, and what it gives."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from squall.errors import InvalidRequest

Pixels = NDArray[np.uint8]
MULTIPLE = 16  # of pixels, in height and width
MOST_PIXELS = 2048 * 2048
MOST_STEPS = 200
MOST_PROMPT = 100_000  # characters, many more than models read: to count tokens takes long
MOST_GUIDANCE = 100.0
# (least, most) of whole numbers.
_BOUNDS = {"steps": (1, MOST_STEPS), "seed": (0, 2**64 - 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRequest:
    """One picture.

    width, height: multiples of 16. steps, guidance: by default the model's.
    seed: the same one gives the same picture; by default a random one.
    image: a picture to begin with, uint8 [height, width, 3] of any size; it is made to fit.
    strength: how much of it is made anew, above 0 and at most 1.
    """

    prompt: str
    width: int = 1280
    height: int = 720
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    image: Pixels | None = None
    strength: float = 0.6

    def __post_init__(self) -> None:
        """Raises InvalidRequest for what is out of range."""
        _check_prompt(self.prompt)
        for name in ("width", "height"):
            value = getattr(self, name)
            if not _whole(value) or value < MULTIPLE or value % MULTIPLE:
                raise InvalidRequest(f"{name} is {value!r}; it must be a multiple of {MULTIPLE}")
        if self.width * self.height > MOST_PIXELS:
            raise InvalidRequest(
                f"{self.width}x{self.height} is too large; at most {MOST_PIXELS} pixels, such as "
                "2048x2048"
            )
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and (not _whole(value) or not least <= value <= most):
                raise InvalidRequest(f"{name} is {value!r}; it must be {least} to {most}")
        for name, high in (("guidance", MOST_GUIDANCE), ("strength", 1.0)):
            value = getattr(self, name)
            real = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (real and 0 <= value <= high):
                raise InvalidRequest(f"{name} is {value!r}; it must be 0 to {high:g}")
        if self.strength == 0:
            raise InvalidRequest("strength is 0; it must be above that: nothing would be made")


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidRequest("the prompt is empty; say what the picture is to show")
    if len(prompt) > MOST_PROMPT:
        raise InvalidRequest(f"the prompt has {len(prompt)} characters; at most {MOST_PROMPT}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture that was made. pixels: [height, width, 3]. notes: what its maker was not told."""

    pixels: Pixels
    seed: int
    steps: int
    notes: tuple[str, ...] = ()

    def png(self) -> bytes:
        """As a PNG file."""
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "PNG")
        return file.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, of the kind that its ending names."""
        from PIL import Image

        Image.fromarray(self.pixels).save(path)
