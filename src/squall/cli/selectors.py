"""mistral.rs's words for what kind of model to open, each a function from flags to a path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from squall.errors import InvalidRequest

Selected = str | Path | None
_Text = Annotated[str | None, typer.Option(hidden=True)]

# Words whose models cannot be opened yet, and what they are for.
NOT_YET = {
    "toml": "a selection in a TOML file",
    "plain": "safetensors",
    "x-lora": "X-LoRA adapters",
    "lora": "LoRA adapters",
    "x-lora-gguf": "X-LoRA adapters",
    "lora-gguf": "LoRA adapters",
    "ggml": "GGML files",
    "x-lora-ggml": "GGML files",
    "lora-ggml": "GGML files",
    "vision-plain": "vision models",
    "diffusion-plain": "diffusion models",
}


def gguf(
    quantized_model_id: Annotated[
        str | None, typer.Option("-m", "--quantized-model-id", help="A folder.")
    ] = None,
    quantized_filename: Annotated[
        str | None,
        typer.Option("-f", "--quantized-filename", help="Its GGUF file; of a split one any part."),
    ] = None,
    tok_model_id: Annotated[
        str | None,
        typer.Option("-t", "--tok-model-id", help="Accepted; the file has its tokenizer."),
    ] = None,
    topology: _Text = None,
) -> Selected:
    """A GGUF file. With neither -m nor -f, the default model."""
    del tok_model_id  # GGUF files are complete
    if topology is not None:
        raise InvalidRequest("--topology is not supported yet")
    # The parts of a split file are named with spaces between; they know of each other.
    name = (quantized_filename or "").split(" ")[0]
    if not name:
        return quantized_model_id
    return Path(quantized_model_id or ".", name)


def _not_yet(word: str, what: str) -> Callable[..., Selected]:
    def select(
        arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    ) -> Selected:
        del arguments
        raise InvalidRequest(f"{word}: {what} are not supported yet; gguf is")

    select.__doc__ = "Not supported yet."
    return select


SELECTORS: dict[str, Callable[..., Any]] = {
    "gguf": gguf,
    **{word: _not_yet(word, what) for word, what in NOT_YET.items()},
}
