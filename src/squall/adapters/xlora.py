"""X-LoRA: a first pass of the model, and a classifier, weigh LoRA adapters row by row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from squall import decoder, executors
from squall.adapters import lora
from squall.adapters.edits import SCALINGS, adaptable
from squall.adapters.ordering import Ordering, place_of
from squall.adapters.peft import checked
from squall.adapters.target import Target
from squall.batch import Batch, Mixture
from squall.checkpoints.base import Checkpoint
from squall.checkpoints.hub import Hub
from squall.checkpoints.safetensors import open_part
from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound, UnsupportedModel
from squall.executors import CPU, Executor, Floats, Limits, Phase, Placement, ThreadPool
from squall.files import quote, read_json
from squall.program import Builder, Linear, Matrix, Program, Site, Slice, Vector, sites
from squall.quant import Plan
from squall.recipes import Recipe
from squall.weights import Progress, Term, WeightStore

# The role of the classifier's weights, and the source of their slices.
CLASSIFIER = "classifier"
# mistral.rs's files, and PEFT's.
_CONFIGS = ("xlora_config.json", "adapter_config.json")
_WEIGHTS = ("xlora_classifier.safetensors", "adapter_model.safetensors")
# PEFT counts what is between the linears, too.
_LINEAR = re.compile(r"(.*\.)?((inner|layers)\.(?P<number>\d{1,4})|last)\.(?P<part>weight|bias)")
_LAST = 1 << 24
# The modules of a layer, in the order in which transformers' classes have those that they have.
_MODULES = """
    embed_tokens q_proj k_proj v_proj dense o_proj qkv_proj gate gate_proj up_proj gate_up_proj
    fc1 c_fc down_proj fc2 c_proj w1 w2 w3 lm_head
    """.split()  # noqa: SIM905

_Size = Annotated[int, Field(ge=1, le=1 << 24)]
_Weight = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class XLora:
    """How to open a model with X-LoRA.

    path: the folder of configuration, classifier and adapters, or a model of the hub.
    order: a file that orders adapters and layers.
    tgt_non_granular_index: after so many tokens of an answer its scalings stay what they are.
    """

    path: str | Path
    order: str | Path | None = None
    tgt_non_granular_index: int | None = None

    def __post_init__(self) -> None:
        count = self.tgt_non_granular_index
        if count is not None and (type(count) is not int or count < 1):
            raise InvalidRequest(f"tgt_non_granular_index is {count!r}; it must be at least 1")


class Config(BaseModel):
    """xlora_config.json, or PEFT's adapter_config.json, as far as it matters to answers."""

    model_config = ConfigDict(strict=True, frozen=True)

    hidden_size: _Size
    adapters: Annotated[dict[str, str], Field(min_length=1, max_length=1024)]
    base_model_id: str | None = None
    layerwise_scalings: bool = False
    xlora_depth: Annotated[int, Field(ge=1, le=64)] = 1
    xlora_size: _Size = 1
    use_bias: bool = True
    enable_relu_and_dropout: bool = False
    enable_softmax: bool = True
    enable_softmax_topk: Literal[False] = False
    softmax_temperature: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)] = 1.0
    top_k_lora: _Size | None = None
    scaling_pass_value: _Weight = 0.0
    global_scaling_weight: _Weight = 1.0

    @classmethod
    def read(cls, folder: Path) -> Config:
        peft = read_json(folder / _CONFIGS[1]) or {}
        base = {"base_model_id": peft.get("base_model_name_or_path")}
        if (given := read_json(folder / _CONFIGS[0])) is None:
            if peft.get("peft_type") != "XLORA":
                raise ModelNotFound(f"{str(folder)!r} has no {' or '.join(_CONFIGS)} of X-LoRA")
            given = base | {"enable_relu_and_dropout": True} | peft
        if isinstance(names := given.get("adapters"), list):
            given["adapters"] = {str(name): "" for name in names}
        return checked(cls, given, "the configuration of X-LoRA")

    def scalings(self, logits: Floats) -> Floats:
        """What the adapters weigh, [rows, layers * adapters]. No row depends on another."""
        x = logits.reshape(len(logits), -1, len(self.adapters))
        if self.enable_softmax:
            x = x / np.float32(self.softmax_temperature)
            x = np.exp(x - x.max(axis=-1, keepdims=True))
            # Added up one by one: the order of `sum` may depend on how many rows there are.
            x = x / np.cumsum(x, axis=-1)[..., -1:]
        if self.top_k_lora is not None:
            others = np.argsort(-x, axis=-1, kind="stable")[..., self.top_k_lora :]
            np.put_along_axis(x, others, 0, axis=-1)
        return x.reshape(logits.shape)


