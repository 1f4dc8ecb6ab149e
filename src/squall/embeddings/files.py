"""What the files of a model that embeds say beside its weights: sentence-transformers' and GGUF's.

Formulas and names are those of sentence-transformers' modules and of GGUF's metadata.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from squall.checkpoints import Checkpoint, read_header
from squall.errors import InvalidCheckpoint, InvalidRequest, SquallError, UnsupportedModel
from squall.files import quote, read_json, read_text
from squall.recipes.config import RECIPES
from squall.recipes.config_fields import by_model_type
from squall.recipes.embedders import (
    ASKED,
    CLASSIFIER,
    FAMILIES,
    GGUF_ENCODERS,
    RANKS,
    Pooling,
)
from squall.spec import Activation

MODULES = "modules.json"
_LAST = "lasttoken"  # as they call it
_FLAGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
_GGUF_POOLED: tuple[Pooling | None, ...] = (None, "mean", "cls", "last")
# Classes of transformers without a head.
_HEADLESS = re.compile(r"[A-Za-z0-9]+(?<!LMHead)Model")
_FOLDER = re.compile(r"[A-Za-z0-9_]{1,60}")
_SETTINGS = ("sentence_bert_config.json", "sentence_roberta_config.json")
_ACTIVATIONS: Mapping[str, Activation | Literal["tanh"] | None] = {
    "Tanh": "tanh", "Identity": None, "GELU": "gelu", "ReLU": "relu", "SiLU": "silu",
}  # fmt: skip
_IDENTITY, _SIGMOID = "Identity", "Sigmoid"
_LONGEST = 1 << 30


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear after pooling, in a folder of its own."""

    folder: Path
    activation: Activation | Literal["tanh"] | None


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model's rows become vectors, or scores.

    pooling: None: the files do not say. context: tokens of a text; None: all that it was trained
    for. width: so many first values; None: all. prompts: texts to put before others, by name.
    prompt: the one by default. lower: texts become lower case. sigmoid: of a score.
    """

    pooling: Pooling | None = None
    context: int | None = None
    width: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    linears: tuple[Linear, ...] = ()
    lower: bool = False
    sigmoid: bool = True


def is_embedding_model(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is a model that embeds, or judges pairs; reads headers alone."""
    found = Path(os.path.expanduser(path))
    try:
        if found.is_dir():
            config = read_json(found / "config.json") or {}
            return embeds(found, config) or judges(found, config)
        return found.suffix == ".gguf" and embeds(found, read_header(found).metadata)
    except (SquallError, OSError):
        return False


def embeds(path: Path, metadata: Mapping[str, Any]) -> bool:
    """Whether the checkpoint there is of a model that embeds, or a classifier."""
    if "general.architecture" in metadata:
        architecture = metadata["general.architecture"]
        return architecture in GGUF_ENCODERS or bool(metadata.get(f"{architecture}.pooling_type"))
    named, kind = metadata.get("architectures"), metadata.get("model_type")
    if kind in FAMILIES or (metadata and (path / MODULES).is_file()):
        return True
    names = [str(name) for name in named] if isinstance(named, list) else []
    heads = any(name.endswith(CLASSIFIER) or _HEADLESS.fullmatch(name) for name in names)
    return heads and by_model_type(kind) in RECIPES


