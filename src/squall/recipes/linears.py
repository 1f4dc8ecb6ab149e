"""The linears that quantizing means, in the order in which UQFF numbers them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from squall.checkpoints.base import Tensor
from squall.checkpoints.uqff import bias_name, weight_name
from squall.errors import InvalidCheckpoint
from squall.program import Names
from squall.recipes.names import Naming
from squall.roles import roles
from squall.spec import Decoder, Encoder, Flux, Moe

# Whose q, k and v are one linear, and gate and up another.
FUSED = ("Phi3ForCausalLM",)
# Whose router of the experts is quantized.
ROUTED = ("MixtralForCausalLM",)
# Whose head is not, nor the layers that recall; or that have none.
HEADLESS = ("MllamaForConditionalGeneration", "T5EncoderModel")
FLUX = "FluxTransformer2DModel"
_ATTENTION = ("attention.q", "attention.k", "attention.v", "attention.out")
_MLP = ("feed_forward.gate", "feed_forward.up", "feed_forward.down")
_EXPERT = tuple(f"feed_forward.experts.{part}" for part in ("gate", "down", "up"))


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear: roles whose rows follow each other, of one `expert` if it is one of several.

    tensor: its name in the checkpoint, without `.weight` and `.bias`.
    """

    tensor: str
    roles: tuple[str, ...]
    expert: int = 0


def linears(
    architecture: str, spec: Decoder | Encoder | Flux, naming: Naming
) -> tuple[Linear, ...]:
    if isinstance(spec, Flux):
        matrices = [
            role.removesuffix(".weight") for role, shape in roles(spec).items() if shape[1:]
        ]
        return tuple(_single(naming, role) for role in matrices if role.startswith("layers."))
    found = [] if architecture in HEADLESS else [_single(naming, "head")]
    for index, layer in enumerate(spec.layers):
        if layer.attention.recalls:
            continue
        stems = [*_ATTENTION, *([] if isinstance(layer.feed_forward, Moe) else _MLP)]
        if not getattr(layer.feed_forward, "gated", True):
            stems.remove("feed_forward.gate")
        if isinstance(layer.feed_forward, Moe) and architecture in ROUTED:
            stems.append("feed_forward.router")
        if architecture in FUSED:
            found += _fused(naming, index, stems)
        else:
            found += [_single(naming, f"layers.{index}.{stem}") for stem in stems]
        if isinstance(layer.feed_forward, Moe):
            found += _experts(naming, index, layer.feed_forward.experts)
    return tuple(found)


def named(
    found: tuple[Linear, ...], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A UQFF checkpoint's tensors by their usual names, and those names -> the checkpoint's."""
    count = sum(weight_name(i) in tensors for i in range(len(found) + 1))
    if count != len(found) or weight_name(len(found)) in tensors:
        given = sum(name.startswith("uqff.") and name.endswith(".weight") for name in tensors)
        raise InvalidCheckpoint(
            f"the UQFF file has {given} linears; the model of config.json has {len(found)}"
        )
    originals = {}
    for index, linear in enumerate(found):
        originals[f"{linear.tensor}.weight"] = weight_name(index)
        if bias_name(index) in tensors:
            originals[f"{linear.tensor}.bias"] = bias_name(index)
    renamed = {name: t for name, t in tensors.items() if not name.startswith("uqff.")}
    return renamed | {name: tensors[own] for name, own in originals.items()}, originals


def stored(names: Names, originals: Mapping[str, str]) -> Names:
    """Places in tensors of usual names, in those of the checkpoint."""
    return MappingProxyType(
        {
            role: tuple(replace(p, tensor=originals.get(p.tensor, p.tensor)) for p in places)
            for role, places in names.items()
        }
    )


def _single(naming: Naming, role: str) -> Linear:
    return Linear(naming.name(f"{role}.weight").removesuffix(".weight"), (role,))


def _fused(naming: Naming, index: int, stems: list[str]) -> Iterator[Linear]:
    """Each tensor of several roles where its first would be."""
    groups = {stem: (name, group) for name, group in naming.fused.items() for stem in group}
    for stem in stems:
        name, group = groups.get(stem, ("", ()))
        if not group:
            yield _single(naming, f"layers.{index}.{stem}")
        elif stem == group[0]:
            roles = tuple(f"layers.{index}.{member}" for member in group)
            yield Linear(naming.layer.format(index) + name, roles)


def _experts(naming: Naming, index: int, experts: int) -> Iterator[Linear]:
    for expert in range(experts):
        for stem in _EXPERT:
            name = naming.layer.format(index) + naming.pieces[stem].format(expert)
            yield Linear(name, (f"layers.{index}.{stem}",), expert)
