"""Pictures for towers of SigLIP's kind: rows of patches, and what files say of their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.errors import InvalidCheckpoint
from squall.recipes.config_fields import ConfigFields, flatten, part_keys
from squall.recipes.config_names import USUAL
from squall.recipes.fields import Fields
from squall.vision.pixels import Floats, patches

Int32 = NDArray[np.int32]
Inputs = dict[str, NDArray[np.generic]]
HALF = (0.5, 0.5, 0.5)  # the mean, and the deviation


def section(config: Mapping[str, Any], key: str, kind: str) -> ConfigFields:
    """What config.json says in the object `key`, and the class of this model_type else.

    key: "": what it says beside its objects.
    """
    found = (config.get(key) or {}) if key else config
    return ConfigFields(found, {}, part_keys(kind) or {}, USUAL)


def settings(processor: Mapping[str, Any]) -> Fields:
    """What preprocessor_config.json says, which must be to resize."""
    found = Fields(dict(flatten(processor)), {})
    if not found.flag("do_resize", True):
        raise InvalidCheckpoint("do_resize in preprocessor_config.json is false; it must be true")
    return found


def edge(
    processor: Mapping[str, Any], key: str, name: str, default: int, high: int = 1 << 12
) -> int:
    """A number of pixels, such as the `longest_edge` of `size`, or the default."""
    given = (processor.get(key) or {name: default}).get(name)
    return Fields({f"{key}.{name}": given}, {}).count(f"{key}.{name}", high=high)


def rows(pictures: Sequence[Floats], patch: int, side: int) -> Inputs:
    """Pictures [3, height, width], each of which sees itself, among side * side positions."""
    grids = [(p.shape[1] // patch, p.shape[2] // patch) for p in pictures]
    ends = np.cumsum([height * width for height, width in grids])
    sizes = np.diff(ends, prepend=0)
    cut = [
        patches(picture[:, : height * patch, : width * patch], patch)
        for picture, (height, width) in zip(pictures, grids, strict=True)
    ]
    spans = np.stack([np.repeat(ends - sizes, sizes), np.repeat(ends, sizes)])
    return {
        "patches": np.concatenate(cut),
        "positions": np.concatenate([positions(*grid, side) for grid in grids]),
        "spans": spans.astype(np.int32),
    }


def positions(height: int, width: int, side: int) -> Int32:
    """Which of side * side learned positions patches have, by where in their picture they are."""
    edges = ((np.arange(side - 1) + 1.0) * (1 / side)).astype(np.float32)

    def along(count: int) -> Int32:
        at = np.arange(count, dtype=np.float32) * (np.float32(1) / np.float32(count))
        at = np.minimum(at, np.float32(1 - 1e-6))
        found: Int32 = np.searchsorted(edges, at, side="right").astype(np.int32)
        return found

    return (along(height)[:, None] * side + along(width)).reshape(-1)


def windows(pictures: int, side: int, size: int) -> Int32:
    """Rows of each square of size * size patches, [size * size, squares]; of one row, [squares]."""
    shape = pictures, side // size, size, side // size, size
    every: Int32 = np.arange(pictures * side**2, dtype=np.int32).reshape(shape)
    found: Int32 = np.ascontiguousarray(every.transpose(2, 4, 0, 1, 3))
    return found.reshape((size**2, -1) if size > 1 else -1)
