"""Requests made from our own description of the API: whatever it allows gives no 5xx."""

from __future__ import annotations

import os
import secrets
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from servers import Process

EXAMPLES = settings.default.max_examples // 10
SEED = int(os.environ.get("SQUALL_TEST_SEED") or secrets.randbits(32))
QUIET = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/rerank"),
    ("POST", "/api/chat"),
    ("POST", "/api/generate"),
    ("POST", "/api/embed"),
    ("POST", "/api/embeddings"),
    ("POST", "/api/show"),
    ("POST", "/api/pull"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("GET", "/images/{name}"),
    ("POST", "/render"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/v1/adapters"),
    ("POST", "/v1/adapters"),
    ("DELETE", "/v1/adapters/{name}"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/activate_adapters"),
]


@pytest.fixture(scope="module")
def schema(server: Process) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_row_4_no_5xx(http: httpx.Client, schema: Any, method: str, path: str, mode: str) -> None:
    mode_of = schemathesis.GenerationMode[mode]
    operation = schema[path][method]
    if mode == "NEGATIVE" and method != "POST":
        pytest.skip("every path is a good path")

    @seed(SEED)
    @QUIET
    @given(case=operation.as_strategy(generation_mode=mode_of))
    def check(case: Any) -> None:
        asked = case.as_transport_kwargs(base_url=str(http.base_url))
        body = asked.get("json")
        if isinstance(body, dict) and isinstance(body.get("max_tokens"), int | None):
            # Answers are to end soon.
            asked["json"] = body | {
                "max_tokens": 1,
                "max_completion_tokens": None,
                "max_output_tokens": None,
            }
        url = asked.pop("url")
        response = http.request(asked.pop("method"), url, **_known(asked))
        assert response.status_code < 500, f"SQUALL_TEST_SEED={SEED} {asked} {response.text}"
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error if isinstance(error, str) else error["message"]

    check()


def _known(asked: dict[str, Any]) -> dict[str, Any]:
    """What httpx takes too."""
    found = {k: v for k, v in asked.items() if k in ("json", "params") and v is not None}
    data = asked.get("data")
    return found | ({"content": data} if isinstance(data, (bytes, str)) else {})
