"""Triton's kernels are interpreted here: they are loaded so, and in NumPy's way."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
os.environ["TRITON_INTERPRET"] = "1"
try:
    import triton.language as tl
    from triton.runtime import interpreter

    import squall.gpu.triton_linear
    import squall.gpu.triton_rows  # noqa: F401
finally:
    del os.environ["TRITON_INTERPRET"]

_patch = interpreter._patch_lang_tensor


def _patched(tensor: type[tl.tensor], scope: interpreter._LangPatchScope) -> None:
    """Bounds of loops are arrays of one element, which NumPy 2.4 takes for no number."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patched
