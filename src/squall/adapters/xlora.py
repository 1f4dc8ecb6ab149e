"""X-LoRA: a first pass of the model, and a classifier, weigh LoRA adapters row by row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from squall import decoder, executors
from squall.adapters.edits import SCALINGS, adaptable
from squall.batch import Batch, Mixture, Sequences
from squall.checkpoints.base import Checkpoint
from squall.checkpoints.safetensors import open_part
from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound
from squall.executors import Adapter, Executor, Floats, Limits, Phase, ThreadPool
from squall.files import quote, read_json
from squall.program import Linear, Matrix, Program, Site, Slice, Value, Vector, sites
from squall.quant import Plan
from squall.recipes import Recipe
from squall.weights import Progress, Term, WeightStore

# The role of the classifier's weights, and the source of their slices.
CLASSIFIER = "classifier"
# mistral.rs's files, and PEFT's.
_CONFIGS = ("xlora_config.json", "adapter_config.json")
_WEIGHTS = ("xlora_classifier.safetensors", "adapter_model.safetensors")
# PEFT counts what is between the linears, too.
_LINEAR = re.compile(r"(.*\.)?((inner|layers)\.(?P<number>\d{1,4})|last)\.weight")
# The modules of a layer in the order in which transformers' classes have those they have.
_MODULES = (
    "embed_tokens", "q_proj", "k_proj", "v_proj", "dense", "o_proj", "qkv_proj", "gate",
    "gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "down_proj", "fc2", "c_proj", "w1", "w2",
    "w3", "lm_head",
)  # fmt: skip

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


class XLoraConfig(BaseModel):
    """xlora_config.json, or PEFT's adapter_config.json, as far as it matters to answers."""

    model_config = ConfigDict(strict=True, frozen=True)

    hidden_size: _Size
    adapters: Annotated[dict[str, str], Field(min_length=1, max_length=1024)]
    base_model_id: str = ""
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
    def read(cls, folder: Path) -> XLoraConfig:
        """That of a folder."""
        ours, pefts = (read_json(folder / name) for name in _CONFIGS)
        if ours is None and (pefts is None or pefts.get("peft_type") != "XLORA"):
            raise ModelNotFound(f"{str(folder)!r} has no {' or '.join(_CONFIGS)} of X-LoRA")
        if ours is None:
            base = pefts.pop("base_model_name_or_path", None)
            ours = {"base_model_id": base, "enable_relu_and_dropout": True} | pefts
        if isinstance(names := ours.get("adapters"), list):
            ours["adapters"] = {str(name): "" for name in names}
        try:
            return cls.model_validate({k: v for k, v in ours.items() if v is not None})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            shown = f"{quote(key)} is {first['input']!r:.99}; {first['msg']}"
            raise InvalidCheckpoint(f"the configuration of X-LoRA: {shown}") from None

    def scalings(self, logits: Floats) -> Floats:
        """What the adapters weigh, [rows, layers * adapters]. No row depends on another."""
        x = logits.reshape(len(logits), -1, len(self.adapters))
        if self.enable_softmax:
            x = x / np.float32(self.softmax_temperature)
            x = np.exp(x - x.max(axis=-1, keepdims=True))
            # Added up one by one: the order of `sum` may depend on how many rows there are.
            x = x / np.cumsum(x, axis=-1)[..., -1:]
        if self.top_k_lora is not None:
            x = x.copy()
            others = np.argsort(-x, axis=-1, kind="stable")[..., self.top_k_lora :]
            np.put_along_axis(x, others, 0, axis=-1)
        return np.ascontiguousarray(x.reshape(logits.shape))


