"""How the next token is chosen: checked parameters, and one native call for the rows of a step.

docs/sampling.md has the order in which parameters act, and their formulas.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall import _native
from squall.engine.fields import (
    Number,
    check,
    check_texts,
    described,
    numbers_of,
    real,
    texts,
    whole,
)
from squall.errors import InvalidRequest, SamplingFailed

MOST_BIASES = 300
MOST_BREAKERS = 64
MOST_BREAKER_BYTES = 64
MOST_TOP_LOGPROBS = 20
DRY_BREAKERS = ("\n", ":", '"', "*")

Floats = NDArray[np.float32]
Mask = NDArray[np.uint32]  # [ceil(vocab / 32)]: bit i % 32 of word i // 32 is of id i
# (logits [vocab], which it may change, the sequence's ids) -> other logits, or None for the same
LogitsProcessor = Callable[[Floats, NDArray[np.int32]], Floats | None]

_SIZE_LIMIT = 2**31
_TOKEN = Number(help="", whole=True, most=_SIZE_LIMIT - 1)
_BIAS = Number(help="", least=-math.inf)
TOP_LOGPROBS = Number(
    help="So many of the likeliest tokens in a token's place.", whole=True, most=MOST_TOP_LOGPROBS
)
_BREAKERS_ALLOWED = f"at most {MOST_BREAKERS} texts of 1 to {MOST_BREAKER_BYTES} UTF-8 bytes"


@dataclass(frozen=True, kw_only=True)
class SamplingFields:
    """What may be asked of sampling; None: as the model's makers have it, or as `Sampling`."""

    temperature: float | None = real("0: always the likeliest token.", stored=True)
    top_k: int | None = whole("Only the k likeliest tokens.", off=0, stored=True)
    top_p: float | None = real(
        "Only the likeliest tokens that sum to p.", above=True, most=1, off=1, stored=True
    )
    min_p: float | None = real(
        "Only tokens at least p times as likely as the likeliest.", most=1, off=0, stored=True
    )
    seed: int | None = whole("The same seed, the same answer.", most=2**64 - 1)
    frequency_penalty: float | None = real(
        "Against tokens of the answer, by how often.", least=-2, most=2, off=0
    )
    presence_penalty: float | None = real(
        "Against tokens of the answer, however often.", least=-2, most=2, off=0
    )
    repetition_penalty: float | None = real(
        "Divides the logits of tokens of prompt and answer.", above=True, off=1, stored=True
    )
    min_tokens: int | None = whole("Nothing ends the answer before so many tokens.")
    dry_multiplier: float | None = real("Against repeats (DRY).", off=0)
    dry_base: float | None = real("How DRY grows with each token of a repeat.", least=1)
    dry_allowed_length: int | None = whole("Tokens of a repeat that DRY allows.", least=1)
    dry_range: int | None = whole("Only so many of the last tokens count for DRY.", least=1)
    dry_sequence_breakers: Sequence[str] | None = texts("Texts at which repeats end for DRY.")

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was said: of `Sampling`, and apart from that of `Model.dry`."""
        said = {name: getattr(self, name) for name in described(SamplingFields)}
        plain = {name: value for name, value in said.items() if value is not None}
        names = [name for name in plain if name.startswith(DRY)]
        dry = {n.removeprefix(DRY).removeprefix("sequence_"): plain.pop(n) for n in names}
        return plain, dry


DRY = "dry_"
NUMBERS = numbers_of(SamplingFields)


@dataclass(frozen=True, slots=True)
class Breakers:
    """Where DRY's repeats end: at the token in which one of `texts` ends, and at tokens `ids`.

    token_bytes: the text of any id that a sequence may have. A breaker is found inside of a longer
        token and across tokens.
    """

    texts: Sequence[str]
    token_bytes: Callable[[int], bytes]
    ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        check_texts("dry_sequence_breakers", self.texts)
        sizes = [len(text.encode(errors="replace")) for text in self.texts]
        right = len(sizes) <= MOST_BREAKERS and all(1 <= n <= MOST_BREAKER_BYTES for n in sizes)
        check(right, "dry_sequence_breakers", self.texts, _BREAKERS_ALLOWED)


@dataclass(frozen=True, slots=True)
class Dry:
    """The penalty on repeats. `range` is how many of the last tokens count; None: all."""

    multiplier: float
    base: float = 1.75
    allowed_length: int = 2
    breakers: Breakers | None = None
    range: int | None = None

    def __post_init__(self) -> None:
        for name, number in NUMBERS.items():
            if name.startswith(DRY):
                value = getattr(self, name.removeprefix(DRY))
                if value is not None or name != "dry_range":
                    number.check(name, value)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Checked parameters. The same seed gives the same answer, whatever else runs.

    `temperature` 0 is greedy; `top_k` 0 or None, `top_p` 1 and `min_p` 0 are off, and so are
    penalties of 0 and a `repetition_penalty` of 1. A `logit_bias` of -inf forbids a token.
    """

    temperature: float = 0.7
    top_k: int | None = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = field(default_factory=partial(secrets.randbits, 32))  # short enough to be typed
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    dry: Dry | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name, number in NUMBERS.items():
            if not name.startswith(DRY) and not (name == "top_k" and self.top_k is None):
                number.check(name, getattr(self, name))
        self._check_biases()
        processors = self.logits_processors
        right = isinstance(processors, list | tuple) and all(map(callable, processors))
        check(right, "logits_processors", processors, "a list of functions of (logits, ids)")

    def _check_biases(self) -> None:
        right = isinstance(self.logit_bias, Mapping)
        check(right, "logit_bias", self.logit_bias, "a mapping of token ids to numbers")
        count = len(self.logit_bias)
        if count > MOST_BIASES:
            raise InvalidRequest(f"logit_bias is {count} ids; it must be at most {MOST_BIASES}")
        for token, bias in self.logit_bias.items():
            _TOKEN.check("a token id in logit_bias", token)
            right = _BIAS.allows(bias) or (isinstance(bias, float) and bias == -math.inf)
            check(right, f"logit_bias of token {token}", bias, "a number, or -inf to forbid it")

    def check_ids(self, vocab: int) -> None:
        """Raises InvalidRequest for a biased token that the model does not have."""
        for token in self.logit_bias:
            check(token < vocab, "a token id in logit_bias", token, f"below {vocab}")


