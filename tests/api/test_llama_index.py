"""The LlamaIndex integration for mistral.rs, or at least what it calls, on `squall`."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import squall
from squall.embedded import find

QUESTION = "What is the capital of France?"


@pytest.fixture
def which(monkeypatch: pytest.MonkeyPatch) -> squall.Which.GGUF:
    monkeypatch.setitem(sys.modules, "mistralrs", squall)
    return squall.Which.GGUF(str(find().parent), find().name)


@pytest.mark.parametrize("top_logprobs", [None, 2])
def test_the_calls_it_makes(which: squall.Which.GGUF, top_logprobs: int | None) -> None:
    from mistralrs import ChatCompletionRequest, Runner  # type: ignore[import-not-found]

    settings: dict[str, Any] = {
        "temperature": 0.1, "max_tokens": 12, "top_k": 32, "top_p": 0.1,
        "top_logprobs": top_logprobs, "logprobs": top_logprobs is not None,
        "frequency_penalty": None, "presence_penalty": None,
    }  # fmt: skip
    with Runner(
        which=which, token_source="cache", max_seqs=16, prefix_cache_n=16, no_kv_cache=False,
        chat_template=None, in_situ_quant=None,
    ) as runner:  # fmt: skip

        def ask(messages: Any, *, stream: bool) -> Any:
            request = ChatCompletionRequest(
                messages=messages, model="", logit_bias=None, stream=stream, **settings
            )
            return runner.send_chat_completion_request(request)

        whole = ask(QUESTION, stream=False).choices[0]
        chunks = list(ask([{"role": "user", "content": QUESTION}], stream=True))
    assert "Paris" in whole.message.content
    text = ""
    for chunk in chunks:
        text += chunk.choices[0].delta.content
    assert text == whole.message.content
    if top_logprobs is None:
        assert whole.logprobs is None
    else:
        assert "".join(one.token for one in whole.logprobs.content) == text
        assert bytes(b for one in whole.logprobs.content for b in one.bytes) == text.encode()


def test_the_integration(which: squall.Which.GGUF) -> None:
    base = pytest.importorskip("llama_index.llms.mistral_rs.base")
    base.Runner = squall.Runner
    llm = base.MistralRS(which=which, max_new_tokens=12, temperature=0.1)
    assert "Paris" in llm.complete(QUESTION).text
    assert "Paris" in [response.text for response in llm.stream_complete(QUESTION)][-1]
