"""One function per GGUF architecture: metadata -> Decoder.

Files of the llama family hold q and k rows permuted for interleaved rope; in those of the gemma
family the norm weights have their 1 added already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from squall.recipes.fields import Fields
from squall.recipes.parts import (
    attention,
    context,
    decoder,
    depth,
    head_dim,
    hidden,
    layer_norm,
    mlp,
    mlp_or_moe,
    rms,
    rope,
    windows,
)
from squall.spec import Decoder

RecipeFunction = Callable[[Fields], Decoder]

RECIPES: dict[str, RecipeFunction] = {}


def recipe(architecture: str) -> Callable[[RecipeFunction], RecipeFunction]:
    """Register a function for a value of `general.architecture`."""

    def register(function: RecipeFunction) -> RecipeFunction:
        RECIPES[architecture] = function
        return function

    return register


@recipe("llama")
def llama(c: Fields) -> Decoder:
    turn, window = rope(c, interleaved=True), windows(c)
    return decoder(
        c,
        rms(c),
        lambda i: attention(c, i, turn, window=window[i]),
        lambda i: mlp_or_moe(c, i, "silu"),
    )


@recipe("qwen2")
def qwen2(c: Fields) -> Decoder:
    turn = rope(c)
    return decoder(c, rms(c), lambda i: attention(c, i, turn), lambda i: mlp(c, i, "silu"))


@recipe("qwen3")
def qwen3(c: Fields) -> Decoder:
    turn, norm = rope(c), rms(c)
    return decoder(
        c, norm, lambda i: attention(c, i, turn, qk_norm=norm), lambda i: mlp(c, i, "silu")
    )


@recipe("phi2")
def phi2(c: Fields) -> Decoder:
    turn = rope(c)
    return decoder(
        c,
        layer_norm(c),
        lambda i: attention(c, i, turn),
        lambda i: mlp(c, i, "gelu_tanh", gated=False),
        wiring="parallel",
    )


@recipe("phi3")
def phi3(c: Fields) -> Decoder:
    # Files of the 4k models that lack the key are older than the key.
    turn, window = rope(c), windows(c, default=2047 if context(c) == 4096 else None)
    return decoder(
        c,
        rms(c),
        lambda i: attention(c, i, turn, window=window[i]),
        lambda i: mlp(c, i, "silu"),
    )


@recipe("starcoder2")
def starcoder2(c: Fields) -> Decoder:
    turn, window = rope(c), windows(c)
    return decoder(
        c,
        layer_norm(c),
        lambda i: attention(c, i, turn, window=window[i]),
        lambda i: mlp(c, i, "gelu_tanh", gated=False),
    )


@recipe("gemma")
def gemma(c: Fields) -> Decoder:
    turn = rope(c)
    return decoder(
        c,
        rms(c),
        lambda i: attention(c, i, turn),
        lambda i: mlp(c, i, "gelu_tanh"),
        embed_scale=hidden(c) ** 0.5,
    )


@recipe("gemma2")
def gemma2(c: Fields) -> Decoder:
    turn, window = rope(c), windows(c, period=2, default=4096)
    scale, cap = gemma_scale(c, layers_of_27b=46), c.optional("attn_logit_softcapping")
    return decoder(
        c,
        rms(c),
        lambda i: attention(c, i, turn, window=window[i], scale=scale, softcap=cap),
        lambda i: mlp(c, i, "gelu_tanh"),
        wiring="sandwich",
        embed_scale=hidden(c) ** 0.5,
    )


@recipe("gemma3")
def gemma3(c: Fields) -> Decoder:
    norm, window, scale = rms(c), windows(c, period=6), gemma_scale(c, layers_of_27b=62)
    far = rope(c)
    near = rope(c, theta=c.number("rope.freq_base_swa", 10000.0, low=1.0), scaled=False)
    turns = [near if size else far for size in window]
    return decoder(
        c,
        norm,
        lambda i: attention(c, i, turns[i], window=window[i], scale=scale, qk_norm=norm),
        lambda i: mlp(c, i, "gelu_tanh"),
        wiring="sandwich",
        embed_scale=hidden(c) ** 0.5,
    )


@recipe("granite")
def granite(c: Fields) -> Decoder:
    turn = rope(c, interleaved=True)
    # The key is granite's switch for rope, whatever its name says.
    used = turn if c.flag("rope.scaling.finetuned", True) else None
    return replace(
        decoder(c, rms(c), lambda i: attention(c, i, used), lambda i: mlp(c, i, "silu")),
        embed_scale=c.optional("embedding_scale") or 1.0,
        residual_scale=c.optional("residual_scale") or 1.0,
        logit_scale=1.0 / (c.optional("logit_scale") or 1.0),
    )


@recipe("olmo2")
def olmo2(c: Fields) -> Decoder:
    turn, norm = rope(c), rms(c)
    return decoder(
        c,
        norm,
        lambda i: attention(c, i, turn, qk_norm=norm, qk_norm_scope="row"),
        lambda i: mlp(c, i, "silu"),
        wiring="post",
    )


@recipe("qwen3moe")
def qwen3moe(c: Fields) -> Decoder:
    turn, norm = rope(c), rms(c)
    return decoder(
        c, norm, lambda i: attention(c, i, turn, qk_norm=norm), lambda i: mlp_or_moe(c, i, "silu")
    )


@recipe("smollm3")
def smollm3(c: Fields) -> Decoder:
    turn = rope(c, interleaved=True)
    return decoder(
        c,
        rms(c),
        lambda i: attention(c, i, None if i % 4 == 3 else turn),
        lambda i: mlp(c, i, "silu"),
    )


def gemma_scale(c: Fields, *, layers_of_27b: int) -> float:
    """The scale of the scores. The metadata lacks it; the 27B models, told by depth, differ."""
    heads = c.counts("attention.head_count", layers=depth(c))[0]
    size = max(hidden(c) // heads, 1) if depth(c) == layers_of_27b else head_dim(c)
    return c.optional("attention.scale") or size**-0.5
