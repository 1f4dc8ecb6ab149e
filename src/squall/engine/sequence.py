"""The tokens of one request, and how far they are computed."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from squall.engine.request import Request, Span


@dataclass(slots=True, eq=False)
class Sequence:
    """Known tokens of a request, guesses of what follows, and where they are in the KV cache.

    The scheduler owns it. tokens: the prompt, with its spans, and what was drawn. computed: how
        many of them are in the KV cache. guesses: what the next step verifies.
    scored: the first token whose logits are wanted and not told: the last one, but for scoring.
    blocks: KV blocks, in order; while it runs, all tokens have room, and guesses in their step.
    keys: of the leading full blocks, as far as known. stored: how many of them are cached.
    """

    request: Request
    number: int
    tokens: list[int]
    scored: int
    spans: tuple[Span, ...] = ()
    guesses: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    stored: int = 0

    @property
    def pending(self) -> int:
        """Tokens known and not computed."""
        return len(self.tokens) - self.computed
