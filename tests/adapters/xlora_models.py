"""Tiny models with X-LoRA: folders as mistral.rs reads them, and what PEFT makes of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from harness import BLOCK, BLOCKS
from numpy.typing import NDArray

from squall import executors
from squall.adapters.target import Target
from squall.adapters.xlora import CLASSIFIER, Parts, TwoPasses, XLora
from squall.checkpoints import open_checkpoint
from squall.executors import Limits
from squall.recipes import load
from squall.weights import WeightStore

PROMPT, ANSWER = 24, 32
ADAPTERS = ("0", "1", "2")
# How the adapters differ; together they adapt every kind of module that PEFT's X-LoRA knows.
KINDS: tuple[dict[str, Any], ...] = (
    {"r": 4, "lora_alpha": 8},
    {"r": 2, "lora_alpha": 6, "use_rslora": True},
    {"r": 6, "lora_alpha": 6, "rank_pattern": {"down_proj": 3}},
)
MODULES = {
    "llama": ("q_proj k_proj v_proj o_proj", "gate_proj down_proj", "q_proj up_proj embed_tokens"),
    "phi3": ("qkv_proj o_proj", "gate_up_proj", "o_proj down_proj"),
}
Float32 = NDArray[np.float32]


@dataclass
class Made:
    """A folder of X-LoRA for a model, and PEFT's model of it."""

    folder: Path
    model: Any

    def run(self, tokens: Sequence[int], frozen_from: int | None = None) -> tuple[Float32, Float32]:
        """Logits [tokens, vocab] and scalings [tokens, modules * adapters] of PEFT.

        frozen_from: those of this token's row hold for all that follow.
        """
        import torch

        classifier = self.model.base_model.internal_xlora_classifier
        own, rows = type(classifier).forward, len(tokens)

        def forward(*args: Any, **options: Any) -> Any:
            scalings = own(classifier, *args, **options)
            return scalings if frozen_from is None else scalings[:, at]

        at = [row if frozen_from is None else min(row, frozen_from) for row in range(rows)]
        classifier.forward = forward
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([list(tokens)])).logits
        scalings = self.model.base_model.internal_xlora_scalings
        top = classifier.config.top_k_lora
        if top is not None:
            least = scalings.topk(top, dim=-1).values[..., -1:]
            scalings = scalings * (scalings >= least)
        return logits[0].numpy(), scalings[0].reshape(rows, -1).numpy()


def make(model: Any, modules: Sequence[str], folder: Path, **config: Any) -> Made:
    """Random adapters and a random classifier. config: keys of mistral.rs's file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers about each other
        return _make(model, modules, folder, config)


def _make(model: Any, modules: Sequence[str], folder: Path, config: dict[str, Any]) -> Made:
    import torch
    from peft import LoraConfig, XLoraConfig, get_peft_model
    from safetensors.torch import save_file

    torch.manual_seed(5)
    keys = dict(config)
    biased, relu = keys.pop("use_bias", True), keys.pop("enable_relu_and_dropout", True)
    paths = {name: str(folder / name) for name in ADAPTERS}
    for path, kind, targets in zip(paths.values(), KINDS, modules, strict=True):
        adapted = get_peft_model(model, LoraConfig(target_modules=targets.split(), **kind))
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    weight.normal_(0.0, 0.5 * weight.shape[1] ** -0.5)
        adapted.save_pretrained(path, save_embedding_layers=False)
        model = adapted.unload()
    model.config.use_cache = False
    hidden = model.config.hidden_size
    given = XLoraConfig(task_type="CAUSAL_LM", hidden_size=hidden, adapters=paths, **keys)
    mixed = get_peft_model(model, given)
    classifier = mixed.base_model.internal_xlora_classifier
    linears = [layer for layer in classifier.layers if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for linear in linears:
            linear.weight.normal_(0.0, 1.5 * linear.in_features**-0.5)
            linear.bias.normal_(0.0, 0.3 * biased)
    if not relu:
        layers = [layer for layer in classifier.layers if not isinstance(layer, torch.nn.ReLU)]
        classifier.layers = torch.nn.Sequential(*layers)
    names = [*(f"inner.{i}" for i in range(len(linears) - 1)), "last"]
    tensors = {f"{n}.weight": x.weight.detach() for n, x in zip(names, linears, strict=True)}
    if biased:
        tensors |= {f"{n}.bias": x.bias.detach() for n, x in zip(names, linears, strict=True)}
    save_file(tensors, folder / "xlora_classifier.safetensors")
    keys |= {"hidden_size": hidden, "adapters": list(ADAPTERS), "base_model_id": "tiny"}
    keys |= {"use_bias": biased, "enable_relu_and_dropout": relu}
    (folder / "xlora_config.json").write_text(json.dumps(keys))
    return Made(folder, mixed.eval())


def tokens_of(model: Any, count: int = PROMPT + ANSWER) -> list[int]:
    """A prompt and an answer."""
    return np.random.default_rng(3).integers(3, model.config.vocab_size, count).tolist()


def case(name: str) -> tiny.Case:
    return next(case for case in tiny.CASES if case.name == name)


def opened(base: Path, folder: Path, **options: Any) -> TwoPasses:
    """The executor, with exact weights; options: of XLora, and of the store."""
    xlora = {key: options.pop(key) for key in ("order", "tgt_non_granular_index") if key in options}
    checkpoint = open_checkpoint(base, gqa=options.pop("gqa", 1))
    recipe = load(checkpoint)
    parts = Parts.read(XLora(folder, **xlora), Target.of(checkpoint, recipe))
    given = {"exact": True} | options
    store = WeightStore(checkpoint, others={CLASSIFIER: parts.classifier}, **given)
    limits = Limits(blocks=BLOCKS, block_size=BLOCK, kv_dtype="f32" if store.exact else "f16")
    pool = executors.thread_pool(1)
    return TwoPasses(parts, parts.programs(recipe, tiny.CONTEXT), store, limits, pool=pool)
