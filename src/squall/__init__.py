"""Fast, flexible LLM inference in Python.

>>> import squall
>>> with squall.Model.open() as model:
...     for piece in model.generate([{"role": "user", "content": "Why is the sky blue?"}]):
...         print(piece.text, end="", flush=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from squall.errors import (
    ContextLengthExceeded,
    EngineStopped,
    InvalidCheckpoint,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    QueueFull,
    SamplingFailed,
    SquallError,
    TemplateError,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from squall.engine.engine import EngineConfig
    from squall.engine.generation import Generation
    from squall.engine.request import Piece, Usage
    from squall.model import Message, Model

__version__ = "0.1.0"

__all__ = [
    "ContextLengthExceeded",
    "EngineConfig",
    "EngineStopped",
    "Generation",
    "InvalidCheckpoint",
    "InvalidRequest",
    "Message",
    "Model",
    "ModelNotFound",
    "OutOfMemory",
    "Piece",
    "QueueFull",
    "SamplingFailed",
    "SquallError",
    "TemplateError",
    "UnsupportedModel",
    "Usage",
    "__version__",
]

_LAZY = {
    "EngineConfig": "squall.engine.engine",
    "Generation": "squall.engine.generation",
    "Message": "squall.model",
    "Model": "squall.model",
    "Piece": "squall.engine.request",
    "Usage": "squall.engine.request",
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # Loaded on first use, so that the parts can be imported without the whole.
        if name not in _LAZY:
            raise AttributeError(f"module 'squall' has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return found


def __dir__() -> list[str]:
    return __all__
