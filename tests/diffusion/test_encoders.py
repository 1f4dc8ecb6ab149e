"""T5 and CLIP's text half against transformers, in every kind of file, and no field unnoticed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from harness import distance
from mutate import mutations
from numpy.typing import NDArray
from transformers.models.t5.modeling_t5 import T5Attention

from native_executor import opened
from reference_executor import ReferenceExecutor
from squall.checkpoints.base import Checkpoint
from squall.checkpoints.folder import open_folder
from squall.diffusion import encoders
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.program import Program
from squall.recipes.encoders import load_clip, load_t5
from squall.recipes.names import Part, locate
from squall.roles import roles
from squall.spec import Encoder, Relative

CLOSE, MOVED = 1e-4, 1e-4
VOCAB = 90
# Distances go beyond the farthest bucket; no two sizes are the same.
T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 3, "num_heads": 6,
    "relative_attention_num_buckets": 12, "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 0.01, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
CLIP: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 77, "layer_norm_eps": 0.01,
    "bos_token_id": 1, "eos_token_id": 89, "pad_token_id": 89,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
FEED_FORWARDS = ("gated-gelu", "gated-silu", "relu", "gelu")
LENGTHS = (1, 2, 21, 60)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@dataclass(frozen=True)
class Case:
    """An encoder: in transformers, and as it is opened from its files."""

    model: Any
    checkpoint: Checkpoint
    part: Part

    @property
    def causal(self) -> bool:
        return self.part.spec.relative is None

    def wanted(self, ids: list[int]) -> NDArray[np.float32]:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).last_hidden_state[0].numpy()

    def found(self, ids: list[int], executor: str = "reference") -> NDArray[np.float32]:
        return states(self.part, self.checkpoint, ids, executor, causal=self.causal)


def states(
    part: Part, checkpoint: Checkpoint, ids: list[int], executor: str, *, causal: bool
) -> NDArray[np.float32]:
    program = encoders.compile(part.spec, part.names)
    given = encoders.inputs(part.spec, ids, causal=causal)
    return EXECUTORS[executor](program, checkpoint).run(given)["states"].copy()


EXECUTORS: dict[str, Callable[[Program, Checkpoint], Any]] = {
    "reference": lambda program, checkpoint: ReferenceExecutor(program, checkpoint, blocks=0),
    "native": lambda program, checkpoint: opened(program, checkpoint, {"tokens": 512}),
}


def random(kind: Any, config: Any, seed: int = 3) -> Any:
    """Every weight large enough to matter."""
    torch.manual_seed(seed)
    model = kind(config).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.uniform_(0.5, 1.5)
            elif weight.dim() == 1:
                weight.normal_(0.0, 0.3)
            elif "embed" in name or "shared" in name or "relative" in name:
                weight.normal_(0.0, 1.0)
            else:
                weight.normal_(0.0, 1.3 * weight[0].numel() ** -0.5)
            if re.search(r"SelfAttention\.[qk]\.", name):  # whose scores have no scale
                weight.mul_(0.5)
    return model


def t5(path: Path, kind: str = "T5EncoderModel", **changes: Any) -> Case:
    model = random(getattr(transformers, kind), transformers.T5Config(**T5 | changes))
    model.save_pretrained(path, max_shard_size="150KB")
    checkpoint = open_folder(path)
    encoder = model if kind == "T5EncoderModel" else model.get_encoder()
    return Case(encoder, checkpoint, load_t5(checkpoint))


def clip(path: Path, **changes: Any) -> Case:
    model = random(transformers.CLIPTextModel, transformers.CLIPTextConfig(**CLIP | changes))
    model.save_pretrained(path)
    checkpoint = open_folder(path)
    return Case(model, checkpoint, load_clip(checkpoint))


def tokens(length: int) -> list[int]:
    """Ids, of which a third are padding."""
    ids = np.random.default_rng(length).integers(1, VOCAB, length)
    ids[length - length // 3 :] = 0
    return ids.tolist()


# ---- parity ----


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
def test_t5(tmp_path: Path, feed_forward: str, executor: str) -> None:
    case = t5(tmp_path, feed_forward_proj=feed_forward)
    assert len(case.checkpoint.parts) > 1  # shards
    for length in LENGTHS:
        ids = tokens(length)
        assert distance(case.found(ids, executor), case.wanted(ids)) < CLOSE, length


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip(tmp_path: Path, activation: str, executor: str) -> None:
    case = clip(tmp_path, hidden_act=activation)
    for length in (*LENGTHS, 77):
        ids = tokens(length)
        assert distance(case.found(ids, executor), case.wanted(ids)) < CLOSE, length


@pytest.mark.parametrize("buckets", [4, 7, 12, 32, 33, 64, 320])
@pytest.mark.parametrize("farthest", [9, 20, 100, 127, 128, 129, 800])
def test_buckets(buckets: int, farthest: int) -> None:
    if buckets >= 4 * farthest:
        return
    apart = torch.arange(-farthest, farthest + 1)
    wanted = T5Attention._relative_position_bucket(apart, True, buckets, farthest)
    assert list(encoders.buckets(Relative(buckets, farthest))) == wanted.tolist()
    beyond = T5Attention._relative_position_bucket(apart[-1:] + 10**6, True, buckets, farthest)
    assert beyond == wanted[-1]


# ---- mutations ----


@pytest.mark.parametrize("make", [t5, clip])
def test_no_field_goes_unnoticed(tmp_path: Path, make: Callable[[Path], Case]) -> None:
    case = make(tmp_path)
    ids = tokens(60)
    wanted, unmoved = case.found(ids), []
    for name, changed in mutations(case.part.spec, 1):
        if _is_equivalent(name):
            continue
        if (moved := _effect(case, changed, ids, wanted)) <= MOVED:
            unmoved.append(f"{name}: {moved:.1e}")
    assert not unmoved


def _is_equivalent(name: str) -> bool:
    """There is no norm to scope; and no image to see."""
    return name.startswith("layers") and "qk_norm_scope" in name


def _effect(case: Case, changed: Encoder, ids: list[int], wanted: NDArray[np.float32]) -> float:
    """How far the rows move; infinitely, where the files do not fit."""
    stems = {case.part.naming.split(role)[1] for role in roles(changed)}
    if not stems <= case.part.naming.stems.keys():
        return math.inf
    own = {place.tensor for places in case.part.names.values() for place in places}
    try:
        (found,) = locate(
            [(roles(changed), case.part.naming)],
            case.checkpoint.tensors,
            read=case.checkpoint.tensors.keys() - own,
        )
    except (InvalidCheckpoint, UnsupportedModel):
        return math.inf
    names = {f"encoder.{role}": places for role, places in found.items()}
    part = Part("encoder", changed, case.part.naming, names)
    try:
        rows = states(part, case.checkpoint, ids, "reference", causal=case.causal)
    except (InvalidRequest, ValueError, KeyError):  # which a rotary embedding would be for
        return math.inf
    return math.inf if rows.shape != wanted.shape else distance(rows, wanted)
