"""Models that embed texts, or judge pairs of them: the BERT family, and decoders without a head."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from squall.checkpoints.base import Checkpoint, Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.recipes import config, config_parts, gguf, gguf_parts, parts
from squall.recipes.config_fields import ConfigFields, by_model_type, part_keys
from squall.recipes.encoders import FARTHEST, check_buckets, check_relative
from squall.recipes.fields import Fields
from squall.recipes.gguf_parts import NAMING as GGUF_NAMING
from squall.recipes.gguf_parts import GgufFields
from squall.recipes.names import Naming, Part, check_applied, place
from squall.spec import Activation, Decoder, Dense, Encoder, Head, Layer, Relative, Rope

CLASSIFIER = "ForSequenceClassification"
Pooling = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "last"]
# What models have beside their encoder: other heads than those that are used, and tables.
_BESIDE = re.compile(
    r"(pooler|cls|lm_head|classifier|pre_classifier|head|decoder|vocab_\w+|\w+_predictions)\..*"
    r"|embeddings\.(position|token_type)_ids"
)
# Of training, of other heads, and of how the same numbers are computed.
_NO_EFFECT = """
hidden_dropout_prob attention_probs_dropout_prob classifier_dropout tie_word_embeddings dropout
qa_dropout seq_classif_dropout sinusoidal_pos_embds embedding_size summary_activation
summary_last_dropout summary_type summary_use_proj classifier_activation classifier_bias
classifier_pooling cls_token_id sep_token_id decoder_bias deterministic_flash_attn
initializer_cutoff_factor mlp_dropout sparse_pred_ignore_index sparse_prediction
"""
_QKV = "attention.self."
STEMS: Mapping[str, str] = {
    "embed": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings", "embed_norm": "embeddings.LayerNorm",
    "attention.q": f"{_QKV}query", "attention.k": f"{_QKV}key", "attention.v": f"{_QKV}value",
    "attention.out": "attention.output.dense", "attention.post_norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense", "feed_forward.down": "output.dense",
    "feed_forward.post_norm": "output.LayerNorm",
}  # fmt: skip
MPNET_STEMS: Mapping[str, str] = {
    **{role: name for role, name in STEMS.items() if role != "types"},
    **{f"attention.{role}": f"attention.attn.{role}" for role in "qkv"},
    "attention.out": "attention.attn.o", "attention.post_norm": "attention.LayerNorm",
    "relative": "encoder.relative_attention_bias",
}  # fmt: skip
DISTILBERT_STEMS: Mapping[str, str] = {
    **{role: STEMS[role] for role in ("embed", "positions", "embed_norm")},
    **{f"attention.{role}": f"attention.{role}_lin" for role in "qkv"},
    "attention.out": "attention.out_lin", "attention.post_norm": "sa_layer_norm",
    "feed_forward.up": "ffn.lin1", "feed_forward.down": "ffn.lin2",
    "feed_forward.post_norm": "output_layer_norm",
}  # fmt: skip
NOMIC_STEMS: Mapping[str, str] = {
    "embed": STEMS["embed"], "types": STEMS["types"], "embed_norm": "emb_ln",
    **{f"attention.{role}": f"attn.{role}_proj" for role in "qkv"},
    "attention.out": "attn.out_proj", "attention.post_norm": "norm1",
    "feed_forward.gate": "mlp.fc12", "feed_forward.up": "mlp.fc11", "feed_forward.down": "mlp.fc2",
    "feed_forward.post_norm": "norm2",
}  # fmt: skip
MODERN_STEMS: Mapping[str, str] = {
    "embed": "embeddings.tok_embeddings", "embed_norm": "embeddings.norm", "norm": "final_norm",
    "attention.norm": "attn_norm", **{f"attention.{role}": f"attn.W{role}" for role in "qkv"},
    "attention.out": "attn.Wo", "feed_forward.norm": "mlp_norm", "feed_forward.gate": "mlp.Wg",
    "feed_forward.up": "mlp.Wu", "feed_forward.down": "mlp.Wo",
}  # fmt: skip
_FUSED: Mapping[str, tuple[str, ...]] = {
    "attn.Wqkv": ("attention.q", "attention.k", "attention.v"),
    "mlp.Wi": ("feed_forward.gate", "feed_forward.up"),
}  # fmt: skip
GGUF_STEMS: Mapping[str, str] = {
    **GGUF_NAMING.stems, "positions": "position_embd", "types": "token_types",
    "embed_norm": "token_embd_norm", "attention.post_norm": "attn_output_norm",
    "feed_forward.post_norm": "layer_output_norm",
}  # fmt: skip
_GGUF_HEADS = re.compile(r"cls(\.output|\.norm)?\.(weight|bias)|output\.weight")
EMBEDDING_GEMMA, MODERN_BERT = "gemma-embedding", "modern-bert"
# Architectures of GGUF that write no text, and kinds of language models that are asked yes or no.
GGUF_ENCODERS = frozenset(("bert", EMBEDDING_GEMMA, "nomic-bert", MODERN_BERT, "jina-bert-v2"))
ASKED = frozenset(("qwen3",))
RANKS = 4  # a pooling_type of GGUF


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a model that embeds is.

    checkpoint: with tensors by the names that `text` and `head` use.
    text: its encoder, or decoder. causal: a token sees those before it. context: tokens of a text
    that it was trained for. head: linears after pooling. pooling: the one whose rows the head needs
    to judge pairs of texts, if that is what it does.
    """

    checkpoint: Checkpoint
    text: Part
    causal: bool
    context: int
    head: Part | None = None
    pooling: Pooling | None = None

    @property
    def judges(self) -> bool:
        return self.pooling is not None

    @property
    def spec(self) -> Encoder | Decoder:
        assert isinstance(self.text.spec, Encoder | Decoder)
        return self.text.spec


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
    return _encoder(checkpoint, str(kind)) if kind in FAMILIES else _decoder(checkpoint)


