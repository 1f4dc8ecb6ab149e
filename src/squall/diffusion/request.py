"""What can be asked of a model that makes pictures, and what it gives."""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from squall.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
MULTIPLE = 16  # of pixels, in height and width
MOST_PIXELS = 2048 * 2048
MOST_PROMPT = 32_000  # characters, far more than models read: tokenizing them takes time
# What numbers are, the least and the most.
_BOUNDS = {
    "steps": ((int,), 1, 200), "seed": ((int,), 0, 2**64 - 1),
    "guidance": ((int, float), 0, 100), "strength": ((int, float), 0, 1),
}  # fmt: skip


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
            if not _is(value, (int,)) or value < MULTIPLE or value % MULTIPLE:
                raise InvalidRequest(f"{name} is {value!r}; it must be a multiple of {MULTIPLE}")
        if self.width * self.height > MOST_PIXELS:
            raise InvalidRequest(
                f"{self.width}x{self.height} is too large; at most {MOST_PIXELS} pixels, such as "
                "2048x2048"
            )
        for name, (kinds, least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not (_is(value, kinds) and least <= value <= most):
                raise InvalidRequest(f"{name} is {value!r}; it must be {least} to {most}")
        if self.strength == 0:
            raise InvalidRequest("strength is 0; it must be above that: nothing would be made")


def size_of(text: str) -> dict[str, int]:
    """Width and height of a size such as 1280x720."""
    if (found := re.fullmatch(r"([0-9]{1,5})[xX]([0-9]{1,5})", text)) is None:
        raise InvalidRequest(f"the size is {text!r:.99}; give it as WxH, such as 1024x1024")
    return {"width": int(found[1]), "height": int(found[2])}


def fitted(image: Image, width: int, height: int) -> Pixels:
    """A picture's middle, as large as needed."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    return np.asarray(ImageOps.fit(image, (width, height), Resampling.LANCZOS))


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidRequest("the prompt is empty; say what the picture is to show")
    if len(prompt) > MOST_PROMPT:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} characters, and at most {MOST_PROMPT} are read"
        )


def _is(value: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


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
