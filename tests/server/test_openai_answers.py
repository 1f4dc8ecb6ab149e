"""What answers are, by the official client: seeds, lengths, completions, errors, in every way."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from servers import Process

QUESTION: Any = [{"role": "user", "content": "Name a colour."}]


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"model": "small", "messages": QUESTION, "max_tokens": 8, "temperature": 1.5}
    return client.chat.completions.create(**(given | fields))


def complete(client: openai.OpenAI, prompt: Any = "The sky is", **fields: Any) -> Any:
    given = {"model": "small", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    return client.completions.create(**(given | fields))


def test_seeds(client: openai.OpenAI) -> None:
    texts = [ask(client, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 2


def test_without_a_seed_answers_differ(client: openai.OpenAI) -> None:
    assert len({ask(client).choices[0].message.content for _ in range(5)}) > 1


@pytest.mark.parametrize("limit", [1, 2, 7])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_lengths(client: openai.OpenAI, name: str, limit: int) -> None:
    given = {"max_tokens": openai.NOT_GIVEN, "extra_body": {"ignore_eos": True}, name: limit}
    answer = ask(client, **given)
    assert answer.usage.completion_tokens == limit
    assert answer.choices[0].finish_reason == "length"


def test_a_conversation_is_more_than_its_last_message(client: openai.OpenAI) -> None:
    first: Any = [
        {"role": "user", "content": "My name is Zebediah."},
        {"role": "assistant", "content": "Hello, Zebediah!"},
    ]
    last: Any = [{"role": "user", "content": "What is my name?"}]
    found = [ask(client, messages=m, temperature=0, max_tokens=20) for m in (first + last, last)]
    assert found[0].choices[0].message.content != found[1].choices[0].message.content
    assert found[0].usage.prompt_tokens > found[1].usage.prompt_tokens


def test_a_bias_forbids_a_token(client: openai.OpenAI, http: httpx.Client) -> None:
    free = complete(client, max_tokens=1, logprobs=1).choices[0].text
    (token,) = http.post("/tokenize", json={"prompt": free}).json()["tokens"]
    bound = complete(client, max_tokens=1, logit_bias={str(token): -100})
    assert bound.choices[0].text != free


@pytest.mark.parametrize("count", [0, 1, 20])
def test_as_many_likeliest_as_asked_for(client: openai.OpenAI, count: int) -> None:
    (choice,) = ask(client, logprobs=True, top_logprobs=count).choices
    assert {len(entry.top_logprobs) for entry in choice.logprobs.content} == {count}


def test_penalties_change_an_answer(client: openai.OpenAI) -> None:
    prompt = "one one one one one one one one"
    plain = complete(client, prompt).choices[0].text
    assert complete(client, prompt, frequency_penalty=2).choices[0].text != plain


def test_usage_counts_the_prompt(client: openai.OpenAI, http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"messages": QUESTION}).json()["tokens"]
    assert ask(client).usage.prompt_tokens == len(tokens)
    tokens = http.post("/tokenize", json={"prompt": "The sky is"}).json()["tokens"]
    assert complete(client).usage.prompt_tokens == len(tokens)


def test_a_stream_of_completions(client: openai.OpenAI) -> None:
    whole = complete(client).choices[0]
    with complete(client, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "length"


def test_a_stream_of_several(client: openai.OpenAI) -> None:
    with ask(client, n=3, seed=5, stream=True) as stream:
        texts = ["", "", ""]
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in ask(client, n=3, seed=5).choices]


def test_prompts_keep_their_order(client: openai.OpenAI) -> None:
    prompts = ["The sky is", "One, two, three,", "Once upon a"]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in complete(client, prompts).choices] == alone


def test_the_best_of_several(client: openai.OpenAI) -> None:
    options = {"temperature": 1, "seed": 3, "logprobs": 0}
    every = complete(client, n=4, best_of=4, **options).choices
    (best,) = complete(client, n=1, best_of=4, **options).choices
    means = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in every}
    assert means[best.text] == max(means.values())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"n": 0}, "n"),
        ({"messages": []}, "messages"),
        ({"presence_penalty": 9}, "presence_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f f"}}]}, "tools[0]"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_errors_name_the_field(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_an_error_in_place_of_a_stream(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(client, stream=True, messages=[{"role": "user", "content": "word " * 3000}])


def test_raw_and_streamed_responses(client: openai.OpenAI) -> None:
    fields: Any = {"model": "small", "messages": QUESTION, "max_tokens": 2}
    raw = client.chat.completions.with_raw_response.create(**fields)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().usage.completion_tokens <= 2
    with client.chat.completions.with_streaming_response.create(**fields, stream=True) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_the_asynchronous_client(server: Process) -> None:
    async def text() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            stream: Any = await client.chat.completions.create(
                model="small", messages=QUESTION, max_tokens=8, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        assert asyncio.run(text()) == ask(client, temperature=0).choices[0].message.content
