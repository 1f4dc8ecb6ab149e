"""Weights that change while requests run."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import squall

PROMPT = list(range(100, 180))


def test_answers_go_on_with_the_new_weights() -> None:
    with squall.Model.open(context=512) as model:
        answer = model.generate(PROMPT, max_tokens=60, temperature=0)
        begun = [next(answer) for _ in range(5)]
        model.re_isq("Q8_0")
        assert {total.format for total in model.weight_formats} == {"q8_0"}
        for _ in answer:
            pass
        assert begun
        assert answer.usage.answer_tokens == 60 or answer.finish_reason == "stop"
        after = model.logits(PROMPT)
    with squall.Model.open(context=512, isq="8") as fresh:
        np.testing.assert_array_equal(fresh.logits(PROMPT), after)


def test_a_change_that_fails_changes_nothing() -> None:
    with squall.Model.open(context=512) as model:
        before = model.logits(PROMPT)

        def fail() -> None:
            assert threading.current_thread().name == "squall-engine"
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            model.engine.change_model(fail)
        with pytest.raises(squall.InvalidRequest, match="unknown quantization"):
            model.re_isq("q9")
        np.testing.assert_array_equal(model.logits(PROMPT), before)
        assert model.engine.alive
