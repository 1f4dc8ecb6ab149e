"""Folders of PEFT: adapter_config.json, and the tensors that it explains."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from pydantic_core import SchemaError, SchemaValidator, core_schema

from squall.adapters.parts import Floats, Parts
from squall.adapters.target import TABLE
from squall.checkpoints.base import Tensor
from squall.checkpoints.pickle import open_pickle
from squall.checkpoints.safetensors import open_part
from squall.errors import InvalidCheckpoint, ModelNotFound, UnsupportedModel
from squall.files import quote, read_json
from squall.recipes.fields import Fields
from squall.recipes.modules import PARAMETERS

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MAX_PATTERNS = 2048
MAX_PATTERN_CHARS = 4096
# What says how the adapter was begun, trained or saved, not what it does.
_HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config fan_in_fan_out
    inference_mode lora_dropout lora_ga_config loftq_config megatron_core peft_version
    qalora_group_size revision runtime_config task_type velora_config
    """.split()  # noqa: SIM905
)
# Other beginnings take something from the base's weights, each time they are loaded.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_VARIANTS = re.compile(r"use_.*|.*_config|.*_(tokens|indices|replication)")
_LORA = re.compile(
    r"(.+?)((?:\.base_layer)*)\.lora_(?:embedding_)?([AB])(?:\.(?!weight$|bias$)[^.]+)?"
    r"(?:\.(weight|bias))?"
)
_SAVED = re.compile(
    r"(.+?)(\.base_layer|\.original_module|\.modules_to_save(?:\.[^.]+)?)?\.(weight|bias)"
)
_EMBEDDINGS = ("embed_tokens", "lm_head")
_LAYER = r"(?:^|.*?\.){}\.(\d{{1,5}})\."
Names = str | tuple[str, ...]