def read_classifier(folder: Path, config: Config, outputs: int) -> Checkpoint:
    """Linears, one after another: 0.weight, 0.bias, 1.weight and so on. outputs: of the last."""
    path = next((path for name in _WEIGHTS if (path := folder / name).exists()), None)
    if path is None:
        raise ModelNotFound(f"{str(folder)!r} has no {_WEIGHTS[0]}")
    given = {tensor.name: tensor for tensor in open_part(path).tensors()}
    matches = [match for name in given if (match := _LINEAR.fullmatch(name))]
    numbers = sorted({int(match["number"] or _LAST) for match in matches})
    tensors = {}
    for match in matches:
        number = numbers.index(int(match["number"] or _LAST))
        tensors[f"{number}.{match['part']}"] = given[match.string]
    widths = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), outputs]
    wanted: dict[str, tuple[int, ...]] = {}
    for number, (cols, rows) in enumerate(pairwise(widths)):
        wanted |= {f"{number}.weight": (rows, cols)}
        wanted |= {f"{number}.bias": (rows,)} if config.use_bias else {}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != wanted or len(matches) > len(found):
        raise InvalidCheckpoint(
            f"{quote(path.name)} has a classifier of {found!s:.999}; its configuration says "
            f"{wanted}"
        )
    for tensor in tensors.values():
        tensor.check_format()
    return Checkpoint(path, {}, tensors, path.stat().st_size)


def place(module: str) -> tuple[int, ...]:
    """Sorts paths of modules as transformers' models have them."""
    kind = module.rpartition(".")[2]
    if kind not in _MODULES:
        raise UnsupportedModel(f"which layer of X-LoRA {quote(module)} is, an ordering file tells")
    rank = _MODULES.index(kind)
    numbers = [int(number) for number in re.findall(r"\.(\d+)\.", module)]
    layer, expert = [*(numbers or [-1 if rank == 0 else _LAST]), -1][:2]
    return layer, expert, rank


@dataclass(frozen=True, slots=True)
class Parts:
    """What X-LoRA adds to a model.

    adapters: in the order of their scalings. columns: where the scalings of a site begin, of
        `width` in all. settles: see `Executor`.
    """

    config: Config
    classifier: Checkpoint
    adapters: tuple[Mapping[Site, Term], ...]
    columns: Mapping[Site, int]
    width: int
    settles: int | None = None

    @classmethod
    def read(cls, xlora: XLora, target: Target, hub: Hub | None = None) -> Parts:
        folder = (hub or Hub()).path(xlora.path)
        config, ordering = Config.read(folder), Ordering.read(xlora.order)
        ordering.check_base(config.base_model_id)
        if config.hidden_size != (hidden := target.decoder.hidden):
            raise InvalidRequest(
                f"X-LoRA is for a hidden_size of {config.hidden_size}, the model has {hidden}"
            )
        names = ordering.order or tuple(config.adapters)
        if set(names) != set(config.adapters):
            raise InvalidRequest(
                f"the ordering file orders {_listed(names)}; X-LoRA has the adapters "
                f"{_listed(config.adapters)}"
            )
        loras = [lora.read(_path(folder, name, config), target, hub=hub) for name in names]
        modules = {module for one in loras for module in one.modules}
        layers = ordering.layers if config.layerwise_scalings else dict.fromkeys(modules, 0)
        layers = layers or {module: i for i, module in enumerate(sorted(modules, key=place))}
        if missing := sorted(modules - layers.keys()):
            raise InvalidRequest(f"the ordering file has no index for the layer {missing[0]}")
        columns = {
            site: layers[module] * len(names)
            for module in modules
            for site, *_ in target.sites(module)
        }
        for name, one in zip(names, loras, strict=True):
            if one.vectors or not one.terms.keys() <= columns.keys():
                raise UnsupportedModel(
                    f"the adapter {quote(name)} of X-LoRA changes more than linears"
                )
        width = (max(layers.values()) + 1) * len(names)
        classifier = read_classifier(folder, config, width)
        adapters = tuple(one.terms for one in loras)
        return cls(config, classifier, adapters, columns, width, xlora.tgt_non_granular_index)

    def programs(self, recipe: Recipe, context: int) -> tuple[Program, Program]:
        """The first pass, which tells logits of scalings, and the second."""
        build = partial(decoder.compile, recipe.decoder, recipe.names, context=context)
        first, _ = build(whole=True).stages("norm")
        if self.config.scaling_pass_value:
            first = adaptable(first)
        return self._classified(first), adaptable(build(), self.columns, self.width)

    def _classified(self, program: Program) -> Program:
        """The program with the classifier of its output as its output."""
        (x,), builder = program.outputs, Builder()
        builder.ops, builder.values = list(program.ops), list(program.values)
        for number in range(self.config.xlora_depth):
            rows, cols = self.classifier.tensors[f"{number}.weight"].shape
            weight, bias = (
                (Slice(f"{number}.{part}", 0, rows, CLASSIFIER),) for part in ("weight", "bias")
            )
            matrix = Matrix(weight, rows, cols, role=CLASSIFIER)
            vector = Vector(bias, rows) if self.config.use_bias else None
            relu = self.config.enable_relu_and_dropout and number < self.config.xlora_depth - 1
            out = builder.value(f"{CLASSIFIER}.{number}", rows)
            x = builder.emit(Linear(out, x, matrix, vector, "relu" if relu else None))
        return builder.build(x, caches=program.caches, context=program.context)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(quote, islice(names, 20)))


