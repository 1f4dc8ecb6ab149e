"""Where images stand in a prompt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens `start:stop` of a prompt, which the rows of an image from `offset` on replace."""

    image: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A prompt's ids, and the runs of them that images replace, in order."""

    ids: tuple[int, ...]
    runs: tuple[Run, ...]
