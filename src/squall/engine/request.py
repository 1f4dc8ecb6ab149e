"""What is asked for, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from squall.batch import Memory, Mixture
from squall.engine.fields import Number, check, check_fields, whole
from squall.engine.sampling import MOST_TOP_LOGPROBS, Mask, Sampled, Sampling
from squall.errors import InvalidRequest

FinishReason = Literal["stop", "length", "cancelled", "error"]
Logits = NDArray[np.float32]
# (ids, most) -> at most so many ids that may follow. It is asked before steps, on the engine's
# thread, and changes how long an answer takes but never what it is.
Proposer = Callable[[Sequence[int], int], Iterable[int]]

_ID_LIMIT = 2**31


class Matcher(Protocol):
    """What may follow in one answer. One thread at a time calls it."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow any more; then the answer ends."""

    def allowed(self, guesses: Sequence[int]) -> Sequence[Mask] | None:
        """`1 + len(guesses)` masks: what may come now, and after each guess; None: anything.

        It is asked before draws, on a thread of its own while the executor computes the logits for
        them. After a guess that must not come the masks do not matter.
        """

    def forced(self, most: int) -> Sequence[int]:
        """At most so many ids that must follow, or nearly; they are computed in one step."""

    def accept(self, token: int) -> None:
        """`token` was drawn."""


# Starts the matcher of an answer; several answers of one request have one each.
Constraint = Callable[[], Matcher]


def _check_whole(name: str, value: object, least: int, most: float = math.inf) -> None:
    Number(help="", whole=True, least=least, most=most).check(name, value)


@dataclass(frozen=True, slots=True)
class CacheScope:
    """Requests reuse each other's cached prefixes only where all of this is equal.

    tenant: whose request it is. adapter: what the adapters are, whatever their names. memory: what
    may be recalled.
    """

    tenant: str = ""
    adapter: str = ""
    memory: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start:stop` of a prompt come from an embedding with this digest, not from their ids.

    rows: float32 [stop - start, hidden]. mutual: they see each other, and are computed in one step.
    """

    start: int
    stop: int
    digest: bytes
    rows: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    mutual: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Recalled:
    """What a prompt may recall: int32 [3, ids], as `Batch.seen` has it for each token.

    Those of the answer see what the last one does.
    """

    memory: Memory
    seen: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Scoring:
    """The wish to see the logits of the prompt itself.

    start: the first token of the prompt whose logits are wanted.
    take: called on the engine's thread with (token, logits `[tokens, vocab]` after it and the
        following ones); the next step waits for it.
    """

    take: Callable[[int, Logits], None]
    start: int = 0

    def __post_init__(self) -> None:
        _check_whole("start of a scoring", self.start, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to one prompt. Several answers are several requests; they share their prefix.

    ids: the prompt, at least one token. spans: the parts of it that are embeddings, in order.
    max_tokens: at most so many, and never more than the context leaves, which is None. 0 is for
        scoring alone.
    stop: strings that end the answer and are not part of it. stop_ids: tokens that do, beside the
        model's own end tokens. ignore_eos: go on after those.
    logprobs: how many of the likeliest tokens to tell beside each token's own log-probability;
        None tells neither.
    truncate: drop the beginning of a prompt that is too long, and tell how much in
        `Usage.dropped_tokens`, instead of refusing it. A span that would be cut is dropped whole.
    chunk: at most so many tokens of the prompt a step.
    continues: the answer goes on with a text, so a leading space belongs to it.
    proposer: guesses how it goes on. constraint: starts what says how it may.
    shown: control tokens whose names are part of the text; others have none.
    adapters: of the executor, each with its weight; `scope` has to tell them from others.
    whole: the prompt is computed in one step, and nothing of it is used by others.
    rotary: int32 [axes, ids], where tokens are for the rotary embedding; None: at their places.
    recalled: what they see of a memory, which `scope` has to tell from others.
    """

    ids: Sequence[int]
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = whole("See above.", least=0, most=MOST_TOP_LOGPROBS)
    scope: CacheScope = CacheScope()
    truncate: bool = False
    chunk: int | None = whole("See above.", least=1)
    continues: bool = False
    scoring: Scoring | None = None
    spans: tuple[Span, ...] = ()
    proposer: Proposer | None = None
    constraint: Constraint | None = None
    shown: frozenset[int] = frozenset()
    adapters: Mixture = ()
    whole: bool = False
    rotary: NDArray[np.int32] | None = None
    recalled: Recalled | None = None

    def __post_init__(self) -> None:
        # Copies, so that nobody can change what was checked.
        object.__setattr__(self, "ids", _ids("ids", self.ids))
        object.__setattr__(self, "stop_ids", frozenset(_ids("stop_ids", self.stop_ids)))
        if not self.ids:
            raise InvalidRequest("the prompt is empty; give at least one token")
        for name, kind, allowed in _KINDS:
            check(isinstance(getattr(self, name), kind), name, getattr(self, name), allowed)
        check_fields(self)
        if self.max_tokens is not None:
            _check_whole("max_tokens", self.max_tokens, int(self.scoring is None))
        right = all(isinstance(text, str) and text for text in self.stop)
        check(right, "stop", self.stop, "texts, none of them empty")
        right = all(isinstance(span, Span) for span in self.spans)
        check(right, "spans", self.spans, "a tuple of Spans")
        end = 0
        for span in self.spans:
            _check_whole("start of a span", span.start, end)
            _check_whole("stop of a span", span.stop, span.start + 1, len(self.ids))
            end = span.stop


_KINDS: tuple[tuple[str, Any, str], ...] = (
    ("sampling", Sampling, "a Sampling"),
    ("scope", CacheScope, "a CacheScope"),
    ("scoring", Scoring | None, "a Scoring or None"),
    ("stop", tuple, "a tuple of texts"),
    ("spans", tuple, "a tuple of Spans"),
)


def _ids(name: str, given: Iterable[Any]) -> tuple[int, ...]:
    right = isinstance(given, Iterable) and not isinstance(given, str | bytes)
    check(right, name, given, "token ids, such as a list")
    ids = tuple(given)
    # One look at all of them is quick, and nearly always enough.
    if set(map(type, ids)) <= {int} and 0 <= min(ids, default=0) <= max(ids, default=0) < _ID_LIMIT:
        return ids
    for id_ in ids:
        _check_whole(f"an id in {name}", id_, 0, _ID_LIMIT - 1)
    return tuple(map(int, ids))


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
    Of `guessed_tokens`, which a proposer gave and a step verified, `accepted_tokens` were right.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    answer_tokens: int = 0
    dropped_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
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