class _Fields(Fields):
    def shown(self, key: str) -> str:
        return f"{CONFIG}: {key}"

    def number_map(self, key: str) -> dict[str, float]:
        """Pattern -> number above 0."""
        found = self._value(key, {})
        if not isinstance(found, dict) or len(found) > MAX_PATTERNS:
            raise self._invalid(key, found, f"an object of at most {MAX_PATTERNS} patterns")
        return {name: self._number(key, value, 0, 1e6) for name, value in found.items()}

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings, or a string as one."""
        found = self._value(key, [])
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise self._invalid(key, found, "a list of names")
        if len(found) > MAX_PATTERNS:
            raise self._invalid(key, f"{len(found)} names", f"at most {MAX_PATTERNS}")
        return tuple(found)

    def pattern_or_names(self, key: str) -> Names:
        """A string is a regular expression."""
        found = self._value(key, [])
        return found if isinstance(found, str) else self.names(key)

    def layers(self, key: str) -> frozenset[int]:
        """A layer, or a list of them."""
        found = self._value(key, [])
        items = found if isinstance(found, list) else [found]
        return frozenset(self._integer(key, item, 0, 1 << 16) for item in items)

    def _is_harmless(self, key: str, value: object) -> bool:
        if not _VARIANTS.fullmatch(key):
            self.ignored += [] if key in _HARMLESS or not value else [key]
            return True
        return key in _HARMLESS or not value


@dataclass(frozen=True, slots=True)
class Config:
    """An adapter_config.json."""

    base: str
    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    modules: Names
    excluded: Names
    saved: tuple[str, ...]
    parameters: tuple[str, ...]
    layers: frozenset[int]
    layer_lists: tuple[str, ...]
    bias: str
    lora_bias: bool

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Raises UnsupportedModel for what would change results and is not done here."""
        found = read_json(folder / CONFIG)
        if found is None:
            raise ModelNotFound(
                f"{str(folder)!r} has no {CONFIG}; name the folder of a LoRA adapter"
            )
        c = _Fields({key: value for key, value in found.items() if value is not None}, {})
        kind, bias = c.word("peft_type", "LORA"), c.word("bias", "none")
        begun = found.get("init_lora_weights", True)
        for key, value, allowed in (
            ("peft_type", kind, ("LORA",)),
            ("bias", bias, ("none", "all", "lora_only")),
            ("init_lora_weights", True if begun is None else begun, _BEGINNINGS),
        ):
            if value not in allowed:
                raise UnsupportedModel(
                    f"{CONFIG}: {key} is {repr(value)[:99]}; only {', '.join(map(str, allowed))} "
                    "can be followed"
                )
        c.skip("init_lora_weights")
        config = cls(
            base=str(found.get("base_model_name_or_path") or ""),
            rank=c.count("r", 8),
            alpha=c.number("lora_alpha", 8.0, low=0, high=1e6),
            rslora=c.flag("use_rslora", False),
            ranks=c.number_map("rank_pattern"),
            alphas=c.number_map("alpha_pattern"),
            modules=c.pattern_or_names("target_modules"),
            excluded=c.pattern_or_names("exclude_modules"),
            saved=c.names("modules_to_save"),
            parameters=c.names("target_parameters"),
            layers=c.layers("layers_to_transform"),
            layer_lists=tuple(map(re.escape, c.names("layers_pattern"))),
            bias=bias,
            lora_bias=c.flag("lora_bias", False),
        )
        c.check_all_read()
        return config

    def rank_of(self, module: str) -> int:
        return int(_of(self.ranks, module, self.rank))

    def scale(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = _of(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def adapts(self, module: str) -> bool:
        """Whether PEFT adapts a module of this name."""
        saved = any(_matches(rf"(?:.*\.)?(?:{name})(?:\..*)?", module) for name in self.saved)
        if saved or _named(self.excluded, module):
            return False
        if self.modules == "all-linear":
            return module.rpartition(".")[2] not in _EMBEDDINGS
        if isinstance(self.modules, str):
            return _named(self.modules, module)
        # A whole path that is named is adapted in any layer.
        whole = module in self.modules
        return whole or (_named(self.modules, module) and self._in_layers(module))

    def saves(self, module: str, kind: str) -> bool:
        """Whether PEFT takes a module's weight or bias from the adapter's file."""
        embedding = module.rpartition(".")[2] in _EMBEDDINGS
        trained = kind == "bias" and (
            self.bias == "all" or (self.bias == "lora_only" and self.adapts(module))
        )
        ends = tuple(self.saved)  # of the module, or of one that it is a part of
        parts = module.split(".")
        within = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return embedding or trained or any(outer.endswith(ends) for outer in within)

    def _in_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        for name in self.layer_lists or (r"[^.]*",):
            if match := re.match(_LAYER.format(name), module):
                return int(match[1]) in self.layers
        return False


def read_folder(folder: Path, weights: Path | None, parts: Parts) -> tuple[Config, tuple[str, ...]]:
    """What the folder says, and the modules that it adapts; their terms go to `parts`."""
    config, tensors = Config.read(folder), tensors_of(folder, weights)
    pairs: dict[tuple[str, int], dict[str, Floats]] = {}
    for name, tensor in tensors.items():
        path = name.removeprefix("base_model.model.")
        if match := _LORA.fullmatch(path):
            key = match[1], match[2].count(".")
            part = match[3] + ("" if match[4] in (None, "weight") else match[4])
            if part in pairs.setdefault(key, {}):
                raise InvalidCheckpoint(f"tensor {quote(name)} is there twice, by other names")
            pairs[key][part] = Floats.of(tensor)
        else:
            _whole(path, tensor, config, parts)
    modules = [_adapted(key, pair, config, parts) for key, pair in pairs.items()]
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
    raise ModelNotFound(f"{str(folder)!r} has no {' or '.join(path.name for path in there)}")


def _whole(path: str, tensor: Tensor, config: Config, parts: Parts) -> None:
    """A weight or bias in place of the base's."""
    match = _SAVED.fullmatch(path)
    if match is None or not config.saves(match[1], match[3]):
        raise UnsupportedModel(
            f"the adapter's tensor {quote(tensor.name)} is no part of a LoRA, and {CONFIG} does "
            "not name it in modules_to_save or by its bias"
        )
    if ".original_module" not in path:  # of what is saved the base's own
        parts.whole(f"{match[1]}.{match[3]}", Floats.of(tensor))


def _adapted(key: tuple[str, int], pair: Mapping[str, Floats], config: Config, parts: Parts) -> str:
    """Add a pair of matrices; returns the module, or the parameter of one, that they adapt."""
    module, depth = key
    parameter = _parameter(module, depth, config, parts)
    name = module if parameter is None else f"{module}.{parameter}"
    if pair.keys() != {"A", "B", "Bbias"} - (set() if config.lora_bias else {"Bbias"}):
        given = ", ".join(quote(tensor.name) for tensor in pair.values())
        raise InvalidCheckpoint(
            f"the adapter has {given}; each module has lora_A and lora_B, and a bias of lora_B if "
            f"lora_bias is true in {CONFIG}, where it is {str(config.lora_bias).lower()}"
        )
    a, b, rank = pair["A"], pair["B"], config.rank_of(name)
    if parameter is None and (depth or not config.adapts(module)):
        raise UnsupportedModel(
            f"the adapter has the tensor {quote(a.name)}, and {CONFIG} does not adapt the module: "
            "see its target_modules, target_parameters, exclude_modules, modules_to_save and "
            "layers_to_transform"
        )
    places = parts.target.sites(name)
    if not places:
        raise parts.unknown(a.name)
    experts = len({site[1] for site, _, _ in places})
    if a.array.ndim != 2 or not len(a.array) == experts * rank == b.array.size // len(b.array):
        raise InvalidCheckpoint(
            f"tensors {quote(a.name)} and {quote(b.name)} have shapes {a.array.shape} and "
            f"{b.array.shape}; by {CONFIG} their rank is {rank}"
            + (f", of each of {experts} experts" if experts > 1 else "")
        )
    if places[0][0][0] == TABLE:
        a = replace(a, array=a.array.T)
    rows = len(b.array)
    a = replace(a, array=a.array.reshape(experts, -1, a.array.shape[-1]))
    b = replace(b, array=b.array.reshape(rows, rank, experts).transpose(2, 0, 1))
    parts.low_rank(name, a, b, config.scale(name), pair.get("Bbias"))
    return name


def _parameter(module: str, depth: int, config: Config, parts: Parts) -> str | None:
    """Of several adapted parameters of a module the first is wrapped first, innermost."""
    known = (*PARAMETERS, "weight")
    found = [
        name
        for name in known
        if _named(config.parameters, f"{module}.{name}") and parts.target.sites(f"{module}.{name}")
    ]
    return found[-1 - depth] if depth < len(found) else None


def _check_complete(modules: Sequence[str], config: Config, parts: Parts) -> None:
    """What is adapted in one layer is in all that the configuration names."""
    there, layers = set(modules), range(len(parts.target.decoder.layers))
    split = (re.fullmatch(r"(.*?\blayers\.)\d+(\..*)", module) for module in modules)
    for begin, end in {(match[1], match[2]) for match in split if match is not None}:
        for name in (f"{begin}{layer}{end}" for layer in layers):
            adapted = _named(config.parameters, name) or config.adapts(name)
            if name not in there and adapted and parts.target.sites(name):
                raise InvalidCheckpoint(
                    f"the adapter has no tensors of {quote(name)}, which {CONFIG} adapts: is the "
                    "file whole?"
                )


def _of(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's path."""
    found = (value for name, value in patterns.items() if _ends(name, module))
    return next(found, default)


def _ends(pattern: str, module: str) -> bool:
    if re.fullmatch(r"[\w.]+", pattern):
        return module == pattern or module.endswith(f".{pattern}")
    return _matches(rf"(?:.*\.)?(?:{pattern})", module)


def _named(names: Names, module: str) -> bool:
    if isinstance(names, str):
        return _matches(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matches(pattern: str, text: str) -> bool:
    return _validator(pattern).isinstance_python(text)


@lru_cache(64)
def _validator(pattern: str) -> SchemaValidator:
    """Of whole texts. By an engine that takes linear time: the pattern is a stranger's."""
    try:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise ValueError(f"it has over {MAX_PATTERN_CHARS} characters")
        return SchemaValidator(core_schema.str_schema(pattern=rf"\A(?:{pattern})\z"))
    except (SchemaError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UnsupportedModel(
            f"{CONFIG}: the pattern {quote(pattern)} cannot be followed ({reason}); without "
            "looking ahead or back, or as a list of names, it can"
        ) from None
