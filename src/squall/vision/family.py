"""What families of models that see have in common: an image as a tower reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, Resampling

from squall.vision.pixels import Scale, shrunk


@dataclass(frozen=True, slots=True, eq=False)
class Processed:
    """An image as a model's tower reads it, and what stands for it in the prompt.

    inputs: of the tower's program, by name.
    text: what its placeholder becomes, in special tokens of the model. rows: how many of those are
        the family's `token`, whose embeddings the tower's rows replace.
    grid: height and width of its rows, where the decoder's positions go by them.
    recalled: where the decoder recalls images, which then replace nothing: how many rows the tower
        makes of the image, and after them of what fills it up.
    seam: what two images side by side have one of between them; a word after it gets a space.
    """

    inputs: Mapping[str, NDArray[np.generic]]
    text: str
    rows: int
    grid: tuple[int, int] | None = None
    recalled: tuple[int, int] | None = None
    seam: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a model reads images, by its preprocessor_config.json.

    scale, filter: of most pictures. max_edge: they are made smaller first, until their longer edge
        is at most so long.
    placeholder: what its chat template writes for an image. token: what an image's rows replace.
    mutual: whether the rows of an image see each other in the decoder.
    cost: for people, how many tokens an image takes.
    """

    scale: Scale
    filter: Resampling = Resampling.BICUBIC
    max_edge: int | None = None
    placeholder: str = "<image>"
    token: str = "<image>"
    mutual: bool = False
    cost: str

    def process(self, image: Image) -> Processed:
        """An upright RGB image, of any size from 1 x 1 on."""
        return self.read(shrunk(image, self.max_edge))

    def read(self, image: Image) -> Processed:
        """One that is small enough."""
        raise NotImplementedError


def clip_rows(
    tiles: NDArray[np.float32], *, class_token: bool = True, skipped: int = 1
) -> dict[str, NDArray[np.generic]]:
    """Tiles [tiles, patches, patch] as a tower reads them, each by itself.

    class_token: one stands before the patches. All but the first `skipped` of a tile are `merged`.
    """
    count, each, width = tiles.shape
    each += class_token
    rows = np.arange(count * each, dtype=np.int32)
    place = rows % each
    given = np.zeros((count, each, width), np.float32)
    given[:, class_token:] = tiles
    first = rows - place
    return {
        "patches": given.reshape(-1, width),
        "patch": np.where(place >= class_token, rows, -1).astype(np.int32),
        "class": np.zeros_like(rows),
        "positions": place,
        "spans": np.stack([first, first + each]).astype(np.int32),
        "merged": rows[place >= skipped],
    }


def line_ends(grid: NDArray[np.int32]) -> NDArray[np.int32]:
    """The rows of an image line by line, and a newline, -1, after each line."""
    return np.pad(grid, ((0, 0), (0, 1)), constant_values=-1).reshape(-1).astype(np.int32)


def tiled(side: int, lines: int, columns: int, first: int = 0) -> NDArray[np.int32]:
    """Of a picture cut into tiles, side by side in lines, the place of each row.

    The rows of a tile, side * side, follow each other; they begin at `first`.
    """
    rows = np.arange(first, first + lines * columns * side * side, dtype=np.int32)
    cut = rows.reshape(lines, columns, side, side).transpose(0, 2, 1, 3)
    return cut.reshape(lines * side, columns * side)
