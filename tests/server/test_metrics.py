"""What Prometheus is told, read with its own parser."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import Running, chat, in_thread, until

from squall import Model

PATH = "/v1/chat/completions"


@pytest.fixture
def running(model: Model) -> Iterator[Running]:
    with in_thread(model) as found:
        yield found


def read(http: httpx.Client) -> dict[str, float]:
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        ",".join(
            [sample.name, *(v for k, v in sample.labels.items() if k != "model")]
        ): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_count(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=30) as http:
        before = read(http)
        body = chat("Something long enough to be cached, word after word after word.", max_tokens=5)
        for _ in range(2):
            http.post(PATH, json=body | {"ignore_eos": True})
        http.post(PATH, json={"messages": 5})
        after = read(http)
        news = {name: value - before.get(name, 0) for name, value in after.items()}
        assert news["squall_answer_tokens_total"] == 10
        assert news["squall_answers_total,finished"] == 2
        assert news[f"squall_http_responses_total,{PATH},200"] == 2
        assert news[f"squall_http_responses_total,{PATH},400"] == 1
        assert news["squall_time_to_first_token_seconds_count"] == 2
        assert news["squall_inter_token_seconds_count"] == 2
        assert news["squall_queue_seconds_count"] == 2
        assert news["squall_prefix_hit_tokens_total"] >= 16
        assert news["squall_engine_steps_total"] >= 10
        assert after["squall_requests_running"] == after["squall_requests_waiting"] == 0
        assert after["squall_kv_blocks,used"] == 0
        blocks = [after[f"squall_kv_blocks,{state}"] for state in ("used", "cached", "free")]
        assert sum(blocks) == running.model.engine.stats().blocks
        assert after["squall_engine_alive"] == 1
        assert news["squall_guessed_tokens_total"] == news["squall_accepted_tokens_total"] == 0
        assert {"squall_preemptions_total", "squall_step_seconds_total,executor"} <= after.keys()


def test_metrics_of_what_goes_on(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=30) as http:
        running.held.hold()
        with http.stream("POST", PATH, json=chat(max_tokens=3, stream=True)):
            until(lambda: read(http)["squall_requests_running"] == 1)
            assert read(http)["squall_kv_blocks,used"] > 0
        running.held.let()
        until(running.quiet)
        assert read(http)["squall_answers_total,cancelled"] >= 1


def test_made_up_paths_make_no_series(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=30) as http:
        for i in range(5):
            http.get(f"/made/up/{i}")
        found = read(http)
    assert found["squall_http_responses_total,other,404"] == 5
    assert not any("made" in name for name in found)


def test_row_24_metrics_tell_guesses() -> None:
    text = "one two three four five six seven eight nine ten " * 8
    body = {"prompt": text, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with (
        Model.open(context=512, draft="ngram") as model,
        in_thread(model) as running,
        httpx.Client(base_url=running.url, timeout=30) as http,
    ):
        assert http.post("/v1/completions", json=body).status_code == 200
        found = read(http)
        guessed = found["squall_guessed_tokens_total"]
        assert guessed >= found["squall_accepted_tokens_total"] > 0
