"""Writes docs/supported.md from the tables that the code goes by; with --check only compares."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

from squall.cli.selectors import SELECTORS
from squall.quant import FORMATS, GGML_FORMATS, UNSUPPORTED
from squall.quant.isq import BITS, FALLBACKS, TYPES
from squall.quant.scheme import METHODS
from squall.recipes import config, gguf
from squall.recipes.gguf_write import ARCHITECTURES

PAGE = Path(__file__).parents[1] / "docs" / "supported.md"
# What people call the models of an architecture. All else here is read from the code.
MODELS = {
    "llama": "Llama 1, 2, 3, 3.1, 3.2, 3.3; SmolLM, SmolLM 2; Yi; Falcon 3, CodeLlama, Vicuna, "
    "DeepSeek R1 Distill; and many more",
    "mistral": "Mistral 7B v0.1, v0.2, v0.3, Nemo, Small 3; Zephyr, OpenChat, OpenHermes",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "qwen2": "Qwen 1.5, 2, 2.5, QwQ; DeepSeek R1 Distill",
    "qwen3": "Qwen 3",
    "qwen3moe": "Qwen 3 30B-A3B, 235B-A22B",
    "phi2": "Phi 1, 1.5, 2",
    "phi3": "Phi 3, Phi 3.5 mini, Phi 4, Phi 4 mini",
    "phi3.5moe": "Phi 3.5 MoE",
    "starcoder2": "StarCoder 2",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "granite": "Granite 3, dense",
    "olmo2": "OLMo 2",
    "cohere": "Command R, R+",
    "cohere2": "Command R7B, Command A",
    "stablelm": "StableLM 3B, StableLM 2",
    "glm": "GLM-4 9B",
    "glm4": "GLM-4 0414",
    "smollm3": "SmolLM 3",
}
SEERS = {
    "llava": "LLaVA 1.5; Pixtral 12B",
    "llava_next": "LLaVA-NeXT (1.6)",
    "phi3v": "Phi 3 Vision, Phi 3.5 Vision",
    "qwen2vl": "Qwen2-VL",
    "qwen2.5vl": "Qwen2.5-VL",
    "mistral3": "Mistral Small 3.1, 3.2; Ministral 3",
    "vllama": "Llama 3.2 Vision",
    "gemma3-vision": "Gemma 3 4B, 12B, 27B",
    "idefics2": "Idefics 2",
    "idefics3": "Idefics 3",
    "smolvlm": "SmolVLM, SmolVLM 2 (images)",
}
GGML = "llama"  # there are no others from before GGUF that can be read
KINDS = {
    "plain": "folders of transformers, UQFF files",
    "vision-plain": "the same, of models that see",
    "diffusion-plain": "FLUX.1, which makes pictures: [diffusion.md](diffusion.md)",
    "gguf": "GGUF files",
    "ggml": "LLaMA files from before GGUF",
    "toml": "any of these, named in a TOML file",
}
ADAPTED = {"lora": "with LoRA adapters", "x-lora": "with X-LoRA"}


def main() -> None:
    """Write the page, or exit with status 1 if it is not up to date."""
    if sys.argv[1:] == ["--check"]:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    return f"""\
# What is supported

`make docs` writes this page from the tables in the source. What one model is, and whether it runs:

```sh
squall inspect model.gguf
```

## Models

A folder of transformers runs if `architectures` in its config.json is one of these classes, or is
missing and its `model_type` is that of one, whoever made it; a GGUF file if its
`general.architecture` is in the third column.

{models()}
- The first column is for `--arch` and `Model.open(architecture=...)`, where config.json does not
  say, or says another name.
- Folders may have safetensors or PyTorch files, of f32, f16 or bf16, one or in parts.
- They may be quantized already: {methods()}.
- Those of floats can be quantized while they are read, by the types below, and written to UQFF
  files; those with a GGUF architecture to GGUF files too.
- GGUF files have versions 2 and 3, and may be split. Their tokenizers are `gpt2` (byte-level BPE)
  and `llama` (SentencePiece).
