"""How to open a model on this machine: what fits, how good it is, and how fast it will be."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Literal, get_args

from squall import decoder, program
from squall.assembly import Prepared, place, prepare
from squall.engine.memory import DEFAULT_CONTEXT, SMALLEST_CONTEXT, choose_context
from squall.errors import InvalidRequest, OutOfMemory
from squall.executors.memory import by_memory
from squall.machine import largest_cache_bytes
from squall.measure import Bench, Workload, seconds
from squall.opening import KvDtype, Opening
from squall.quant.isq import parse_type
from squall.weights import Progress, WeightStore

Goal = Literal["quality", "balanced", "speed"]
# By how much the perplexity of Llama 3 8B grows on Wikitext if most weights are of a type, made
# without an importance matrix: tools/perplexity/README.md of ggml-org.
LOSS = {"Q8_0": 0.0009, "Q6K": 0.0056, "Q5K": 0.018, "Q4K": 0.043, "Q3K": 0.28, "Q2K": 0.57}
_LOSS = {"f32": 0.0, "f16": 0.0, "bf16": 0.0} | {parse_type(name): x for name, x in LOSS.items()}
# What a goal puts up with.
MOST_LOSS: dict[str, float] = {"quality": 0.0, "balanced": 0.05, "speed": 0.3}
PROMPT, ANSWER = 512, 128  # as `squall bench` measures
_LEAST_BYTES, _STEPS, _ROUNDS = 128 << 20, 8, 3


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to open a model.

    isq: what its weights become; None: they stay as they are. format: of most of the layers.
    loss: see `LOSS`; None: nobody knows.
    context: tokens, with whose KV cache it takes `bytes`; 0: it does not fit. longest: the most
        tokens that would fit.
    prompt, answer: tokens a second, expected of a prompt of 512 tokens and after it; None: it was
        not measured.
    """

    isq: str | None
    format: str
    loss: float | None
    kv_dtype: KvDtype
    context: int
    longest: int
    weight_bytes: int
    bytes: int
    prompt: float | None = None
    answer: float | None = None


def choices(opening: Opening, progress: Progress | None = None) -> list[Choice]:
    """The ways to open a model, the best quality first; what fits is measured, by a few layers.

    opening: its `isq`, `context` and `kv_dtype` are kept where they say something. progress: called
    with (ways done, all).
    """
    found: list[Choice] = []
    stored = prepare(opening)
    choose_context(opening.context, trained=stored[1].decoder.context, loads=())
    ways = [*_ways(stored, opening)]
    for prepared, own in ways:
        if progress is not None:
            progress(len(found), len(ways))
        found.append(_choice(prepared, own))
    return found


def best(found: list[Choice], goal: str = "balanced") -> Choice:
    """The fastest of those that lose no more than the goal puts up with, or what loses least."""
    if goal not in get_args(Goal):
        raise InvalidRequest(f"the goal is {goal!r:.99}; it must be {', '.join(get_args(Goal))}")
    fitting = [choice for choice in found if choice.context]
    if not fitting:
        least = min(choice.weight_bytes for choice in found) >> 20
        raise OutOfMemory(
            f"no way to open it fits: the smallest has {least} MiB of weights, and needs memory "
            "beside them; choose a smaller model, a shorter context, or free memory"
        )
    good = [c for c in fitting if c.loss is not None and c.loss <= MOST_LOSS[goal]]
    least_lossy = min(fitting, key=lambda c: math.inf if c.loss is None else c.loss)
    return max(good, key=lambda choice: choice.answer or 0.0, default=least_lossy)


def _ways(stored: Prepared, opening: Opening) -> Iterator[tuple[Prepared, Opening]]:
    checkpoint, recipe, plan = stored
    yield stored, opening
    formats = {tensor.format for tensor in checkpoint.tensors.values()}
    if not plan.quantizes and not checkpoint.quantization and formats <= {"f32", "f16", "bf16"}:
        for name in LOSS:
            plan = replace(plan, isq=parse_type(name))
            yield (checkpoint, recipe, plan), replace(opening, isq=name)


