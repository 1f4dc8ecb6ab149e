"""Encoders of texts: T5, and the half of CLIP that reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from squall.checkpoints.base import Checkpoint, Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.recipes import clip_towers, config_parts, parts
from squall.recipes.config_fields import ConfigFields, part_keys
from squall.recipes.fields import Fields
from squall.recipes.gguf_parts import GgufFields
from squall.recipes.linears import linears, named, stored
from squall.recipes.names import Naming, Part, check_applied, place
from squall.spec import Activation, Encoder, Layer, Relative

T5 = "T5EncoderModel"
GGUF = ("t5encoder", "t5")
FARTHEST = 128  # GGUF files do not say it
_SELF, _DENSE = "layer.0.SelfAttention", "layer.1.DenseReluDense"
# Of whole models, which have a decoder too. Tables of embeddings are tied.
_DECODER = re.compile(r"decoder\..*|lm_head\.weight|(shared|encoder\.embed_tokens)\.weight")
T5_NAMING = Naming(
    {
        "embed": "shared", "norm": "encoder.final_layer_norm",
        "relative": f"encoder.block.0.{_SELF}.relative_attention_bias",
        "attention.norm": "layer.0.layer_norm", **{f"attention.{r}": f"{_SELF}.{r}" for r in "qkv"},
        "attention.out": f"{_SELF}.o", "feed_forward.norm": "layer.1.layer_norm",
        "feed_forward.gate": f"{_DENSE}.wi_0", "feed_forward.up": f"{_DENSE}.wi_1",
        "feed_forward.down": f"{_DENSE}.wo",
    }, "encoder.block.{}.", harmless=_DECODER,
)  # fmt: skip
GGUF_NAMING = Naming(
    {
        "embed": "token_embd", "norm": "enc.output_norm", "relative": "enc.blk.0.attn_rel_b",
        "attention.norm": "attn_norm", **{f"attention.{role}": f"attn_{role}" for role in "qkv"},
        "attention.out": "attn_o", "feed_forward.norm": "ffn_norm",
        **{f"feed_forward.{role}": f"ffn_{role}" for role in ("gate", "up", "down")},
    }, "enc.blk.{}.", harmless=re.compile(r"dec\..*|output\.weight"),
)  # fmt: skip
CLIP_STEMS: Mapping[str, str] = {
    **clip_towers.CLIP_STEMS, "embed": "embeddings.token_embedding", "norm": "final_layer_norm",
}  # fmt: skip
# What files without config.json are: T5 v1.1 XXL, and CLIP ViT-L/14.
XXL: Mapping[str, Any] = {
    "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
LARGE: Mapping[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12,
}  # fmt: skip
# What a whole CLIP has beside its text half.
_SEEING = r"(vision_model|visual_projection|text_projection)\..*|logit_scale|.*\.position_ids"


def load_t5(checkpoint: Checkpoint) -> Part:
    """The encoder of a T5 as transformers, GGUF or UQFF has it."""
    check_applied(checkpoint)
    tensors, originals = checkpoint.tensors, dict[str, str]()
    read = _of_gguf if checkpoint.kind == "gguf" else _of_config
    spec, naming = read(checkpoint.metadata or XXL, tensors)
    if checkpoint.kind == "uqff":
        tensors, originals = named(linears(T5, spec, naming), tensors)
    (part,) = place([Part("encoder", spec, naming)], tensors, read=set())
    check_relative(spec, tensors[naming.name("relative.weight")])
    return replace(part, names=stored(part.names, originals))


def _of_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Encoder, Naming]:
    keys, said = part_keys("t5"), str(config.get("feed_forward_proj", "relu"))
    assert keys is not None
    name = "gelu_new" if said == "gated-gelu" else said.removeprefix("gated-")
    name = config.get("dense_act_fn", name)  # which counts, if the file has it
    c = ConfigFields({**config, "feed_forward_proj": name}, tensors, keys, T5_NAMING)
    c.ignored.clear()  # of decoders, tasks and generation
    c.skip("dropout_rate", "num_decoder_layers")
    relative = Relative(
        c.count("relative_attention_num_buckets", high=4096),
        c.count("relative_attention_max_distance", high=1 << 16),
    )
    activation = config_parts.activation(c, "feed_forward_proj")
    spec = _t5(c, c.count("vocab_size"), relative, activation)
    stems = dict(T5_NAMING.stems)
    if "shared.weight" not in tensors:
        stems["embed"] = "encoder.embed_tokens"
    return spec, replace(T5_NAMING, stems=stems)


def _of_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Encoder, Naming]:
    architecture = str(metadata.get("general.architecture"))
    if architecture not in GGUF:
        raise UnsupportedModel(
            f"the GGUF file is of the architecture {quote(architecture)}, and no T5: {GGUF[0]}"
        )
    c = GgufFields(architecture, metadata, tensors)
    vocab = c.head()["vocab"]
    c.skip("context_length", "decoder_start_token_id", "decoder_block_count")
    relative = Relative(c.count("attention.relative_buckets_count", high=4096), FARTHEST)
    return _t5(c, vocab, relative, "gelu_tanh"), GGUF_NAMING


def _t5(c: Fields, vocab: int, relative: Relative, activation: Activation) -> Encoder:
    check_buckets(relative)
    heads = parts.attention(c, None, scale=1.0)
    mlps = parts.mlp(c, activation, gated=True, bias=False)
    norm = parts.rms(c)
    layers = tuple(Layer(*pair, norm) for pair in zip(heads, mlps, strict=True))
    spec = Encoder(vocab, parts.hidden(c), layers, norm, relative=relative)
    c.check_all_read()
    return spec


def check_buckets(relative: Relative) -> None:
    if not 4 <= relative.buckets < 4 * relative.farthest:
        raise InvalidCheckpoint(
            f"{relative.buckets} buckets of relative positions, up to {relative.farthest}; there "
            "must be at least 4, a quarter of them below that"
        )


def check_relative(spec: Encoder, tensor: Tensor) -> None:
    """It is a vector of a program, in which a transposed one would not show."""
    assert spec.relative is not None
    shape = spec.relative.buckets, spec.layers[0].attention.heads
    if tensor.shape != shape:
        raise InvalidCheckpoint(
            f"tensor {quote(tensor.name)} has shape {tensor.shape}, the metadata asks for {shape}"
        )


def load_clip(checkpoint: Checkpoint) -> Part:
    """The text half of a CLIP, from a folder of its own or of the whole."""
    if checkpoint.kind != "folder":
        raise UnsupportedModel(f"CLIP is read from a folder of transformers, not {checkpoint.kind}")
    check_applied(checkpoint)
    keys, tensors = part_keys("clip_text_model"), checkpoint.tensors
    assert keys is not None
    config: Any = checkpoint.metadata or LARGE
    for key in ("text_config", "text_config_dict"):  # of a whole one; the latter counts
        inner = checkpoint.metadata.get(key)
        config = config if inner is None else inner
    if not isinstance(config, Mapping):
        raise InvalidCheckpoint("text_config in config.json is no object")
    stem = CLIP_STEMS["embed"]
    before = next((name.partition(stem)[0] for name in tensors if stem in name), "text_model.")
    c = ConfigFields(config, tensors, keys, T5_NAMING)
    c.ignored.clear()  # of whole models, many
    layers = clip_towers.layers(c, parts.depth(c))
    spec = Encoder(
        c.count("vocab_size"), parts.hidden(c), layers, parts.layer_norm(c), parts.context(c)
    )
    c.check_all_read()
    naming = clip_towers.naming(before, CLIP_STEMS, "encoder.layers.{}.", _SEEING)
    return place([Part("encoder", spec, naming)], tensors, read=set())[0]
