"""How a model that embeds is put together: files, weights, tokens, and what comes after pooling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from squall import encoder, executors
from squall.checkpoints import Checkpoint, open_checkpoint, open_file
from squall.embeddings.files import Linear, Setup, judges, pooling_named, setup
from squall.embeddings.reading import TEXTS, Place, Reader
from squall.embeddings.tokens import Text, Tokens, open_tokens
from squall.errors import InvalidCheckpoint, InvalidRequest
from squall.executors import Executor, Limits, Placement, ThreadPool, devices
from squall.locate import locate
from squall.opening import Opening
from squall.program import Slice
from squall.quant import FormatTotal, Plan
from squall.recipes import embedders
from squall.recipes.embedders import Pooling, Recipe
from squall.recipes.names import Naming, Part, place
from squall.spec import Decoder, Dense, Head
from squall.weights import WeightStore

Floats = NDArray[np.float32]
OPTIONS = frozenset((
    "path", "threads", "device", "exact", "isq", "topology", "dtype", "weights", "hub", "progress",
    "tokenizer_json", "context", "command", "pooling",
))  # fmt: skip
# Tokens of a text by default, at most.
CONTEXT = 8192
# How Qwen3-Reranker is asked, by its model card: what stands around a pair, and the pair.
_AROUND = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
_PAIR = (
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {query}\n<Document>: {document}"
)


@dataclass(frozen=True, slots=True)
class Parts:
    """What an open model that embeds consists of.

    ids: tokens that there are. asked: it is a language model, which says no or yes.
    """

    path: Path
    width: int
    context: int
    ids: int
    reranks: bool
    asked: bool
    tokens: Tokens
    setup: Setup
    reader: Reader
    head: Executor | None

    @property
    def formats(self) -> tuple[FormatTotal, ...]:
        return self.reader.formats

    def vectors(self, texts: Sequence[Text]) -> Iterator[Floats]:
        """What the head makes of each text's row, or that row."""
        rows = self.reader.rows(texts)
        if self.head is None:
            yield from rows
            return
        while some := list(islice(rows, TEXTS)):
            (made,) = self.head.run({encoder.POOLED: np.stack(some)}, patient=True).values()
            yield from made

    def pairs(self, query: str, documents: Sequence[str], limit: int | None) -> list[Text]:
        if self.asked:
            texts = [_PAIR.format(query=query, document=document) for document in documents]
            return self.tokens.texts(self.tokens.bodies(texts), limit)
        first, *others = self.tokens.bodies([query, *documents])
        return self.tokens.pairs(first, others, limit)

    def score(self, logits: Floats) -> float:
        """What a classifier's number says, or the logits of no and yes."""
        *no, logit = logits.tolist()
        if not self.setup.sigmoid:
            return float(logit)
        x = logit - sum(no)
        e = math.exp(-abs(x))
        return float((1 if x >= 0 else e) / (1 + e))


def assemble(opening: Opening, pool: ThreadPool | None) -> Parts:
    opening.check_only(OPTIONS, "models that embed")
    if opening.path is None:
        raise InvalidRequest("name a model that embeds: a folder, a GGUF file, or one of the hub")
    checkpoint = open_checkpoint(locate(opening.path, opening.hub, opening.progress, mmproj=False))
    recipe, said = embedders.load(checkpoint), setup(checkpoint)
    unsaid = checkpoint.kind == "folder" and judges(checkpoint.path, checkpoint.metadata)
    asked = unsaid or (recipe.judges and isinstance(recipe.spec, Decoder))
    named = None if opening.tokenizer_json is None else Path(opening.tokenizer_json)
    around = _AROUND if asked else None
    tokens = open_tokens(checkpoint, named, lower=said.lower, around=around)
    recipe = _asked(recipe, tokens) if unsaid else recipe
    plan = Plan.of(opening.isq, opening.topology, dtype=opening.dtype)
    plan.topology.check(len(recipe.spec.layers))
    at = Place(_placement(opening), pool or executors.thread_pool(opening.threads))
    exact, context = opening.weights == "f32", _context(opening, recipe, said)
    store = WeightStore(recipe.checkpoint, plan=plan, exact=exact)
    reader = Reader(recipe, store, at, _pooling(opening, recipe, said), context)
    reader.load(opening.progress)
    head, made = _head(recipe, said, at, exact=exact)
    width = min(said.width or made, made)
    return Parts(
        checkpoint.path, width, context, recipe.spec.vocab, recipe.judges, asked, tokens, said,
        reader, head,
    )  # fmt: skip


def _asked(recipe: Recipe, tokens: Tokens) -> Recipe:
    no, yes = (tokens.find(word) for word in ("no", "yes"))
    if no is None or yes is None:
        raise InvalidCheckpoint("the tokenizer has no tokens 'yes' and 'no'; it is no reranker's")
    return embedders.judging(recipe, (no, yes))


def _pooling(opening: Opening, recipe: Recipe, said: Setup) -> Pooling:
    if recipe.pooling is not None:
        return recipe.pooling
    if opening.pooling is not None:
        return pooling_named(opening.pooling)
    return said.pooling or ("last" if isinstance(recipe.spec, Decoder) else "mean")


def _context(opening: Opening, recipe: Recipe, said: Setup) -> int:
    if opening.context is None:
        return min(said.context or recipe.context, recipe.context, CONTEXT)
    if not 1 <= opening.context <= recipe.context:
        raise InvalidRequest(
            f"context is {opening.context}; this model reads 1 to {recipe.context} tokens"
        )
    return opening.context


def _placement(opening: Opening) -> Placement:
    stage = devices.one_stage(opening.device, "models that embed")
    return Placement(stage, opening.exact, opening.dtype)


def _head(recipe: Recipe, said: Setup, at: Place, *, exact: bool) -> tuple[Executor | None, int]:
    """What comes after pooling, and how wide its rows are."""
    others: dict[str, Checkpoint] = {}
    part = recipe.head
    if part is None and said.linears:
        part, others = _linears(recipe.spec.hidden, said.linears)
    if part is None:
        return None, recipe.spec.hidden
    assert isinstance(part.spec, Head)
    store = WeightStore(recipe.checkpoint, others=others, exact=exact)
    program = encoder.compile_head(part.spec, part.names)
    return at.open(program, store, Limits(rows={"outputs": TEXTS})), part.spec.layers[-1].width


def _linears(hidden: int, linears: Sequence[Linear]) -> tuple[Part, dict[str, Checkpoint]]:
    """A head of linears that have a file each, by the `source` of its slices."""
    layers: list[Dense] = []
    names: dict[str, tuple[Slice, ...]] = {}
    files, width = {}, hidden
    for number, linear in enumerate(linears):
        source = linear.folder.name
        files[source] = file = open_file(linear.folder / "model.safetensors")
        weight, stem = file.tensors.get("linear.weight"), f"dense{number}"
        bias = "linear.bias" in file.tensors
        dense = Dense(weight.rows if weight else 0, bias, linear.activation)
        own = Part("head", Head(width, (dense,)), Naming({"dense0": "linear"}, ""))
        (placed,) = place([own], file.tensors, read=set(), source=source)
        names |= {role.replace("dense0", stem): found for role, found in placed.names.items()}
        layers.append(dense)
        width = dense.width
    return Part("head", Head(hidden, tuple(layers)), Naming({}, ""), names), files
