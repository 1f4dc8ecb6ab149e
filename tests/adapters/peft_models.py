"""Adapters as PEFT saves them, on the tiny models of tests/parity, and its logits with them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from config_cases import CONFIG_CASES
from convert import convert
from harness import BLOCK, BLOCKS, Float32, make_batch, run

from squall.adapters.edits import adaptable
from squall.adapters.lora import Lora, merged_terms, merged_vectors, read
from squall.adapters.target import Target
from squall.checkpoints import open_checkpoint
from squall.checkpoints.base import Checkpoint
from squall.decoder import compile
from squall.executors import Limits, open, thread_pool
from squall.quant import Plan
from squall.recipes import Recipe, load
from squall.weights import WeightStore

CASES = {case.name: case for case in [*tiny.CASES, *CONFIG_CASES]}
LIMITS = Limits(blocks=BLOCKS, block_size=BLOCK, kv_dtype="f32")


@dataclass(frozen=True)
class Adapted:
    """A base, an adapter's folder, and the logits of PEFT for the tokens."""

    base: Path
    folder: Path
    tokens: list[int]
    logits: Float32
    plain: Float32
    context: int = tiny.CONTEXT

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.base)

    def read(self, path: Path | None = None) -> Lora:
        checkpoint = self.checkpoint
        return read(path or self.folder, Target.of(checkpoint, load(checkpoint)))


def save_base(model: Any, case: tiny.Case, path: Path, kind: str) -> Path:
    """The model as a folder, or as a GGUF file."""
    if kind == "folder":
        model.save_pretrained(path / "base")
        return path / "base"
    convert(model, case.architecture, path / "base.gguf", **case.options)
    return path / "base.gguf"


def adapt(case: tiny.Case, path: Path, kind: str = "folder", **config: Any) -> Adapted:
    """A base and an adapter with random weights."""
    import torch

    model = tiny.build(case)
    base = save_base(model, case, path, kind)
    if case.options.get("rope_for_prompt"):
        rotary = model.model.rotary_emb
        rotary.rope_init_fn = partial(rotary.rope_init_fn, seq_len=tiny.PROMPT)
    rng = np.random.default_rng(len(case.name))
    tokens = rng.integers(3, model.config.vocab_size, tiny.PROMPT).tolist()
    with torch.no_grad():
        plain = model(torch.tensor([tokens])).logits[0].numpy()
    return replace(
        save_adapter(copy.deepcopy(model), path / "adapter", tokens, **config),
        base=base,
        plain=plain,
        context=case.context,
    )


def save_adapter(model: Any, folder: Path, tokens: list[int], **config: Any) -> Adapted:
    import torch
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The configuration becomes PEFT's, which edits it.
        adapted = get_peft_model(model, LoraConfig(**copy.deepcopy(config))).eval()
        torch.manual_seed(7)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    weight.normal_(0.0, 0.15)
                elif weight.requires_grad or "modules_to_save" in name:
                    weight.add_(torch.randn_like(weight) * 0.1)
            logits = adapted(torch.tensor([tokens])).logits[0].numpy()
        adapted.save_pretrained(folder)
    return Adapted(folder, folder, tokens, logits, logits)


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    return load(checkpoint)


def merged(model: Adapted, *loras: tuple[Lora, float], plan: Plan | None = None) -> Float32:
    """Logits of the base with adapters merged into it."""
    checkpoint = model.checkpoint
    recipe = load(checkpoint)
    store = WeightStore(
        checkpoint, plan=plan, merged=merged_terms(loras), vectors=merged_vectors(loras)
    )
    program = compile(recipe.decoder, recipe.names, context=model.context)
    executor = open(program, store, LIMITS, pool=thread_pool(1))
    return run(executor, model.tokens, [len(model.tokens)])


def beside(model: Adapted, *loras: tuple[Lora, float], exact: bool = False) -> Float32:
    """Logits of the base with adapters beside it, in steps of several lengths."""
    checkpoint = model.checkpoint
    recipe = load(checkpoint)
    store = WeightStore(checkpoint, exact=exact)
    program = adaptable(compile(recipe.decoder, recipe.names, context=model.context))
    executor = open(program, store, LIMITS, pool=thread_pool(1))
    mixture = tuple((executor.adapter(lora.terms), weight) for lora, weight in loras)
    found, start = [], 0
    for length in (13, 1, len(model.tokens) - 14):
        batch = make_batch([(model.tokens[start : start + length], start, 0)])
        batch = replace(batch, mixture=np.zeros(length, np.int32), mixtures=(mixture,))
        found.append(executor.step(batch).copy())
        start += length
    return np.concatenate(found)