def _choice(prepared: Prepared, opening: Opening) -> Choice:
    recipe, trained = prepared[1], prepared[1].decoder.context
    wanted = opening.context or min(trained, DEFAULT_CONTEXT)
    for kv_dtype in dict.fromkeys((opening.kv_dtype, "q8_0")):
        opening = replace(opening, kv_dtype=kv_dtype)
        loads = by_memory(place([prepared], opening)[1])
        longest = min([trained, *(load.room for load in loads if load.room is not None)])
        if longest >= wanted:
            break
    context = wanted if longest >= wanted else longest
    if context < (opening.context or min(trained, SMALLEST_CONTEXT)):
        context = 0
    store, compiled = (
        _store(prepared, opening),
        decoder.compile(recipe.decoder, recipe.names, context=1),
    )
    sizes: Counter[str] = Counter()
    for weight in compiled.weights():
        # Embeddings are many values that may stay as they are, and lose nothing.
        if isinstance(weight, program.Matrix) and weight.role.startswith("layers."):
            sizes[store.format(weight)] += weight.experts * weight.rows * weight.cols
    format, weights = max(sizes, key=sizes.__getitem__), sum(load.weights for load in loads)
    taken = weights + context * sum(load.kv for load in loads)
    isq = None if opening.isq is None else str(opening.isq)
    choice = Choice(
        isq, format, _LOSS.get(format), opening.kv_dtype, context, longest, weights, taken
    )
    if not context:
        return choice
    prompt, answer = _rates(prepared, opening, context, weights)
    return replace(choice, prompt=prompt, answer=answer)


def _store(prepared: Prepared, opening: Opening) -> WeightStore:
    checkpoint, _, plan = prepared
    return WeightStore(checkpoint, plan=plan, exact=opening.weights == "f32")


def _rates(prepared: Prepared, opening: Opening, context: int, weights: int) -> tuple[float, float]:
    """Tokens a second of prompt and answer: what some layers take, times all, and the head."""
    depth = len(prepared[1].decoder.layers)
    # So many that caches don't hold them, as they don't hold the model.
    measured = max(_LEAST_BYTES, 2 * largest_cache_bytes())
    count = min(depth, -(-measured * depth // weights))
    small = _some_layers(prepared, [layer * depth // count for layer in range(count)], opening)
    tokens = min(ANSWER, context // 2)
    prompt = min(PROMPT, context - tokens)
    load = Workload(prompt, tokens, kv_dtype=opening.kv_dtype)
    placement = place([small], opening)[0]
    bench = Bench(
        small, load, threads=opening.threads, placement=placement, weights=opening.weights
    )
    first = prompt + tokens // 2
    middle = range(first, min(first + _STEPS, prompt + tokens))

    def answer(*, outputs: bool) -> None:
        for position in middle:
            bench.step(range(1), range(position, position + 1), outputs=outputs)

    prompts = _median(partial(bench.fill, 0, prompt))
    whole, layers = (_median(partial(answer, outputs=o)) / len(middle) for o in (True, False))
    head, scale = max(whole - layers, 0.0), depth / count
    return prompt / ((prompts - head) * scale + head), 1 / (layers * scale + head)


def _median(run: Callable[[], None]) -> float:
    run()  # to warm up
    return statistics.median(seconds(run) for _ in range(_ROUNDS))


def _some_layers(prepared: Prepared, layers: list[int], opening: Opening) -> Prepared:
    """The model of some of its layers."""
    checkpoint, recipe, plan = prepared
    part, spec = recipe.part("decoder"), recipe.decoder
    kept = {f"layers.{layer}.": f"layers.{place}." for place, layer in enumerate(layers)}
    names = {}
    for role, slices in part.names.items():
        layer = ".".join(role.split(".", 2)[:2]) + "."
        if layer in kept:
            names[kept[layer] + role.removeprefix(layer)] = slices
        elif not role.startswith("layers."):
            names[role] = slices
    spec = replace(spec, layers=tuple(spec.layers[layer] for layer in layers), sees=False)
    part = replace(part, spec=spec, names=MappingProxyType(names))
    store, compiled = _store(prepared, opening), decoder.compile(spec, names, context=1)
    size = sum(map(store.nbytes, compiled.weights()))
    return replace(checkpoint, size_bytes=size), replace(recipe, parts=(part,)), plan