@dataclass(frozen=True, slots=True)
class Classifier:
    """Linears one after another; `names` of their weights in the checkpoint."""

    checkpoint: Checkpoint
    names: tuple[str, ...]
    relu: bool

    @classmethod
    def read(cls, folder: Path, config: XLoraConfig, outputs: int) -> Classifier:
        """That of a folder, which is to have so many outputs."""
        path = next((path for name in _WEIGHTS if (path := folder / name).exists()), None)
        if path is None:
            raise ModelNotFound(f"{str(folder)!r} has no {_WEIGHTS[0]}")
        tensors = {tensor.name: tensor for tensor in open_part(path).tensors()}
        found = [match for name in tensors if (match := _LINEAR.fullmatch(name))]
        found.sort(key=lambda match: int(match["number"] or 10**4))
        names = tuple(match.string for match in found)
        cols = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1)]
        wanted = list(zip([*cols[1:], outputs], cols, strict=True))
        shapes = [tensors[name].shape for name in names]
        biases = [tensors[bias].shape for bias in map(_bias, names) if bias in tensors]
        if shapes != wanted or biases != [(rows,) for rows, _ in wanted] * config.use_bias:
            raise InvalidCheckpoint(
                f"{quote(path.name)} has weights of shapes {shapes} and biases {biases}; its "
                f"configuration wants {wanted} {'with' if config.use_bias else 'without'} biases"
            )
        for name in names:
            tensors[name].check_format()
        checkpoint = Checkpoint(path, {}, tensors, path.stat().st_size)
        return cls(checkpoint, names, config.enable_relu_and_dropout)

    def after(self, program: Program) -> Program:
        """The program with the classifier of its output as its output."""
        (x,), ops, values = program.outputs, list(program.ops), list(program.values)
        for number, name in enumerate(self.names):
            rows, cols = self.checkpoint.tensors[name].shape
            weight = Matrix((Slice(name, 0, rows, CLASSIFIER),), rows, cols, role=CLASSIFIER)
            biased = _bias(name) in self.checkpoint.tensors
            bias = Vector((Slice(_bias(name), 0, rows, CLASSIFIER),), rows) if biased else None
            relu = self.relu and name != self.names[-1]
            out = Value(len(program.values) + number, f"{CLASSIFIER}.{number}", rows)
            ops.append(Linear(out, x, weight, bias, "relu" if relu else None))
            values.append(out)
            x = out
        return replace(program, ops=tuple(ops), values=tuple(values), outputs=(x,))


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def place(module: str) -> tuple[int, ...]:
    """Sorts paths of modules as transformers' models have them."""
    kind = module.rpartition(".")[2]
    rank = _MODULES.index(kind) if kind in _MODULES else len(_MODULES)
    numbers = [int(number) for number in re.findall(r"\.(\d+)\.", module)]
    layer, expert = [*(numbers or [-1 if rank == 0 else 1 << 24]), -1][:2]
    return layer, expert, rank


@dataclass(frozen=True, slots=True)
class Parts:
    """What X-LoRA adds to a model.

    adapters: in the order of their scalings. columns: where the scalings of a site begin, of
        `width` in all. settles: see `Executor`.
    """

    config: XLoraConfig
    classifier: Classifier
    adapters: tuple[Mapping[Site, Term], ...]
    columns: Mapping[Site, int]
    width: int
    settles: int | None = None

    def programs(self, recipe: Recipe, context: int) -> tuple[Program, Program]:
        """The first pass, which tells logits of scalings, and the second."""
        build = partial(decoder.compile, recipe.decoder, recipe.names, context=context)
        first, _ = build(whole=True).cut("norm")
        if self.config.scaling_pass_value:
            first = adaptable(first)
        return self.classifier.after(first), adaptable(build(), self.columns, self.width)


@dataclass(frozen=True, slots=True)
class _Pass:
    """An executor, and the adapters of all its rows."""

    executor: Executor
    mixture: Mixture

    def run(self, batch: Batch, **inputs: Floats) -> Floats:
        """Its only output."""
        mixture = np.zeros(len(batch.tokens), np.int32)
        batch = replace(batch, mixture=mixture, mixtures=(self.mixture,))
        (found,) = self.executor.run({**batch.indices(), **inputs}, batch, batch.mixtures).values()
        return found