def judges(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether it is a language model that says yes or no to pairs, which its name alone tells."""
    return config.get("model_type") in ASKED and "reranker" in str(path).lower()


def setup(checkpoint: Checkpoint) -> Setup:
    """What the files beside a checkpoint's weights say."""
    if checkpoint.kind == "gguf":
        return _of_gguf(checkpoint.metadata)
    folder, config = checkpoint.path, checkpoint.metadata
    said = next((found for name in _SETTINGS if (found := read_json(folder / name))), {})
    texts = read_json(folder / "config_sentence_transformers.json") or {}
    given, older = texts.get("prompts"), config.get("sentence_transformers")
    prompts = {str(k): str(v) for k, v in given.items()} if isinstance(given, dict) else {}
    activations = (  # as three generations of sentence-transformers write it
        texts.get("activation_fn"),
        older.get("activation_fn") if isinstance(older, dict) else None,
        config.get("sbert_ce_default_activation_function"),
    )
    pooling, linears = _modules(folder, asked=judges(folder, config))
    return Setup(
        pooling, _context(said, folder), _count(texts, "truncate_dim"), prompts,
        prompts.get(str(texts.get("default_prompt_name")), ""), linears,
        said.get("do_lower_case") is True, _sigmoid(*activations),
    )  # fmt: skip


def _of_gguf(metadata: Mapping[str, Any]) -> Setup:
    key = f"{metadata.get('general.architecture')}.pooling_type"
    value = metadata.get(key, 0)
    if value not in range(RANKS + 1):
        raise InvalidCheckpoint(f"metadata key {key} is {value!r:.99}; it must be in 0..{RANKS}")
    return Setup(None if value == RANKS else _GGUF_POOLED[value])


def _context(said: Mapping[str, Any], folder: Path) -> int | None:
    """What sentence-transformers wrote, or writes now, to the tokenizer's."""
    key = "model_max_length"
    longest = (read_json(folder / "tokenizer_config.json") or {}).get(key)
    huge = not isinstance(longest, int) or longest > _LONGEST  # which stands for no limit
    return _count(said, "max_seq_length") or (None if huge else _count({key: longest}, key))


def _count(said: Mapping[str, Any], key: str) -> int | None:
    value = said.get(key)
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= _LONGEST:
        raise InvalidCheckpoint(f"{key} is {value!r:.99}; it must be a positive integer")
    return value


def _sigmoid(*said: object) -> bool:
    """Whether scores are made numbers from 0 to 1: by the first that says it, or by default."""
    name = str(next(filter(None, said), _SIGMOID)).rpartition(".")[2]
    if name not in (_SIGMOID, _IDENTITY):
        raise UnsupportedModel(f"scores are made by {name!r:.99}; known: {_SIGMOID}, {_IDENTITY}")
    return name == _SIGMOID


def _modules(folder: Path, *, asked: bool) -> tuple[Pooling | None, tuple[Linear, ...]]:
    """How rows are pooled, and the linears after that, by modules.json."""
    pooling, linears = None, []
    for kind, path in _listed(folder):
        match kind:
            case "Pooling":
                pooling = _pooling(read_json(path / "config.json") or {})
            case "Dense":
                linears.append(_linear(path))
            case "Transformer" | "Normalize":
                pass
            case "LogitScore" if asked:  # yes less no
                pass
            case _:
                raise UnsupportedModel(
                    f"{MODULES} has a {quote(kind)}; known: Transformer, Pooling, Dense, Normalize"
                )
    return pooling, tuple(linears)


def _listed(folder: Path) -> list[tuple[str, Path]]:
    """The kinds of a model's modules, and their folders."""
    text = read_text(folder / MODULES, 1 << 16)
    try:
        found: list[Any] = [] if text is None else json.loads(text)
        if not isinstance(found, list):
            raise TypeError
        made = [(str(one["type"]).rpartition(".")[2], str(one["path"])) for one in found]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidCheckpoint(f"{MODULES} is no list of modules with type and path") from None
    for _, path in made:
        if path and not _FOLDER.fullmatch(path):
            raise InvalidCheckpoint(f"{MODULES} names {quote(path)}; it must be a folder in it")
    return [(kind, folder / path) for kind, path in made]


def _pooling(config: Mapping[str, Any]) -> Pooling:
    modes = config.get("pooling_mode") or [name for key, name in _FLAGS.items() if config.get(key)]
    mode = modes[0] if isinstance(modes, list) and len(modes) == 1 else modes
    if config.get("include_prompt", True) is not True:
        raise UnsupportedModel(
            "the prompt's rows are not pooled (include_prompt); that is not supported"
        )
    for known in get_args(Pooling):
        if mode == (_LAST if known == "last" else known):
            found: Pooling = known
            return found
    names = ", ".join((*get_args(Pooling)[:-1], _LAST))
    raise UnsupportedModel(f"rows are pooled by {mode!r:.99}; known: {names}")


def pooling_named(name: str) -> Pooling:
    for known in get_args(Pooling):
        if name == known:
            found: Pooling = known
            return found
    raise InvalidRequest(f"pooling is {name!r}; it must be one of {', '.join(get_args(Pooling))}")


def _linear(folder: Path) -> Linear:
    config = read_json(folder / "config.json") or {}
    name = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UnsupportedModel(f"{folder.name} has the activation {quote(name)}; known: {known}")
    return Linear(folder, _ACTIVATIONS[name])
