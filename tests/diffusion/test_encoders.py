"""T5 and CLIP's text half against transformers, in every kind of file, and no field unnoticed."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from harness import distance
from mmproj_files import write
from mutate import mutations
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

from native_executor import opened
from reference_executor import ReferenceExecutor
from squall import encoder
from squall.checkpoints.base import ByteTensor, Checkpoint
from squall.checkpoints.folder import open_folder
from squall.checkpoints.gguf import open_gguf
from squall.checkpoints.uqff import GGML, RESIDUAL, VERSION, open_uqff
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.program import Program
from squall.quant import FORMATS
from squall.quant.isq import parse_type
from squall.recipes.encoders import load_clip, load_t5
from squall.recipes.linears import linears
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
FEED_FORWARDS = ("gated-gelu", "gated-silu")
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
    program = encoder.compile(part.spec, part.names)
    given = encoder.inputs(part.spec, ids, causal=causal)
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
            elif weight.dim() < 2:
                weight.normal_(0.0, 0.3)
            elif "embed" in name or "shared" in name or "relative" in name:
                weight.normal_(0.0, 1.0)
            else:
                weight.normal_(0.0, 1.3 * weight[0].numel() ** -0.5)
            if re.search(r"SelfAttention\.[qk]\.", name):  # whose scores have no scale
                weight.mul_(0.15)
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
    assert list(encoder.buckets(Relative(buckets, farthest))) == wanted.tolist()
    beyond = T5Attention._relative_position_bucket(apart[-1:] + 10**6, True, buckets, farthest)
    assert beyond == wanted[-1]


def test_what_an_activation_is_called(tmp_path: Path) -> None:
    """Files have it in other words too, which count."""
    t5(tmp_path)
    checkpoint, ids = reconfigured(tmp_path, dense_act_fn="silu"), tokens(30)
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float32)
    case = Case(theirs, checkpoint, load_t5(checkpoint))
    assert case.part.spec.layers[0].feed_forward.activation == "silu"
    assert distance(case.found(ids), case.wanted(ids)) < CLOSE


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
    """There is no norm to scope; no image to see; and without positions no first one."""
    return (name.startswith("layers") and "qk_norm_scope" in name) or name == "first+1"


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


# ---- files ----


def resaved(
    path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Checkpoint:
    """The tensors of a folder, changed, in one file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    for file in path.glob("*.index.json"):
        file.unlink()
    save_file(change(tensors), path / "model.safetensors", {"format": "pt"})
    return open_folder(path)


def reconfigured(path: Path, **changes: Any) -> Checkpoint:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return open_folder(path)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("make", "load"), [(t5, load_t5), (clip, load_clip)])
def test_halves(tmp_path: Path, make: Any, load: Any, dtype: torch.dtype, executor: str) -> None:
    case, ids = make(tmp_path), tokens(40)
    checkpoint = resaved(tmp_path, lambda all: {name: t.to(dtype) for name, t in all.items()})
    case.model.to(dtype).float()
    found = replace(case, checkpoint=checkpoint, part=load(checkpoint)).found(ids, executor)
    assert distance(found, case.wanted(ids)) < CLOSE


def test_embeddings_by_either_name(tmp_path: Path) -> None:
    case, ids = t5(tmp_path), tokens(30)
    shared, own = "shared.weight", "encoder.embed_tokens.weight"
    for names in ([shared], [own], [shared, own]):

        def named(all: dict[str, torch.Tensor], names: list[str] = names) -> Any:
            table = all.get(shared, all.get(own))
            rest = {name: t for name, t in all.items() if name not in (shared, own)}
            return rest | {name: table.clone() for name in names}

        checkpoint = resaved(tmp_path, named)
        found = replace(case, checkpoint=checkpoint, part=load_t5(checkpoint)).found(ids)
        assert distance(found, case.wanted(ids)) < CLOSE


def test_the_encoder_of_a_whole_t5(tmp_path: Path) -> None:
    case, ids = t5(tmp_path, "T5ForConditionalGeneration"), tokens(30)
    assert distance(case.found(ids), case.wanted(ids)) < CLOSE


