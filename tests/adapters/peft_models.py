"""Adapters as PEFT saves them, on the tiny models of tests/parity, and its logits with them."""

from __future__ import annotations

import copy
import re
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
        adapted.create_or_update_model_card = lambda _: None  # which takes as long as weights
        adapted.save_pretrained(folder)
    return Adapted(folder, folder, tokens, logits, logits)


def write_gguf_lora(
    model: Adapted, case: tiny.Case, path: Path, alpha: float, quantized: Any = None
) -> None:
    """The adapter as llama.cpp's converter writes it: names, rows of q and k, norms."""
    import gguf
    from convert import NAMES, OWN_POST_NORM, PERMUTED, POST_NORM, UNIT_OFFSET, _permute
    from safetensors.torch import load_file

    post = "post_attention_norm" if case.architecture in OWN_POST_NORM else "ffn_norm"
    names = [*NAMES, (POST_NORM, rf"blk.\1.{post}")]
    heads = tiny.SIZES | case.config
    counts = {"q": heads["num_attention_heads"], "k": heads["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    tensors = load_file(model.folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        stem = name.removeprefix("base_model.model.").removesuffix(".weight")
        stem, _, part = stem.partition(".lora_")
        kind = "bias" if stem.endswith(".bias") else "weight"
        stem = stem.removesuffix(".bias")
        if "base_layer" in stem + part or ".experts" in stem:
            continue
        (new,) = [re.sub(old, to, stem) for old, to in names if re.fullmatch(old, stem)]
        rows = tensor.T if part == "embedding_A" else tensor
        projection = re.search(r"self_attn\.([qk])_proj", stem)
        if part == "B" and projection and case.architecture in PERMUTED:
            rows = _permute(rows, counts[projection[1]])
        if not part and kind == "weight" and case.architecture in UNIT_OFFSET:
            rows = rows + 1
        end = f".lora_{part[-1].lower()}" if part else ""
        data = rows.contiguous().numpy()
        if quantized is not None and data.shape[-1] % 32 == 0:
            data = gguf.quants.quantize(data, quantized)
            writer.add_tensor(f"{new}.{kind}{end}", data, raw_dtype=quantized)
        else:
            writer.add_tensor(f"{new}.{kind}{end}", data)
    for layer in range(100):
        at = f"base_model.model.model.layers.{layer}.mlp.experts."
        if at + "lora_A.weight" not in tensors:
            continue
        for wrapped, parts in (("", ["down"]), ("base_layer.", ["gate", "up"])):
            a, b = (tensors[f"{at}{wrapped}lora_{end}.weight"] for end in "AB")
            experts = heads.get("num_experts") or heads["num_local_experts"]
            a = a.reshape(experts, -1, a.shape[1])
            b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
            for part, rows in zip(parts, b.chunk(len(parts), 1), strict=True):
                name = f"blk.{layer}.ffn_{part}_exps.weight.lora"
                writer.add_tensor(f"{name}_a", a.contiguous().numpy())
                writer.add_tensor(f"{name}_b", rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
