"""Folders of PEFT: adapter_config.json, and the tensors that it explains."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import SchemaError, SchemaValidator, core_schema

from squall.adapters.ordering import CONFIG
from squall.adapters.parts import MAX_RANK, TABLE, Array, Parts, array_of
from squall.checkpoints.base import Tensor
from squall.checkpoints.pickle import open_pickle
from squall.checkpoints.safetensors import MAX_NAME_CHARS, open_part
from squall.errors import InvalidCheckpoint, ModelNotFound, UnsupportedModel
from squall.files import quote, read_json
from squall.recipes.modules import PARAMETERS

MAX_PATTERNS = 64
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Keys of PEFT's variants of LoRA; some others are only of how an adapter was begun or trained.
_VARIANTS = re.compile(
    r"use_.*|(?!corda|eva|lora_ga|loftq|runtime|velora).*_config|.*_(tokens|indices|replication)"
)
_PLAIN = re.compile(r"\^?([\w.]+)\$?")
_LORA = re.compile(
    r"(.+?)((?:\.base_layer)*)\.lora_(?:embedding_)?([AB])(?:\.(?!weight$|bias$)[^.]+)?"
    r"(?:\.(weight|bias))?"
)
_SAVED = re.compile(
    r"(.+?)(\.base_layer|\.original_module|\.modules_to_save(?:\.[^.]+)?)?\.(weight|bias)"
)
_EMBEDDINGS = ("embed_tokens", "lm_head")

T = TypeVar("T")
Kind = TypeVar("Kind", bound=BaseModel)
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Pattern = Annotated[str, Field(max_length=4096)]
Patterns = Annotated[list[Pattern], Field(max_length=2048)]
Layers = Literal["layers", "model.layers"]
Layer = Annotated[int, Field(ge=0, le=1 << 16)]


def checked(kind: type[Kind], given: Mapping[str, object], what: str) -> Kind:
    """A configuration; null is as if it were not there. Raises InvalidCheckpoint."""
    try:
        return kind.model_validate({key: v for key, v in given.items() if v is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = quote(".".join(map(str, first["loc"])))
        raise InvalidCheckpoint(
            f"{what}: {where} is {repr(first['input'])[:99]}: {first['msg']}"
        ) from None


class Config(BaseModel):
    """An adapter_config.json. Lists name ends of modules' paths, and a string is a pattern."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    peft_type: Literal["LORA"] = "LORA"
    base_model_name_or_path: str = ""
    r: Rank = 8
    lora_alpha: Alpha = 8.0
    rank_pattern: Annotated[dict[Pattern, Rank], Field(max_length=2048)] = {}
    alpha_pattern: Annotated[dict[Pattern, Alpha], Field(max_length=2048)] = {}
    use_rslora: bool = False
    target_modules: Pattern | Patterns = []
    exclude_modules: Pattern | Patterns = []
    modules_to_save: Annotated[list[Pattern], Field(max_length=MAX_PATTERNS)] = []
    target_parameters: Patterns = []
    layers_to_transform: Layer | Annotated[list[Layer], Field(max_length=2048)] = []
    layers_pattern: Layers | list[Layers] = []
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    # Other beginnings take something from the base's weights, each time they are loaded.
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal", "mica"] = True

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Raises UnsupportedModel for what would change results and is not done here."""
        found = read_json(folder / CONFIG)
        if found is None:
            there = ", ".join(quote(str(p.parent)) for p in sorted(folder.glob(f"*/{CONFIG}"))[:9])
            there = f": there are {there}" if there else ""
            raise ModelNotFound(
                f"{str(folder)!r} has no {CONFIG}; name the folder of an adapter{there}"
            )
        config = checked(cls, found, CONFIG)
        more = (key for key, value in (config.model_extra or {}).items() if value)
        if variants := sorted(filter(_VARIANTS.fullmatch, more)):
            raise UnsupportedModel(
                f"{CONFIG} has {', '.join(map(quote, variants[:6]))}, which Squall cannot follow; "
                "ignoring it could change the results"
            )
        patterns = (*config.rank_pattern, *config.alpha_pattern)
        if sum(_PLAIN.fullmatch(pattern) is None for pattern in patterns) > MAX_PATTERNS:
            raise UnsupportedModel(f"{CONFIG} has over {MAX_PATTERNS} patterns that are no names")
        return config

    def rank(self, module: str) -> int:
        return _of(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        rank, alpha = self.rank(module), _of(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def adapts(self, module: str) -> bool:
        if any(_within(m, module) for m in self.modules_to_save):
            return False
        if _named(self.exclude_modules, module):
            return False
        if self.ensure_weight_tying and module.endswith(_EMBEDDINGS):
            return True  # with the other, where it shares the weights
        if self.target_modules == "all-linear":
            return module.rpartition(".")[2] not in _EMBEDDINGS
        # Of a list, what is named by its whole path is adapted in any layer.
        whole = isinstance(self.target_modules, str) or module in self.target_modules
        layered = whole or self.layers_to_transform == [] or self._in_layers(module)
        return layered and (self.vague or _named(self.target_modules, module))

    @property
    def vague(self) -> bool:
        """Whether target_modules cannot be followed; then the file's tensors tell what it names."""
        try:
            return isinstance(self.target_modules, str) and not _validator(self.target_modules)
        except UnsupportedModel:
            return True

    def saves(self, module: str, kind: str) -> bool:
        """Whether PEFT takes a weight or bias from the adapter's file, of a module or its part."""
        parts = module.split(".")
        ends = tuple(self.modules_to_save)
        saved = any(".".join(parts[:count]).endswith(ends) for count in range(1, len(parts) + 1))
        own = self.bias == "all" or (self.bias == "lora_only" and self.adapts(module))
        return saved or parts[-1] in _EMBEDDINGS or (kind == "bias" and own)

    def _in_layers(self, module: str) -> bool:
        match, layers = re.match(r".*?\blayers\.(\d{1,5})\.", module), self.layers_to_transform
        found = -1 if match is None else int(match[1])
        return found in (layers if isinstance(layers, list) else [layers])


