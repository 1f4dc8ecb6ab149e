"""Fixtures of every test in a browser."""

from browsers import browser, screens, shots

__all__ = ["browser", "screens", "shots"]