def _path(folder: Path, name: str, config: Config) -> str:
    """Where an adapter is: by its name in the folder, or where the configuration says."""
    given = config.adapters[name]
    if not given or (folder / name).is_dir():
        return place_of(name, str(folder))
    return str(folder / given) if (folder / given).exists() else given


class TwoPasses:
    """Two executors on one store, each with a KV cache; what is not said here is the second's.

    programs: those of the parts. store: has the classifier's checkpoint as CLASSIFIER.
    """

    def __init__(  # noqa: PLR0913
        self,
        parts: Parts,
        programs: tuple[Program, Program],
        store: WeightStore,
        limits: Limits,
        *,
        placement: Placement = CPU,
        pool: ThreadPool | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._config, self._programs, self.settles = parts.config, programs, parts.settles
        pool = pool or executors.thread_pool()
        self._open = partial(executors.open, limits=limits, placement=placement, pool=pool)
        self.whole = False
        # What settled, by the block of the row that it is of.
        self._settled = np.empty((limits.blocks, parts.width), np.float32)
        self._load(store, progress)
        weight = parts.config.global_scaling_weight
        self._mixtures = (
            _mixture(self._first, parts.adapters, weight * parts.config.scaling_pass_value),
            _mixture(self._second, parts.adapters, weight),
        )

    def __getattr__(self, name: str) -> object:
        return getattr(self._second, name)

    def _load(self, store: WeightStore, progress: Progress | None) -> None:
        second = self._open(self._programs[1], store, progress=progress)
        first = self._open(self._programs[0], store)
        self._first, self._second, self._store = first, second, store
        self.kv_bytes = first.kv_bytes + second.kv_bytes

    def requantize(self, plan: Plan, *, progress: Progress | None = None) -> None:
        self._load(self._store.replanned(plan), progress)

    def profile(self, act: Callable[[], None]) -> list[Phase]:
        found: list[Phase] = []
        return self._first.profile(lambda: found.extend(self._second.profile(act))) + found

    def step(self, batch: Batch) -> Floats:
        scalings = {SCALINGS: self.scalings(batch)}
        return _run(self._second, self._mixtures[1], batch, scalings)

    def scalings(self, batch: Batch) -> Floats:
        """[rows, width], by the first pass, or of the row at which they settled."""
        if self.settles is None or batch.prompts is None:
            return self._config.scalings(_run(self._first, self._mixtures[0], batch, {}))
        lengths, positions = np.diff(batch.bounds), batch.positions
        last = np.repeat(batch.prompts + (self.settles - 1), lengths)
        early, late = positions <= last, positions >= last
        found = np.empty((len(last), self._settled.shape[1]), np.float32)
        if early.any():
            found[early] = self.scalings(_only(batch, early))
        sequence = np.repeat(np.arange(len(lengths)), lengths)[late]
        blocks = batch.block_tables[sequence, last[late] // self._second.block_size]
        self._settled[blocks[early[late]]] = found[early & late]
        found[late] = self._settled[blocks]
        return found


def _mixture(executor: Executor, adapters: Iterable[Mapping[Site, Term]], weight: float) -> Mixture:
    """All adapters, as far as the program has places for them."""
    places = {site for op in executor.program.ops for site in sites(op)}
    there = ({site: terms[site] for site in terms.keys() & places} for terms in adapters)
    return tuple((executor.adapter(terms), weight) for terms in there) if weight else ()


def _run(
    executor: Executor, mixture: Mixture, batch: Batch, inputs: Mapping[str, Floats]
) -> Floats:
    """The only output, where all rows have all adapters."""
    every = np.zeros(len(batch.tokens), np.int32)
    batch = replace(batch, mixture=every, mixtures=(mixture,))
    (found,) = executor.run(
        {**batch.inputs(executor.program.indices), **inputs}, batch, batch.mixtures
    ).values()
    return found


def _only(batch: Batch, rows: NDArray[np.bool_]) -> Batch:
    """These rows of a batch, before scalings settle; nobody wants outputs of them."""
    bounds = np.concatenate([[0], np.cumsum(rows)])[batch.bounds].astype(np.int32)
    return replace(
        batch, tokens=batch.tokens[rows], positions=batch.positions[rows], bounds=bounds,
        outputs=np.empty(0, np.int32), prompts=None,
    )  # fmt: skip
