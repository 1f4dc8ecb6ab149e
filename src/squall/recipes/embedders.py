"""Models that embed texts, or judge pairs of them: the BERT family, and decoders without a head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from squall.checkpoints.base import Checkpoint, Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.recipes import config, config_parts, gguf, parts
from squall.recipes.config_fields import ConfigFields, by_model_type, part_keys
from squall.recipes.encoders import FARTHEST, check_buckets, check_relative
from squall.recipes.gguf_parts import NAMING as GGUF_NAMING
from squall.recipes.gguf_parts import GgufFields
from squall.recipes.names import Naming, Part, check_applied, place
from squall.spec import Decoder, Dense, Encoder, Head, Layer, Relative

CLASSIFIER = "ForSequenceClassification"
# What models have beside their encoder: other heads than those that are used, and tables.
_BESIDE = re.compile(r"(pooler|cls|lm_head|classifier)\..*|embeddings\.(position|token_type)_ids")
_FIRST = "embeddings.word_embeddings.weight"
_QKV = "attention.self."
STEMS: Mapping[str, str] = {
    "embed": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings", "embed_norm": "embeddings.LayerNorm",
    "attention.q": f"{_QKV}query", "attention.k": f"{_QKV}key", "attention.v": f"{_QKV}value",
    "attention.out": "attention.output.dense", "attention.post_norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense", "feed_forward.down": "output.dense",
    "feed_forward.post_norm": "output.LayerNorm",
}  # fmt: skip
GGUF_STEMS: Mapping[str, str] = {
    **GGUF_NAMING.stems, "positions": "position_embd", "types": "token_types",
    "embed_norm": "token_embd_norm", "attention.post_norm": "attn_output_norm",
    "feed_forward.post_norm": "layer_output_norm",
}  # fmt: skip
_GGUF_HEADS = re.compile(r"cls(\.output)?\.(weight|bias)|output\.weight")
EMBEDDING_GEMMA = "gemma-embedding"
# Architectures of GGUF that write no text, and kinds of language models that are asked yes or no.
GGUF_ENCODERS = frozenset(("bert", EMBEDDING_GEMMA, "nomic-bert", "modern-bert", "jina-bert-v2"))
ASKED = frozenset(("qwen3",))


MPNET_STEMS: Mapping[str, str] = {
    **STEMS, **{f"attention.{role}": f"attention.attn.{role}" for role in "qkv"},
    "attention.out": "attention.attn.o", "attention.post_norm": "attention.LayerNorm",
    "relative": "encoder.relative_attention_bias",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of BERT.

    offset: positions begin after that of padding. dense: a classifier's linears, the last one's
    last.
    """

    offset: bool = False
    dense: tuple[str, str] = ("pooler.dense", "classifier")
    stems: Mapping[str, str] = field(default_factory=lambda: STEMS)


