"""mistral.rs's words for what kind of model to open, each a function from flags to a selection."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from squall.api.which import NUMBERS, Selection, Which, chosen
from squall.cli.options import keyword, taking
from squall.cli.toml_selector import TomlSelection, read_toml

Selected = Selection | TomlSelection | str | None

# The fields of kinds as flags: letter and help; where two have one letter, the first has it.
_FLAGS: dict[str, tuple[str, str]] = {
    "model_id": ("m", "A folder, or owner/name."),
    "quantized_model_id": ("m", "A folder, or owner/name."),
    "quantized_filename": ("f", "Its file; of a split one any part."),
    "tok_model_id": ("t", "Whose tokenizer and chat template to use."),
    "tokenizer_json": ("t", "In place of the model's own."),
    "adapters_model_id": ("a", "A folder with adapters, or owner/name."),
    "xlora_model_id": ("x", "A folder with an X-LoRA model, or owner/name."),
    "order": ("o", "An ordering file: which adapters, and in which order."),
    "tgt_non_granular_index": ("", "After so many tokens of an answer, scalings stay as they are."),
    "arch": ("a", "In place of what config.json says."),
    "dtype": ("d", "Of weights that are not quantized: auto, bf16, f16, f32."),
    "topology": ("", "A YAML file: quantization by layer."),
    "organization": ("o", "default, or moqe: experts only."),
    "write_uqff": ("w", "Write what --isq makes to this file."),
    "from_uqff": ("f", "A UQFF file, as in the model's folder."),
    "gqa": ("g", "Query heads that share a KV head."),
    "max_edge": ("e", "Make images smaller, until their longer edge is at most so many pixels."),
}


def _selector(
    kind: type[Any], doc: str, optional: frozenset[str] = frozenset()
) -> Callable[..., Selected]:
    """A function from the fields of a kind, as flags, to the selection."""

    def select(**given: Any) -> Selected:
        said = {name: value for name, value in given.items() if value is not None}
        found = {name: chosen(name, value, f"--{name}") for name, value in said.items()}
        if optional and "quantized_filename" not in found:
            return found.get("quantized_model_id")
        return kind(**dict.fromkeys(optional, ".") | found)  # type: ignore[no-any-return]

    names = {item.name: item for item in fields(kind)}
    as_stored = "quantized_filename" in names
    letters: set[str] = set()
    listed = []
    for name in [name for name in _FLAGS if name in names and not (as_stored and name == "dtype")]:
        letter, help = _FLAGS[name]
        flags = [f"-{letter}"] * bool(letter and letter not in letters)
        letters.add(letter)
        flags.append(f"--{name.replace('_', '-')}")
        option = typer.Option(*flags, help=help, min=NUMBERS.get(name))
        needed = names[name].default is MISSING and name not in optional
        text: Any = int if name in NUMBERS else str
        hint: Any = Annotated[text if needed else text | None, option]
        listed.append(keyword(name, hint, inspect.Parameter.empty if needed else None))
    select.__doc__ = doc
    return taking(listed, select)


def toml(
    file: Annotated[
        Path, typer.Option("-f", "--file", help="Keys as the flags of a kind, in a table [model].")
    ],
) -> Selected:
    """A TOML file that tells which model."""
    return read_toml(file)


_FILE = frozenset(("quantized_model_id", "quantized_filename"))
SELECTORS: dict[str, Callable[..., Any]] = {
    "plain": _selector(Which.Plain, "A folder of transformers, or a model of the hub."),
    "vision-plain": _selector(Which.VisionPlain, "As plain, of a model that sees."),
    "gguf": _selector(Which.GGUF, "A GGUF file. With neither -m nor -f, the default model.", _FILE),
    "ggml": _selector(Which.GGML, "A LLaMA file from before GGUF."),
    "diffusion-plain": _selector(Which.DiffusionPlain, "A model that makes pictures: FLUX.1."),
    "toml": toml,
    "lora": _selector(Which.Lora, "A folder of transformers, with LoRA adapters."),
    "lora-gguf": _selector(Which.LoraGGUF, "A GGUF file, with LoRA adapters."),
    "lora-ggml": _selector(Which.LoraGGML, "A LLaMA file from before GGUF, with LoRA adapters."),
    "x-lora": _selector(Which.XLora, "A folder of transformers, with X-LoRA."),
    "x-lora-gguf": _selector(Which.XLoraGGUF, "A GGUF file, with X-LoRA."),
    "x-lora-ggml": _selector(Which.XLoraGGML, "A LLaMA file from before GGUF, with X-LoRA."),
}
