"""Features in pairs: shapes, tools, streams, adapters, caches and guesses do not mix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_adapter
from test_chat_tools import ADD, joined

from squall import ChatCompletionRequest, Model, Runner

TEXT = "Repeat this list in JSON: [10, 20, 30, 40, 10, 20, 30, 40]"
SCHEMA = {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 12}
FEATURES: dict[str, dict[str, Any]] = {
    "shape": {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    "tools": {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False},
    "several": {"n": 2},
    "sampled": {"temperature": 1, "seed": 3},
    "penalties": {"frequency_penalty": 0.5, "repetition_penalty": 1.1, "dry_multiplier": 0.5},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "stop": {"stop": ["30"]},
    "adapter": {"adapters": {"mine": 0.9}},
}  # fmt: skip
PAIRS = list(combinations(FEATURES, 2))
SIZES = {"self_attn.q_proj": (576, 576), "mlp.down_proj": (576, 1536)}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the default model."""
    folder = tmp_path_factory.mktemp("adapter")
    return write_adapter(folder, 1, list(SIZES), sizes=SIZES, layers=30, size=0.02)


@pytest.fixture(scope="module", params=["small cache", "n-grams", "itself"])
def other(request: pytest.FixtureRequest, adapter: Path) -> Iterator[Model]:
    """A model that computes in another way, and must not say anything else."""
    from squall.embedded import find

    options: dict[str, Any] = {
        "small cache": {"kv_tokens": 1024}, "n-grams": {"draft": "ngram"},
        "itself": {"draft": find()},
    }[request.param]  # fmt: skip
    with Model.open(context=512, **options) as opened:
        opened.adapters.load("mine", adapter)
        yield opened


def asked(pair: tuple[str, str], most: int = 16) -> ChatCompletionRequest:
    fields = {name: value for feature in pair for name, value in FEATURES[feature].items()}
    return ChatCompletionRequest(messages=TEXT, max_tokens=most, **({"temperature": 0} | fields))


def told(found: list[dict[str, Any]]) -> str:
    """Answers without the ids of calls, which are new each time."""
    for choice in found:
        for call in choice["message"].get("tool_calls", []):
            call["id"] = None
    return json.dumps(found, sort_keys=True)


@pytest.fixture(scope="module")
def right(model: Model, adapter: Path) -> Iterator[dict[tuple[str, str], str]]:
    runner = Runner(model)
    model.adapters.load("mine", adapter)
    answers = {pair: runner.send_chat_completion_request(asked(pair)) for pair in PAIRS}
    found = {pair: told(answer.to_dict()["choices"]) for pair, answer in answers.items()}
    without = runner.send_chat_completion_request(asked(("stop", "stop")))
    assert found["stop", "adapter"] != told(without.to_dict()["choices"])
    yield found
    model.adapters.remove("mine")


@pytest.mark.slow("each pair of features, three models")
def test_row_40_pairs_of_features(other: Model, right: dict[tuple[str, str], str]) -> None:
    runner = Runner(other)
    jobs = {pair: runner._chat(asked(pair)) for pair in PAIRS}  # all at a time
    for pair, job in jobs.items():
        found = job.response().to_dict()["choices"]
        assert told(found) == right[pair], pair
        if "shape" in pair and not {"tools", "stop"} & {*pair}:
            for choice in found:
                if choice["finish_reason"] == "stop":
                    json.loads(choice["message"]["content"])


def test_row_40_streams(model: Model, right: dict[tuple[str, str], str]) -> None:
    for pair in PAIRS:
        found = joined(Runner(model).stream_chat_completion_request(asked(pair)))
        whole = json.loads(right[pair])
        for choice in whole:
            del choice["logprobs"]
        assert json.loads(told(found)) == whole, pair