class SamplerState:
    """What sampling remembers of one sequence; it is told each token once.

    ids: the tokens so far; those after the first `prompt_length` (by default all) are generated.
    Ids outside the vocabulary, such as placeholders of images, are allowed.
    """

    __slots__ = ("_breakers", "_tail", "_texts", "native", "sampling")

    def __init__(
        self, sampling: Sampling, ids: Sequence[int], *, prompt_length: int | None = None
    ) -> None:
        self.sampling = sampling
        prompt = len(ids) if prompt_length is None else prompt_length
        self.native = _native.SamplerState(_options(sampling), prompt)
        dry = sampling.dry
        self._breakers = dry.breakers if dry is not None and dry.multiplier > 0 else None
        self._texts = [text.encode() for text in self._breakers.texts] if self._breakers else []
        self._tail = b""
        self.extend(ids)

    def fork(self) -> SamplerState:
        """The same, to go on by itself, without the request's own processors."""
        fork = copy(self)
        fork.native = self.native.copy()
        fork.sampling = replace(self.sampling, logits_processors=())
        return fork

    def append(self, token: int) -> None:
        self.extend((token,))

    def extend(self, ids: Sequence[int]) -> None:
        breakers = self._breakers
        breaks = b"" if breakers is None else bytes(self._breaks(breakers, id_) for id_ in ids)
        self.native.extend(ids, breaks)

    def _breaks(self, breakers: Breakers, token: int) -> bool:
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
    allowed: no others may come; None: all may. Logits processors change nothing of that.
    top_logprobs: how many of the likeliest to report, 0 to 20; None: no log-probabilities at all.
    """

    state: SamplerState
    banned: Sequence[int] = ()
    top_logprobs: int | None = None
    allowed: Mask | None = None

    def __post_init__(self) -> None:
        if self.top_logprobs is not None:
            TOP_LOGPROBS.check("top_logprobs", self.top_logprobs)


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
        wanted.append((i, row.state.native, processed, list(row.banned), row.allowed, top))
    found = iter(_native.sample(logits, wanted, pool))
    return [
        _result(row, *next(found)) if result is None else result
        for row, result in zip(rows, results, strict=True)
    ]


def sample_each(
    logits: Floats, rows: Sequence[RowSampling], pool: _native.ThreadPool | None
) -> list[Sampled | Exception]:
    """The same, where a row may be wrong too."""
    try:
        return [*sample_rows(logits, rows, pool=pool)]
    except Exception as error:
        if len(rows) == 1:
            return [error]
        return [sample_each(logits[i : i + 1], rows[i : i + 1], pool)[0] for i in range(len(rows))]


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
