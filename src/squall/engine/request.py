"""What is asked for, what has become of it so far, and what is told of it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from squall.engine.sampling import MOST_TOP_LOGPROBS, Sampled, Sampling
from squall.errors import InvalidRequest

FinishReason = Literal["stop", "length", "cancelled", "error"]
Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CacheScope:
    """Requests reuse each other's cached prefixes only where all of this is equal.

    tenant: whose request it is. adapter: name and version. images: a digest of each image.
    """

    tenant: str = ""
    adapter: str = ""
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Scoring:
    """The wish to see the logits of the prompt itself.

    start: the first token of the prompt whose logits are wanted.
    take: called on the engine's thread with (token, logits `[tokens, vocab]` after it and the
        following ones); the next step waits for it.
    """

    take: Callable[[int, Logits], None]
    start: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to one prompt. Several answers are several requests; they share their prefix.

    ids: the prompt, at least one token.
    max_tokens: at most so many, and never more than the context leaves, which is None. 0 is for
        scoring alone.
    stop: strings that end the answer and are not part of it. stop_ids: tokens that do, beside the
        model's own end tokens. ignore_eos: go on after those.
    logprobs: how many of the likeliest tokens to tell beside each token's own log-probability;
        None tells neither.
    truncate: drop the beginning of a prompt that is too long, and tell how much in
        `Usage.dropped_tokens`, instead of refusing it.
    chunk: at most so many tokens of the prompt a step.
    continues: the answer goes on with a text, so a leading space belongs to it.
    """

    ids: Sequence[int]
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    scope: CacheScope = CacheScope()
    truncate: bool = False
    chunk: int | None = None
    continues: bool = False
    scoring: Scoring | None = None

    def __post_init__(self) -> None:
        if not len(self.ids):
            raise InvalidRequest("the prompt is empty; give at least one token")
        least = {"max_tokens": int(self.scoring is None), "logprobs": 0, "chunk": 1}
        for name, allowed in least.items():
            value = getattr(self, name)
            if value is not None and value < allowed:
                raise InvalidRequest(f"{name} is {value}; it must be at least {allowed}")
        if self.logprobs is not None and self.logprobs > MOST_TOP_LOGPROBS:
            raise InvalidRequest(f"logprobs is {self.logprobs}; at most {MOST_TOP_LOGPROBS}")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text, the ids sampled since the last piece, and in the last piece why the answer ended.

    logprobs: the sampled ids with their log-probabilities, if asked for.
    error: what went wrong, if that is the reason.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[Sampled, ...] = ()
    error: Exception | None = None


@dataclass(slots=True)
class Usage:
    """Tokens and seconds of one answer.

    `cached_tokens` of the prompt were in the KV cache; `dropped_tokens` were cut off before it.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    answer_tokens: int = 0
    dropped_tokens: int = 0
    queue_s: float = 0.0
    prompt_s: float = 0.0
    answer_s: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens computed a second."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_s if self.prompt_s else 0.0

    @property
    def running_s(self) -> float:
        """From the first step on."""
        return self.prompt_s + self.answer_s

    @property
    def answer_rate(self) -> float:
        """Tokens a second after the first, which belongs to the prompt's step."""
        return (self.answer_tokens - 1) / self.answer_s if self.answer_s else 0.0


@dataclass(slots=True, eq=False)
class Progress:
    """How far a request is. The scheduler owns it; `tokens` grows by what is sampled.

    tokens: known: the prompt and what was sampled. computed: how many are in the KV cache.
    scored: the first known token whose logits are wanted and not told: the last one, but for
        scoring.
    blocks: the KV blocks of the tokens, in order; all known tokens have room while it runs.
    keys: of the leading full blocks, as far as known. stored: how many of them are cached.
    """

    request: Request
    number: int
    tokens: list[int]
    scored: int
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    stored: int = 0

    @property
    def pending(self) -> int:
        """Tokens known and not computed."""
        return len(self.tokens) - self.computed