@pytest.mark.parametrize("both", [False, True])
def test_the_text_half_of_a_whole_clip(tmp_path: Path, both: bool) -> None:
    config = transformers.CLIPConfig(
        text_config=CLIP | {"hidden_act": "gelu"}, vision_config=VISION, projection_dim=24
    )
    model = random(transformers.CLIPModel, config)
    model.save_pretrained(tmp_path)
    checkpoint = open_folder(tmp_path)
    assert any(name.startswith("vision_model.") for name in checkpoint.tensors)
    if both:  # as the first files have it, of which the second counts
        inner = CLIP | {"hidden_act": "gelu"}
        wrong = CLIP | {"hidden_act": "relu", "layer_norm_eps": 0.3}
        checkpoint = reconfigured(tmp_path, text_config=wrong, text_config_dict=inner)
    case, ids = Case(model.text_model, checkpoint, load_clip(checkpoint)), tokens(30)
    assert distance(case.found(ids), case.wanted(ids)) < CLOSE


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_clip_with_and_without_a_prefix(tmp_path: Path, prefix: str) -> None:
    case, ids = clip(tmp_path), tokens(30)
    more = {
        f"{prefix}embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.ones(8, 64),
    }
    checkpoint = resaved(
        tmp_path,
        lambda all: more | {prefix + n.removeprefix("text_model."): t for n, t in all.items()},
    )
    found = replace(case, checkpoint=checkpoint, part=load_clip(checkpoint)).found(ids)
    assert distance(found, case.wanted(ids)) < CLOSE


@pytest.mark.parametrize(
    ("kind", "config", "load"),
    [
        ("T5EncoderModel", {
            "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        }, load_t5),
        ("CLIPTextModel", {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "hidden_act": "quick_gelu",
        }, load_clip),
    ],
)  # fmt: skip
def test_files_without_a_config(
    tmp_path: Path, kind: str, config: dict[str, Any], load: Callable[[Checkpoint], Part]
) -> None:
    """They are the ones that FLUX.1 was trained with; their shapes fit, and no others."""
    model = getattr(transformers, kind)
    with torch.device("meta"):
        shapes = model(model.config_class(**config)).state_dict()
    tensors = {
        name: ByteTensor(name, "f16", tuple(t.shape), np.empty(0, np.uint8))
        for name, t in shapes.items()
        if not name.endswith("position_ids")
    }
    bare = Checkpoint(tmp_path, {}, tensors, 0, kind="folder")
    described = Checkpoint(
        tmp_path, model.config_class(**config).to_dict(), tensors, 0, kind="folder"
    )
    assert load(bare) == load(described)


# ---- GGUF ----

IN_GGUF = {
    r"shared": "token_embd",
    r"encoder\.final_layer_norm": "enc.output_norm",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])": r"enc.blk.\1.attn_\2",
    r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias": (
        "enc.blk.0.attn_rel_b"
    ),
    r"encoder\.block\.(\d+)\.layer\.0\.layer_norm": r"enc.blk.\1.attn_norm",
    r"encoder\.block\.(\d+)\.layer\.1\.layer_norm": r"enc.blk.\1.ffn_norm",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0": r"enc.blk.\1.ffn_gate",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi(_1)?": r"enc.blk.\1.ffn_up",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo": r"enc.blk.\1.ffn_down",
}


def in_gguf(name: str) -> str:
    stem = name.removesuffix(".weight")
    pattern, new = next((p, new) for p, new in IN_GGUF.items() if re.fullmatch(p, stem))
    return re.sub(pattern, new, stem) + ".weight"


