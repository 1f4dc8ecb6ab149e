"""How a model is put together: from how to open it, to the parts that it consists of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from squall import convert, decoder, executors, recipes
from squall.adapters.edits import adaptable
from squall.adapters.shelf import Shelf
from squall.checkpoints import UQFF, Checkpoint, open_checkpoint, open_gguf
from squall.checkpoints.hub import Hub
from squall.embeddings.files import embeds
from squall.engine.draft import Draft
from squall.engine.engine import Engine, EngineConfig
from squall.engine.memory import DEFAULT_CONTEXT, KvSize, choose_context, choose_kv_tokens
from squall.engine.request import Request
from squall.engine.speculation import MOST_GUESSES, Speculation
from squall.errors import InvalidRequest, ModelNotFound, SquallError, UnsupportedModel
from squall.executors import Executor, Limits, Placement, ThreadPool, devices
from squall.executors.memory import Load, Sizes, by_memory
from squall.executors.sharding import shard
from squall.locate import find_mmproj, locate, locate_uqff
from squall.machine import available_bytes
from squall.opening import NO_MMPROJ, Opening
from squall.quant import Plan
from squall.recipes import Recipe, mmproj
from squall.recipes.fields import LOG
from squall.spec import Connector, Tower
from squall.text.chat import ChatTemplate
from squall.text.hf_tokenizer import HfTokenizer
from squall.text.stream import TextStream
from squall.text.tokenizer import Tokenizer
from squall.weights import WeightStore

if TYPE_CHECKING:
    from squall.adapters.lora import Lora
    from squall.vision.sight import Sight

Prepared = tuple[Checkpoint, Recipe, Plan]

MAX_ROWS = 512
MAX_OUTPUTS = 64
# Tokens of the context by default where a prompt is one step, for which there are buffers.
LONGEST_STEP = 2048
# Options for models of other kinds.
_OF_OTHERS = {**dict.fromkeys(("t5", "clip", "vae"), "make pictures"), "pooling": "embed"}
# Of the free memory, for the weights of adapters.
ADAPTER_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Assembly:
    """What an open model consists of.

    template: in place of the checkpoint's own.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    tokenizer: Tokenizer
    template: ChatTemplate | None
    engine: Engine
    adapters: Shelf
    sight: Sight | None = None