# ---- encoders, of both kinds of files ----


def _after(
    c: Fields, vocab: int, activation: Activation, rope: Rope | None = None, **fields: Any
) -> Encoder:
    """Norms follow the sums: BERT's layers, with biases, or gated ones that turn, without."""
    plain, norm = rope is None, parts.layer_norm(c)
    heads = parts.attention(c, rope, qkv_bias=plain, out_bias=plain)
    mlps = parts.mlp(c, activation, gated=not plain, bias=plain)
    layers = tuple(Layer(*pair, norm, "sum") for pair in zip(heads, mlps, strict=True))
    return Encoder(vocab, parts.hidden(c), layers, None, embed_norm=norm, **fields)


def _before(
    c: Fields, vocab: int, activation: Activation, turns: tuple[Rope, Rope], marks: Sequence[bool],
    window: int,
) -> Encoder:  # fmt: skip
    """Norms come first. turns: of layers that see all, and of those with marks.

    window: how much these see, half of it on each side.
    """
    norm = replace(parts.layer_norm(c), bias=False)
    reach = tuple(window // 2 + 1 if mark else None for mark in marks)
    heads = parts.attention(c, tuple(turns[mark] for mark in marks), window=reach)
    mlps = parts.mlp(c, activation, gated=True, bias=False)
    layers = tuple(
        Layer(*pair, norm, "pre" if i else "late")
        for i, pair in enumerate(zip(heads, mlps, strict=True))
    )
    return Encoder(vocab, parts.hidden(c), layers, norm, embed_norm=norm)


# ---- folders ----


def _bert(c: ConfigFields) -> Encoder:
    return _after(
        c, c.count("vocab_size"), config_parts.activation(c), positions=parts.context(c),
        types=_types(c), relative=_relative(c),
    )  # fmt: skip


def _nomic(c: ConfigFields) -> Encoder:
    turn = config_parts.rope(c)
    return _after(
        c, c.count("vocab_size"), config_parts.activation(c), turn, types=_types(c)
    )  # fmt: skip


def _modern(c: ConfigFields) -> Encoder:
    far = config_parts.rope(c, section="full_attention")
    near = config_parts.rope(c, theta="rope_local_base_freq", section="sliding_attention")
    layers, every = parts.depth(c), c.count("global_attn_every_n_layers", 3)
    marks = tuple(i % every > 0 for i in range(layers))
    if c.has("layer_types"):
        marks = config_parts.layer_marks(c, layers)
    own = c.count("vocab_size"), config_parts.activation(c)
    return _before(c, *own, (far, near), marks, c.count("local_attention"))


_NAMING = Naming(STEMS, "encoder.layer.{}.", harmless=_BESIDE)


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of encoder.

    make: its spec. offset: positions begin after that of padding. dense: a classifier's linears,
    the last one's last; activation and norm, of which `head_norm` is the name: between.
    more: what config.json does not say, or by other names: `aliases`.
    """

    make: Callable[[ConfigFields], Encoder] = _bert
    naming: Naming = _NAMING
    offset: bool = False
    dense: tuple[str, str] = ("pooler.dense", "classifier")
    activation: Activation | Literal["tanh"] = "tanh"
    head_norm: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


_OUT = ("classifier.dense", "classifier.out_proj")
_ROBERTA = Family(offset=True, dense=_OUT)
FAMILIES = {
    "bert": Family(), "roberta": _ROBERTA, "xlm-roberta": _ROBERTA, "camembert": _ROBERTA,
    "electra": Family(dense=_OUT, activation="gelu"),
    "mpnet": replace(_ROBERTA, naming=replace(_NAMING, stems=MPNET_STEMS)),
    "distilbert": Family(
        naming=Naming(DISTILBERT_STEMS, "transformer.layer.{}.", harmless=_BESIDE),
        dense=("pre_classifier", "classifier"), activation="relu", more={"layer_norm_eps": 1e-12},
    ),
    "nomic_bert": Family(
        _nomic, Naming(NOMIC_STEMS, "encoder.layers.{}.", fused=_FUSED, harmless=_BESIDE),
        aliases={
            "n_embd": "hidden_size", "n_head": "num_attention_heads",
            "n_layer": "num_hidden_layers", "n_inner": "intermediate_size",
            "layer_norm_epsilon": "layer_norm_eps", "rotary_emb_base": "rope_theta",
            "max_trained_positions": "max_position_embeddings",
            "rotary_emb_fraction": "partial_rotary_factor",
        },
        more=dict.fromkeys(("rotary_emb_interleaved", "prenorm", "use_rms_norm"), False)
        | {"partial_rotary_factor": 1.0},
    ),
    "modernbert": Family(
        _modern, Naming(MODERN_STEMS, "layers.{}.", fused=_FUSED, harmless=_BESIDE),
        dense=("head.dense", "classifier"), activation="gelu", head_norm="head.norm",
        more={"global_attn_every_n_layers": 3},
        aliases={"global_rope_theta": "rope_theta", "local_rope_theta": "rope_local_base_freq"},
    ),
}  # fmt: skip


def _encoder(checkpoint: Checkpoint, kind: str) -> Recipe:
    family = FAMILIES[kind]
    said: Mapping[str, Any] = checkpoint.metadata
    keys = part_keys({"camembert": "roberta"}.get(kind, kind))
    assert keys is not None
    keys = {
        **keys, "reads": family.more | keys["reads"], "aliases": family.aliases | keys["aliases"]
    }  # fmt: skip
    tensors = _plainly_named(checkpoint.tensors, f"{family.naming.stems['embed']}.weight")
    c = ConfigFields(said, tensors, keys, family.naming)
    c.skip(*_NO_EFFECT.split())
    c.ignored.clear()  # of tasks and trainers
    if (how := said.get("position_embedding_type", "absolute")) != "absolute":
        raise UnsupportedModel(f"position_embedding_type is {how!r:.99}; known: absolute")
    first = _after_padding(said) if family.offset else 0
    spec = replace(family.make(c), first=first)
    context = parts.context(c) - first
    c.check_all_read()
    found = [Part("encoder", spec, family.naming)]
    if heads := any(str(name).endswith(CLASSIFIER) for name in said.get("architectures") or ()):
        found.append(_classifier(family, tensors, spec, bias=said.get("classifier_bias") is True))
    text, *head = place(found, tensors, read=set())
    if spec.relative is not None:
        check_relative(spec, tensors[family.naming.name("relative.weight")])
    pooling: Pooling = "mean" if said.get("classifier_pooling") == "mean" else "cls"
    own = replace(checkpoint, tensors=tensors)
    return Recipe(own, text, False, context, _first(head), pooling if heads else None)


def _first(parts: Sequence[Part]) -> Part | None:
    return parts[0] if parts else None


def _types(c: ConfigFields) -> int:
    return c.count("type_vocab_size", high=1 << 10) if "types" in c.naming.stems else 0


def _relative(c: ConfigFields) -> Relative | None:
    key = "relative_attention_num_buckets"
    if not c.has(key):
        return None
    found = Relative(c.count(key, high=4096), FARTHEST)
    check_buckets(found)
    return found


def _plainly_named(tensors: Mapping[str, Tensor], embed: str) -> dict[str, Tensor]:
    """Without the model's own name before, and with what norms of early files are called now."""
    first = next((name for name in tensors if name.endswith(embed)), embed)
    before, found = first.removesuffix(embed), {}
    for name, tensor in tensors.items():
        plain = re.sub(r"(?<=LayerNorm\.)gamma$", "weight", name.removeprefix(before))
        found[re.sub(r"(?<=LayerNorm\.)beta$", "bias", plain)] = tensor
    return found


def _after_padding(metadata: Mapping[str, Any]) -> int:
    padding = metadata.get("pad_token_id", 1)
    if type(padding) is not int or not 0 <= padding < 1 << 16:
        raise InvalidCheckpoint(f"pad_token_id is {padding!r:.99}; it must be a token's id")
    return padding + 1


def _classifier(
    family: Family, tensors: Mapping[str, Tensor], spec: Encoder, *, bias: bool
) -> Part:
    """The head of a model that gives a pair one number. bias: of its first linear, with a norm."""
    weight, norm = f"{family.dense[1]}.weight", spec.norm if family.head_norm else None
    labels = tensors[weight].shape[0] if weight in tensors else 0
    _check_labels(labels)
    first = Dense(spec.hidden, bias or norm is None, family.activation, norm)
    stems = dict(zip(("dense0", "dense1"), family.dense, strict=True)) | {"norm0": family.head_norm}
    return Part("head", Head(spec.hidden, (first, Dense(labels, True))), Naming(stems, ""))


def _check_labels(labels: int, right: int = 1) -> None:
    if labels != right:
        raise UnsupportedModel(
            f"the classifier has {labels} labels; those of models that judge pairs have {right}"
        )


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
    return Recipe(replace(checkpoint, tensors=tensors), text, not mutual, spec.context)


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
    c = GgufFields(architecture, checkpoint.metadata, tensors)
    c.skip("context_length", "pooling_type", "classifier.output_labels")
    c.skip(*(f"dense_{n}_feat_{end}" for n in (2, 3) for end in ("in", "out")))
    causal = c.flag("attention.causal", architecture not in GGUF_ENCODERS)
    part, context = _gguf_part(c, architecture, causal=causal)
    c.check_all_read()
    unsaid = RANKS if architecture in _GGUF and _classifier_rows(c) else 0  # as older files are
    ranks = checkpoint.metadata.get(f"{architecture}.pooling_type", unsaid) == RANKS
    pooling = _judges_by(architecture) if ranks else None
    heads = [] if ranks else _gguf_linears(tensors)
    if ranks and isinstance(part.spec, Encoder):
        heads = [_gguf_classifier(c, part.spec)]
    text, *head = place([part, *heads], tensors, read=c.tensors_read)
    recipe = Recipe(checkpoint, text, causal, context, _first(head), pooling)
    if pooling != "last":
        return recipe
    _check_labels(_rows(c, "cls.output"), 2)
    return judging(recipe, (1, 0), "cls.output.weight")  # which has yes first


def _gguf_part(c: GgufFields, architecture: str, *, causal: bool) -> tuple[Part, int]:
    """Its encoder or decoder, and the tokens of a text that it was trained for."""
    name = {EMBEDDING_GEMMA: "gemma3"}.get(architecture, architecture)
    naming = replace(GGUF_NAMING, harmless=_GGUF_HEADS)
    if make := _GGUF.get(architecture):
        spec = make(c)
        part = Part("encoder", spec, replace(naming, stems=GGUF_STEMS))
        return part, spec.positions or parts.context(c)
    if name in gguf.RECIPES:
        decoder = headless(gguf.RECIPES[name](c), causal=causal)
        return Part("decoder", decoder, naming), decoder.context
    known = ", ".join([*_GGUF, EMBEDDING_GEMMA, *sorted(gguf.RECIPES)])
    raise UnsupportedModel(
        f"unknown architecture {quote(architecture)} of a model that embeds; known: {known}"
    )


def _rows(c: Fields, name: str) -> int:
    tensor = c.tensors.get(f"{name}.weight")
    return tensor.rows if tensor else 0


def _gguf_modern(c: Fields) -> Encoder:
    far, size = gguf_parts.rope(c), c.count("attention.sliding_window")
    near = gguf_parts.rope(c, theta=c.number("rope.freq_base_swa", 10000.0, low=1.0))
    every = c.count("attention.sliding_window_pattern", 3)
    marks = tuple(i % every > 0 for i in range(parts.depth(c)))
    return _before(c, _rows(c, "token_embd"), "gelu", (far, near), marks, size)


_GGUF: Mapping[str, Callable[[Fields], Encoder]] = {
    "bert": lambda c: _after(
        c, _rows(c, "token_embd"), "gelu", positions=_rows(c, "position_embd"),
        types=_rows(c, "token_types"),
    ),
    "nomic-bert": lambda c: _after(
        c, _rows(c, "token_embd"), "silu", gguf_parts.rope(c), types=_rows(c, "token_types")
    ),
    MODERN_BERT: _gguf_modern,
}  # fmt: skip


def _judges_by(architecture: str) -> Pooling:
    if architecture in _GGUF:
        return "mean" if architecture == MODERN_BERT else "cls"
    if architecture in ASKED:
        return "last"
    raise UnsupportedModel(f"{quote(architecture)} is no architecture of models that judge pairs")


def _classifier_rows(c: Fields) -> dict[str, int]:
    """Of the linears of a classifier that the file has."""
    return {name: rows for name in ("cls", "cls.output") if (rows := _rows(c, name))}


def _gguf_classifier(c: Fields, spec: Encoder) -> Part:
    """Of one linear or two: files of those whose first BERT calls its pooler lack it."""
    rows, norm = _classifier_rows(c), spec.norm if "cls.norm.weight" in c.tensors else None
    layers = tuple(
        Dense(width, f"{name}.bias" in c.tensors, "tanh" if norm is None else "gelu", norm)
        if name == "cls"
        else Dense(width, f"{name}.bias" in c.tensors)
        for name, width in rows.items()
    )
    _check_labels(layers[-1].width if layers else 0)
    stems = {f"dense{index}": name for index, name in enumerate(rows)} | {"norm0": "cls.norm"}
    return Part("head", Head(spec.hidden, layers), Naming(stems, ""))


def _gguf_linears(tensors: Mapping[str, Tensor]) -> list[Part]:
    """What EmbeddingGemma has after pooling, if the file has it."""
    names = [name for name in ("dense_2", "dense_3") if f"{name}.weight" in tensors]
    if not names:
        return []
    found = [tensors[f"{name}.weight"] for name in names]
    head = Head(found[0].cols, tuple(Dense(weight.rows, False) for weight in found))
    stems = {f"dense{number}": name for number, name in enumerate(names)}
    return [Part("head", head, Naming(stems, ""))]


def judging(recipe: Recipe, ids: tuple[int, int], head: str = "lm_head.weight") -> Recipe:
    """A language model whose answer is one of two tokens: their rows of its head are a head."""
    (table,) = recipe.text.names["embed.weight"]
    own = head in recipe.checkpoint.tensors
    table = replace(table, tensor=head) if own else table
    slices = tuple(replace(table, start=one, stop=one + 1) for one in ids)
    spec = Head(recipe.spec.hidden, (Dense(len(ids), False),))
    made = Part("head", spec, recipe.text.naming, {"head.dense0.weight": slices})
    return replace(recipe, head=made, pooling="last")
