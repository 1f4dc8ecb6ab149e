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
    UnknownAdapter,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from squall.adapters.xlora import XLora
    from squall.api.anymoe import AnyMoeConfig, AnyMoeExpertType
    from squall.api.requests import ChatCompletionRequest, CompletionRequest
    from squall.api.responses import (
        ChatCompletionChunkResponse,
        ChatCompletionResponse,
        CompletionChunkResponse,
        CompletionResponse,
        ImageChoice,
        ImageGenerationResponse,
    )
    from squall.api.runner import AsyncRunner, Runner
    from squall.api.tool_choice import ToolChoice
    from squall.api.which import (
        Architecture,
        DiffusionArchitecture,
        ImageGenerationResponseFormat,
        IsqOrganization,
        ModelDType,
        VisionArchitecture,
        Which,
    )
    from squall.diffusion.model import ImageModel
    from squall.diffusion.request import Picture, PictureRequest
    from squall.embeddings.model import Embedder, Embeddings, Scores
    from squall.engine.engine import EngineConfig
    from squall.engine.generation import Generation
    from squall.engine.memory import KvSize
    from squall.engine.request import Piece, Usage
    from squall.model import Message, Model
    from squall.opening import Opening
    from squall.text.grammar import Grammar

__version__ = "0.1.0"

__all__ = [
    "AnyMoeConfig", "AnyMoeExpertType", "Architecture", "AsyncRunner",
    "ChatCompletionChunkResponse", "ChatCompletionRequest", "ChatCompletionResponse",
    "CompletionChunkResponse", "CompletionRequest", "CompletionResponse", "ContextLengthExceeded",
    "DiffusionArchitecture", "Embedder", "Embeddings", "EngineConfig", "EngineStopped",
    "Generation", "Grammar", "ImageChoice", "ImageGenerationResponse",
    "ImageGenerationResponseFormat", "ImageModel",
    "InvalidCheckpoint", "InvalidRequest", "IsqOrganization", "KvSize", "Message", "Model",
    "ModelDType", "ModelNotFound", "Opening", "OutOfMemory", "Picture", "PictureRequest", "Piece",
    "QueueFull", "Runner", "SamplingFailed", "Scores", "SquallError", "TemplateError", "ToolChoice",
    "UnknownAdapter", "UnsupportedModel", "Usage", "VisionArchitecture", "Which", "XLora",
    "__version__",
]  # fmt: skip

_MODULES = {
    "squall.adapters.xlora": "XLora",
    "squall.api.anymoe": "AnyMoeConfig AnyMoeExpertType",
    "squall.api.requests": "ChatCompletionRequest CompletionRequest",
    "squall.api.responses": "ChatCompletionChunkResponse ChatCompletionResponse "
    "CompletionChunkResponse CompletionResponse ImageChoice ImageGenerationResponse",
    "squall.api.runner": "AsyncRunner Runner",
    "squall.api.tool_choice": "ToolChoice",
    "squall.api.which": "Architecture DiffusionArchitecture "
    "ImageGenerationResponseFormat IsqOrganization ModelDType VisionArchitecture Which",
    "squall.diffusion.model": "ImageModel",
    "squall.diffusion.request": "Picture PictureRequest",
    "squall.embeddings.model": "Embedder Embeddings Scores",
    "squall.engine.engine": "EngineConfig",
    "squall.engine.generation": "Generation",
    "squall.engine.memory": "KvSize",
    "squall.engine.request": "Piece Usage",
    "squall.model": "Message Model",
    "squall.opening": "Opening",
    "squall.text.grammar": "Grammar",
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names.split()}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # Loaded on first use, so that the parts can be imported without the whole.
        if name not in _LAZY:
            raise AttributeError(f"module 'squall' has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return found


def __dir__() -> list[str]:
    return __all__
