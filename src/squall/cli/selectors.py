"""mistral.rs's words for what kind of model to open, each a function from flags to a selection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from squall.api.which import IsqOrganization, ModelDType, Selection, Which
from squall.cli.toml_selector import TomlSelection, read_toml
from squall.errors import InvalidRequest

_Value = TypeVar("_Value")
Selected = Selection | TomlSelection | str | None
_Text = Annotated[str | None, typer.Option(hidden=True)]

# Words whose models cannot be opened yet, and what they are for.
NOT_YET = {
    "x-lora": "X-LoRA adapters",
    "lora": "LoRA adapters",
    "x-lora-gguf": "X-LoRA adapters",
    "lora-gguf": "LoRA adapters",
    "x-lora-ggml": "X-LoRA adapters",
    "lora-ggml": "LoRA adapters",
    "vision-plain": "vision models",
    "diffusion-plain": "diffusion models",
}
DTYPES = {str(dtype.name).lower(): dtype for dtype in ModelDType}
ORGANIZATIONS = {str(kind.name).lower(): kind for kind in IsqOrganization}


def plain(
    model_id: Annotated[str, typer.Option("-m", "--model-id", help="A folder, or owner/name.")],
    tokenizer_json: Annotated[
        str | None, typer.Option("-t", "--tokenizer-json", help="In place of the model's own.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option("-a", "--arch", help="In place of what config.json says.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("-d", "--dtype", help="Of weights that are not quantized.")
    ] = "auto",
    topology: Annotated[
        str | None, typer.Option("--topology", help="A YAML file: quantization by layer.")
    ] = None,
    organization: Annotated[
        str, typer.Option("-o", "--organization", help="default, or moqe: experts only.")
    ] = "default",
    write_uqff: Annotated[
        str | None, typer.Option("-w", "--write-uqff", help="Write what --isq makes to this file.")
    ] = None,
    from_uqff: Annotated[
        str | None, typer.Option("-f", "--from-uqff", help="A UQFF file, as in the model's folder.")
    ] = None,
) -> Selected:
    """A folder of transformers, or a model of the hub."""
    return Which.Plain(
        model_id,
        arch,
        tokenizer_json,
        topology,
        _one_of(ORGANIZATIONS, "--organization", organization),
        write_uqff,
        from_uqff,
        dtype=_one_of(DTYPES, "--dtype", dtype),
    )


def gguf(
    quantized_model_id: Annotated[
        str | None, typer.Option("-m", "--quantized-model-id", help="A folder, or owner/name.")
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
    # The parts of a split file are named with spaces between; they know of each other.
    name = (quantized_filename or "").split(" ")[0]
    if not name:
        return quantized_model_id
    return Which.GGUF(quantized_model_id or ".", name, tok_model_id, topology)


def ggml(
    quantized_model_id: Annotated[
        str, typer.Option("-m", "--quantized-model-id", help="A folder, or owner/name.")
    ],
    quantized_filename: Annotated[
        str, typer.Option("-f", "--quantized-filename", help="Its GGML file.")
    ],
    tok_model_id: Annotated[
        str | None,
        typer.Option("-t", "--tok-model-id", help="Accepted; the file has its tokenizer."),
    ] = None,
    tokenizer_json: Annotated[
        str | None, typer.Option("--tokenizer-json", help="In place of the file's own.")
    ] = None,
    gqa: Annotated[
        int, typer.Option("-g", "--gqa", min=1, help="Query heads that share a KV head.")
    ] = 1,
    topology: _Text = None,
) -> Selected:
    """A LLaMA file from before GGUF."""
    return Which.GGML(
        quantized_model_id, quantized_filename, tok_model_id, tokenizer_json, gqa, topology
    )


def toml(
    file: Annotated[
        Path, typer.Option("-f", "--file", help="Keys as the flags of a kind, in a table [model].")
    ],
) -> Selected:
    """A TOML file that tells which model."""
    return read_toml(file)


def _one_of(known: Mapping[str, _Value], flag: str, given: str) -> _Value:
    if given.lower() not in known:
        raise InvalidRequest(f"{flag} is {given!r}; it must be one of {', '.join(known)}")
    return known[given.lower()]


def _not_yet(word: str, what: str) -> Callable[..., Selected]:
    def select(
        arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    ) -> Selected:
        del arguments
        raise InvalidRequest(
            f"{word}: {what} are not supported yet; plain, gguf, ggml and toml are"
        )

    select.__doc__ = f"Not supported yet: {what}."
    return select


SELECTORS: dict[str, Callable[..., Any]] = {
    "plain": plain,
    "gguf": gguf,
    "ggml": ggml,
    "toml": toml,
    **{word: _not_yet(word, what) for word, what in NOT_YET.items()},
}
