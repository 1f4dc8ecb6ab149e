"""The Python API, on the default model."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import squall
from squall import Model

TEXT = "The tide is high when the moon is near, because the water follows it around the earth. "
CHAT = [{"role": "user", "content": "What is the capital of France, and what is it known for?"}]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open(context=1024) as opened:
        yield opened


@pytest.fixture(scope="module")
def ids(model: Model) -> list[int]:
    return model.encode(TEXT * 20)[:300]


def test_encode_and_decode(model: Model) -> None:
    assert model.decode(model.encode(TEXT)) == TEXT


def test_control_tokens_in_text_are_text(model: Model) -> None:
    assert not model.tokenizer.stop_ids & set(model.encode("<|im_end|>"))
    user = [{"role": "user", "content": "<|im_end|>"}]
    plain = [{"role": "user", "content": ""}]
    ends = [
        sum(token in model.tokenizer.stop_ids for token in model.encode_chat(messages))
        for messages in (user, plain)
    ]
    assert ends[0] == ends[1]


def test_the_answer_does_not_depend_on_what_was_cached(model: Model) -> None:
    def answer() -> list[int]:
        generation = model.generate(CHAT, max_tokens=20, seed=7)
        generation.read()
        return generation.ids

    model.engine.change_model(lambda: None)
    cold = answer()
    warm = answer()
    model.generate("Something else entirely", max_tokens=3).read()
    assert cold == warm == answer()


def test_a_follow_up_reads_only_what_is_new(model: Model) -> None:
    first = model.generate(CHAT, max_tokens=30, temperature=0)
    text = first.read()
    turn = [*CHAT, {"role": "assistant", "content": text}, {"role": "user", "content": "Thanks."}]
    second = model.generate(turn, max_tokens=1)
    second.read()
    assert second.usage.cached_tokens >= first.usage.prompt_tokens


def test_greedy_answer(model: Model) -> None:
    pieces = list(model.generate(CHAT, max_tokens=100, temperature=0))
    assert "Paris" in "".join(piece.text for piece in pieces)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "stop"
    ids = [token for piece in pieces for token in piece.ids]
    assert ids[-1] in model.tokenizer.stop_ids


def test_greedy_is_the_argmax(model: Model) -> None:
    prompt = model.encode(TEXT)
    generation = model.generate(prompt, max_tokens=8, temperature=0)
    generation.read()
    logits = model.logits(prompt + generation.ids)
    assert generation.ids == logits[len(prompt) - 1 : -1].argmax(axis=1).tolist()


def test_log_probabilities(model: Model, ids: list[int]) -> None:
    logits = model.logits(ids).astype(np.float64)
    expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    expected = expected[np.arange(len(ids) - 1), ids[1:]]
    assert np.allclose(model.log_probabilities(ids), expected, rtol=0, atol=1e-9)
    assert np.array_equal(
        model.log_probabilities(ids, start=100), model.log_probabilities(ids)[99:]
    )


def test_seeds(model: Model) -> None:
    def answer(seed: int | None) -> tuple[int, list[int]]:
        generation = model.generate("Once upon a time", max_tokens=12, temperature=1, seed=seed)
        generation.read()
        return generation.seed, generation.ids

    seed, first = answer(None)
    assert answer(seed) == (seed, first)
    assert len({answer(None)[0] for _ in range(3)}) == 3


def test_stop_strings_are_not_in_the_text(model: Model) -> None:
    whole = model.generate(CHAT, temperature=0, max_tokens=40).read()
    generation = model.generate(CHAT, temperature=0, max_tokens=40, stop="Paris")
    assert generation.read() == whole[: whole.index("Paris")]
    assert generation.finish_reason == "stop"


def test_length(model: Model) -> None:
    generation = model.generate(CHAT, max_tokens=2)
    generation.read()
    assert (generation.finish_reason, len(generation.ids)) == ("length", 2)


def test_stopping_early(model: Model) -> None:
    with model.generate(TEXT) as generation:
        next(generation)
    assert generation.finish_reason == "cancelled"
    assert list(generation) == []
    assert model.generate(CHAT, max_tokens=1).read()


def test_generations_side_by_side(model: Model) -> None:
    alone = [model.generate(text, max_tokens=6, seed=1).read() for text in ("One", "Two")]
    both = [model.generate(text, max_tokens=6, seed=1) for text in ("One", "Two")]
    texts = ["", ""]
    while any(generation.finish_reason is None for generation in both):
        for i, generation in enumerate(both):
            piece = next(generation, None)
            texts[i] += piece.text if piece else ""
    assert texts == alone


def test_threads(model: Model) -> None:
    alone = [model.generate(f"Number {i}", max_tokens=6, seed=i).read() for i in range(8)]
    found = [""] * 8

    def answer(i: int) -> None:
        found[i] = model.generate(f"Number {i}", max_tokens=6, seed=i).read()

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "empty"),
        ([], {}, "empty"),
        ([-1], {}, "token ids go from 0 to 49151; found -1"),
        ([49152], {}, "found 49152"),
        ([1.5], {}, "a prompt is text"),
        ([[1, 2]], {}, "a prompt is text"),
        (["Hi"], {}, "a prompt is text"),
        (None, {}, "a prompt is text"),
        (5, {}, "a prompt is text"),
        (b"Hi", {}, "a prompt is text"),
        ([None], {}, "a prompt is text"),
        ([2**70], {}, "a prompt is text"),
        ("\ud800", {}, "surrogate"),
        ({"role": "user", "content": "Hi"}, {}, "a prompt is text"),
        (["Hi", {"role": "user", "content": "Hi"}], {}, "a prompt is text"),
        ([{"role": "user", "content": "Hi"}, "Hi"], {}, "a role and a content"),
        ([{"role": "user", "content": 5}], {}, "content of a message are text"),
        ([{"role": 5, "content": "Hi"}], {}, "content of a message are text"),
        ("Hi", {"stop": 5}, "must be text"),
        ("Hi", {"stop": [5]}, "must be text"),
        ("Hi", {"stop_ids": 5}, "stop_ids"),
        ("Hi", {"stop_ids": ["x"]}, "stop_ids"),
        ("Hi", {"stop_ids": [1.5]}, "stop_ids"),
        ([{"role": "user"}], {}, "a role and a content"),
        ("Hi", {"max_tokens": 0}, "max_tokens is 0"),
        ("Hi", {"temperature": -1}, "temperature is -1"),
        ("Hi", {"stop": [""]}, "not empty"),
    ],
)
def test_wrong_requests(
    model: Model, prompt: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(squall.InvalidRequest, match=message):
        model.generate(prompt, **options)  # type: ignore[arg-type]


def test_too_long(model: Model) -> None:
    with pytest.raises(squall.ContextLengthExceeded, match=r"1025 tokens .* of 1024 tokens"):
        model.logits([1] * 1025)
    with pytest.raises(squall.ContextLengthExceeded, match=r"1024 tokens and an answer"):
        model.generate([1] * 1024)


def test_up_to_the_context(model: Model) -> None:
    generation = model.generate([1] * 1020, max_tokens=100, seed=1)
    generation.read()
    assert generation.usage.answer_tokens <= 4


def test_a_generation_tells_what_it_said(model: Model) -> None:
    generation = model.generate(CHAT, max_tokens=8, temperature=0)
    assert "not at its end" in repr(generation)
    first = next(generation).text
    assert generation.text == first
    rest = generation.read()
    assert generation.text == first + rest
    assert repr(generation) == f"<Generation {first + rest!r}: length>"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"context": 1.5}, "context is 1.5; it must be a whole number"),
        ({"threads": "2"}, "threads is '2'"),
        ({"gqa": True}, "gqa is True"),
        ({"kv_dtype": "f8"}, "kv_dtype is 'f8'; it must be one of f16, f32, q8_0"),
        ({"weights": None}, "must be one of packed, f32"),
        ({"dtype": "f8"}, "unknown dtype 'f8'"),
        ({"path": 5}, "path is 5; it must be a path"),
        ({"from_uqff": b"x"}, "from_uqff"),
        ({"t5": 5}, "t5 is 5; it must be a path"),
        ({"vae": "ae.safetensors"}, "vae is for models that make pictures"),
        ({"isq": "q9"}, "unknown quantization"),
        ({"chat_template": 5}, "chat_template is 5; it must be text"),
        ({"chat_template": "none.jinja"}, "none.jinja"),
    ],
)
def test_wrong_ways_to_open(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(squall.InvalidRequest, match=problem):
        Model.open(**options)


def test_wrong_texts_and_ids(model: Model) -> None:
    wrong: dict[Any, Any] = {
        model.encode: (None, b"x", 5), model.decode: (None, "x", [1.5], [None]),
        model.logits: (None, "x", [1.5]), model.log_probabilities: (None, ["x"]),
    }  # fmt: skip
    for method, arguments in wrong.items():
        for argument in arguments:
            with pytest.raises(squall.InvalidRequest):
                method(argument)
    for options in ({"chunk": 1.5}, {"chunk": "a"}):
        with pytest.raises(squall.InvalidRequest, match="chunk is"):
            model.logits([1], **options)  # type: ignore[arg-type]


def test_opening_is_what_open_takes(model: Model) -> None:
    opening = squall.Opening(context=64, kv_dtype="q8_0", chat_template="chatml")
    taken = inspect.signature(Model.open).parameters
    assert list(taken) == [field.name for field in dataclasses.fields(opening)]
    assert "context: tokens of prompt" in (Model.open.__doc__ or "")
    with Model.open_with(opening) as other:
        assert other.context == 64
        assert other.chat_template.sources != model.chat_template.sources
    with pytest.raises(TypeError, match="contxt"):
        Model.open(contxt=64)  # type: ignore[call-arg]


def test_closed() -> None:
    model = Model.open(context=64)
    model.close()
    with pytest.raises(squall.InvalidRequest, match="closed"):
        model.logits([1])


def test_context_of_the_model() -> None:
    with pytest.raises(squall.InvalidRequest, match="1 to 8192"):
        Model.open(context=8193)


def test_generate_takes_what_sampling_has(model: Model) -> None:
    prompt = "One two three one two three one two three one"
    greedy = {"max_tokens": 6, "temperature": 0}
    plain = model.generate(prompt, **greedy)
    plain.read()
    first = plain.ids[0]
    for change in (
        {"logit_bias": {first: float("-inf")}},
        {"dry": model.dry(20, allowed_length=1)},
        {"repetition_penalty": 20},
        {"logits_processors": [lambda logits, _: np.negative(logits)]},
    ):
        other = model.generate(prompt, **greedy, **change)
        other.read()
        assert other.ids[0] != first, change
    repeated = model.generate(prompt, **greedy, frequency_penalty=2, presence_penalty=2)
    repeated.read()
    assert repeated.ids[0] == first  # nothing is generated yet
    stopped = model.generate(prompt, **greedy, stop_ids=[first], logprobs=1)
    (piece,) = stopped
    assert (piece.ids, piece.finish_reason) == ((first,), "stop")
    (sampled,) = piece.logprobs
    ids = [*model.encode(prompt), first]
    assert sampled.logprob == pytest.approx(model.log_probabilities(ids)[-1], abs=1e-5)
    assert sampled.top == ((first, sampled.logprob),)
    kept = model.generate(prompt, **greedy, stop_ids=[first], min_tokens=3)
    kept.read()
    assert first not in kept.ids[:3]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"logit_bias": {10**9: 1}}, "logit_bias"),
        ({"stop_ids": [-1]}, "token ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_generate_refuses(model: Model, options: dict[str, object], named: str) -> None:
    with pytest.raises(squall.InvalidRequest, match=named):
        model.generate("Hi", **options)  # type: ignore[arg-type]
