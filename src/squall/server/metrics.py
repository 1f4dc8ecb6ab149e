"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from squall.api.responses import Usage
from squall.diffusion.model import ImageModel
from squall.model import Model
from squall.server.residence import AnyStanding
from squall.server.served import Painter, Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TOKEN_S = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 3, 10)


_Row = tuple[str, str, str, Mapping[str, float]]
_Rows = tuple[list[_Row], list[_Row]]  # of gauges, and of counters


class _Collector(Collector):
    """What `rows` tells of each of some things, which have the names of models."""

    def __init__(
        self, models: Callable[[], Mapping[str, Any]], rows: Callable[[Any], _Rows]
    ) -> None:
        self._models, self._rows = models, rows

    def collect(self) -> Iterator[Metric]:
        models = self._models()
        found = [self._rows(model) for model in models.values()]
        for which, kind in enumerate((GaugeMetricFamily, CounterMetricFamily)):
            for rows in zip(*(both[which] for both in found), strict=True):
                name, what, label, _ = rows[0]
                family = kind(f"squall_{name}", what, labels=["model", label][: 1 + bool(label)])
                for model, (*_, values) in zip(models, rows, strict=True):
                    for value, number in values.items():
                        family.add_metric([model, value][: 1 + bool(label)], number)
                yield family


def _loaded(standings: Mapping[str, AnyStanding]) -> Mapping[str, Any]:
    return {name: standing.model for name, standing in standings.items() if standing.ready}


def _standing_rows(standing: AnyStanding) -> _Rows:
    loaded = int(standing.state == "loaded")
    return [
        ("model_loaded", "1 if the model is loaded", "", {"": loaded}),
        ("model_bytes", "Of its weights, and its KV cache", "", {"": standing.nbytes}),
        ("model_requests", "Requests that have the model", "", {"": len(standing.users)}),
    ], [("model_loads", "How often it was loaded", "", {"": standing.loads})]


def _rows(model: Model) -> _Rows:
    """Families: name, what is told, the label that values have beside the model's, and values."""
    engine, adapters = model.engine, model.adapters.list()
    loaded = [info for info in adapters if info.loaded]
    stats = engine.stats()
    counts = stats.counts
    free = stats.blocks - stats.blocks_used - stats.blocks_cached
    blocks = {"used": stats.blocks_used, "cached": stats.blocks_cached, "free": free}
    shelf = {"loaded": len(loaded), "dropped": len(adapters) - len(loaded)}
    ends = {end: getattr(counts, end) for end in ("finished", "cancelled", "errors")}
    other_s = max(counts.step_s - counts.executor_s - counts.sampling_s, 0)
    steps_s = {"executor": counts.executor_s, "sampling": counts.sampling_s, "other": other_s}
    gauges: list[_Row] = [
        ("requests_running", "Answers in the making", "", {"": stats.running}),
        ("requests_waiting", "Answers in the queue", "", {"": stats.waiting}),
        ("engine_alive", "0 after an error in a step", "", {"": int(engine.alive)}),
        ("engine_stalled_seconds", "Since a step should have ended", "", {"": stats.stalled_s}),
        ("kv_blocks", "Blocks of KV cache", "state", blocks),
        ("adapters", "Adapters, with their weights in memory or without", "state", shelf),
        (
            "adapter_bytes",
            "Of adapters' weights in memory",
            "",
            {"": sum(i.nbytes for i in loaded)},
        ),
    ]
    counters: list[_Row] = [
        ("prompt_tokens", "Prompt tokens computed", "", {"": counts.prompt_tokens}),
        ("prefix_hit_tokens", "Prompt tokens found cached", "", {"": counts.cached_tokens}),
        ("answer_tokens", "Tokens sampled", "", {"": counts.answer_tokens}),
        ("guessed_tokens", "Tokens guessed and verified", "", {"": counts.guessed_tokens}),
        ("accepted_tokens", "Guesses that were right", "", {"": counts.accepted_tokens}),
        ("preemptions", "Answers that gave up their blocks", "", {"": stats.preemptions}),
        ("engine_steps", "Steps", "", {"": counts.steps}),
        ("answers", "Answers that ended", "end", ends),
        ("step_seconds", "Time of steps", "part", steps_s),
    ]
    return gauges, counters


def _painting_rows(model: ImageModel) -> _Rows:
    stats = model.stats()
    seconds = {part: getattr(stats, f"{part}_s") for part in ("text", "steps", "decode")}
    return [
        ("pictures_waiting", "Pictures in the queue", "", {"": stats.waiting}),
        ("pictures_running", "Pictures in the making", "", {"": int(stats.busy)}),
        ("picture_stalled_seconds", "Since a step began", "", {"": stats.stalled_s}),
    ], [
        ("pictures", "Pictures made", "", {"": stats.pictures}),
        ("picture_seconds", "Time of pictures", "part", seconds),
    ]


class Metrics:
    """Counts of one server; nothing is shared with others in the process."""

    def __init__(
        self, models: Mapping[str, Served], painters: Mapping[str, Painter],
        standings: Callable[[], Sequence[AnyStanding]],
    ) -> None:  # fmt: skip
        self._registry = registry = CollectorRegistry()
        registry.register(_Collector(lambda: {s.name: s for s in standings()}, _standing_rows))
        registry.register(_Collector(partial(_loaded, models), _rows))
        registry.register(_Collector(partial(_loaded, painters), _painting_rows))
        self.responses = Counter(
            "squall_http_responses", "Responses", ["path", "status"], registry=registry
        )
        self.embedded = Counter(
            "squall_embedded_tokens", "Of texts that were embedded or ranked", ["model"],
            registry=registry,
        )  # fmt: skip

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, what, ["model"], buckets=buckets, registry=registry)

        self._first = histogram(
            "squall_time_to_first_token_seconds",
            "From its arrival in the engine to a request's first token", _FIRST_S,
        )  # fmt: skip
        self._each = histogram(
            "squall_inter_token_seconds", "Between the tokens of an answer, its mean", _TOKEN_S
        )
        self._queue = histogram("squall_queue_seconds", "Waiting to run", _FIRST_S)

    def observe(self, model: str, usage: Usage) -> None:
        if usage.completion_tokens:
            first_s = usage.total_time_sec - usage.total_completion_time_sec
            self._first.labels(model).observe(first_s)
            self._queue.labels(model).observe(max(first_s - usage.total_prompt_time_sec, 0.0))
        if usage.completion_tokens > 1 and usage.avg_compl_tok_per_sec:
            self._each.labels(model).observe(1 / usage.avg_compl_tok_per_sec)

    def text(self) -> bytes:
        return generate_latest(self._registry)
