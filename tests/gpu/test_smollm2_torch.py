"""SmolLM2's greedy answers by PyTorch and by the native executor: the same but for near ties."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from squall import Model

QUESTIONS = (  # by night all
    "What is the capital of France, and what is it known for?",
    "Write a short story about a lighthouse.",
    "Explain why the sky is blue.",
    "List ten animals that live in the sea.",
    "How do I boil an egg?",
    "Write a Python function that adds two numbers.",
    "Translate 'good morning' into Spanish, Italian and German.",
    "Who was Ada Lovelace?",
)
# By how much the native executor's logits of the two best tokens may be apart where PyTorch takes
# the second: the native one rounds activations to 8 bits, which with float weights it does not.
CLOSE, FLOAT_CLOSE = 0.2, 1e-3

Logits = NDArray[np.float32]
Answers = list[tuple[list[int], list[int]]]
"""Ids of prompts, and what followed them."""


def greedy(model: Model, prompts: Sequence[list[int]], length: int) -> list[list[int]]:
    """The answers to all prompts at once."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": length, "ignore_eos": True}
    made = [model.generate(prompt, logprobs=0, **options) for prompt in prompts]
    return [[said.token for piece in one for said in piece.logprobs] for one in made]


@pytest.fixture(scope="module")
def length(nightly: bool) -> int:
    """Tokens of an answer."""
    return 250 if nightly else 40


@pytest.fixture(scope="module")
def answers(length: int, nightly: bool) -> Answers:
    """Greedy ones by the native executor."""
    with Model.open(device="cpu", context=512) as model:
        asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
        prompts = [model.encode_prompt(model.chat_prompt(one)) for one in asked]
        prompts = prompts if nightly else prompts[:4]
        return list(zip(prompts, greedy(model, prompts, length), strict=True))


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open(device="torch", context=512, kv_dtype="f32") as opened:
        yield opened


def scored(model: Model, answers: Answers) -> Logits:
    """The logits that each token of the answers was chosen by."""
    return np.concatenate(
        [
            model.logits([*prompt, *answer[:-1]], chunk=512)[len(prompt) - 1 :]
            for prompt, answer in answers
        ]
    )


@pytest.fixture(scope="module")
def found(model: Model, answers: Answers) -> Logits:
    return scored(model, answers)


def gaps(native: Logits, found: Logits) -> list[float]:
    """Where another token is the best: how far apart the native logits of the two best are."""
    at = np.flatnonzero(native.argmax(1) != found.argmax(1))
    best = np.sort(native[at], axis=1)
    return sorted((best[:, -1] - best[:, -2]).tolist())


@pytest.mark.slow("200 rows of SmolLM2 by PyTorch, in exact products")
def test_answers_are_the_same_but_for_near_ties(answers: Answers, found: Logits) -> None:
    with Model.open(device="cpu", context=512) as model:
        native = scored(model, answers)
    chosen = [token for _, answer in answers for token in answer]
    assert native.argmax(1).tolist() == chosen
    ties = gaps(native, found)
    assert len(ties) <= 0.02 * len(native), ties
    assert max(ties, default=0) < CLOSE, ties


@pytest.mark.slow("200 rows of SmolLM2 in float weights")
def test_with_float_weights_ties_are_nearer(answers: Answers, found: Logits) -> None:
    with Model.open(device="cpu", context=512, weights="f32", kv_dtype="f32") as model:
        native = scored(model, answers)
    assert np.abs(found - native).max() <= 1e-4 * np.abs(native).max()
    ties = gaps(native, found)
    assert len(ties) <= 0.002 * len(native), ties
    assert max(ties, default=0) < FLOAT_CLOSE, ties


def test_steps_choose_what_prompts_of_the_same_tokens_do(
    model: Model, answers: Answers, found: Logits, length: int
) -> None:
    """Four answers together, of eight tokens, up to one that the native executor did not choose."""
    made = greedy(model, [prompt for prompt, _ in answers[:4]], 8)
    for number, (tokens, (_, answer)) in enumerate(zip(made, answers, strict=False)):
        chosen = found[number * length :][:8].argmax(1).tolist()
        same = [mine == theirs for mine, theirs in zip(tokens, answer, strict=False)]
        count = [*same, False].index(False) + 1
        assert tokens[:count] == chosen[:count]
