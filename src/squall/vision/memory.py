"""Images that a decoder recalls: what a prompt's tokens see of them, and their keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from squall.batch import Mixture
from squall.executors import Executor, Memory
from squall.vision.family import Processed

Floats = NDArray[np.float32]
# Rows that are computed at a time.
MOST = 512


def ordered(images: Sequence[tuple[Processed, Floats]]) -> Floats:
    """The rows of all images, and after them those of what fills them up."""
    cut = [np.split(rows, [(image.recalled or (0,))[0]]) for image, rows in images]
    return np.concatenate([rows for part in zip(*cut, strict=True) for rows in part])


def seen(ids: Sequence[int], token: int, images: Sequence[Processed]) -> NDArray[np.int32]:
    """What tokens see of the memory, as `Batch.seen` has it; images stand where the `token` is.

    They see the last image before them, with those right before that one, and none after it.
    Tokens without an image before them see all, and what fills images up.
    """
    sizes = [image.recalled or (0, 0) for image in images]
    ends = np.cumsum([0, *(size[0] for size in sizes)])
    found = np.zeros((3, len(ids)), np.int32)
    found[1] = sum(map(sum, sizes))
    first = 0
    for image, at in enumerate(at for at, id_ in enumerate(ids) if id_ == token):
        first = first if at and ids[at - 1] == token else image
        found[:, at:] = [[ends[first]], [ends[image + 1]], [1]]
    return found


def remember(keys: Executor, decoder: Executor, rows: Floats, mixture: Mixture = ()) -> Memory:
    """A memory of the decoder's. keys: runs `decoder.compile_memory`. mixture: of its adapters."""
    memory = decoder.memory(len(rows))
    for start in range(0, len(rows), MOST):
        part = rows[start : start + MOST]
        chosen = np.full(len(part), 0 if mixture else -1, np.int32)
        given = {"image": part, "mixture.image": chosen}
        made = list(keys.run(given, mixtures=(mixture,) if mixture else (), patient=True).values())
        memory.write(start, made[::2], made[1::2])
    return memory
