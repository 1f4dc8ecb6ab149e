"""What a model takes of this machine's memory, told before it is opened: only headers are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from squall import decoder
from squall.assembly import MAX_OUTPUTS, MAX_ROWS, Prepared, place, prepare
from squall.checkpoints import read_header
from squall.engine.memory import DEFAULT_CONTEXT, SMALLEST_CONTEXT, KvSize, choose_context
from squall.executors.memory import activations, by_memory
from squall.locate import locate
from squall.opening import NO_MMPROJ, Opening

Kind = Literal["text", "pictures", "embeddings"]

# Of the tokenizer and of what grammars need, for each token of the vocabulary.
TOKEN_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Needs:
    """weights: bytes of them, and about what runs take beside. cache: of the KV cache, at least.

    opening: the model with the context that it has, however much the others leave it.
    """

    weights: int
    cache: int
    opening: Opening

    @property
    def bytes(self) -> int:
        return self.weights + self.cache


def needs(kind: Kind, opening: Opening, total: int) -> Needs:
    """What a model needs where there are `total` bytes for it alone. Raises what opening may."""
    return _KINDS[kind](opening, total)


def _text(opening: Opening, total: int) -> Needs:
    models = [prepare(opening)]
    if (small := opening.of_draft) is not None:
        models.append(prepare(replace(small, mmproj=NO_MMPROJ)))
    loads = by_memory(place(models, opening)[1])
    here = [load for load in loads if load.device == "cpu"]
    beside = sum(map(_beside, models))
    if len(loads) > len(here):  # GPUs say themselves what fits
        return Needs(sum(load.weights for load in here) + beside, 0, opening)
    (load,) = here
    weights, trained = load.weights + beside, models[0][1].decoder.context
    kv = opening.kv or KvSize(tokens=opening.kv_tokens)
    tokens = kv.tokens or (kv.bytes or 0) // max(load.kv, 1)
    context = opening.context
    if context is None and opening.anymoe is None:
        least = weights + 2 * SMALLEST_CONTEXT * load.kv
        alone = replace(load, weights=weights, free=max(total, least))
        context = choose_context(None, trained=trained, loads=[alone])
        context = min(context, tokens or context)
    tokens = tokens or context or min(trained, DEFAULT_CONTEXT)
    return Needs(weights, tokens * load.kv, replace(opening, context=context))


def _beside(model: Prepared) -> int:
    recipe = model[1].decoder
    program = decoder.compile(recipe, model[1].names, context=recipe.context)
    rows = defaultdict(lambda: MAX_ROWS, outputs=MAX_OUTPUTS)  # of images, too
    return activations(program, rows, integers=True) + TOKEN_BYTES * recipe.vocab


def _pictures(opening: Opening, _: int) -> Needs:
    from squall.diffusion.pipeline import open_pipeline
    from squall.diffusion.request import PictureRequest

    pipeline, _path = open_pipeline(opening, loads=False)
    runs = pipeline.needs(PictureRequest(prompt="any"), loaded=True)
    return Needs(sum(part.weight_bytes for part in pipeline.parts.values()) + runs, 0, opening)


def _embeddings(opening: Opening, _: int) -> Needs:
    header = read_header(locate(opening.path, opening.hub, opening.progress))
    return Needs(header.size_bytes, 0, opening)


_KINDS: dict[Kind, Callable[[Opening, int], Needs]] = {
    "text": _text, "pictures": _pictures, "embeddings": _embeddings,
}  # fmt: skip
