"""Tiny models as files, steps as batches, and the distance between two executors' logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from convert import convert
from numpy.typing import NDArray

from squall.batch import Batch
from squall.checkpoints.base import Checkpoint
from squall.checkpoints.folder import open_folder
from squall.checkpoints.gguf import open_gguf
from squall.recipes import Recipe, load

BLOCK = 16
BLOCKS = 16

Float32 = NDArray[np.float32]
MakeExecutor = Callable[..., Any]


@dataclass(frozen=True)
class Built:
    """A tiny model: its file, its recipe, a prompt, and what transformers makes of it."""

    checkpoint: Checkpoint
    recipe: Recipe
    tokens: list[int]
    logits: Float32
    hidden: list[Float32]
    context: int = tiny.CONTEXT


Build = Callable[[tiny.Case], Built]


def build(case: tiny.Case, path: Path) -> Built:
    """The model of a case, through a GGUF file."""
    model = tiny.build(case)
    convert(model, case.architecture, path, **case.options)
    return run_model(model, case, open_gguf(path))


def build_folder(case: tiny.Case, path: Path) -> Built:
    """The model of a case, through a folder as transformers saves it, in several files."""
    model = tiny.build(case)
    model.save_pretrained(path, max_shard_size="150KB")
    if case.options.get("rope_for_prompt"):
        # transformers 5 does not tell this model's rope how long the prompt is; its authors' does.
        rotary = model.model.rotary_emb
        rotary.rope_init_fn = partial(rotary.rope_init_fn, seq_len=tiny.PROMPT)
    return run_model(model, case, open_folder(path))


def once(folder: Path, name: str, make: Callable[[tiny.Case, Path], Built]) -> Build:
    """Makes the model of a case when it is asked for first. name: of its file, with {}."""
    done: dict[str, Built] = {}

    def get(case: tiny.Case) -> Built:
        if case.name not in done:
            done[case.name] = make(case, folder / name.format(case.name))
        return done[case.name]

    return get


def run_model(model: Any, case: tiny.Case, checkpoint: Checkpoint) -> Built:
    import torch

    rng = np.random.default_rng(len(case.name))
    tokens = rng.integers(3, model.config.vocab_size, tiny.PROMPT).tolist()
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_hidden_states=True)
    hidden = [state[0].numpy() for state in out.hidden_states]
    recipe, logits = load(checkpoint), out.logits[0].numpy()
    return Built(checkpoint, recipe, tokens, logits, hidden, case.context)


def make_batch(parts: Sequence[tuple[Sequence[int], int, int]]) -> Batch:
    """A step of (tokens, position of the first, sequence) parts; every row's logits are wanted."""
    tables = np.random.default_rng(7).permutation(BLOCKS).reshape(-1, tiny.CONTEXT // BLOCK)
    lengths = [len(tokens) for tokens, _, _ in parts]
    positions = [np.arange(start, start + len(tokens)) for tokens, start, _ in parts]
    return Batch(
        tokens=np.concatenate([tokens for tokens, _, _ in parts]).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        bounds=np.cumsum([0, *lengths]).astype(np.int32),
        block_tables=tables[[sequence for _, _, sequence in parts]].astype(np.int32),
        outputs=np.arange(sum(lengths)).astype(np.int32),
    )


def distance(found: Float32, wanted: Float32) -> float:
    """The largest difference, relative to the largest wanted value."""
    assert found.shape == wanted.shape
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


def run(executor: Any, tokens: Sequence[int], steps: Sequence[int], sequence: int = 0) -> Float32:
    """The logits of every token, computed in steps of these lengths."""
    parts, start = [], 0
    for length in steps:
        chunk = tokens[start : start + length]
        parts.append(executor.step(make_batch([(chunk, start, sequence)])).copy())
        start += length
    return np.concatenate(parts)