def write_t5(model: Any, path: Path, kind: str, architecture: str = "t5encoder") -> Checkpoint:
    """As llama.cpp's converter does."""
    c = model.config
    keys = {
        "context_length": 512, "embedding_length": c.d_model, "feed_forward_length": c.d_ff,
        "block_count": c.num_layers, "attention.head_count": c.num_heads,
        "attention.key_length": c.d_kv, "attention.value_length": c.d_kv,
        "attention.layer_norm_epsilon": c.layer_norm_epsilon,
        "attention.layer_norm_rms_epsilon": c.layer_norm_epsilon,
        "attention.relative_buckets_count": c.relative_attention_num_buckets,
    }  # fmt: skip
    values = {f"{architecture}.{key}": value for key, value in keys.items()}
    values |= {"general.architecture": architecture, "general.file_type": 0}
    weights = {in_gguf(name): w.detach().numpy() for name, w in model.named_parameters()}
    if architecture == "t5":
        values |= {"t5.decoder_block_count": c.num_layers, "t5.decoder_start_token_id": 0}
        weights |= {"dec.output_norm.weight": np.ones(64, np.float32)}
    write(path, values, weights, kind)
    return open_gguf(path)


def rounded(model: Any, checkpoint: Checkpoint) -> None:
    """The model gets the values that a GGUF file has."""
    for name, weight in model.named_parameters():
        weight.data = torch.from_numpy(checkpoint.tensors[in_gguf(name)].to_float32().copy())


@pytest.mark.parametrize("architecture", ["t5encoder", "t5"])
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_gguf(tmp_path: Path, kind: str, architecture: str) -> None:
    config = T5 | {"relative_attention_max_distance": 128}
    model = random(transformers.T5EncoderModel, transformers.T5Config(**config))
    checkpoint = write_t5(model, tmp_path / "t5.gguf", kind, architecture)
    case, ids = Case(model, checkpoint, load_t5(checkpoint)), tokens(200)
    rounded(model, checkpoint)
    assert distance(case.found(ids), case.wanted(ids)) < CLOSE
    near = 0.03 if kind == "q8_0" else CLOSE  # activations are rounded too
    assert distance(case.found(ids, "native"), case.wanted(ids)) < near


# ---- quantized ----


@pytest.mark.parametrize(("type", "near"), [("q8_0", 0.03), ("q5k", 0.15), ("q4k", 0.3)])
def test_linears_are_quantized_at_load(tmp_path: Path, type: str, near: float) -> None:
    case, ids = t5(tmp_path, d_model=256, d_kv=64, num_heads=4, d_ff=256), tokens(40)
    program = encoder.compile(case.part.spec, case.part.names)
    executor = opened(program, case.checkpoint, {"tokens": 64}, plan=type)
    totals = {total.format: total.matrices for total in executor.formats}
    assert totals == {parse_type(type): 7 * 3, "f32": 1}
    found = executor.run(encoder.inputs(case.part.spec, ids, causal=False))["states"]
    assert 1e-4 < distance(found, case.wanted(ids)) < near


def test_uqff(tmp_path: Path) -> None:
    case, ids = t5(tmp_path), tokens(40)
    tensors = dict(case.checkpoint.tensors)
    items = {}
    for number, linear in enumerate(linears("T5EncoderModel", case.part.spec, case.part.naming)):
        weight = tensors.pop(f"{linear.tensor}.weight").to_float32()
        data = FORMATS["q8_0"].quantize(weight.reshape(-1))
        head = struct.pack("<IBIB", VERSION, GGML, data.nbytes, 0)
        head += struct.pack("<4I", FORMATS["q8_0"].ggml_id, 2, *weight.shape)
        items[str(number)] = torch.frombuffer(bytearray(head + data.tobytes()), dtype=torch.uint8)
    rest = {name: torch.from_numpy(t.to_float32().copy()) for name, t in tensors.items()}
    folder = tmp_path / "uqff"
    folder.mkdir()
    save_file(rest, folder / RESIDUAL)
    save_file(items, folder / "t5.uqff")
    (folder / "config.json").write_text((tmp_path / "config.json").read_text())
    checkpoint = open_uqff(folder / "t5.uqff")
    found = replace(case, checkpoint=checkpoint, part=load_t5(checkpoint))
    assert 1e-5 < distance(found.found(ids), case.wanted(ids)) < 0.03
    assert 1e-5 < distance(found.found(ids, "native"), case.wanted(ids)) < 0.03
    del items["20"]
    save_file(items, folder / "t5.uqff")
    with pytest.raises(InvalidCheckpoint, match=r"20 linears.* has 21"):
        load_t5(open_uqff(folder / "t5.uqff"))


