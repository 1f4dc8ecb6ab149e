"""Libraries that people build on, against a server: chats, streams, tools, and answers of a class.

docs/clients.md has the settings that are used here.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import anthropic
import numpy as np
import openai
import pytest
from embedders import MadeUpEmbedder
from pydantic import BaseModel
from scripted import scripted
from servers import Process, serving

from squall import Model

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class City(BaseModel):
    """A city of the world."""

    name: str
    people: int


PARIS = City(name="Paris", people=2)
LARGER = City(name="Paris", people=2_000_000)


def call(name: str, /, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


# What prompts hold, and what is answered; the first that is found counts.
SCRIPT = {
    "more than a thousand": call("City", name="Paris", people=2_000_000),
    "as JSON": PARIS.model_dump_json(),
    "PartialCity": call("PartialCity", name="Paris", people=2),  # instructor's, for streams
    "Call City": call("City", name="Paris", people=2),
    "It has 21 degrees": "21 degrees in Rome.",
    "How warm": call("weather", city="Rome"),
    "Which city": call("final_result", name="Paris", people=2),
    "Hello": "Hello to you.",
}
asked: list[str] = []


def weather(city: str) -> str:
    """How warm it is in a city."""
    asked.append(city)
    return f"It has 21 degrees: {city}"


class Place(NamedTuple):
    root: str

    @property
    def url(self) -> str:
        return f"{self.root}/v1"


@pytest.fixture(scope="module")
def at(model: Model) -> Iterator[Place]:
    models = {"small": model, "texts": MadeUpEmbedder()}
    with scripted(model, SCRIPT), serving(models) as running:
        yield Place(running.url)


@pytest.fixture(autouse=True)
def _nothing_asked() -> Iterator[None]:
    asked.clear()
    yield
    gc.collect()  # connections and loops that libraries leave open, while that is ignored


TEXTS = ["a", "hello", "Gruss"]


def vectors() -> Any:
    return MadeUpEmbedder().embed(TEXTS).vectors


# LangChain


def gpt(at: Place, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=at.url, api_key="any", model="small", max_retries=0, **options)


def claude(at: Place, **options: Any) -> Any:
    from langchain_anthropic import ChatAnthropic

    return ChatAnthropic(base_url=at.root, api_key="any", model="small", max_retries=0, **options)


@pytest.mark.parametrize("chat", [gpt, claude])
def test_langchain(at: Place, chat: Any) -> None:
    llm = chat(at, **({"stream_usage": True} if chat is gpt else {}))
    found = llm.invoke("Hello")
    assert found.content == "Hello to you."
    *parts, last = llm.stream("Hello")
    whole = sum(parts[1:], parts[0]) + last
    assert whole.text == "Hello to you."
    for message in (found, whole):
        assert message.usage_metadata["output_tokens"] > 1
        assert message.usage_metadata["input_tokens"] > 1
    assert asyncio.run(llm.ainvoke("Hello")).content == "Hello to you."


@pytest.mark.parametrize("chat", [gpt, claude])
@pytest.mark.parametrize("stream", [False, True])
def test_langchain_tools(at: Place, chat: Any, stream: bool) -> None:
    from langchain.agents import create_agent

    agent: Any = create_agent(chat(at, streaming=stream), [weather])
    found = agent.invoke({"messages": [{"role": "user", "content": "How warm is it?"}]})
    assert found["messages"][-1].text == "21 degrees in Rome."
    assert asked == ["Rome"]


@pytest.mark.parametrize(
    ("chat", "method", "text"),
    [
        (gpt, "json_schema", "as JSON"),
        (gpt, "json_mode", "as JSON"),
        (gpt, "function_calling", "Call City"),
        (claude, "function_calling", "Call City"),
        (claude, "json_schema", "as JSON"),
    ],
)
def test_langchain_classes(at: Place, chat: Any, method: str, text: str) -> None:
    assert chat(at).with_structured_output(City, method=method).invoke(text) == PARIS


def test_langchain_embeddings(at: Place) -> None:
    from langchain_openai import OpenAIEmbeddings

    made: Any = OpenAIEmbeddings(
        base_url=at.url, api_key="any", model="texts", check_embedding_ctx_length=False
    )  # which else counts tokens as OpenAI's models do, and sends these
    assert np.allclose(made.embed_documents(TEXTS), vectors())
    assert np.allclose(made.embed_query(TEXTS[0]), vectors()[0])


# LlamaIndex


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own
def test_llama_index(at: Place, server: Process) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    options: Any = {"api_key": "any", "model": "small", "max_retries": 0}
    llm = OpenAILike(api_base=at.url, is_chat_model=True, is_function_calling_model=True, **options)
    said = [ChatMessage(role="user", content="Hello")]
    assert llm.chat(said).message.content == "Hello to you."
    assert "".join(str(part.delta) for part in llm.stream_chat(said)) == "Hello to you."
    assert llm.as_structured_llm(City).chat([ChatMessage(content="Call City")]).raw == PARIS
    assert asyncio.run(llm.achat(said)).message.content == "Hello to you."
    plain = OpenAILike(
        api_base=f"{server.url}/v1", is_chat_model=False, max_tokens=4, temperature=0, **options
    )
    whole = plain.complete("One, two,").text
    assert whole
    assert [part.text for part in plain.stream_complete("One, two,")][-1] == whole


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_llama_index_embeddings(at: Place) -> None:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    made = OpenAILikeEmbedding(model_name="texts", api_base=at.url, api_key="any")
    assert np.allclose(made.get_text_embedding_batch(TEXTS), vectors())
    assert np.allclose(made.get_query_embedding(TEXTS[0]), vectors()[0])


# instructor


@pytest.mark.parametrize("mode", ["TOOLS", "JSON", "JSON_SCHEMA", "MD_JSON"])
def test_instructor(at: Place, mode: str) -> None:
    import instructor

    chats = openai.OpenAI(base_url=at.url, api_key="any", max_retries=0)
    known: Any = instructor.from_openai(chats, mode=instructor.Mode[mode])
    said = [{"role": "user", "content": "Call City" if mode == "TOOLS" else "as JSON"}]
    found = known.create(model="small", response_model=City, messages=said)
    assert found.model_dump() == PARIS.model_dump()
    *_, last = known.create_partial(model="small", response_model=City, messages=said)
    assert last.model_dump() == PARIS.model_dump()


def test_instructor_and_messages(at: Place) -> None:
    import instructor

    messages = anthropic.Anthropic(base_url=at.root, api_key="any", max_retries=0)
    known: Any = instructor.from_anthropic(messages, mode=instructor.Mode.TOOLS)
    said = [{"role": "user", "content": "Call City"}]
    found = known.create(model="small", max_tokens=99, response_model=City, messages=said)
    assert found.model_dump() == PARIS.model_dump()


def test_instructor_asks_again(at: Place) -> None:
    import instructor
    from pydantic import field_validator

    class Large(City):
        @field_validator("people")
        @classmethod
        def check(cls, people: int) -> int:
            if people < 1000:
                raise ValueError("there must be more than a thousand")
            return people

    Large.__name__ = "City"
    chats = openai.OpenAI(base_url=at.url, api_key="any", max_retries=0)
    known = instructor.from_openai(chats, mode=instructor.Mode.TOOLS)
    said: Any = [{"role": "user", "content": "Call City"}]
    found = known.create(model="small", response_model=Large, messages=said, max_retries=2)
    assert found.model_dump() == LARGER.model_dump()


# pydantic-ai


def agent(at: Place, **options: Any) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=at.url, api_key="any")
    return Agent(OpenAIChatModel("small", provider=provider), **options)


def test_pydantic_ai(at: Place) -> None:
    found = agent(at, tools=[weather]).run_sync("How warm is it?")
    assert (found.output, asked) == ("21 degrees in Rome.", ["Rome"])
    assert found.usage.output_tokens > 1


@pytest.mark.parametrize("output", ["ToolOutput", "NativeOutput", "PromptedOutput"])
def test_pydantic_ai_classes(at: Place, output: str) -> None:
    import pydantic_ai

    kind = getattr(pydantic_ai, output)(City)
    text = "Which city?" if output == "ToolOutput" else "as JSON"
    assert agent(at, output_type=kind).run_sync(text).output == PARIS


def test_pydantic_ai_streams(at: Place) -> None:
    async def parts() -> list[str]:
        async with agent(at, tools=[weather]).run_stream("How warm is it?") as found:
            return [part async for part in found.stream_text(delta=True, debounce_by=None)]

    assert "".join(asyncio.run(parts())) == "21 degrees in Rome."
