"""What a decoder is, an encoder, and a tower, as frozen data.

No architecture names, tensors, or file formats. A recipe makes them from a checkpoint's
configuration; `squall.decoder`, `squall.encoder` and `squall.vision` compile them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]
Wiring = Literal["pre", "late", "sandwich", "post", "sum", "parallel"]
NormScope = Literal["head", "each_head", "row"]


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm or LayerNorm; `unit_offset`: the checkpoint stores `weight - 1`."""

    kind: Literal["rms", "layer"]
    eps: float
    bias: bool = False
    unit_offset: bool = False


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """NTK: above `original_context` theta grows, so that the slowest frequency still fits."""

    factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): a ramp from kept to interpolated frequencies, and a magnitude."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float | None = None


@dataclass(frozen=True, slots=True)
class FactorScaling:
    """Each frequency divided by its factor: `long` above `original_context`, else `short`.

    `long_magnitude` is the magnitude that goes with `long`; None: the same.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int
    magnitude: float = 1.0
    long_magnitude: float | None = None


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | FactorScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of a head's first `dims`; `interleaved` pairs (0, 1), else (0, dims / 2).

    axes: which axis of its position each frequency turns with, if positions have several.
    order: which frequency each is, if they are not all there in descending order.
    """

    theta: float
    dims: int
    interleaved: bool = False
    scaling: RopeScaling | None = None
    axes: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def frequencies(self, context: int) -> tuple[tuple[float, ...], float]:
        """The `dims / 2` frequencies (radians a position), and the magnitude of cos and sin.

        What depends on the length goes by `context`, the tokens there is room for, and not by how
        many there are: so a token's result does not depend on when it was computed.
        """
        base = [self.theta ** (-2 * i / self.dims) for i in self.order or range(self.dims // 2)]
        match self.scaling:
            case None:
                return tuple(base), 1.0
            case LinearScaling(factor):
                return tuple(f / factor for f in base), 1.0
            case DynamicScaling() as scaling:
                stretch = self._stretch(scaling, context)
                return tuple(f * stretch**i for i, f in enumerate(base)), 1.0
            case Llama3Scaling() as scaling:
                return tuple(_llama3(f, scaling) for f in base), 1.0
            case YarnScaling() as scaling:
                return self._yarn(base, scaling)
            case FactorScaling() as scaling:
                return self._factored(base, scaling, long=context > scaling.original_context)

    def _stretch(self, s: DynamicScaling, context: int) -> float:
        """What each frequency is multiplied by, to the power of its index."""
        growth = s.factor * max(context / s.original_context, 1.0) - (s.factor - 1)
        return growth ** (-2 / (self.dims - 2)) if self.dims > 2 else 1.0

    def _factored(
        self, base: list[float], s: FactorScaling, *, long: bool
    ) -> tuple[tuple[float, ...], float]:
        factors = s.long if long else s.short
        own = s.long_magnitude if long else None
        scaled = tuple(f / by for f, by in zip(base, factors, strict=True))
        return scaled, s.magnitude if own is None else own

    def _yarn(self, base: list[float], s: YarnScaling) -> tuple[tuple[float, ...], float]:
        def dim_of(rotations: float) -> float:
            turns = s.original_context / (rotations * 2 * math.pi)
            return self.dims * math.log(turns) / (2 * math.log(self.theta))

        low = max(math.floor(dim_of(s.beta_fast)), 0)
        high = min(math.ceil(dim_of(s.beta_slow)), self.dims - 1)
        span = max(high - low, 0.001)
        kept = [1 - min(max((i - low) / span, 0.0), 1.0) for i in range(self.dims // 2)]
        mixed = (f * k + f / s.factor * (1 - k) for f, k in zip(base, kept, strict=True))
        default = 0.1 * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0
        return tuple(mixed), default if s.magnitude is None else s.magnitude


def _llama3(frequency: float, s: Llama3Scaling) -> float:
    wavelength = 2 * math.pi / frequency
    if wavelength < s.original_context / s.high_freq_factor:
        return frequency
    if wavelength > s.original_context / s.low_freq_factor:
        return frequency / s.factor
    span = s.high_freq_factor - s.low_freq_factor
    smooth = (s.original_context / wavelength - s.low_freq_factor) / span
    return (1 - smooth) * frequency / s.factor + smooth * frequency


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention; `window` counts the positions seen, itself included.

    qk_norm_scope: of each head with weights that all share (head) or its own (each_head), or of the
        whole row.
    recalls: keys and values are those of the sequence's memory, not its own.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_scope: NormScope = "head"
    recalls: bool = False


@dataclass(frozen=True, slots=True)
class Mlp:
    """`down(act(gate(x)) * up(x))` when gated, else `down(act(up(x)))`."""

    width: int
    activation: Activation
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Moe:
    """`top_k` of `experts` gated MLPs, weighted by their softmax scores.

    normalize: the chosen scores are divided by their sum.
    jitter: of SparseMixer (arXiv 2409.12136), see `program.MixtureOfExperts`; None: softmax.
    """

    experts: int
    top_k: int
    width: int
    activation: Activation
    normalize: bool
    jitter: float | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One block.

    pre:      x += attn(norm(x)); x += ffn(norm(x))
    late:     x += attn(x); x += ffn(norm(x))
    sandwich: x += norm(attn(norm(x))); x += norm(ffn(norm(x)))
    post:     x += norm(attn(x)); x += norm(ffn(x))
    sum:      x = norm(x + attn(x)); x = norm(x + ffn(x))
    parallel: h = norm(x); x += attn(h) + ffn(h)

    gates: what attn and ffn are multiplied by before they are added. Where attention recalls, ffn
        is added only to rows that see an image.
    """

    attention: Attention
    feed_forward: Mlp | Moe
    norm: Norm
    wiring: Wiring = "pre"
    gates: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A whole decoder-only language model.

    sees: rows of images may stand in place of embeddings. more_ids: embeddings beyond those of the
        vocabulary, of tokens that are never an answer.
    """

    vocab: int
    hidden: int
    context: int
    layers: tuple[Layer, ...]
    norm: Norm
    tied: bool = False
    head_bias: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    sees: bool = False
    more_ids: int = 0

    @property
    def recalls(self) -> bool:
        """Whether some of its layers recall a memory."""
        return any(layer.attention.recalls for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Tiles:
    """How rows know the tile of a picture that they are of, and its shape.

    shapes, most: shapes of a picture that there are, and tiles of one.
    gates: of what is learned for a tile and added to its patches; for its positions, which give up
        that share of their own; and for a tile again, after the norm.
    late: layers after the norm. read: layers before it whose rows are read too, after the last's,
        value by value beside each other.
    """

    shapes: int
    most: int
    gates: tuple[float, float, float]
    late: tuple[Layer, ...]
    read: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision transformer: patches of pixels in, a row for each out.

    patch: values of a patch. bias: of the linear that embeds them.
    class_token: a learned row stands before those of each tile.
    positions: learned ones that there are; 0: none.
    pre_norm, norm: before and after the layers. local: of the layers, those that see less than the
        whole image. read: after how many layers rows are read, side by side; by default after all.
    """

    patch: int
    hidden: int
    layers: tuple[Layer, ...]
    bias: bool = False
    class_token: bool = False
    positions: int = 0
    pre_norm: Norm | None = None
    norm: Norm | None = None
    local: frozenset[int] = frozenset()
    read: tuple[int, ...] = ()
    tiles: Tiles | None = None


@dataclass(frozen=True, slots=True)
class Perceiver:
    """A connector of learned rows, the latents, which read those of a tower.

    An MLP makes the tower's rows `hidden` wide. In each layer latents attend to these, normed by a
    norm of their own, and to each other.
    """

    tower: int
    hidden: int
    mlp: Mlp
    latents: int
    layers: tuple[Layer, ...]
    norm: Norm


@dataclass(frozen=True, slots=True)
class Connector:
    """Makes a decoder's rows of a tower's: norm, merging, linears; in this order.

    merge: so many rows become one, side by side; mean: their mean instead; mix: a linear over them,
        channel by channel, of the tower's width, without bias.
    widths: of the linears' outputs, the last the decoder's. activation: between linears.
    newlines: learned rows that stand between those of images; `early`: before the linears.
    scale: of all rows in the end.
    """

    tower: int
    widths: tuple[int, ...]
    activation: Activation | None = None
    bias: bool = False
    norm: Norm | None = None
    merge: int = 1
    mean: bool = False
    mix: bool = False
    newlines: int = 0
    early: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Relative:
    """T5's relative positions (arXiv 1910.10683): a learned bias for each head and bucket.

    Half of the `buckets` are for keys after their query. Near distances have a bucket each, farther
    ones share them, logarithmically, up to `farthest`.
    """

    buckets: int
    farthest: int


@dataclass(frozen=True, slots=True)
class Encoder:
    """A transformer that makes a row of each token of a text.

    norm: after the layers. positions: learned ones that there are; 0: none. first: that of a text's
        first token. relative: of all layers' attention.
    types: learned rows that say which of two texts a token is of. embed_norm: before the layers.
    """

    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    norm: Norm | None
    positions: int = 0
    relative: Relative | None = None
    first: int = 0
    types: int = 0
    embed_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Dense:
    """One linear of a `Head`: how wide its rows are, and what is made of them."""

    width: int
    bias: bool
    activation: Activation | Literal["tanh"] | None = None
    norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """Linears, one after another, over one row a text. width: of those that come in."""

    width: int
    layers: tuple[Dense, ...]


@dataclass(frozen=True, slots=True)
class Flux:
    """The transformer of FLUX.1: the velocity of a picture's patches, given a text.

    patch: values of a patch of latents. text, pooled: widths of what T5 and CLIP make of the text.
    double: layers in which picture and text have weights of their own; single: those after them.
    axes: columns of a head that turn with each of three axes: 0, line, column.
    guidance: it is told how closely to follow the text.
    """

    patch: int
    hidden: int
    heads: int
    head_dim: int
    double: int
    single: int
    text: int
    pooled: int
    axes: tuple[int, int, int]
    mlp: int
    theta: float = 10000.0
    guidance: bool = False


@dataclass(frozen=True, slots=True)
class AutoEncoder:
    """A convolutional autoencoder (AutoencoderKL): pictures to latents, and back.

    latent: channels of latents, which are stored as (x - shift) * scale. widths: channels at each
    resolution, the finest first; each is half of the one before. blocks: at a resolution when
    encoding, one more when decoding. groups: of its norms. attends: in the middle.
    """

    latent: int
    widths: tuple[int, ...]
    blocks: int
    groups: int
    scale: float
    shift: float
    attends: bool = True
    eps: float = 1e-6
