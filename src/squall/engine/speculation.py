"""How many guesses an answer gets in a step, and which: looked up in its text, or of a draft model.

A guess costs a row of a step, and saves a step if it is right, so it is made where that pays. Times
and chances, as they were lately, change how long an answer takes, and never what it is.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from squall.engine.sequence import Sequence as Tokens

if TYPE_CHECKING:
    from squall.engine.draft import Draft
    from squall.engine.reply import Reply

LOGGER = logging.getLogger("squall.engine")
MOST_GUESSES = 32
# Lengths of ends of the text that are looked up, and up to where a match is followed.
LENGTHS = (8, 4, 2)
LONGEST = 32
# So many tokens are learned at a time, as others wait.
AT_ONCE = 1024
# Chances at the start: of a draft's guess, and of a looked up one by the bits of how many tokens
# matched before it.
DRAFT, MOST_BITS = 0, 5
CHANCES = (0.7, 0.1, 0.3, 0.5, 0.7, 0.9)
LEAST_CHANCE, MOST_CHANCE = 0.01, 0.99
# How fast the chances of a request follow what comes, and what new requests begin with.
OWN, SHARED = 1 / 8, 1 / 32
# A guess that does not pay is tried all the same for so much of the time.
TRIES = 1 / 100


class Lookup:
    """Where the last tokens of one sequence stood before. Each token costs the same, wherever."""

    def __init__(self) -> None:
        self._ends: dict[int, dict[int, int]] = {length: {} for length in LENGTHS}
        self._known = 0

    def find(self, tokens: Sequence[int], most: int) -> tuple[list[int], int]:
        """What came after the longest match, its latest, and its length; ([], 0): none."""
        last = len(tokens)
        known = min(last, self._known + AT_ONCE)
        for end in range(self._known + 1, known):
            for length, ends in self._ends.items():
                if end >= length:
                    # A hash instead of tokens takes less memory, and matches are looked at anyway.
                    ends[hash(tuple(tokens[end - length : end]))] = end
        self._known = known - 1
        for length, ends in self._ends.items():
            end = ends.get(hash(tuple(tokens[last - length :])), 0)
            if end and (matched := _matched(tokens, end)) >= length:
                # Behind the last token it goes round.
                return [tokens[end + i % (last - end)] for i in range(most)], matched
        return [], 0


def _matched(tokens: Sequence[int], end: int) -> int:
    """How many tokens before `end` equal as many of the last ones."""
    behind, length = len(tokens) - end, 0
    while (
        length < min(LONGEST, end) and tokens[end - 1 - length] == tokens[end + behind - 1 - length]
    ):
        length += 1
    return length


class Cost:
    """Seconds of a step as `fixed + row * rows`, by a line through what was measured lately."""

    KEEP = 0.97
    # As long as rows hardly differ one is taken to cost so much of a step.
    USUAL = 0.1

    def __init__(self) -> None:
        self.fixed = self.row = 0.0
        self._count = self._rows = self._seconds = self._products = self._squares = 0.0

    def __bool__(self) -> bool:
        return self._count > 0

    def of(self, rows: int) -> float:
        return self.fixed + self.row * rows

    def observe(self, rows: int, seconds: float) -> None:
        if self:
            # What else the machine does is not the step's.
            seconds = min(seconds, 3 * self.of(rows))
        self._count = self._count * self.KEEP + 1
        away = rows - self._rows
        self._rows += away / self._count
        self._seconds += (seconds - self._seconds) / self._count
        self._squares = self._squares * self.KEEP + away * (rows - self._rows)
        self._products = self._products * self.KEEP + away * (seconds - self._seconds)
        slope = (self._products + self.USUAL * self._seconds) / (self._squares + 1)
        self.row = min(max(slope, self._seconds / 200), self._seconds / max(self._rows, 1))
        self.fixed = self._seconds - self.row * self._rows


NOTHING = Cost()


def share_out(
    odds: Sequence[Sequence[float]], *, answers: int, spare: int, step: Cost, draft: Cost = NOTHING
) -> list[int]:
    """How many guesses of each request pay in a step of `answers` rows that has `spare` more.

    odds: how likely each guess of a request is right, and those before it. draft: of its steps,
        each of which makes a guess for all requests that want one more.
    """
    counts = [0] * len(odds)
    tokens, seconds, row = float(answers), step.of(answers), step.row + draft.row
    for depth in range(spare):
        # More tokens a second than without it.
        worth = [
            i for i, found in enumerate(odds)
            if counts[i] == depth < len(found) and found[depth] * seconds > row * tokens
        ]  # fmt: skip
        worth = sorted(worth, key=lambda i: -odds[i][depth])[:spare]
        gained, cost = sum(odds[i][depth] for i in worth), draft.fixed + row * len(worth)
        if not worth or gained * seconds <= cost * tokens:
            break
        for i in worth:
            counts[i] += 1
        tokens, seconds, spare = tokens + gained, seconds + cost, spare - len(worth)
    return counts


@dataclass(slots=True)
class Guessing:
    """What is known of one request's guesses.

    chances: of a guess to be right, by its kind. made: the kinds of those that are being verified.
    tried_s: what tries took. found, matched: what was looked up. The draft has `computed` so many
        tokens into `blocks`, and what it `guessed` behind them; the first `stored` have keys.
    """

    reply: Reply
    chances: list[float]
    lookup: Lookup = field(default_factory=Lookup)
    made: deque[int] = field(default_factory=deque)
    tried_s: float = 0.0
    found: Sequence[int] = ()
    matched: int = 0
    blocks: object = None
    stored: int = 0
    computed: int = 0
    guessed: list[int] = field(default_factory=list)

    @property
    def sequence(self) -> Tokens:
        return self.reply.sequence

    def kind(self, guess: int) -> int:
        """Of its next guess but so many."""
        return min((self.matched + guess).bit_length(), MOST_BITS) if self.matched else DRAFT

    def odds(self, most: int) -> list[float]:
        """How likely its next guesses are right, each with those before; those with a chance."""
        found, product = [], 1.0
        for guess in range(most):
            product *= self.chances[self.kind(guess)]
            if product < LEAST_CHANCE:
                break
            found.append(product)
        return found


class Speculation:
    """Owns what is known of guesses, at most so many a request and step; the engine's thread calls.

    draft: the model that makes them; without one they are looked up.
    """

    def __init__(self, most: int = MOST_GUESSES, draft: Draft | None = None) -> None:
        self.cost = Cost()
        self.most = most
        self.draft = draft
        self._chances = list(CHANCES)
        self._guessing: dict[int, Guessing] = {}

    def forget(self, number: int) -> None:
        self._guessing.pop(number, None)

    def guess(
        self, replies: Collection[Reply], answers: int, spare: int, reserve: Callable[..., int]
    ) -> None:
        """Set guesses of some requests, where the scheduler's `reserve` gives room."""
        if not self.most or not self.cost:
            return
        found = [guessing for reply in replies if (guessing := self._of(reply)) is not None]
        asked = []
        for guessing, count in zip(found, self._counts(found, answers, spare), strict=True):
            if count and (most := reserve(guessing.sequence, count)):
                asked.append((guessing, most))
        try:
            if self.draft is not None:
                self.draft.guess(asked)
        except Exception:
            LOGGER.exception("the draft model failed; answers go on without it")
            self.most = 0
        for guessing, most in asked:
            if self.draft is None:
                guessing.sequence.guesses = list(guessing.found[:most])
            guessing.made.extend(map(guessing.kind, range(len(guessing.sequence.guesses))))

    def told(self, number: int, *, right: bool) -> None:
        """Whether the first of the guesses that are being verified was right."""
        guessing = self._guessing.get(number)
        if guessing is None or not guessing.made:
            return
        kind = guessing.made.popleft()
        if not right:
            guessing.made.clear()
        for chances, weight in ((guessing.chances, OWN), (self._chances, SHARED)):
            chance = chances[kind] + (right - chances[kind]) * weight
            chances[kind] = min(max(chance, LEAST_CHANCE), MOST_CHANCE)

    def _of(self, reply: Reply) -> Guessing | None:
        """What is known of its guesses; None if there is nothing to guess now."""
        number = reply.sequence.number
        if (known := self._guessing.get(number)) is None:
            known = self._guessing[number] = Guessing(reply, list(self._chances))
        if self.draft is None:
            known.found, known.matched = known.lookup.find(reply.sequence.tokens, self.most)
        return known if reply.room > 0 and (known.matched or self.draft) else None

    def _counts(self, found: Sequence[Guessing], answers: int, spare: int) -> list[int]:
        """How many guesses each gets: those that pay, and one where it is time to try again."""
        step, draft = self.cost, self.draft
        odds = [guessing.odds(min(self.most, guessing.reply.room)) for guessing in found]
        line = NOTHING if draft is None else draft.cost
        counts = share_out(odds, answers=answers, spare=spare, step=step, draft=line)
        left = spare - sum(counts)
        for i, guessing in enumerate(found):
            if counts[i] or not left:
                continue
            cost = step.row + (draft.price(guessing) if draft is not None else 0.0)
            if guessing.reply.usage.answer_s * TRIES > (guessing.tried_s + cost) * answers:
                guessing.tried_s += cost
                counts[i], left = 1, left - 1
        return counts
