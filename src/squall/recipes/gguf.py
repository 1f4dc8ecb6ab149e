"""One function per GGUF architecture: metadata -> Decoder.

Files of the llama family hold q and k rows permuted for interleaved rope; in those of the gemma
family the norm weights have their 1 added already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from squall.recipes.fields import Fields
from squall.recipes.gguf_parts import attention, mlp, mlp_or_moe, rope, sectioned, windows
from squall.recipes.parts import context, decoder, depth, head_dim, hidden, layer_norm, rms
from squall.spec import Attention, Decoder

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
    heads = attention(c, rope(c, interleaved=True), window=windows(c))
    return decoder(c, rms(c), heads, mlp_or_moe(c, "silu"))


@recipe("qwen2")
def qwen2(c: Fields) -> Decoder:
    return decoder(c, rms(c), attention(c, rope(c)), mlp(c, "silu"))


@recipe("qwen2vl")
def qwen2vl(c: Fields) -> Decoder:
    return decoder(c, rms(c), attention(c, sectioned(c, rope(c))), mlp(c, "silu"))


@recipe("qwen3")
@recipe("qwen3moe")
def qwen3(c: Fields) -> Decoder:
    heads = attention(c, rope(c), qk_norm=rms(c))
    return decoder(c, rms(c), heads, mlp_or_moe(c, "silu"))


@recipe("phi2")
def phi2(c: Fields) -> Decoder:
    feed_forward = mlp(c, "gelu_tanh", gated=False)
    return decoder(c, layer_norm(c), attention(c, rope(c)), feed_forward, wiring="parallel")


@recipe("phi3")
def phi3(c: Fields) -> Decoder:
    # Files of the 4k models that lack the key are older than the key.
    window = windows(c, default=2047 if context(c) == 4096 else None)
    return decoder(c, rms(c), attention(c, rope(c), window=window), mlp(c, "silu"))


@recipe("starcoder2")
def starcoder2(c: Fields) -> Decoder:
    heads = attention(c, rope(c), window=windows(c))
    return decoder(c, layer_norm(c), heads, mlp(c, "gelu_tanh", gated=False))


@recipe("gemma")
def gemma(c: Fields) -> Decoder:
    heads, scale = attention(c, rope(c)), hidden(c) ** 0.5
    return decoder(c, rms(c), heads, mlp(c, "gelu_tanh"), embed_scale=scale)


@recipe("gemma2")
def gemma2(c: Fields) -> Decoder:
    window, cap = windows(c, period=2, default=4096), c.optional("attn_logit_softcapping")
    scale = gemma_scale(c, layers_of_27b=46)
    heads = attention(c, rope(c), window=window, scale=scale, softcap=cap)
    return sandwich(c, heads)


@recipe("gemma3")
def gemma3(c: Fields) -> Decoder:
    window, scale = windows(c, period=6), gemma_scale(c, layers_of_27b=62)
    far = rope(c)
    near = rope(c, theta=c.number("rope.freq_base_swa", 10000.0, low=1.0), scaled=False)
    turns = tuple(near if size else far for size in window)
    return sandwich(c, attention(c, turns, window=window, scale=scale, qk_norm=rms(c)))


@recipe("granite")
def granite(c: Fields) -> Decoder:
    turn = rope(c, interleaved=True)
    # The key is granite's switch for rope, whatever its name says.
    used = turn if c.flag("rope.scaling.finetuned", True) else None
    return decoder(
        c,
        rms(c),
        attention(c, used),
        mlp(c, "silu"),
        embed_scale=c.optional("embedding_scale") or 1.0,
        residual_scale=c.optional("residual_scale") or 1.0,
        logit_scale=1.0 / (c.optional("logit_scale") or 1.0),
    )


@recipe("olmo2")
def olmo2(c: Fields) -> Decoder:
    heads = attention(c, rope(c), qk_norm=rms(c), qk_norm_scope="row")
    return decoder(c, rms(c), heads, mlp(c, "silu"), wiring="post")


@recipe("smollm3")
def smollm3(c: Fields) -> Decoder:
    turn = rope(c, interleaved=True)
    turns = tuple(None if i % 4 == 3 else turn for i in range(depth(c)))
    return decoder(c, rms(c), attention(c, turns), mlp(c, "silu"))


def sandwich(c: Fields, heads: Sequence[Attention]) -> Decoder:
    scale = hidden(c) ** 0.5
    return decoder(c, rms(c), heads, mlp(c, "gelu_tanh"), wiring="sandwich", embed_scale=scale)


def gemma_scale(c: Fields, *, layers_of_27b: int) -> float:
    """The scale of the scores. The metadata lacks it; the 27B models, told by depth, differ."""
    heads = c.counts("attention.head_count", layers=depth(c))[0]
    size = max(hidden(c) // heads, 1) if depth(c) == layers_of_27b else head_dim(c)
    return c.optional("attention.scale") or size**-0.5
