"""From a prompt to a picture: text, steps, and pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from squall.errors import UnsupportedModel
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.diffusion.model import Pipeline


def open_pipeline(opening: Opening) -> tuple[Pipeline, Path]:
    """What an opening describes."""
    raise UnsupportedModel(f"models that make pictures cannot be opened yet: {opening.path}")
