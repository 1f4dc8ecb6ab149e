"""Triton's kernels are interpreted here: they are loaded so, and in NumPy's way."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

pytest.importorskip("torch")
os.environ["TRITON_INTERPRET"] = "1"
try:
    pytest.importorskip("triton")
    import triton.language as tl
    from triton.experimental import gluon  # noqa: F401  # which a launch loads
    from triton.runtime import interpreter

    import squall.gpu.triton_attention
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

_patch_lang, _loaded = interpreter._patch_lang, set[frozenset[str]]()


def _patch_once(fn: Callable[..., object]) -> interpreter._LangPatchScope:
    """Each call of a function by a kernel would do it again, in a millisecond."""
    languages = frozenset(name for name, x in fn.__globals__.items() if x is tl or x is tl.core)
    if languages not in _loaded:
        _loaded.add(languages)
        _patch_lang(fn)
    return interpreter._LangPatchScope()


interpreter._patch_lang = _patch_once