def read_folder(folder: Path, weights: Path | None, parts: Parts) -> tuple[Config, tuple[str, ...]]:
    """What the folder says, and the modules that it adapts; their terms go to `parts`."""
    config, tensors = Config.read(folder), tensors_of(folder, weights)
    pairs: dict[tuple[str, int], dict[str, Array]] = {}
    for name, tensor in tensors.items():
        path = name.removeprefix("base_model.model.") if len(name) <= MAX_NAME_CHARS else ""
        if match := _LORA.fullmatch(path):
            pair = pairs.setdefault((match[1], match[2].count(".")), {})
            part = "bias" if match[4] == "bias" else match[3]
            if part in pair:
                raise InvalidCheckpoint(f"tensor {quote(name)} is there twice, by another name")
            pair[part] = array_of(tensor)
            continue
        match = _SAVED.fullmatch(path)
        if match is None or not config.saves(match[1], match[3]):
            raise UnsupportedModel(
                f"the adapter's tensor {quote(name)} is no part of a LoRA, and {CONFIG} does not "
                "say by modules_to_save or bias that it is saved"
            )
        if match[2] != ".original_module":  # of what is saved, and not in use
            trained = match[2] != ".base_layer" or match[3] == "bias"
            parts.whole(f"{match[1]}.{match[3]}", array_of(tensor), trained=trained)
    modules = [_adapt(*key, pair, config, parts) for key, pair in pairs.items()]
    _check_complete(modules, config, parts)
    return config, tuple(sorted(modules))


def tensors_of(folder: Path, weights: Path | None = None) -> Mapping[str, Tensor]:
    """Those of an adapter's folder, or of a file in it."""
    there = [folder / name for name in WEIGHTS] if weights is None else [weights]
    for path in there:
        if path.is_file():
            is_pickle = path.suffix in (".bin", ".pt", ".pth")
            found = open_pickle(path).values() if is_pickle else open_part(path).tensors()
            return {tensor.name: tensor for tensor in found}
    names = " or ".join(path.name for path in there)
    raise ModelNotFound(f"the adapter {str(folder)!r} has no {names}")