def test_stages_give_the_same_bytes(tmp_path: Path) -> None:
    case = t5(tmp_path)
    program = encoder.compile(case.part.spec, case.part.names)
    assert program.layers == ["layers.0", "layers.1", "layers.2"]
    given: dict[str, Any] = encoder.inputs(case.part.spec, tokens(40), causal=False)
    wanted = opened(program, case.checkpoint, {"tokens": 64}).run(given)["states"].copy()
    for stage in program.stages(*program.layers):
        given = given | opened(stage, case.checkpoint, {"tokens": 64}).run(given)
    assert given["states"].tobytes() == wanted.tobytes()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"feed_forward_proj": "gated-mish", "dense_act_fn": "mish"},
            "'mish', which is not supported; known: silu",
        ),
        ({"dense_act_fn": 7}, "must be a string"),
        ({"relative_attention_num_buckets": 3}, "3 buckets"),
        ({"relative_attention_max_distance": 2}, "up to 2"),
        ({"relative_attention_max_distance": 1 << 30}, "relative_attention_max_distance"),
        ({"relative_attention_num_buckets": 14}, r"\(12, 6\), the metadata asks for .*84"),
        ({"num_layers": 4}, r"block\.3\..* is missing"),
        ({"num_layers": 2}, "does not use"),
        ({"num_heads": 5}, "shape"),
        ({"d_model": "64"}, "d_model is '64'; it must be an integer"),
        ({"vocab_size": 91}, "shape"),
        ({"is_decoder": True}, "is_decoder"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization"),
    ],
)
def test_a_t5_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    t5(tmp_path)
    with pytest.raises((InvalidCheckpoint, UnsupportedModel), match=message):
        load_t5(reconfigured(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "mish"}, "'mish', which is not supported; known: silu"),
        ({"max_position_embeddings": 78}, "position_embedding.*shape"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": 4}, r"layers\.3\..* is missing"),
        ({"text_config": [1]}, "text_config"),
        ({"intermediate_size": 95}, "shape"),
    ],
)
def test_a_clip_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    clip(tmp_path)
    with pytest.raises((InvalidCheckpoint, UnsupportedModel), match=message):
        load_clip(reconfigured(tmp_path, **changes))


def test_a_table_of_relative_positions_that_is_transposed(tmp_path: Path) -> None:
    case = t5(tmp_path)
    name = case.part.naming.name("relative.weight")
    checkpoint = resaved(tmp_path, lambda all: all | {name: all[name].T.contiguous()})
    with pytest.raises(InvalidCheckpoint, match=r"\(6, 12\), the metadata asks for \(12, 6\)"):
        load_t5(checkpoint)


def test_every_layer_with_relative_positions_of_its_own(tmp_path: Path) -> None:
    """As umT5 has them."""
    case = t5(tmp_path)
    name = case.part.naming.name("relative.weight")
    more = name.replace("block.0", "block.1")
    checkpoint = resaved(tmp_path, lambda all: all | {more: all[name].clone()})
    with pytest.raises(UnsupportedModel, match=r"block\.1.*relative_attention_bias"):
        load_t5(checkpoint)


def test_another_gguf_file(tmp_path: Path) -> None:
    model = random(transformers.T5EncoderModel, transformers.T5Config(**T5))
    checkpoint = write_t5(model, tmp_path / "t5.gguf", "f32", "bert")
    with pytest.raises(UnsupportedModel, match="'bert', and no T5"):
        load_t5(checkpoint)
    with pytest.raises(UnsupportedModel, match="folder"):
        load_clip(checkpoint)


def test_ids_that_the_encoder_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        clip(tmp_path).found([1, VOCAB], "native")
