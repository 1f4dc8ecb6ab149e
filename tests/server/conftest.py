"""One server for most tests, and one model for the servers of the others."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Iterator

import httpx
import openai
import pytest
from servers import Process, in_process

from squall import EngineConfig, Model

CONTEXT = 2048


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    errors = tmp_path_factory.mktemp("server") / "stderr"
    flags = ("--context", str(CONTEXT), "--kv-tokens", "6000", "--served-model-name", "small")
    with in_process(errors, *flags) as found:
        yield found
        assert found.stop() == 0
        assert '"level": "error"' not in found.stderr()


@pytest.fixture(scope="module", autouse=True)
def loops_of_clients(request: pytest.FixtureRequest) -> Iterator[None]:
    """Event loops that clients' libraries leave open go before the next file's tests."""
    yield
    if "client" in request.module.__name__:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            asyncio.set_event_loop(None)
            gc.collect()


@pytest.fixture
def client(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture
def http(server: Process) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as found:
        yield found


@pytest.fixture(scope="session")
def model() -> Iterator[Model]:
    config = EngineConfig(max_seqs=2, max_queue=4, prefix_cache_n=2)
    with Model.open(context=1024, engine=config) as found:
        yield found
