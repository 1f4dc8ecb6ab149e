"""Towers of SigLIP's kind, and the models that have them."""

from __future__ import annotations

from dataclasses import replace

from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.recipes import clip_towers, config_parts, parts
from squall.recipes.clip_towers import naming, side
from squall.recipes.config_fields import ConfigFields
from squall.recipes.config_names import USUAL
from squall.recipes.names import Part
from squall.recipes.vision import Sections, seer
from squall.spec import Attention, Connector, Layer, Mlp, Norm, Perceiver, Tower

PATCHES = "embeddings.patch_embedding"


def tower(s: Sections, v: ConfigFields) -> Part:
    """A tower of SigLIP with the norm after it, and without the head that makes one row."""
    norm = parts.layer_norm(v)
    part = clip_towers.tower(v, s.before(PATCHES), -1, class_token=False)
    assert isinstance(part.spec, Tower)
    return replace(part, spec=replace(part.spec, norm=norm))


@seer("Gemma3ForConditionalGeneration", "gemma3-vision", "gemma3_text")
def gemma3(s: Sections) -> tuple[Part, ...]:
    if not any(PATCHES in name for name in s.text.tensors):
        return ()  # the language model alone
    v, top = s.part("vision_config", "siglip_vision_model"), s.top("gemma3")
    top.skip("boi_token_index", "eoi_token_index", "image_token_index", "tie_word_embeddings")
    tokens = top.count("mm_tokens_per_image", high=1 << 16)
    size = max(side(v) // max(int(tokens**0.5), 1), 1)
    if (side(v) / size) ** 2 != tokens:
        raise InvalidCheckpoint(
            f"mm_tokens_per_image is {tokens}; {side(v)} x {side(v)} patches do not make as many "
            "squares"
        )
    windows = (layer.attention.window for layer in s.decoder.layers)
    if any(window is not None and window < tokens for window in windows):
        raise UnsupportedModel(f"an image's {tokens} tokens must fit into sliding_window")
    norm = Norm("rms", v.number("layer_norm_eps", low=1e-15, high=1.0), unit_offset=True)
    spec = Connector(parts.hidden(v), (s.decoder.hidden,), norm=norm, merge=size**2, mean=True)
    stem = "multi_modal_projector.mm_"
    stems = {"norm": f"{stem}soft_emb_norm", "linear0": f"{stem}input_projection_weight"}
    names = replace(naming(s.before(stem), stems, ""), transposed=frozenset({"linear0"}))
    top.check_all_read()
    return tower(s, v), Part("connector", spec, names)


@seer("Idefics2ForConditionalGeneration", "idefics2", "mistral")
def idefics2(s: Sections) -> tuple[Part, ...]:
    v = s.part("vision_config", "idefics2_vision", fixed=True)
    p = s.part("perceiver_config", "idefics2_perceiver", fixed=True)
    s.top("idefics2").check_all_read()
    hidden, norm = s.decoder.hidden, parts.rms(p)
    if p.count("embedding_length") != hidden:  # which early files leave out
        norm = parts.rms(s.text)
    heads, kv_heads = p.count("resampler_n_heads"), p.count("num_key_value_heads")
    size, act = p.count("resampler_head_dim", high=1 << 16), config_parts.activation(p)
    if heads % kv_heads:
        raise InvalidCheckpoint(
            f"{heads} resampler_n_heads cannot share {kv_heads} key-value heads"
        )
    layer = Layer(Attention(heads, kv_heads, size, size**-0.5, None), Mlp(4 * hidden, act), norm)
    mlp = Mlp(s.text.count("feed_forward_length"), config_parts.activation(s.text))
    latents = p.count("resampler_n_latents", high=1 << 16)
    blocks = (layer,) * p.count("resampler_depth", high=4096)
    spec = Perceiver(parts.hidden(v), hidden, mlp, latents, blocks, norm)
    p.check_all_read()
    stems = {
        **USUAL.stems,
        "attention.norm": "input_latents_norm",
        "attention.context_norm": "input_context_norm",
        "latents": "perceiver_resampler.latents",
        "norm": "perceiver_resampler.norm",
        **{f"mlp.{part}": f"modality_projection.{part}_proj" for part in ("gate", "up", "down")},
    }
    names = naming(s.before("modality_projection"), stems, "perceiver_resampler.layers.{}.")
    return tower(s, v), Part("connector", spec, names)


@seer("Idefics3ForConditionalGeneration", "idefics3", "llama")
def idefics3(s: Sections, kind: str = "idefics3") -> tuple[Part, ...]:
    v, top = s.part("vision_config", f"{kind}_vision", fixed=True), s.top(kind)
    merge = top.count("scale_factor", high=64) ** 2
    top.check_all_read()
    spec = Connector(parts.hidden(v), (s.decoder.hidden,), merge=merge)
    stem = "modality_projection.proj"
    names = naming(s.before(stem), {"linear0": stem}, "")
    return tower(s, v), Part("connector", spec, names)


@seer("SmolVLMForConditionalGeneration", "smolvlm", "llama")
def smolvlm(s: Sections) -> tuple[Part, ...]:
    return idefics3(s, "smolvlm")
