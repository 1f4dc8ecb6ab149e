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
from squall.checkpoints import open_checkpoint, open_file
from squall.embeddings.files import Setup, setup
from squall.embeddings.reading import TEXTS, Place, Reader
from squall.embeddings.tokens import Text, Tokens, open_tokens
from squall.errors import InvalidRequest
from squall.executors import Executor, Limits, Placement, ThreadPool, devices
from squall.locate import locate
from squall.opening import Opening
from squall.program import Slice
from squall.quant import FormatTotal, Plan
from squall.recipes import embedders
from squall.recipes.embedders import Recipe
from squall.recipes.names import Naming, Part, place
from squall.spec import Decoder, Dense, Head
from squall.weights import WeightStore

Floats = NDArray[np.float32]
OPTIONS = frozenset((
    "path", "threads", "device", "exact", "isq", "topology", "dtype", "weights", "hub", "progress",
    "tokenizer_json", "context", "command",
))  # fmt: skip
# Tokens of a text by default, at most.
CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class Parts:
    """What an open model that embeds consists of. ids: tokens that there are."""

    path: Path
    width: int
    context: int
    ids: int
    reranks: bool
    tokens: Tokens
    setup: Setup
    reader: Reader
    head: Executor | None

    @property
    def prompts(self) -> dict[str, str]:
        return dict(self.setup.prompts)

    @property
    def prompt(self) -> str:
        return self.setup.prompt

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
        first, *others = self.tokens.bodies([query, *documents])
        return self.tokens.pairs(first, others, limit)

    def score(self, logits: Floats) -> float:
        """What a classifier's number says."""
        (logit,) = logits.tolist()
        if not self.setup.sigmoid:
            return float(logit)
        return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def assemble(opening: Opening, pool: ThreadPool | None) -> Parts:
    opening.check_only(OPTIONS, "models that embed")
    if opening.path is None:
        raise InvalidRequest(
            "name a model that embeds, such as sentence-transformers/all-MiniLM-L6-v2"
        )
    checkpoint = open_checkpoint(locate(opening.path, opening.hub, opening.progress, mmproj=False))
    recipe, said = embedders.load(checkpoint), setup(checkpoint)
    tokens = open_tokens(
        checkpoint, None if opening.tokenizer_json is None else Path(opening.tokenizer_json),
        lower=said.lower,
    )  # fmt: skip
    plan = Plan.of(opening.isq, opening.topology, dtype=opening.dtype)
    plan.topology.check(len(recipe.spec.layers))
    at = Place(_placement(opening), pool or executors.thread_pool(opening.threads))
    pooling = said.pooling or ("last" if isinstance(recipe.spec, Decoder) else "mean")
    if recipe.head is not None:
        pooling = "cls"
    context = _context(opening, recipe, said)
    exact = opening.weights == "f32"
    store = WeightStore(recipe.checkpoint, plan=plan, exact=exact)
    reader = Reader(recipe, store, at, pooling, context)
    reader.load(opening.progress)
    head, width = _head(recipe, said, at, exact=exact)
    ids = recipe.spec.vocab
    return Parts(
        checkpoint.path, width, context, ids, recipe.head is not None, tokens, said, reader, head
    )


def _context(opening: Opening, recipe: Recipe, said: Setup) -> int:
    if opening.context is None:
        return min(said.context or recipe.context, recipe.context, CONTEXT)
    if not 1 <= opening.context <= recipe.context:
        raise InvalidRequest(
            f"context is {opening.context}; this model reads 1 to {recipe.context} tokens"
        )
    return opening.context


def _placement(opening: Opening) -> Placement:
    device = opening.device
    if device == devices.AUTO:
        device = next(iter(devices.gpus()), "cpu")
    stages = devices.stages_of(device)
    if len(stages) > 1:
        raise InvalidRequest(f"device is {device!r}; models that embed run on one")
    devices.check(stages[0].device)
    return Placement(stages, opening.exact, opening.dtype)


def _head(recipe: Recipe, said: Setup, at: Place, *, exact: bool) -> tuple[Executor | None, int]:
    """What comes after pooling, and how wide its rows are."""
    part, others, width = recipe.head, {}, recipe.spec.hidden
    if part is None and said.linears:
        layers: list[Dense] = []
        names: dict[str, tuple[Slice, ...]] = {}
        for number, linear in enumerate(said.linears):
            file = open_file(linear.folder / "model.safetensors")
            rows = file.tensors["linear.weight"].shape[0] if "linear.weight" in file.tensors else 0
            dense = Dense(rows, "linear.bias" in file.tensors, linear.tanh)
            own = Part("head", Head(width, (dense,)), Naming({"dense0": "linear"}, ""))
            (placed,) = place([own], file.tensors, read=set(), source=linear.folder.name)
            others[linear.folder.name] = file
            names |= {
                role.replace("dense0", f"dense{number}"): slices
                for role, slices in placed.names.items()
            }
            layers.append(dense)
            width = rows
        part = Part("head", Head(recipe.spec.hidden, tuple(layers)), Naming({}, ""), names)
    if part is None:
        return None, width
    assert isinstance(part.spec, Head)
    store = WeightStore(recipe.checkpoint, others=others, exact=exact)
    program = encoder.compile_head(part.spec, part.names)
    return at.open(program, store, Limits(rows={"outputs": TEXTS})), part.spec.layers[-1].width
