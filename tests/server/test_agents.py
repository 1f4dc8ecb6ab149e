"""Agents of LangChain and LlamaIndex against a server: two calls of tools, then the answer."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import in_thread

from squall import Model

sys.path.append(str(Path(__file__).parents[1] / "api"))
from scripted import scripted

QUESTION = "What is 3 + 4, times 5?"


def call(name: str, a: int, b: int) -> str:
    arguments = json.dumps({"a": a, "b": b})
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


# What each prompt holds that the one before did not: results of tools.
SCRIPT = {"350": "It is 350.", "70": call("multiply", 70, 5), QUESTION: call("add", 3, 4)}
done: list[tuple[str, int, int]] = []


def add(a: int, b: int) -> int:
    """The sum of two numbers, in tenths."""
    done.append(("add", a, b))
    return (a + b) * 10


def multiply(a: int, b: int) -> int:
    """The product of two numbers."""
    done.append(("multiply", a, b))
    return a * b


@pytest.fixture(scope="module")
def url(model: Model) -> Iterator[str]:
    with scripted(model, SCRIPT), in_thread(model) as running:
        yield f"{running.url}/v1"


@pytest.fixture(autouse=True)
def _two_calls() -> Iterator[None]:
    done.clear()
    yield
    assert done == [("add", 3, 4), ("multiply", 70, 5)]


@pytest.mark.parametrize("stream", [False, True])
def test_langchain(url: str, stream: bool) -> None:
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(base_url=url, api_key="any", model="small", streaming=stream, max_retries=0)
    agent: Any = create_agent(llm, [add, multiply])
    found = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})
    assert found["messages"][-1].content == "It is 350."


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_llama_index(url: str) -> None:
    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        api_base=url, api_key="any", model="small", is_chat_model=True,
        is_function_calling_model=True, max_retries=0, context_window=1024,
    )  # fmt: skip
    agent = FunctionAgent(tools=[add, multiply], llm=llm)

    async def ask() -> str:
        return str(await agent.run(QUESTION))

    assert asyncio.run(ask()) == "It is 350."


def test_ours(model: Model) -> None:
    from squall import tools

    with scripted(model, SCRIPT):
        assert tools.run(model, QUESTION, [add, multiply]).answer == "It is 350."
