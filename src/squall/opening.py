"""How to open a model: every option once, whoever names it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec, TypeVar, get_args

from squall.errors import InvalidRequest
from squall.quant.isq import Dtype

if TYPE_CHECKING:
    from squall.adapters.anymoe import AnyMoe
    from squall.adapters.xlora import XLora
    from squall.checkpoints.hub import Hub
    from squall.engine.engine import EngineConfig
    from squall.engine.memory import KvSize
    from squall.quant import Topology

Path = str | os.PathLike[str]
Weights = Literal["packed", "f32"]
KvDtype = Literal["f16", "f32", "q8_0"]

NO_MMPROJ = "none"
_CHOICES = {
    "weights": get_args(Weights), "kv_dtype": get_args(KvDtype), "exact": (True, False),
}  # fmt: skip
_KINDS = {
    (int, "a whole number"): "context threads kv_tokens draft_tokens gqa adapter_bytes max_edge "
    "image_bytes tensor_parallel memory_bytes",
    (str, "text"): "architecture chat_template device pooling",
    (int | str | list | tuple, "20 or '0:16;1:12'"): "device_layers",
    (str | os.PathLike, "a path"): "path mmproj tokenizer_json tokenizer_from write_uqff "
    "from_uqff t5 clip vae",
}
_LEAST = {"threads": 1, "draft_tokens": 1, "max_edge": 1, "image_bytes": 0, "tensor_parallel": 1}
# Named, as their modules are slow to import; who has such an object has its module too.
_CLASSES = {
    "kv": "squall.engine.memory:KvSize",
    "engine": "squall.engine.engine:EngineConfig",
    "hub": "squall.checkpoints.hub:Hub",
    "topology": "squall.quant:Topology",
    "draft": "squall.opening:Opening",
    "adapters": "collections.abc:Mapping",
    "active": "collections.abc:Mapping",
    "xlora": "squall.adapters.xlora:XLora",
    "anymoe": "squall.adapters.anymoe:AnyMoe",
}
# Pairs that cannot be, and what to do.
_APART = {
    ("xlora", "anymoe"): "choose one",
    ("xlora", "adapters"): "X-LoRA has its own",
    ("anymoe", "adapters"): "merge them into a model first: squall adapters merge",
    ("xlora", "tensor_parallel"): "several ranks take no adapters",
    ("anymoe", "tensor_parallel"): "several ranks take no adapters",
    ("device_layers", "tensor_parallel"): "every rank has all layers",
    ("merge", "write_uqff"): "merge first, with squall adapters merge, and quantize that",
}
_OF_ADAPTERS = ("adapters", "xlora", "anymoe")


@dataclass(frozen=True, slots=True)
class Opening:
    """A GGUF file, the folder of a model or a model of the hub; without `path` the default one.

    device: where the model runs: "cpu", "cuda", "cuda:1", "mps", or "torch", PyTorch on the CPU;
        "auto": on the GPUs that are here, as far as it fits; layers on several: "cuda:0=16;cpu".
    device_layers: layers on GPUs, as in mistral.rs: 20, of the first, or "0:16;1:12"; the rest run
        on the CPU.
    exact: on a GPU, rows are the same bytes whatever they are computed with, as on the CPU; False:
        the fastest kernels.
    tensor_parallel: so many processes run a part of every layer each, on a GPU each; torchrun
        starts them, or `command` does: arguments of Python that open the model in the same way.
    context: tokens of prompt and answer together; by default what the model was trained for,
        up to 8192 and to half of the free memory.
    threads: by default as many as this process may use.
    weights: "f32" computes with the exact values of the file, for comparisons; slow and large.
    kv_dtype: of the KV cache; "q8_0" takes half the memory of "f16", and a little quality.
    kv: how large the KV cache is, for all requests together, and its blocks.
    kv_tokens: short for `KvSize(tokens=kv_tokens)`.
    memory_bytes: of this machine's memory at most so many, for weights and KV cache; by default
        what is free.
    isq: quantize the weights while they are read: "Q4K", "Q8_0", "HQQ4", "FP8"..., or bits.
    topology: other types for some layers, a `Topology` or its YAML file.
    dtype: of the float weights that are not quantized; "auto": as they are stored.
    experts_only: of a mixture of experts quantize only the experts and the head.
    engine: how many requests run and wait, and what is kept.
    draft: guesses how answers go on, which makes them faster and changes nothing: a smaller model
        with the same vocabulary, or "ngram", a look-up in the text so far.
    draft_tokens: at most so many guesses an answer and step, by default 32.
    architecture: such as "mistral", in place of what a folder's config.json says. Of models that
        make pictures "flux", or "flux-offloaded": weights are read when their layer runs.
    hub: revision and token for a `path` such as "owner/name:file", or that it must be offline.
    tokenizer_json: a file to use in place of the model's own tokenizer.
    tokenizer_from: a folder, or a model of the hub, whose tokenizer and chat template are used as
        far as it has them.
    mmproj: the GGUF file of the tower that a GGUF model sees with; by default the one beside it
        that fits it. "none": it is to see nothing.
    chat_template: in place of the model's own: a name, a .jinja or .json file, or Jinja.
    gqa: query heads to a KV head, which files from before GGUF do not say.
    write_uqff: write the quantized weights to this new UQFF file, and open that.
    from_uqff: open this UQFF file, or the one of this name in the model's folder.
    adapters: LoRA adapters by name: folders as PEFT writes them, models of the hub, or GGUF files.
        Requests choose among them; `Model.adapters` has more to do with them.
    active: those that requests get that choose none, and the weight of each.
    merge: add all `adapters` to the weights while these are read, so that no request can choose
        them or leave them out; None: if the weights are floats.
    adapter_bytes: so much memory for adapters; those that were not used for longest make room.
    xlora: adapters that the model itself weighs, token by token (X-LoRA).
    anymoe: experts made of other models or adapters, and gates between them (AnyMoE).
    t5, clip, vae: of a model that makes pictures, where these parts are, if not beside it or where
        they usually come from.
    pooling: of a model that embeds, which of a text's rows become its vector: "cls", the first,
        "mean" or "last"; by default what its files say.
    max_edge: images are made smaller first, until their longer edge is at most so many pixels.
    image_bytes: so much memory for what models made of images lately, so that it is not made again.
    progress: called with (done, in all): bytes loaded; then adapters, or steps of a training.
    """

    path: Path | None = None
    _: KW_ONLY
    device: str = "cpu"
    device_layers: int | str | Sequence[str] | None = None
    exact: bool = True
    tensor_parallel: int | None = None
    command: tuple[str, ...] = ()
    context: int | None = None
    threads: int | None = None
    weights: Weights = "packed"
    kv_dtype: KvDtype = "f16"
    kv: KvSize | None = None
    kv_tokens: int | None = None
    memory_bytes: int | None = None
    isq: str | int | None = None
    topology: Topology | Path | None = None
    dtype: Dtype = "auto"
    experts_only: bool = False
    engine: EngineConfig | None = None
    draft: Opening | Path | None = None
    draft_tokens: int | None = None
    architecture: str | None = None
    hub: Hub | None = None
    tokenizer_json: Path | None = None
    tokenizer_from: Path | None = None
    mmproj: Path | None = None
    chat_template: str | None = None
    gqa: int = 1
    write_uqff: Path | None = None
    from_uqff: Path | None = None
    adapters: Mapping[str, Path] | None = None
    active: Mapping[str, float] | None = None
    merge: bool | None = False
    adapter_bytes: int | None = None
    xlora: XLora | None = None
    anymoe: AnyMoe | None = None
    t5: Path | None = None
    clip: Path | None = None
    vae: Path | None = None
    pooling: str | None = None
    max_edge: int | None = None
    image_bytes: int = 256 << 20
    progress: Callable[[int, int], None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                listed = ", ".join(map(str, allowed))
                raise InvalidRequest(f"{name} is {value!r}; it must be one of {listed}")
        for (kind, what), names in _KINDS.items():
            for name in names.split():
                value = getattr(self, name)
                none = value is None and name != "device"
                if not none and (not isinstance(value, kind) or isinstance(value, bool)):
                    raise InvalidRequest(f"{name} is {value!r}; it must be {what}")
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise InvalidRequest(f"{name} is {value}; it must be at least {least}")
        for name, place in _CLASSES.items():
            value, path = getattr(self, name), name in ("topology", "draft")
            right = value is None or (path and isinstance(value, str | os.PathLike))
            if not right and not isinstance(value, resolve_name(place)):
                what = f"a {place.partition(':')[2]}{' or the path of its file' * path}"
                raise InvalidRequest(f"{name} is {value!r}; it must be {what}")

        self._check_adapters()

    def _check_adapters(self) -> None:
        for (one, other), remedy in _APART.items():
            if getattr(self, one) and getattr(self, other):
                raise InvalidRequest(f"{one} and {other} cannot go together: {remedy}")
        if isinstance(self.draft, Opening) and any(getattr(self.draft, n) for n in _OF_ADAPTERS):
            raise InvalidRequest("a draft has no adapters; merge them: squall adapters merge")
        places = ("device", "device_layers", "tensor_parallel")
        if isinstance(self.draft, Opening) and any(
            getattr(self.draft, name) != getattr(DEFAULTS, name) for name in places
        ):
            raise InvalidRequest("a draft runs where the model begins; it has no device of its own")

    def check_only(self, allowed: frozenset[str], what: str) -> None:
        """Raises InvalidRequest for an option that is set and is none of those for `what`."""
        for one in fields(self):
            if one.name not in allowed and getattr(self, one.name) != getattr(DEFAULTS, one.name):
                known = ", ".join(sorted(allowed))
                raise InvalidRequest(f"{one.name} is not for {what}; there are {known}")

    @property
    def of_draft(self) -> Opening | None:
        """How to open the draft model, if there is one."""
        if isinstance(self.draft, Opening):
            return self.draft
        none = self.draft in (None, "ngram")
        return None if none else Opening(self.draft, hub=self.hub, progress=self.progress)


DEFAULTS = Opening()

_Options = ParamSpec("_Options")
_Opened = TypeVar("_Opened")


def one_by_one(
    describe: Callable[_Options, Opening], open_with: Callable[[type[_Opened], Opening], _Opened]
) -> Callable[Concatenate[type[_Opened], _Options], _Opened]:
    """`open_with` as a method that takes the options themselves, spelled nowhere else."""

    def open(cls: type[_Opened], /, *path: _Options.args, **options: _Options.kwargs) -> _Opened:
        return open_with(cls, describe(*path, **options))

    open.__doc__ = describe.__doc__
    first, *_ = inspect.signature(open).parameters.values()
    options = inspect.signature(describe).parameters.values()
    open.__signature__ = inspect.Signature([first, *options])  # type: ignore[attr-defined]
    return open
