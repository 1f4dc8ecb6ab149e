"""The table of sampling fields is what every door has, and says what the classes do."""

from __future__ import annotations

import dataclasses
import inspect
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from squall import ChatCompletionRequest, CompletionRequest, InvalidRequest, Model
from squall.api.requests import NUMBERS as ALL_NUMBERS
from squall.cli.run import RunFlags
from squall.engine.fields import Number, described
from squall.engine.sampling import DRY, NUMBERS, Dry, Sampling, SamplingFields
from squall.server.schemas import ChatBody, CompletionBody

ROOT = Path(__file__).parents[2]
FIELDS = described(SamplingFields)
OWN = {f.name: f.default for f in dataclasses.fields(Sampling)}
DRYS = {f.name: f.default for f in dataclasses.fields(Dry)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_door_has_it(name: str) -> None:
    for kind in (ChatCompletionRequest, CompletionRequest, RunFlags):
        assert name in {f.name for f in dataclasses.fields(kind)}
    for body in (ChatBody, CompletionBody):
        assert name in body.model_json_schema()["properties"]
    inner = name.removeprefix(DRY).removeprefix("sequence_")
    door = Model.dry if name.startswith(DRY) else Model.generate
    assert inner in inspect.signature(door).parameters


@pytest.mark.parametrize(("name", "number"), NUMBERS.items())
def test_types_and_defaults_agree(name: str, number: Number) -> None:
    hint = get_type_hints(SamplingFields)[name]
    assert hint == ((int if number.whole else float) | None)
    default = DRYS[name.removeprefix(DRY)] if name.startswith(DRY) else OWN[name]
    if name not in ("seed", "dry_multiplier", "dry_range"):
        assert number.allows(default)
    if number.off is not None:
        assert number.allows(number.off)


@pytest.mark.parametrize(("name", "number"), ALL_NUMBERS.items())
def test_a_wrong_value_is_named_with_what_is_allowed(name: str, number: Number) -> None:
    wrong: list[Any] = [True, "1", [], math.nan, math.inf, number.least - 1, 10**400]
    wrong += [1.5] if number.whole else []
    wrong += [number.most + 1] if number.most < math.inf else []
    wrong += [number.least] if number.above else []
    for value in wrong:
        if value == 10**400 and number.whole and number.most == math.inf:
            continue
        with pytest.raises(InvalidRequest) as caught:
            number.check(name, value)
        assert str(caught.value).startswith(f"{name} is ")
        assert number.allowed in str(caught.value)
        assert len(str(caught.value)) < 300


def test_the_page_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/sampling.py", "--check"])
    assert done.returncode == 0, "run `make docs`"