_ROBERTA = Family(True, ("classifier.dense", "classifier.out_proj"))
FAMILIES = {
    "bert": Family(), "roberta": _ROBERTA, "xlm-roberta": _ROBERTA, "camembert": _ROBERTA,
    "mpnet": replace(_ROBERTA, stems=MPNET_STEMS),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a model that embeds is.

    checkpoint: with tensors by the names that `text` and `head` use.
    text: its encoder, or decoder. head: linears after pooling. judges: pairs of texts, by the head.
    causal: a token sees those before it.
    """

    checkpoint: Checkpoint
    text: Part
    causal: bool
    head: Part | None = None
    judges: bool = False

    @property
    def spec(self) -> Encoder | Decoder:
        assert isinstance(self.text.spec, Encoder | Decoder)
        return self.text.spec

    @property
    def context(self) -> int:
        """Tokens of a text that it was trained for."""
        spec = self.spec
        return spec.context if isinstance(spec, Decoder) else spec.positions - spec.first


def load(checkpoint: Checkpoint) -> Recipe:
    """The recipe of a checkpoint; what it does not use of the files, it refuses."""
    check_applied(checkpoint)
    if checkpoint.kind == "gguf":
        return _of_gguf(checkpoint)
    if checkpoint.kind != "folder":
        raise UnsupportedModel(
            f"models that embed are read from folders and GGUF files, not {checkpoint.kind}"
        )
    kind = checkpoint.metadata.get("model_type")
    return _bert(checkpoint, str(kind)) if kind in FAMILIES else _decoder(checkpoint)


# ---- folders ----


def _bert(checkpoint: Checkpoint, kind: str) -> Recipe:
    family, keys = FAMILIES[kind], part_keys({"camembert": "roberta"}.get(kind, kind))
    assert keys is not None
    tensors = _plainly_named(checkpoint.tensors)
    naming = Naming(family.stems, "encoder.layer.{}.", harmless=_BESIDE)
    c = ConfigFields(checkpoint.metadata, tensors, keys, naming)
    c.skip("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    c.skip("tie_word_embeddings")  # with a head that is not used
    c.ignored.clear()  # of tasks and trainers
    if (how := checkpoint.metadata.get("position_embedding_type", "absolute")) != "absolute":
        raise UnsupportedModel(f"position_embedding_type is {how!r:.99}; known: absolute")
    first = _after_padding(checkpoint.metadata) if family.offset else 0
    types = c.count("type_vocab_size", high=1 << 10) if "relative" not in family.stems else 0
    spec = replace(
        _layers(c), positions=parts.context(c), first=first, types=types, relative=_relative(c)
    )
    c.check_all_read()
    found = [Part("encoder", spec, naming)]
    if _judges(checkpoint.metadata):
        found.append(_classifier(family.dense, tensors, spec.hidden))
    text, *head = place(found, tensors, read=set())
    if spec.relative is not None:
        check_relative(spec, tensors[naming.name("relative.weight")])
    own = replace(checkpoint, tensors=tensors)
    return Recipe(own, text, False, head[0] if head else None, bool(head))


def _relative(c: ConfigFields) -> Relative | None:
    key = "relative_attention_num_buckets"
    if not c.has(key):
        return None
    found = Relative(c.count(key, high=4096), FARTHEST)
    check_buckets(found)
    return found


def _plainly_named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the model's own name before, and with what norms of early files are called now."""
    first = next((name for name in tensors if name.endswith(_FIRST)), _FIRST)
    before, found = first.removesuffix(_FIRST), {}
    for name, tensor in tensors.items():
        plain = re.sub(r"(?<=LayerNorm\.)gamma$", "weight", name.removeprefix(before))
        found[re.sub(r"(?<=LayerNorm\.)beta$", "bias", plain)] = tensor
    return found


def _layers(c: ConfigFields) -> Encoder:
    norm = parts.layer_norm(c)
    heads = config_parts.attention(c, None, qkv_bias=True, out_bias=True)
    mlps = parts.mlp(c, config_parts.activation(c), gated=False, bias=True)
    layers = tuple(Layer(*pair, norm, "sum") for pair in zip(heads, mlps, strict=True))
    return Encoder(c.count("vocab_size"), parts.hidden(c), layers, None, embed_norm=norm)


def _after_padding(metadata: Mapping[str, Any]) -> int:
    padding = metadata.get("pad_token_id", 1)
    if type(padding) is not int or not 0 <= padding < 1 << 16:
        raise InvalidCheckpoint(f"pad_token_id is {padding!r:.99}; it must be a token's id")
    return padding + 1


def _judges(metadata: Mapping[str, Any]) -> bool:
    return any(str(name).endswith(CLASSIFIER) for name in metadata.get("architectures") or ())


def _classifier(stems: tuple[str, str], tensors: Mapping[str, Tensor], hidden: int) -> Part:
    """The head of a model that gives a pair one number."""
    weight = f"{stems[1]}.weight"
    labels = tensors[weight].shape[0] if weight in tensors else 0
    if labels != 1:
        raise UnsupportedModel(
            f"the classifier has {labels} labels; those of models that judge pairs have 1"
        )
    spec = Head(hidden, (Dense(hidden, True, True), Dense(labels, True, False)))
    return Part("head", spec, Naming(dict(zip(("dense0", "dense1"), stems, strict=True)), ""))


def _decoder(checkpoint: Checkpoint) -> Recipe:
    kind = checkpoint.metadata.get("model_type")
    name = by_model_type(kind)
    if name not in config.RECIPES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModel(
            f"unknown model_type {quote(str(kind))} of a model that embeds; known: {known}, and "
            "those of language models"
        )
    tensors = {
        name if name.startswith(("model.", "lm_head.")) else f"model.{name}": tensor
        for name, tensor in checkpoint.tensors.items()
    }
    c = config.fields(checkpoint.metadata, tensors, name)
    config.check_depth(c)
    mutual = c.has("use_bidirectional_attention") and c.flag("use_bidirectional_attention", False)
    spec = headless(config.RECIPES[name].function(c), causal=not mutual)
    c.check_all_read()
    harmless = re.compile(rf"{c.naming.harmless.pattern}|lm_head\..*")
    part = Part("decoder", spec, replace(c.naming, harmless=harmless))
    (text,) = place([part], tensors, read=c.tensors_read)
    return Recipe(replace(checkpoint, tensors=tensors), text, not mutual)


def headless(spec: Decoder, *, causal: bool) -> Decoder:
    """Its layers alone. Where all see each other, a window is half before and half after."""

    def seen(layer: Layer) -> Layer:
        window = layer.attention.window
        if causal or window is None:
            return layer
        return replace(layer, attention=replace(layer.attention, window=window // 2 + 1))

    return replace(spec, layers=tuple(map(seen, spec.layers)), tied=True, head_bias=False)


# ---- GGUF ----


def _of_gguf(checkpoint: Checkpoint) -> Recipe:
    architecture = str(checkpoint.metadata.get("general.architecture"))
    tensors = checkpoint.tensors
    name = {EMBEDDING_GEMMA: "gemma3"}.get(architecture, architecture)
    c = GgufFields(architecture, checkpoint.metadata, tensors)
    c.skip(
        "pooling_type",
        "context_length",
        *(f"dense_{n}_feat_{end}" for n in (2, 3) for end in ("in", "out")),
    )
    causal = c.flag("attention.causal", architecture not in ("bert", EMBEDDING_GEMMA))
    naming = replace(GGUF_NAMING, harmless=_GGUF_HEADS)
    if architecture == "bert":
        stems = {role: stem for role, stem in GGUF_STEMS.items() if role != "norm"}
        part = Part("encoder", _gguf_bert(c), replace(naming, stems=stems))
    elif name in gguf.RECIPES:
        part = Part("decoder", headless(gguf.RECIPES[name](c), causal=causal), naming)
    else:
        known = ", ".join(["bert", EMBEDDING_GEMMA, *sorted(gguf.RECIPES)])
        raise UnsupportedModel(
            f"unknown architecture {quote(architecture)} of a model that embeds; known: {known}"
        )
    c.check_all_read()
    text, *head = place([part, *_gguf_linears(tensors)], tensors, read=c.tensors_read)
    return Recipe(checkpoint, text, causal, head[0] if head else None)


def _gguf_linears(tensors: Mapping[str, Tensor]) -> list[Part]:
    """What EmbeddingGemma has after pooling, if the file has it."""
    names = [name for name in ("dense_2", "dense_3") if f"{name}.weight" in tensors]
    if not names:
        return []
    found = [tensors[f"{name}.weight"] for name in names]
    head = Head(found[0].cols, tuple(Dense(weight.rows, False, False) for weight in found))
    stems = {f"dense{number}": name for number, name in enumerate(names)}
    return [Part("head", head, Naming(stems, ""))]


def _gguf_bert(c: GgufFields) -> Encoder:
    def rows(name: str) -> int:
        return c.tensors[name].rows if name in c.tensors else 0

    norm = parts.layer_norm(c)
    heads = parts.attention(c, None, qkv_bias=True, out_bias=True)
    mlps = parts.mlp(c, "gelu", gated=False, bias=True)
    layers = tuple(Layer(*pair, norm, "sum") for pair in zip(heads, mlps, strict=True))
    return Encoder(
        rows("token_embd.weight"), parts.hidden(c), layers, None,
        positions=rows("position_embd.weight"), types=rows("token_types.weight"), embed_norm=norm,
    )  # fmt: skip


def judging(recipe: Recipe, ids: tuple[int, int]) -> Recipe:
    """A language model whose answer is one of two tokens: their rows of its head are a head."""
    (table,) = recipe.text.names["embed.weight"]
    own = "lm_head.weight" in recipe.checkpoint.tensors
    table = replace(table, tensor="lm_head.weight") if own else table
    slices = tuple(replace(table, start=one, stop=one + 1) for one in ids)
    spec = Head(recipe.spec.hidden, (Dense(len(ids), False, False),))
    head = Part("head", spec, recipe.text.naming, {"head.dense0.weight": slices})
    return replace(recipe, head=head, judges=True)
