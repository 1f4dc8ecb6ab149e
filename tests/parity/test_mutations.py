"""The parity test can fail: no field of any Spec can change unnoticed.

A changed field must move the logits, or ask for weights that the file lacks, which loading refuses.
One executor suffices: the others equal it (`test_parity`), so they cannot ignore what moves it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
from config_cases import CONFIG_CASES
from harness import Build, Built, MakeExecutor, distance, make_batch
from mutate import mutations
from tiny import CASES, CONTEXT, Case

from squall.decoder import compile
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.recipes.names import locate
from squall.roles import roles
from squall.spec import Decoder, DynamicScaling, FactorScaling, RopeScaling, YarnScaling

MOVED = 1e-4

# pattern of the mutation: (of which decoders, why nothing can move)
EQUIVALENT: dict[str, tuple[Callable[[Decoder], bool], str]] = {
    r"context\+1": (lambda _: True, "it bounds what callers may ask for"),
    r".*\.axes=other": (lambda _: True, "text is at the same place on all axes"),
    r"sees=True": (lambda _: True, "the prompt has no image"),
    r".*qk_norm_scope=\w+": (
        lambda d: d.layers[0].attention.qk_norm is None,
        "there is no norm to scope",
    ),
    r".*\.long\*1\.5": (
        lambda d: factors(d).original_context >= CONTEXT,
        "the context is short",
    ),
    r".*\.short\*1\.5": (
        lambda d: factors(d).original_context < CONTEXT,
        "the context is long",
    ),
    r".*\.scaling(\.factor\*1\.5|=None)": (
        lambda d: isinstance(s := scaling(d), DynamicScaling) and s.original_context >= CONTEXT,
        "the context is short",
    ),
    r".*\.magnitude=None": (
        lambda d: magnitude(d) == pytest.approx(0.1 * math.log(4.0) + 1.0),
        "the file's magnitude is the default",
    ),
    r".*\.scaling\.magnitude\*1\.5": (
        lambda d: factors(d).long_magnitude is not None and factors(d).original_context < CONTEXT,
        "the context is long, and has a magnitude of its own",
    ),
    r".*\.long_magnitude(\*1\.5|=\w+)": (
        lambda d: factors(d).original_context >= CONTEXT,
        "the context is short",
    ),
    r".*\.original_context=other": (
        lambda d: isinstance(scaling(d), FactorScaling) and factors(d).long == factors(d).short,
        "both sets of factors are the same",
    ),
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def scaling(decoder: Decoder) -> RopeScaling | None:
    rope = decoder.layers[0].attention.rope
    return rope.scaling if rope is not None else None


def factors(decoder: Decoder) -> FactorScaling:
    found = scaling(decoder)
    assert isinstance(found, FactorScaling)
    return found


def magnitude(decoder: Decoder) -> float | None:
    found = scaling(decoder)
    assert isinstance(found, YarnScaling)
    return found.magnitude


def is_equivalent(mutation: str, decoder: Decoder) -> bool:
    return any(re.fullmatch(p, mutation) and holds(decoder) for p, (holds, _) in EQUIVALENT.items())


def effect(decoder: Decoder, model: Built, make_executor: MakeExecutor) -> float:
    """How far the logits move; infinitely, when the file lacks weights of the changed decoder."""
    shapes, names = roles(decoder), model.recipe.names
    known = roles(model.recipe.decoder)
    if (
        not {model.recipe.naming.split(role)[1] for role in shapes}
        <= model.recipe.naming.stems.keys()
    ):
        return math.inf  # as it recalls
    if any(known.get(role) != shape for role, shape in shapes.items()):
        with pytest.raises((InvalidCheckpoint, UnsupportedModel)):
            locate([(shapes, model.recipe.naming)], model.checkpoint.tensors, read=set())
        return math.inf
    try:
        program = compile(decoder, names, context=model.context)
        logits = make_executor(program, model.checkpoint).step(make_batch([(model.tokens, 0, 0)]))
    except ValueError:  # not one rope factor, or axis, a frequency
        return math.inf
    return distance(logits, model.logits)


def unmoved(model: Built, make_executor: MakeExecutor) -> list[str]:
    """The mutations that change nothing, and should."""
    return [
        f"{name}: {moved:.1e}"
        for name, changed in mutations(model.recipe.decoder, model.context)
        if (moved := effect(changed, model, make_executor)) <= MOVED
        and not is_equivalent(name, model.recipe.decoder)
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_field_matters(case: Case, built: Build, make_reference: MakeExecutor) -> None:
    assert not unmoved(built(case), make_reference)


@pytest.mark.parametrize("case", CONFIG_CASES, ids=str)
def test_every_field_matters_in_folders(
    case: Case, built_folder: Build, make_reference: MakeExecutor
) -> None:
    assert not unmoved(built_folder(case), make_reference)
