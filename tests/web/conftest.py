"""Fixtures of every test in a browser."""

from browsers import screens, shots, tab

__all__ = ["screens", "shots", "tab"]