def assemble(opening: Opening) -> Assembly:
    """Everything that the opening describes, ready to answer."""
    model = prepare(opening)
    if opening.write_uqff is not None:
        checkpoint = _written(*model, opening)
        model = checkpoint, recipes.load(checkpoint, opening.architecture), Plan()
    checkpoint, recipe, _ = model
    lent = _lent(opening)
    tokenizer = open_tokenizer(checkpoint, opening.tokenizer_json, lent)
    small = opening.of_draft
    models = [model] if small is None else [model, _prepared_draft(small, tokenizer)]
    engine = opening.engine or EngineConfig()
    room = _room(models, opening, engine.max_seqs)
    template = None if lent is None else ChatTemplate.from_folder(lent)
    template = template if template and template.sources else None
    if opening.chat_template:
        template = (template or template_of(checkpoint)).replaced(opening.chat_template)

    def encode(text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        prompt = (template or template_of(checkpoint)).prompt(chat, tokenizer)
        return tokenizer.encode_pieces(prompt.pieces)

    merged = _merged(model, opening)
    executor = _executor(model, opening, room, encode, merged)
    sight = _sight(model, opening, executor, tokenizer, merged)
    adapters = _shelf(model, opening, sight or executor)
    most, draft = min(opening.draft_tokens or MOST_GUESSES, MAX_OUTPUTS), None
    if small is not None:
        own = _merged(models[1], small)
        beside = replace(room, placement=room.placement.first)
        draft = Draft(_executor(models[1], small, beside, encode, own), executor.vocab)
    speculation = None if opening.draft is None else Speculation(most, draft)
    answering = _engine(executor, engine, tokenizer, speculation)
    return Assembly(checkpoint, recipe, tokenizer, template, answering, adapters, sight)


def _lent(opening: Opening) -> Path | None:
    """The folder of `tokenizer_from`; None, which is told, where it cannot be had."""
    if (name := opening.tokenizer_from) is None:
        return None
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    try:
        return (opening.hub or Hub()).fetch(f"{name}:tokenizer.json", opening.progress).parent
    except ModelNotFound as error:
        LOG.warning("the model's own tokenizer is used: %s", error)
        return None


def open_tokenizer(
    checkpoint: Checkpoint,
    tokenizer_json: str | os.PathLike[str] | None = None,
    lent: Path | None = None,
) -> Tokenizer:
    """The tokenizer of a checkpoint, from where its kind has it, from a file, or of a folder."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if lent is not None and (lent / "tokenizer.json").is_file():
        folder = lent
    elif checkpoint.kind == "gguf" and tokenizer_json is None:
        return Tokenizer.from_gguf(checkpoint.metadata)
    return HfTokenizer.from_folder(folder, tokenizer_json=tokenizer_json)


def template_of(checkpoint: Checkpoint) -> ChatTemplate:
    if checkpoint.kind == "gguf":
        return ChatTemplate.from_gguf(checkpoint.metadata)
    return ChatTemplate.from_folder(checkpoint.path)


def prepare(opening: Opening) -> Prepared:
    """What `Model.open` begins with: the files, what the model is, what becomes of the weights."""
    for name, whose in _OF_OTHERS.items():
        if getattr(opening, name) is not None:
            raise InvalidRequest(f"{name} is for models that {whose}")
    checkpoint = open_checkpoint(_locate(opening), gqa=opening.gqa)
    if embeds(checkpoint.path, checkpoint.metadata):
        raise UnsupportedModel(
            f"{checkpoint.path.name} embeds texts, or judges pairs of them, and writes none: open "
            "it with squall.Embedder, or serve it with squall serve"
        )
    recipe = recipes.load(checkpoint, opening.architecture)
    checkpoint, recipe = _seeing(checkpoint, recipe, opening)
    plan = Plan.of(
        opening.isq, opening.topology, experts_only=opening.experts_only, dtype=opening.dtype
    )
    plan.topology.check(len(recipe.decoder.layers))
    return checkpoint, recipe, plan


def _seeing(checkpoint: Checkpoint, recipe: Recipe, opening: Opening) -> tuple[Checkpoint, Recipe]:
    """A GGUF model with the tower of an mmproj file, where one is named, or one beside it fits."""
    text, asked = checkpoint.path, opening.mmproj is not None
    gguf = checkpoint.kind == "gguf" and text.suffix == ".gguf"
    if opening.mmproj == NO_MMPROJ or not (gguf or asked):
        return checkpoint, recipe
    if not gguf:
        raise InvalidRequest(f"mmproj is for GGUF models, and {text} is none")
    files = find_mmproj(text, opening.mmproj, opening.hub, opening.progress)
    fitting = [found for path in files if (found := _with_tower(recipe, path, must=asked))]
    if len(fitting) > 1:
        names = ", ".join(file.path.name for file, _ in fitting)
        raise InvalidRequest(f"several mmproj files fit {text.name}; name one as mmproj: {names}")
    if not fitting:
        return checkpoint, recipe
    file, recipe = fitting[0]
    size = checkpoint.size_bytes + file.size_bytes
    return replace(checkpoint, beside={mmproj.SOURCE: file}, size_bytes=size), recipe


def _with_tower(recipe: Recipe, path: Path, *, must: bool) -> tuple[Checkpoint, Recipe] | None:
    """An mmproj file, and the model with it; None if it does not fit, and need not."""
    try:
        file = mmproj.opened(open_gguf(path))
        return file, recipes.seeing(recipe, file)
    except SquallError as error:
        if must:
            raise
        LOG.info("%s is left out: %s", path.name, error)
        return None


def _prepared_draft(opening: Opening, tokenizer: Tokenizer) -> Prepared:
    """What opening a draft model begins with; raises InvalidRequest for another vocabulary."""
    prepared = prepare(replace(opening, mmproj=NO_MMPROJ))
    found = open_tokenizer(prepared[0], opening.tokenizer_json, _lent(opening))
    if (id_ := tokenizer.differs(found)) is not None:
        raise InvalidRequest(
            f"the draft model {prepared[0].path} has another vocabulary, from token {id_} on; "
            "choose a smaller model of the same family"
        )
    return prepared


@dataclass(frozen=True, slots=True)
class _Room:
    """What executors of one engine have in common."""

    context: int
    limits: Limits
    placement: Placement
    pool: ThreadPool


def _room(models: Sequence[Prepared], opening: Opening, max_seqs: int) -> _Room:
    """Sizes of the context, and of the KV cache, which several models share."""
    kv = opening.kv or KvSize(tokens=opening.kv_tokens)
    placement, stages = place(models, opening)
    loads = by_memory(stages)
    trained, wanted = models[0][1].decoder.context, opening.context
    if wanted is None and opening.anymoe:
        wanted = min(trained, LONGEST_STEP)
    size = choose_context(wanted, trained=trained, loads=loads)
    tokens = choose_kv_tokens(kv, context=size, max_seqs=max_seqs, loads=loads)
    limits = Limits(
        rows={"tokens": MAX_ROWS, "outputs": MAX_OUTPUTS},
        blocks=-(-tokens // kv.block_size),
        block_size=kv.block_size,
        kv_dtype=opening.kv_dtype,
    )
    size = min(size, tokens) if opening.context is None else size
    if placement.ranks is not None:
        size, agreed = placement.ranks.agree((size, asdict(limits)))
        limits = Limits(**agreed)
    return _Room(size, limits, placement, executors.thread_pool(opening.threads))


def place(models: Sequence[Prepared], opening: Opening) -> tuple[Placement, list[Load]]:
    """Where the first of the models runs, and what each stage holds; the others, whole, come last.

    They run where the first one begins. Raises InvalidRequest for a device that is not here.
    Of several ranks, which it waits for, this is of one.
    """
    ranks, topology = None, models[0][2].topology
    if (size := opening.tensor_parallel or 1) > 1:
        from squall.executors.parallel import Ranks

        cuda = opening.device.startswith("cuda")
        devices.check(f"cuda:{size - 1}" if cuda else "torch")
        _sizes(models[0], opening, (0, size))  # no rank is started for what cannot be shared out
        ranks = Ranks(size, opening.device, opening.command)
        opening = replace(opening, device=ranks.device)
    sizes = _sizes(models[0], opening, None if ranks is None else (ranks.rank, size))
    others = [_sizes(model, opening) for model in models[1:]]
    count = len(sizes.kv)
    if opening.device == devices.AUTO and opening.device_layers is None:
        stages = _chosen(sizes, others, models[0][1].decoder.context, opening)
    else:
        stages = devices.stages_of(opening.device, opening.device_layers)
    own = [topology.device_of(layer) for layer in range(count)]
    placement = Placement(stages, opening.exact, opening.dtype, ranks).overridden(
        [device and devices.device_name(device) for device in own]
    )
    for device, _ in placement.spread(count):
        devices.check(device)
    free = partial(_free, opening)
    loads = sizes.loads(placement.spread(count), free)
    for more in others:
        loads += more.loads(placement.first.spread(len(more.kv)), free)
    return placement, loads


def _free(opening: Opening, device: str) -> int | None:
    """What a device has for the model."""
    free, most = devices.free_bytes(device), opening.memory_bytes
    if most is None or device not in ("cpu", "torch"):
        return free
    return most if free is None else min(most, free)


def _chosen(
    sizes: Sizes, others: Sequence[Sizes], trained: int, opening: Opening
) -> tuple[devices.Stage, ...]:
    """Layers to the GPUs that are here, with KV cache for what is asked for."""
    kv = opening.kv or KvSize(tokens=opening.kv_tokens)
    tokens = max(opening.context or min(trained, DEFAULT_CONTEXT), kv.tokens or 0)
    beside = sum(more.bytes(tokens) for more in others)
    layers = [sizes.bytes(tokens, i, i + 1) for i in range(len(sizes.kv))]
    layers[0] += beside
    free = {gpu: devices.free_bytes(gpu) or 0 for gpu in devices.gpus() if gpu != "mps"}
    return devices.chosen(layers, sizes.bytes(tokens) + beside, free)


def _sizes(model: Prepared, opening: Opening, rank: tuple[int, int] | None = None) -> Sizes:
    """rank: which of how many it is, where several have a part each."""
    checkpoint, recipe, plan = model
    program = decoder.compile(recipe.decoder, recipe.names, context=recipe.decoder.context)
    store = WeightStore(checkpoint, plan=plan, exact=opening.weights == "f32")
    own = program if rank is None else shard(program, store, *rank)
    return Sizes.of(own, store, opening.kv_dtype, caches=2 if opening.xlora else 1, whole=program)


def _executor(
    model: Prepared,
    opening: Opening,
    room: _Room,
    encode: Callable[[str], Sequence[int]],
    merged: Mapping[str, Any],
) -> Executor:
    """One of the model, with what adapters make of it.

    encode: what a user says, as tokens. merged: what a weight store adds to the weights.
    """
    checkpoint, recipe, plan = model
    context, limits = min(room.context, recipe.decoder.context), room.limits
    store = partial(WeightStore, checkpoint, plan=plan, exact=opening.weights == "f32")
    given: dict[str, Any] = {
        "placement": room.placement, "pool": room.pool, "progress": opening.progress,
    }  # fmt: skip
    if opening.xlora is not None and recipe.sees:
        raise InvalidRequest("X-LoRA is for models that read no images")
    if opening.xlora is not None:
        from squall.adapters.target import Target
        from squall.adapters.xlora import CLASSIFIER, Parts, TwoPasses

        parts = Parts.read(opening.xlora, Target.of(checkpoint, recipe), opening.hub)
        own, programs = (
            store(others={CLASSIFIER: parts.classifier}),
            parts.programs(recipe, context),
        )
        return cast(Executor, TwoPasses(parts, programs, own, limits, **given))
    if opening.anymoe is not None:
        from squall.adapters.anymoe import Experts
        from squall.adapters.anymoe_training import open_experts

        experts = Experts(opening.anymoe, checkpoint, recipe, opening.hub)
        own = store(others=experts.others, merged=experts.merged)
        # A prompt is one step, beside a row of each other request.
        most = max(context + (opening.engine or EngineConfig()).max_seqs, MAX_ROWS)
        limits = replace(limits, rows={**limits.rows, "tokens": most})
        given |= {"context": context, "encode": encode, "trained": opening.progress}
        return open_experts(experts, own, limits, **given)
    program = adaptable(decoder.compile(recipe.decoder, recipe.names, context=context))
    return executors.open(program, store(**merged), limits, **given)


def _sight(
    model: Prepared,
    opening: Opening,
    executor: Executor,
    tokenizer: Tokenizer,
    merged: Mapping[str, Any],
) -> Sight | None:
    """What a model with a tower sees with. merged: see `_executor`."""
    checkpoint, recipe, plan = model
    if not recipe.sees:
        return None
    from squall.vision import families, tower
    from squall.vision.placing import stand_in
    from squall.vision.sight import Sight

    given = recipe.architecture, checkpoint, opening.max_edge
    both = families.family(*given), families.family(*given, low=True)
    if checkpoint.beside:
        shown = f"{checkpoint.metadata.get('tokenizer.chat_template')}{opening.chat_template}"
        both = stand_in(both[0], tokenizer, shown), stand_in(both[1], tokenizer, shown)
    seeing, connector = recipe.part("tower").spec, recipe.part("connector").spec
    names = recipe.all_names
    program = adaptable(tower.compile(cast(Tower, seeing), cast(Connector, connector), names))
    recalls = recipe.decoder.recalls
    keys = adaptable(decoder.compile_memory(recipe.decoder, names)) if recalls else None
    store = WeightStore(checkpoint, plan=plan, exact=opening.weights == "f32", **merged)
    return Sight(both, executor, store, (program, keys), limit_bytes=opening.image_bytes)


def _read_adapter(model: Prepared, opening: Opening, path: str | os.PathLike[str]) -> Lora:
    from squall.adapters.lora import read
    from squall.adapters.target import Target

    return read(path, Target.of(*model[:2]), hub=opening.hub)


def _merges(checkpoint: Checkpoint, opening: Opening) -> bool:
    """Whether adapters become part of the weights."""
    if opening.merge is None:
        stored = {tensor.format for tensor in checkpoint.tensors.values()}
        return not checkpoint.quantization and stored <= {"f32", "f16", "bf16"}
    if opening.merge and not opening.adapters:
        raise InvalidRequest("merge: there is nothing to merge; name adapters")
    return opening.merge


def _merged(model: Prepared, opening: Opening) -> dict[str, Any]:
    """What a weight store is to add to the weights."""
    if not opening.adapters or not _merges(model[0], opening):
        return {}
    from squall.adapters.lora import merged_terms, merged_vectors

    active = opening.active or {}
    loras = [
        (_read_adapter(model, opening, path), active.get(name, 1.0))
        for name, path in opening.adapters.items()
    ]
    return {"merged": merged_terms(loras), "vectors": merged_vectors(loras)}


def _shelf(model: Prepared, opening: Opening, executor: Executor | Sight) -> Shelf:
    """The adapters that requests may have; at first those of the opening."""
    limit, free = opening.adapter_bytes, available_bytes()
    if limit is None and free is not None:
        limit = int(free * ADAPTER_SHARE)
    alone = opening.xlora or opening.anymoe

    def refuse(_: object) -> NoReturn:
        raise InvalidRequest("a model with X-LoRA or AnyMoE takes no adapters beside its own")

    make = refuse if alone else executor.adapter
    shelf = Shelf(partial(_read_adapter, model, opening), make, limit_bytes=limit)
    if _merges(model[0], opening):
        return shelf
    adapters = opening.adapters or {}
    for number, (name, path) in enumerate(adapters.items(), start=1):
        shelf.load(name, path)
        if opening.progress is not None:
            opening.progress(number, len(adapters))
    shelf.activate(opening.active or {})
    return shelf


def _engine(
    executor: Executor, config: EngineConfig, tokenizer: Tokenizer, speculation: Speculation | None
) -> Engine:
    def text(request: Request) -> TextStream:
        at_start = not request.continues
        return TextStream(tokenizer, request.stop, at_start=at_start, shown=request.shown)

    stop_ids = tokenizer.stop_ids
    return Engine(executor, config, text=text, stop_ids=stop_ids, speculation=speculation)


def _locate(opening: Opening) -> Path:
    path, name = opening.path, opening.from_uqff
    if name is not None and (path is None or Path(path).expanduser().is_dir()):
        return locate_uqff(Path(path or "").expanduser(), name)
    judge = partial(recipes.judge, architecture=opening.architecture)
    seen = opening.mmproj is None
    found = locate(path, opening.hub, opening.progress, judge, mmproj=seen)
    return found if name is None else locate_uqff(found, name)


def _written(checkpoint: Checkpoint, recipe: Recipe, plan: Plan, opening: Opening) -> Checkpoint:
    """The checkpoint as a UQFF file, which is new."""
    path = Path(opening.write_uqff or "")
    if path.suffix != UQFF:
        raise InvalidRequest(f"write_uqff is {str(path)!r}; the name must end in {UQFF}")
    if not plan.quantizes:
        raise InvalidRequest("write_uqff needs isq or a topology: what to quantize the weights to")
    threads = opening.threads or executors.default_threads()
    convert.write(checkpoint, recipe, plan, path, threads=threads, progress=opening.progress)
    return open_checkpoint(path)
