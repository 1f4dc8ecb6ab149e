"""Every way to alter one field of a spec: a walk of the dataclass tree, not a list of fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from squall.spec import (
    Connector,
    Decoder,
    Encoder,
    Flux,
    Layer,
    LinearScaling,
    Norm,
    Relative,
    Rope,
    Tiles,
    Tower,
)

Spec = TypeVar("Spec", Decoder, Tower, Connector, Encoder, Flux)

# What an absent option becomes.
PRESENT: dict[str, Any] = {
    "window": 5,
    "softcap": 1.5,
    "logit_softcap": 2.0,
    "scaling": LinearScaling(2.0),
    "magnitude": 1.5,
    "long_magnitude": 1.5,
    "jitter": 0.3,
    "qk_norm": Norm("rms", 0.01),
    "pre_norm": Norm("layer", 0.01, bias=True),
    "norm": Norm("layer", 0.01, bias=True),
    "embed_norm": Norm("layer", 0.01, bias=True),
    "activation": "relu",
    "rope": Rope(10000.0, 32),
    "relative": Relative(8, 16),
    "tiles": Tiles(2, 1, (0.5, 0.5, 0.5), (), (0,)),
}
# Where one more would be out of range, or would not cross a rounding or a threshold.
OWN: dict[str, Callable[[Any, int], Any]] = {
    "eps": lambda value, _: value * 10,
    "dims": lambda value, _: value - 2,
    "beta_fast": lambda value, _: value * 4,
    "beta_slow": lambda value, _: value * 4,
    "original_context": lambda value, context: value // 4 if context <= value else value * 4,
    "axes": lambda value, _: tuple(max(value) - axis for axis in value),
    "order": lambda value, _: tuple(reversed(value)),
    "widths": lambda value, _: tuple(width + 1 for width in value),
    "local": lambda value, _: value ^ {0},
    "farthest": lambda value, _: value * 2,
    "read": lambda value, _: tuple(max(layer - 1, 0) for layer in value),
}


def mutations(spec: Spec, context: int) -> Iterator[tuple[str, Spec]]:
    """(what changed, the changed spec); parts that layers have in common change together."""
    yield from _fields(spec, context)
    for name, layers in _layers(getattr(spec, "layers", ()), context):
        yield f"layers{name}", dataclasses.replace(spec, layers=layers)


def _layers(own: tuple[Layer, ...], context: int) -> Iterator[tuple[str, tuple[Layer, ...]]]:
    for field in dataclasses.fields(Layer):
        parts = [getattr(layer, field.name) for layer in own]
        for part in dict.fromkeys(parts):
            first = own[parts.index(part)]
            for name, changed in _field(first, field.name, context):
                new = getattr(changed, field.name)
                layers = tuple(
                    dataclasses.replace(layer, **{field.name: new}) if old == part else layer
                    for layer, old in zip(own, parts, strict=True)
                )
                yield f"[{parts.index(part)}].{name}", layers


def _fields(item: Any, context: int) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(item):
        if field.name != "layers":
            yield from _field(item, field.name, context)


def _field(item: Any, name: str, context: int) -> Iterator[tuple[str, Any]]:
    hint = get_type_hints(type(item))[name]
    for how, new in _values(name, getattr(item, name), hint, context):
        yield f"{name}{how}", dataclasses.replace(item, **{name: new})


def _values(name: str, value: Any, hint: Any, context: int) -> Iterator[tuple[str, Any]]:
    if value is None:
        yield "=present", PRESENT[name]
        return
    if value == ():  # what is there without others to turn with
        return
    if type(None) in get_args(hint):
        yield "=None", None
    if name == "late":
        yield from _layers(value, context)
        return
    if name == "gates":
        for i, gate in enumerate(value):
            yield f"[{i}]*1.5", (*value[:i], 1.5 * gate, *value[i + 1 :])
        return
    if dataclasses.is_dataclass(value):
        yield from ((f".{how}", new) for how, new in _fields(value, context))
    elif isinstance(value, str):
        yield from ((f"={other}", other) for other in _choices(hint) if other != value)
    else:
        yield _altered(name, value, context)


def _altered(name: str, value: Any, context: int) -> tuple[str, Any]:
    if name in OWN:
        return "=other", OWN[name](value, context)
    match value:
        case bool():
            return f"={not value}", not value
        case int():
            return "+1", value + 1
        case tuple():
            return "*1.5", tuple(1.5 * part for part in value)
        case _:
            return "*1.5", 1.5 * value


def _choices(hint: Any) -> tuple[str, ...]:
    kinds = hint if get_origin(hint) is Literal else get_args(hint)[0]
    assert get_origin(kinds) is Literal, hint
    return get_args(kinds)
