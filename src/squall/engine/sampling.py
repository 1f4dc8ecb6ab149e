"""How the next token is chosen: checked parameters, and one native call for the rows of a step.

docs/sampling.md has the order in which parameters act, and their formulas.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from squall import _native
from squall.errors import InvalidRequest, SamplingFailed

TEMPERATURE = 0.7
TOP_K = 0
TOP_P = 0.95
MIN_P = 0.0
SEED_LIMIT = 2**64
MOST_BIASES = 300
MOST_BREAKERS = 64
MOST_BREAKER_BYTES = 64
MOST_TOP_LOGPROBS = 20
DRY_BREAKERS = ("\n", ":", '"', "*")

Floats = NDArray[np.float32]
# (logits [vocab], which it may change, the sequence's ids) -> other logits, or None for the same
LogitsProcessor = Callable[[Floats, NDArray[np.int32]], Floats | None]

_SIZE_LIMIT = 2**31
_BREAKERS_ALLOWED = f"at most {MOST_BREAKERS} texts of 1 to {MOST_BREAKER_BYTES} UTF-8 bytes"


def random_seed() -> int:
    """A seed that is new each time, and short enough to be typed again."""
    return secrets.randbits(32)


@dataclass(frozen=True, slots=True)
class Breakers:
    """Where DRY's repeats end: at the token in which one of `texts` ends, and at tokens `ids`.

    token_bytes: the text of any id that a sequence may have. A breaker is found inside of a longer
        token and across tokens.
    """

    texts: tuple[str, ...]
    token_bytes: Callable[[int], bytes]
    ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        sizes = [len(text.encode()) for text in self.texts]
        right = len(sizes) <= MOST_BREAKERS and all(1 <= n <= MOST_BREAKER_BYTES for n in sizes)
        _check(right, "dry_sequence_breakers", list(self.texts), _BREAKERS_ALLOWED)


@dataclass(frozen=True, slots=True)
class Dry:
    """The penalty on repeats. `range` is how many of the last tokens count; None: all."""

    multiplier: float
    base: float = 1.75
    allowed_length: int = 2
    breakers: Breakers | None = None
    range: int | None = None

    def __post_init__(self) -> None:
        _check(0 <= self.multiplier < math.inf, "dry_multiplier", self.multiplier, "at least 0")
        _check(1 <= self.base < math.inf, "dry_base", self.base, "at least 1")
        allowed = self.allowed_length
        _check(_whole(allowed) and allowed >= 1, "dry_allowed_length", allowed, "at least 1")
        right = self.range is None or (_whole(self.range) and self.range >= 1)
        _check(right, "dry_range", self.range, "at least 1, or None for all")


@dataclass(frozen=True, slots=True)
class Sampling:
    """Checked parameters. The same seed gives the same answer, whatever else runs.

    `temperature` 0 is greedy; `top_k` 0 or None, `top_p` 1 and `min_p` 0 are off, and so are
    penalties of 0 and a `repetition_penalty` of 1. A `logit_bias` of -inf forbids a token.
    """

    temperature: float = TEMPERATURE
    top_k: int | None = TOP_K
    top_p: float = TOP_P
    min_p: float = MIN_P
    seed: int = field(default_factory=random_seed)
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    dry: Dry | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        top_k = self.top_k or 0
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, "at least 0")
        _check(_whole(top_k) and top_k >= 0, "top_k", top_k, "at least 0 (0: off)")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1: off)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1 (0: off)")
        right = _whole(self.seed) and 0 <= self.seed < SEED_LIMIT
        _check(right, "seed", self.seed, "at least 0 and below 2**64")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _check(-2 <= value <= 2, name, value, "between -2 and 2 (0: off)")
        repetition = self.repetition_penalty
        _check(0 < repetition < math.inf, "repetition_penalty", repetition, "above 0 (1: off)")
        right = _whole(self.min_tokens) and self.min_tokens >= 0
        _check(right, "min_tokens", self.min_tokens, "at least 0")
        self._check_biases()

    def _check_biases(self) -> None:
        count = len(self.logit_bias)
        _check(count <= MOST_BIASES, "logit_bias", f"{count} ids", f"at most {MOST_BIASES}")
        for token, bias in self.logit_bias.items():
            right = _whole(token) and 0 <= token < _SIZE_LIMIT
            _check(right, "a token id in logit_bias", token, "a whole number from 0")
            right = -math.inf <= bias < math.inf
            _check(right, f"logit_bias of token {token}", bias, "a number, or -inf to forbid it")

    def check_ids(self, vocab: int) -> None:
        """Raises InvalidRequest for a biased token that the model does not have."""
        for token in self.logit_bias:
            _check(token < vocab, "a token id in logit_bias", token, f"below {vocab}")


class SamplerState:
    """What sampling remembers of one sequence; it is told each token once.

    ids: the tokens so far; those after the first `prompt_length` (by default all) are generated.
    Ids outside the vocabulary, such as placeholders of images, are allowed.
    """

    __slots__ = ("_breakers", "_tail", "_texts", "native", "prompt_length", "sampling")

    def __init__(
        self, sampling: Sampling, ids: Sequence[int], *, prompt_length: int | None = None
    ) -> None:
        self.sampling = sampling
        self.prompt_length = len(ids) if prompt_length is None else prompt_length
        self.native = _native.SamplerState(_options(sampling), self.prompt_length)
        dry = sampling.dry
        self._breakers = dry.breakers if dry is not None and dry.multiplier > 0 else None
        self._texts = [text.encode() for text in self._breakers.texts] if self._breakers else []
        self._tail = b""
        self.extend(ids)

    def __len__(self) -> int:
        return self.native.length

    @property
    def generated(self) -> int:
        """How many tokens came after the prompt."""
        return len(self) - self.prompt_length

    def append(self, token: int) -> None:
        """The sequence goes on with `token`."""
        self.extend((token,))

    def extend(self, ids: Sequence[int]) -> None:
        """The sequence goes on with `ids`."""
        breakers = self._breakers
        breaks = b"" if breakers is None else bytes(self._breaks(breakers, id_) for id_ in ids)
        self.native.extend(ids, breaks)

    def _breaks(self, breakers: Breakers, token: int) -> bool:
        """Whether a breaker ends in this token."""
        before = len(self._tail)
        text = self._tail + breakers.token_bytes(token)
        self._tail = text[1 - MOST_BREAKER_BYTES :]
        return token in breakers.ids or any(
            text.find(wanted, max(0, before - len(wanted) + 1)) >= 0 for wanted in self._texts
        )


@dataclass(frozen=True, slots=True)
class RowSampling:
    """What to sample from one row of logits.

    banned: ids that must not come now, such as stop ids before `min_tokens`.
    top_logprobs: how many of the likeliest to report, 0 to 20; None: no log-probabilities at all.
    """

    state: SamplerState
    banned: Sequence[int] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        top = self.top_logprobs
        right = top is None or (_whole(top) and 0 <= top <= MOST_TOP_LOGPROBS)
        _check(right, "top_logprobs", top, f"between 0 and {MOST_TOP_LOGPROBS}")


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, and natural log-probabilities of the model's own distribution if they were wanted.

    top: (token, log-probability), the likeliest first; the sampled token may not be among them.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def sample_rows(
    logits: Floats,  # [rows, vocab]
    rows: Sequence[RowSampling],
    *,
    pool: _native.ThreadPool | None = None,
) -> list[Sampled | SamplingFailed]:
    """A token for each row; where none can be chosen, the error that concerns this row alone.

    Does not change `logits` or the states: tell a state its token with `append`. A result depends
    on its row only, not on the others or on the threads of `pool`, which share out the rows.
    """
    results: list[Sampled | SamplingFailed | None] = [None] * len(rows)
    wanted = []
    for i, row in enumerate(rows):
        try:
            processed = _process(logits[i], row)
        except SamplingFailed as error:
            results[i] = error
            continue
        top = -1 if row.top_logprobs is None else row.top_logprobs
        wanted.append((i, row.state.native, processed, list(row.banned), top))
    found = iter(_native.sample(logits, wanted, pool))
    return [
        _result(row, *next(found)) if result is None else result
        for row, result in zip(rows, results, strict=True)
    ]


def _result(
    row: RowSampling, token: int, logprob: float, top: Sequence[tuple[int, float]]
) -> Sampled | SamplingFailed:
    if token == _native.LOGITS_ARE_NAN:
        return SamplingFailed(
            "the model's logits are NaN: a weight is broken, or a number grew beyond float32"
        )
    if token < 0:
        return SamplingFailed("no token can be chosen: every logit is NaN, -inf or forbidden")
    return Sampled(token, None if row.top_logprobs is None else logprob, tuple(top))


def _process(logits: Floats, row: RowSampling) -> Floats | None:
    """The row after the request's own processors, if it has some."""
    processors = row.state.sampling.logits_processors
    if not processors:
        return None
    native = row.state.native
    adjusted, ids = native.adjusted(logits, list(row.banned)), native.tokens()
    for processor in processors:
        name = getattr(processor, "__name__", type(processor).__name__)
        try:
            returned = processor(adjusted, ids)
            if returned is not None:
                adjusted = np.ascontiguousarray(returned, np.float32)
        except Exception as error:
            text = f"logits processor {name} failed: {type(error).__name__}: {error}"
            raise SamplingFailed(text) from error
        if adjusted.shape != logits.shape:
            raise SamplingFailed(
                f"logits processor {name} returned the shape {adjusted.shape}, not {logits.shape}"
            )
    return adjusted


def _options(sampling: Sampling) -> _native.SamplingOptions:
    options = _native.SamplingOptions()
    options.temperature = sampling.temperature
    options.top_k = min(sampling.top_k or 0, _SIZE_LIMIT)
    options.top_p = sampling.top_p
    options.min_p = sampling.min_p
    options.seed = sampling.seed
    options.bias = list(sampling.logit_bias.items())
    options.frequency = sampling.frequency_penalty
    options.presence = sampling.presence_penalty
    options.repetition = sampling.repetition_penalty
    if sampling.dry is not None:
        options.dry_multiplier = sampling.dry.multiplier
        options.dry_base = sampling.dry.base
        options.dry_allowed_length = min(sampling.dry.allowed_length, _SIZE_LIMIT)
        options.dry_range = min(sampling.dry.range or _SIZE_LIMIT, _SIZE_LIMIT)
    return options


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check(right: bool, name: str, value: object, allowed: str) -> None:
    if not right:
        raise InvalidRequest(f"{name} is {value}; it must be {allowed}")
