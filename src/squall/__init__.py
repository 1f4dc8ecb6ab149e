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
    from squall.api.requests import (
        ChatCompletionRequest,
        CompletionRequest,
        ToolChoice,
    )
    from squall.api.responses import (
        ChatCompletionChunkResponse,
        ChatCompletionResponse,
        CompletionChunkResponse,
        CompletionResponse,
    )
    from squall.api.runner import AsyncRunner, Runner
    from squall.api.which import (
        AnyMoeConfig,
        AnyMoeExpertType,
        Architecture,
        DiffusionArchitecture,
        ImageGenerationResponseFormat,
        IsqOrganization,
        ModelDType,
        VisionArchitecture,
        Which,
    )
    from squall.engine.engine import EngineConfig
    from squall.engine.generation import Generation
    from squall.engine.memory import KvSize
    from squall.engine.request import Piece, Usage
    from squall.model import Message, Model

__version__ = "0.1.0"

__all__ = [
    "AnyMoeConfig",
    "AnyMoeExpertType",
    "Architecture",
    "AsyncRunner",
    "ChatCompletionChunkResponse",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "CompletionChunkResponse",
    "CompletionRequest",
    "CompletionResponse",
    "ContextLengthExceeded",
    "DiffusionArchitecture",
    "EngineConfig",
    "EngineStopped",
    "Generation",
    "ImageGenerationResponseFormat",
    "InvalidCheckpoint",
    "InvalidRequest",
    "IsqOrganization",
    "KvSize",
    "Message",
    "Model",
    "ModelDType",
    "ModelNotFound",
    "OutOfMemory",
    "Piece",
    "QueueFull",
    "Runner",
    "SamplingFailed",
    "SquallError",
    "TemplateError",
    "ToolChoice",
    "UnsupportedModel",
    "Usage",
    "VisionArchitecture",
    "Which",
    "__version__",
]

_LAZY = {
    "AnyMoeConfig": "squall.api.which",
    "AnyMoeExpertType": "squall.api.which",
    "Architecture": "squall.api.which",
    "AsyncRunner": "squall.api.runner",
    "ChatCompletionChunkResponse": "squall.api.responses",
    "ChatCompletionRequest": "squall.api.requests",
    "ChatCompletionResponse": "squall.api.responses",
    "CompletionChunkResponse": "squall.api.responses",
    "CompletionRequest": "squall.api.requests",
    "CompletionResponse": "squall.api.responses",
    "DiffusionArchitecture": "squall.api.which",
    "EngineConfig": "squall.engine.engine",
    "Generation": "squall.engine.generation",
    "ImageGenerationResponseFormat": "squall.api.which",
    "IsqOrganization": "squall.api.which",
    "KvSize": "squall.engine.memory",
    "Message": "squall.model",
    "Model": "squall.model",
    "ModelDType": "squall.api.which",
    "Piece": "squall.engine.request",
    "Runner": "squall.api.runner",
    "ToolChoice": "squall.api.requests",
    "Usage": "squall.engine.request",
    "VisionArchitecture": "squall.api.which",
    "Which": "squall.api.which",
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