- [Adapters](adapters.md), LoRA and X-LoRA, work on all of them, from all of these files;
  [AnyMoE](anymoe.md) makes experts for those that have none.
- What would change the answers and is not known here is an error, never left out: scalings of rope,
  activations, tensors, and keys of config.json that the class of transformers reads. Keys that it
  does not read are named in the log.

## Models that see

{seers()}
[vision.md](vision.md) tells how they are asked, and what an image costs.

## Kinds

What may follow `squall run`, `serve`, `bench`, `perplexity` and `squall-server`:

{kinds()}
## Formats of GGUF and GGML files

{formats()}
{unsupported()}

## Quantization while a model is read

`--isq`, topologies, `squall quantize` and `Model.open(isq=...)` take these names, or bits. Case
and `_` are free, and a mixture's name means what most of it is: `Q4_K_M` is q4k, everywhere. Bits:
{", ".join(f"{bits} is {name}" for bits, name in BITS.items())}.

{types()}
Bits are those of a value in a file, scales included. Rows that are no whole blocks take the last
column instead. [quantization.md](quantization.md) tells which to choose, and has GPTQ and AWQ;
[uqff.md](uqff.md) is about files.
"""


def seers() -> str:
    """Names and classes of models that see."""
    named = [(name, of) for name, of in config.NAMES.items() if of in config.SEERS]
    rows = [(f"`{name}`", f"`{main_class}`", SEERS[name]) for name, main_class in named]
    return table(("name", "class in config.json", "models"), rows)


def models() -> str:
    """Names and classes of each recipe."""
    rows = []
    for name, main_class in config.NAMES.items():
        if main_class in config.SEERS:
            continue
        function = config.RECIPES[main_class].function
        classes = [c for c, entry in config.RECIPES.items() if entry.function is function]
        written = ARCHITECTURES.get(main_class)
        in_gguf = f"`{written}`" if written in gguf.RECIPES else ""
        rows.append((
            f"`{name}`", ", ".join(f"`{c}`" for c in classes), in_gguf,
            "yes" if name == GGML else "", MODELS[name],
        ))  # fmt: skip
    return table(("name", "classes in config.json", "in GGUF", "GGML", "models"), rows)


def methods() -> str:
    """Quantizations that folders may have."""
    bits = {name: ", ".join(map(str, method.BITS)) for name, method in METHODS.items()}
    return " or ".join(f"{name.upper()} ({found} bits)" for name, found in bits.items())


def kinds() -> str:
    """Every word, and whether it works."""
    what = KINDS | {
        f"{word}{f'-{kind}' * (kind != 'plain')}": f"{KINDS[kind]}, {adapted}"
        for word, adapted in ADAPTED.items()
        for kind in ("plain", "gguf", "ggml")
    }
    return table(("kind", "what"), [(f"`{word}`", what[word]) for word in SELECTORS])


def formats() -> str:
    """ggml's types."""
    rows = (
        (f"`{f.name}`", str(id), str(f.block), bits_of(f.name)) for id, f in GGML_FORMATS.items()
    )
    return table(("type", "ggml's number", "values a block", "bits a value"), rows)


def unsupported() -> str:
    """ggml's other types."""
    names = ", ".join(name for name in UNSUPPORTED.values() if "withdrawn" not in name)
    return fill(f"Refused by name, among others that ggml has withdrawn: {names}.", 100)


def types() -> str:
    """ISQ types."""
    rows = (
        (f"`{name}`", bits_of(format), str(FORMATS[format].block), FALLBACKS.get(format, ""))
        for name, format in TYPES.items()
    )
    return table(("type", "bits a value", "values a block", "instead"), rows)


def bits_of(format: str) -> str:
    """Of a value, scales included."""
    found = FORMATS[format]
    return f"{8 * found.block_bytes / found.block:g}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    head = tuple(head)
    lines = (head, ("---",) * len(head), *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
