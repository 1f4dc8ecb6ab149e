"""Jobs on a real model: what is answered is what the engine says, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import threading
from typing import Any

import numpy as np
import openai.types as shapes
import openai.types.chat as chat_shapes
import pytest
from helpers import forced, wait_for

from squall import (
    ChatCompletionRequest,
    CompletionRequest,
    ContextLengthExceeded,
    InvalidRequest,
    Model,
    SamplingFailed,
)
from squall.api.jobs import start_chat, start_completion

MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
TEXT = "The capital of France is"


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(**{"messages": MESSAGES, "max_tokens": 12, "seed": 7, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(**{"prompt": TEXT, "max_tokens": 8, "seed": 7, **fields})


def idle(model: Model) -> bool:
    stats = model.engine.stats()
    return stats.running == stats.waiting == stats.blocks_used == 0


def test_chat_is_the_generation(model: Model) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "frequency_penalty": 0.5,
        "presence_penalty": 0.3, "repetition_penalty": 1.1, "logit_bias": {5: 3.0},
        "min_tokens": 3, "ignore_eos": True,
    }  # fmt: skip
    expected = model.generate(MESSAGES, max_tokens=12, seed=7, stop=["zzz"], **fields)
    text = expected.read()
    found = start_chat(model, chat(stop="zzz", **fields), id="mine").response()
    assert (found.id, found.model, found.object) == ("mine", "default", "chat.completion")
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (text, "length")
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    assert found.usage.completion_tokens == 12
    assert found.usage.total_tokens == found.usage.prompt_tokens + 12
    assert found.usage.total_time_sec >= found.usage.total_completion_time_sec > 0


def test_defaults_are_those_of_openai(model: Model) -> None:
    expected = model.generate(TEXT, max_tokens=8, seed=7, temperature=1, top_p=1).read()
    for fields in ({}, {"top_k": -1}, {"best_of": 1}):
        found = start_completion(model, completion(**fields)).response()
        assert found.choices[0].text == expected
    greedy = model.generate(TEXT, max_tokens=8, temperature=0).read()
    assert start_completion(model, completion(top_p=0)).response().choices[0].text == greedy


def test_dry_is_the_model_s(model: Model) -> None:
    prompt = "one two three four one two three four one two three four one"
    dry = model.dry(5.0, base=2, allowed_length=1, breakers=["three"], range=50)
    plain = model.generate(prompt, max_tokens=8, temperature=0).read()
    expected = model.generate(prompt, max_tokens=8, temperature=0, dry=dry).read()
    asked = completion(
        prompt=prompt, temperature=0, dry_multiplier=5.0, dry_base=2, dry_allowed_length=1,
        dry_sequence_breakers=["three"], dry_range=50,
    )  # fmt: skip
    assert start_completion(model, asked).response().choices[0].text == expected != plain


def test_choices_have_draws_of_their_own(model: Model) -> None:
    alone = start_chat(model, chat()).response().choices[0].message
    several = start_chat(model, chat(n=4)).response()
    texts = [choice.message.content for choice in several.choices]
    assert texts[0] == alone.content
    assert len(set(texts)) == 4
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    again = start_chat(model, chat(n=4)).response()
    assert [choice.message.content for choice in again.choices] == texts
    assert several.usage.completion_tokens == 48
    assert several.usage.prompt_tokens == len(model.encode_chat(MESSAGES))


def test_prompts_are_answered_as_if_alone(model: Model) -> None:
    prompts = [TEXT, "One two", model.encode("A cat")]
    found = start_completion(model, completion(prompt=prompts, n=2)).response()
    alone = [start_completion(model, completion(prompt=p, n=2)).response() for p in prompts]
    expected = [choice.text for response in alone for choice in response.choices]
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == list(range(6))
    assert found.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    assert found.usage.completion_tokens == 48


def test_best_of_has_the_highest_mean(model: Model) -> None:
    every = start_completion(model, completion(n=5, logprobs=0)).response().choices
    means = [np.mean(choice.logprobs.token_logprobs) for choice in every if choice.logprobs]
    best = [every[i].text for i in np.argsort(means)[::-1][:2]]
    found = start_completion(model, completion(n=2, best_of=5)).response()
    assert [choice.text for choice in found.choices] == best
    assert found.usage.completion_tokens == 40
    assert found.choices[0].logprobs is None


def test_echo_tells_the_log_probabilities_of_the_prompt(model: Model) -> None:
    asked = completion(max_tokens=0, echo=True, logprobs=3, prompt=TEXT * 20)
    (choice,) = start_completion(model, asked).response().choices
    assert (choice.text, choice.finish_reason) == (TEXT * 20, "length")
    ids = model.encode(TEXT * 20)
    found = choice.logprobs
    assert found is not None
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    expected = model.log_probabilities(ids)
    assert found.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-5)
    rows = model.logits(ids).astype(np.float64)
    rows -= np.logaddexp.reduce(rows, axis=1, keepdims=True)
    for row, table in zip(rows, found.top_logprobs[1:], strict=False):
        assert table is not None
        best = {model.decode([int(i)]): row[i] for i in np.argsort(-row, kind="stable")[:3]}
        assert best.items() <= {k: pytest.approx(v, abs=1e-5) for k, v in table.items()}.items()
        assert len(table) <= 4
    starts = [*found.text_offset, len(choice.text)]
    texts = [choice.text[a:b] for a, b in itertools.pairwise(starts)]
    assert texts == list(found.tokens)


def test_echo_goes_on_with_the_answer(model: Model) -> None:
    plain = start_completion(model, completion(logprobs=2)).response().choices[0]
    echoed = start_completion(model, completion(logprobs=2, echo=True)).response().choices[0]
    assert echoed.text == TEXT + plain.text
    assert echoed.logprobs is not None
    assert plain.logprobs is not None
    assert echoed.logprobs.token_logprobs[-8:] == plain.logprobs.token_logprobs
    moved = [at + len(TEXT) for at in plain.logprobs.text_offset]
    assert list(echoed.logprobs.text_offset[-8:]) == moved
    ids = start_completion(model, completion(prompt=model.encode(TEXT), echo=True)).response()
    assert ids.choices[0].text == echoed.text


def test_max_tokens_0_is_the_echo_alone(model: Model) -> None:
    (choice,) = start_completion(model, completion(max_tokens=0, echo=True)).response().choices
    assert (choice.text, choice.logprobs) == (TEXT, None)
    for refused in (lambda: start_completion(model, completion(max_tokens=0)),
                    lambda: start_chat(model, chat(max_tokens=0))):  # fmt: skip
        with pytest.raises(InvalidRequest, match="max_tokens"):
            refused()


@pytest.mark.parametrize("stream", [False, True])
def test_half_characters_have_their_bytes(model: Model, stream: bool) -> None:
    text = "né 🦭 漢字!"
    ids = [*model.encode(text), *model.tokenizer.stop_ids][: len(model.encode(text)) + 1]
    assert len(ids) > len(text) + 2
    fields = {"logits_processors": [forced(ids)], "max_tokens": 50}
    job = start_chat(model, chat(logprobs=True, top_logprobs=1, **fields))
    if stream:
        parts = [chunk.choices[0] for chunk in job.chunks()]
        content = "".join(part.delta.content for part in parts)
        tokens = [t for part in parts if part.logprobs for t in part.logprobs.content]
        reason = parts[-1].finish_reason
    else:
        (choice,) = job.response().choices
        assert choice.logprobs is not None
        content, tokens, reason = (
            choice.message.content, choice.logprobs.content, choice.finish_reason,
        )  # fmt: skip
    assert (content, reason) == (text, "stop")
    assert bytes(byte for token in tokens for byte in token.bytes) == text.encode()
    assert tokens[0].token == "n"
    assert any("\ufffd" in token.token for token in tokens)


def test_half_characters_in_completions(model: Model) -> None:
    text = " 🦭!"
    ids = model.encode(text)
    asked = completion(logits_processors=[forced(ids)], max_tokens=len(ids), logprobs=0)
    (choice,) = start_completion(model, asked).response().choices
    assert choice.text == text
    found = choice.logprobs
    assert found is not None
    assert found.tokens[-1] == "!"
    data = b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        if token.startswith("bytes:") else token.encode()
        for token in found.tokens
    )  # fmt: skip
    assert data == text.encode()
    assert any(token.startswith("bytes:\\x") for token in found.tokens)
    assert found.text_offset[0] == 0
    assert found.text_offset[-1] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_takes_its_tokens_along(model: Model, stream: bool) -> None:
    ids = model.encode("One two three four five six")
    fields = {"logits_processors": [forced(ids)], "stop": ["three four"], "logprobs": 0}
    job = start_completion(model, completion(**fields))
    if stream:
        parts = [chunk.choices[0] for chunk in job.chunks()]
        text = "".join(part.text for part in parts)
        tokens = [t for part in parts if part.logprobs for t in part.logprobs.tokens]
    else:
        (choice,) = job.response().choices
        assert choice.logprobs is not None
        text, tokens = choice.text, list(choice.logprobs.tokens)
    assert text == "One two "
    assert "".join(tokens).startswith(text)
    assert tokens[:2] == ["One", " two"]
    assert len(tokens) == 3  # the space before "three" belongs to the token of it


def test_streamed_tokens_begin_in_the_streamed_text(model: Model) -> None:
    ids = model.encode("aba") + model.encode("bcd!")
    pieces = [t for text in ("a", "b", "a", "b", "c", "d") for t in model.encode(text)]
    fields = {"logits_processors": [forced([*pieces, *ids])], "stop": "abcd", "logprobs": 0}
    whole = start_completion(model, completion(**fields)).response().choices[0]
    fields["logits_processors"] = [forced([*pieces, *ids])]
    parts = [c.choices[0] for c in start_completion(model, completion(**fields)).chunks()]
    text, told = "", []
    for part in parts:
        text += part.text
        told += part.logprobs.tokens if part.logprobs else ()
        assert "".join(told) == text
    assert (text, whole.text) == ("ab", "ab")
    assert whole.logprobs is not None
    assert list(whole.logprobs.tokens) == told


@pytest.mark.parametrize("n", [1, 3])
def test_chunks_are_the_response(model: Model, n: int) -> None:
    whole = start_chat(model, chat(n=n, logprobs=True, top_logprobs=2)).response()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    asked = chat(n=n, logprobs=True, top_logprobs=2, **options)
    *chunks, last = start_chat(model, asked).chunks()
    assert last.choices == ()
    assert last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert [part.delta.role for part in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(part.delta.content for part in own) == choice.message.content
        reasons = [part.finish_reason for part in own]
        assert reasons == [None] * (len(own) - 1) + [choice.finish_reason]
        assert choice.logprobs is not None
        told = [token for part in own if part.logprobs for token in part.logprobs.content]
        assert tuple(told) == choice.logprobs.content
    for chunk in [*chunks, last]:
        chat_shapes.ChatCompletionChunk.model_validate(chunk.to_dict(), strict=True)


def test_completion_chunks_are_the_response(model: Model) -> None:
    asked = completion(n=2, echo=True, logprobs=1)
    whole = start_completion(model, asked).response()
    chunks = list(start_completion(model, asked).chunks())
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert own[-1].finish_reason == choice.finish_reason
        assert choice.logprobs is not None
        offsets = [at for part in own if part.logprobs for at in part.logprobs.text_offset]
        assert tuple(offsets) == choice.logprobs.text_offset
    for chunk in start_completion(model, completion(logprobs=1)).chunks():
        data = chunk.to_dict()
        data["choices"][0]["finish_reason"] = data["choices"][0]["finish_reason"] or "stop"
        shapes.Completion.model_validate(data, strict=True)


def test_responses_have_the_shapes_of_openai(model: Model) -> None:
    whole = start_chat(model, chat(n=2, logprobs=True, top_logprobs=2)).response()
    theirs = chat_shapes.ChatCompletion.model_validate_json(whole.to_json(), strict=True)
    assert theirs.choices[1].message.content == whole.choices[1].message.content
    assert theirs.usage is not None
    assert theirs.usage.prompt_tokens_details is not None
    assert theirs.choices[0].logprobs is not None
    text = start_completion(model, completion(n=2, logprobs=2)).response()
    same = shapes.Completion.model_validate_json(text.to_json(), strict=True)
    assert same.choices[1].text == text.choices[1].text
    assert json.loads(text.to_json()) == text.to_dict()


def test_tenants_do_not_share_prefixes(model: Model) -> None:
    prompt = "A prompt of a few dozen tokens that only this test has ever asked about. " * 3
    cached = []
    for tenant in ("one", "one", "two"):
        job = start_completion(model, completion(prompt=prompt), tenant=tenant)
        cached.append(job.response().usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == cached[2] == 0
    assert cached[1] > 16


def test_a_long_prompt_is_refused_or_truncated(model: Model) -> None:
    prompt = "word " * 600
    with pytest.raises(ContextLengthExceeded):
        start_completion(model, completion(prompt=prompt))
    with pytest.raises(ContextLengthExceeded, match="characters"):
        start_completion(model, completion(prompt="x" * 10**7))
    with pytest.raises(ContextLengthExceeded, match="characters"):
        start_chat(model, chat(messages="x" * 10**7))
    asked = completion(prompt=prompt, truncate_sequence=True)
    details = start_completion(model, asked).response().usage.prompt_tokens_details
    assert details.dropped_tokens > 80


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {10**8: 1}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias"),
        ({"dry_multiplier": -1}, "dry_multiplier"),
        ({"dry_multiplier": 1, "dry_sequence_breakers": ["x"] * 65}, "dry_sequence_breakers"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": [10**8]}, "token ids"),
        ({"stop_token_ids": [-1]}, "token ids"),
        ({"prompt": ["x"] * 100, "n": 3}, "300 answers"),
        ({"prompt": ""}, "empty"),
        ({"prompt": [[10**8]]}, "token ids"),
    ],
)
def test_limits_that_need_a_model(model: Model, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        start_completion(model, completion(**fields))
    assert idle(model)


def test_async_is_the_same(model: Model) -> None:
    expected = [start_chat(model, chat(seed=seed)).response() for seed in range(8)]

    async def all_at_once() -> None:
        jobs = [start_chat(model, chat(seed=seed)) for seed in range(8)]
        found = await asyncio.gather(*(job.response_async() for job in jobs[:4]))
        for whole, other in zip(expected, found, strict=False):
            assert whole.choices == other.choices
        for job, whole in zip(jobs[4:], expected[4:], strict=True):
            text = [chunk.choices[0].delta.content async for chunk in job.chunks_async()]
            assert "".join(text) == whole.choices[0].message.content

    asyncio.run(all_at_once())


def test_threads_get_the_same(model: Model) -> None:
    expected = [start_completion(model, completion(seed=seed)).response() for seed in range(8)]
    found: dict[int, Any] = {}

    def ask(seed: int) -> None:
        found[seed] = start_completion(model, completion(seed=seed)).response()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed].choices for seed in range(8)] == [one.choices for one in expected]


LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "n": 3}


def test_closing_the_iterator_frees_blocks(model: Model) -> None:
    chunks = start_chat(model, chat(**LONG)).chunks()
    next(chunks)
    assert not idle(model)
    chunks.close()
    wait_for(lambda: idle(model))


def test_letting_go_frees_blocks(model: Model) -> None:
    job = start_chat(model, chat(**LONG))
    chunks = start_chat(model, chat(**LONG)).chunks()
    next(chunks)
    assert not idle(model)
    del job, chunks
    gc.collect()
    wait_for(lambda: idle(model))


def test_a_cancelled_task_frees_blocks(model: Model) -> None:
    async def stop_waiting() -> None:
        for waiting in (
            start_chat(model, chat(**LONG)).response_async(),
            anext(aiter(start_chat(model, chat(**LONG)).chunks_async())),
        ):
            task = asyncio.ensure_future(waiting)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(stop_waiting())
    wait_for(lambda: idle(model))


def test_cancel_ends_the_response(model: Model) -> None:
    job = start_chat(model, chat(**LONG))
    chunks = job.chunks()
    first = [next(chunks) for _ in range(4)]
    threading.Thread(target=job.close).start()
    rest = list(chunks)
    reasons = [c.choices[0].finish_reason for c in first + rest]
    assert sorted(filter(None, reasons)) == ["canceled"] * 3
    text = "".join(c.choices[0].delta.content for c in first + rest if not c.choices[0].index)
    again = job.response().choices[0]
    assert (again.finish_reason, again.message.content) == ("canceled", text)


def test_errors_end_the_job(model: Model) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no luck")

    with pytest.raises(SamplingFailed, match="no luck"):
        start_chat(model, chat(**LONG, logits_processors=[broken])).response()
    with pytest.raises(SamplingFailed, match="no luck"):
        list(start_chat(model, chat(**LONG, logits_processors=[broken])).chunks())
    wait_for(lambda: idle(model))


def test_a_closed_model_refuses() -> None:
    with Model.open(context=64) as other:
        job = start_chat(other, chat(max_tokens=20, ignore_eos=True))
    assert job.response().choices[0].finish_reason in ("canceled", "length")
    with pytest.raises(InvalidRequest, match="closed"):
        start_chat(other, chat())