def _adapt(module: str, depth: int, pair: Mapping[str, Array], config: Config, parts: Parts) -> str:
    """Add a pair of matrices; returns the module, or the parameter of one, that they adapt."""
    target = parts.target
    # Of several parameters of a module the first is wrapped first, innermost.
    known = (f"{module}.{name}" for name in PARAMETERS)
    wrapped = [p for p in known if _named(config.target_parameters, p) and target.sites(p)]
    name = wrapped[-1 - depth] if depth < len(wrapped) else module
    if name == module and (depth or not config.adapts(module)):
        raise UnsupportedModel(
            f"the adapter has tensors of {quote(module)}, which {CONFIG} does not adapt: see its "
            "target_modules, target_parameters, exclude_modules, modules_to_save and "
            "layers_to_transform"
        )
    places, rank = target.sites(name), config.rank(name)
    experts = max(len({expert for (_, expert), _, _ in places}), 1)
    shapes = {part: array.shape for part, array in pair.items() if part != "bias"}
    ranks = {part: (*shape, 0)[part == "B"] for part, shape in shapes.items() if len(shape) == 2}
    if ranks != dict.fromkeys("AB", rank * experts) or ("bias" in pair) != config.lora_bias:
        given = ", ".join(f"lora_{part} {array.shape}" for part, array in pair.items())
        raise InvalidCheckpoint(
            f"the adapter has of {quote(name)}: {given}; by {CONFIG} it has lora_A and lora_B of "
            f"rank {rank}, for each of {experts} experts, and lora_bias is {config.lora_bias}"
        )
    a, b = pair["A"], pair["B"]
    a = a.T if places and places[0][0][0] == TABLE else a
    a = a.reshape(experts, -1, a.shape[1])
    b = b.reshape(len(b), rank, experts).transpose(2, 0, 1)
    parts.low_rank(name, a, b, config.scale(name), pair.get("bias"))
    return name


def _check_complete(modules: Sequence[str], config: Config, parts: Parts) -> None:
    """What is adapted in one layer is in all that the configuration names."""
    there, layers = set(modules), range(len(parts.target.decoder.layers))
    split = (re.fullmatch(r"(.*?\blayers\.)\d+(\..*)", module) for module in modules)
    for begin, end in {match.groups() for match in split if match is not None}:
        for name in {f"{begin}{layer}{end}" for layer in layers} - there:
            adapted = not config.vague and config.adapts(name)
            adapted = adapted or _named(config.target_parameters, name)
            if adapted and parts.target.sites(name):
                raise InvalidCheckpoint(
                    f"the adapter has no tensors of {quote(name)}, which {CONFIG} adapts: is the "
                    "file whole?"
                )


def _of(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that matches the end of a module's path."""
    return next((value for end, value in patterns.items() if _ends(end, module)), default)


def _ends(pattern: str, module: str) -> bool:
    if plain := _PLAIN.fullmatch(pattern):  # any character may be where it has a dot
        size = len(plain[1])
        before, end = module[:-size], module[-size:]
        same = len(end) == size and all(p in (".", c) for p, c in zip(plain[1], end, strict=True))
        return same and (not before or (pattern[0] != "^" and before.endswith(".")))
    return _matches(rf"(?:.*\.)?(?:{pattern})", module)


def _within(pattern: str, module: str) -> bool:
    """Whether it matches a part of a module's path, between dots."""
    if _PLAIN.fullmatch(pattern):
        return f".{pattern}." in f".{module}."
    return _matches(rf"(?:.*\.)?(?:{pattern})(?:\..*)?", module)


def _named(names: str | Sequence[str], module: str) -> bool:
    if isinstance(names, str):
        return _matches(names, module)
    return f".{module}".endswith(tuple(f".{name}" for name in names))


def _matches(pattern: str, text: str) -> bool:
    return _validator(pattern).isinstance_python(text)


@lru_cache(2 * MAX_PATTERNS)
def _validator(pattern: str) -> SchemaValidator:
    """Of whole texts. By an engine that takes linear time: the pattern is a stranger's."""
    try:
        return SchemaValidator(core_schema.str_schema(pattern=rf"\A(?:{pattern})\z"))
    except SchemaError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UnsupportedModel(
            f"{CONFIG}: the pattern {quote(pattern)} cannot be followed ({reason[:99]}); without "
            "looking ahead or back, or as a list of names, it can"
        ) from None
