"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from squall.api.responses import Usage
from squall.engine.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TOKEN_S = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 3, 10)


class _EngineCollector(Collector):
    """Reads the engine's own counts when asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        counts = stats.counts
        free = stats.blocks - stats.blocks_used - stats.blocks_cached
        yield _gauge("requests_running", "Answers in the making", stats.running)
        yield _gauge("requests_waiting", "Answers in the queue", stats.waiting)
        yield _gauge("engine_alive", "0 after an error in a step", int(self._engine.alive))
        yield _gauge("engine_stalled_seconds", "Since a step should have ended", stats.stalled_s)
        blocks = GaugeMetricFamily("squall_kv_blocks", "Blocks of KV cache", labels=["state"])
        for state, number in (
            ("used", stats.blocks_used), ("cached", stats.blocks_cached), ("free", free),
        ):  # fmt: skip
            blocks.add_metric([state], number)
        yield blocks
        yield _counter("prompt_tokens", "Prompt tokens computed", counts.prompt_tokens)
        yield _counter("prefix_hit_tokens", "Prompt tokens found cached", counts.cached_tokens)
        yield _counter("answer_tokens", "Tokens sampled", counts.answer_tokens)
        yield _counter("preemptions", "Answers that gave up their blocks", stats.preemptions)
        yield _counter("engine_steps", "Steps", counts.steps)
        ends = CounterMetricFamily("squall_answers", "Answers that ended", labels=["end"])
        for end in ("finished", "cancelled", "errors"):
            ends.add_metric([end], getattr(counts, end))
        yield ends
        seconds = CounterMetricFamily("squall_step_seconds", "Time of steps", labels=["part"])
        other_s = counts.step_s - counts.executor_s - counts.sampling_s
        for part, part_s in (
            ("executor", counts.executor_s), ("sampling", counts.sampling_s), ("other", other_s),
        ):  # fmt: skip
            seconds.add_metric([part], max(part_s, 0.0))
        yield seconds


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"squall_{name}", what, value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"squall_{name}", what, value)


class Metrics:
    """Counts of one server; nothing is shared with others in the process."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(engine))
        self.responses = Counter(
            "squall_http_responses", "Responses", ["path", "status"], registry=registry
        )
        self._first = Histogram(
            "squall_time_to_first_token_seconds", "From its arrival in the engine to a request's "
            "first token", buckets=_FIRST_S, registry=registry,
        )  # fmt: skip
        self._each = Histogram(
            "squall_inter_token_seconds", "Between the tokens of an answer, its mean",
            buckets=_TOKEN_S, registry=registry,
        )  # fmt: skip
        self._queue = Histogram(
            "squall_queue_seconds", "Waiting to run", buckets=_FIRST_S, registry=registry
        )

    def observe(self, usage: Usage) -> None:
        """An answer is over."""
        if usage.completion_tokens:
            first_s = usage.total_time_sec - usage.total_completion_time_sec
            self._first.observe(first_s)
            self._queue.observe(max(first_s - usage.total_prompt_time_sec, 0.0))
        if usage.completion_tokens > 1 and usage.avg_compl_tok_per_sec:
            self._each.observe(1 / usage.avg_compl_tok_per_sec)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