class XLoraExecutor(Executor):
    """Two executors on one store, each with a KV cache; what is not said here is the second's.

    programs: those of the parts. store: has the classifier's checkpoint as CLASSIFIER.
    """

    def __init__(
        self,
        parts: Parts,
        programs: tuple[Program, Program],
        store: WeightStore,
        limits: Limits,
        *,
        pool: ThreadPool | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._parts, self._programs = parts, programs
        self._open = partial(executors.open, limits=limits, pool=pool or executors.thread_pool())
        self.settles = parts.settles
        # What settled, by the block of the row that it is of.
        self._settled = np.empty((limits.blocks, parts.width), np.float32)
        self._load(store, progress)

    def _load(self, store: WeightStore, progress: Progress | None) -> None:
        config, passes = self._parts.config, []
        weight = config.global_scaling_weight
        for program, each in zip(
            self._programs, (weight * config.scaling_pass_value, weight), strict=True
        ):
            executor = self._open(program, store, progress=progress)
            terms = _there(program, self._parts.adapters if each else ())
            passes.append(_Pass(executor, tuple((executor.adapter(t), each) for t in terms)))
        self._first, self._second = passes
        self._store = store
        self.kv_bytes = sum(one.executor.kv_bytes for one in passes)

    def __getattr__(self, name: str) -> object:
        return getattr(self._second.executor, name)

    @property
    def pool(self) -> ThreadPool | None:
        """See `Executor`."""
        return self._second.executor.pool

    def step(self, batch: Batch) -> Floats:
        """See `Executor`."""
        return self._second.run(batch, **{SCALINGS: self.scalings(batch)})

    def scalings(self, batch: Batch) -> Floats:
        """[rows, width], by the first pass, or what it was when it settled."""
        if self.settles is None or batch.prompts is None:
            return self._computed(batch)
        lengths, positions = np.diff(batch.bounds), batch.positions
        last = np.repeat(batch.prompts + (self.settles - 1), lengths)
        late, found = positions > last, np.empty((len(last), self._parts.width), np.float32)
        if not late.all():
            found[~late] = self._computed(_rows(batch, ~late))
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        for rows, settle in ((positions == last, True), (late, False)):
            at = batch.block_tables[sequence[rows], last[rows] // self.block_size]
            if settle:
                self._settled[at] = found[rows]
            else:
                found[rows] = self._settled[at]
        return found

    def _computed(self, batch: Batch) -> Floats:
        return self._parts.config.scalings(self._first.run(batch))

    def run(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        sequences: Sequences | None = None,
        mixtures: Sequence[Mixture] = (),
    ) -> dict[str, Floats]:
        """The second pass alone, with scalings as an input."""
        return self._second.executor.run(inputs, sequences, mixtures)

    def adapter(self, terms: Mapping[Site, Term]) -> Adapter:
        """One of the second pass."""
        return self._second.executor.adapter(terms)

    def requantize(self, plan: Plan, *, progress: Progress | None = None) -> None:
        """See `Executor`."""
        self._load(self._store.replanned(plan), progress)

    def profile(self, act: Callable[[], None]) -> list[Phase]:
        """Of both passes."""
        first, second = self._first.executor, self._second.executor
        found: list[Phase] = []
        return first.profile(lambda: found.extend(second.profile(act))) + found

    def value(self, name: str) -> Floats:
        """Of the second pass."""
        return self._second.executor.value(name)


def _there(
    program: Program, adapters: Iterable[Mapping[Site, Term]]
) -> Iterator[Mapping[Site, Term]]:
    """Of each adapter the terms that the program has a place for."""
    places = {site for op in program.ops for site in sites(op)}
    for terms in adapters:
        yield {site: term for site, term in terms.items() if site in places}


def _rows(batch: Batch, rows: NDArray[np.bool_]) -> Batch:
    """These rows of a batch, without outputs."""
    bounds = np.concatenate([[0], np.cumsum(rows)])[batch.bounds]
    axes = {"spans": batch.spans, "rotary": batch.rotary}
    return replace(
        batch, tokens=batch.tokens[rows], positions=batch.positions[rows],
        bounds=bounds.astype(np.int32), outputs=np.empty(0, np.int32),
        **{name: None if found is None else found[..., rows] for name, found in axes.items()},
    )  # fmt: skip
