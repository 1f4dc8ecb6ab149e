"""The tokens that ask a model for what is between two texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Of the text before, of the text after, and of what is between.
_KNOWN = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
)
# Of models that read the text after first, some without a token at the end.
_SUFFIX_FIRST = (("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"), ("[PREFIX]", "[SUFFIX]"))
# Before a repository's name, and before the name of each of its files.
_FILES = (
    ("<|repo_name|>", "<|file_sep|>"), ("<repo_name>", "<file_sep>"), ("<reponame>", "<file_sep>")
)  # fmt: skip
# What else ends such an answer: padding, and where another file would begin.
_ENDS = {"<|fim_pad|>", "<fim_pad>", "<fim-pad>", "▁<EOT>"}.union(*_FILES)


@dataclass(frozen=True, slots=True)
class Fill:
    """tokens: the ids of prefix and suffix, and of what is between, if there is one.

    files: those before names of a repository and of its files, if both are there.
    """

    tokens: tuple[int, ...]
    stops: frozenset[int]
    suffix_first: bool = False
    files: tuple[int, ...] = ()

    def prompt(self, prefix: list[int], suffix: list[int]) -> list[int]:
        """The ids that ask for what is between."""
        before, after, *between = self.tokens
        first, second = [before, *prefix], [after, *suffix]
        return [*second, *first, *between] if self.suffix_first else [*first, *second, *between]


def find_fill(id_of: Callable[[str], int | None], named: tuple[int, ...] = ()) -> Fill | None:
    """The tokens that a vocabulary has for it: those `named`, or those whose texts are known."""
    ends = {i for text in _ENDS if (i := id_of(text)) is not None}
    files = next(filter(None, (_all(id_of, texts) for texts in _FILES)), ())
    if named:
        return Fill(named, frozenset({*named, *ends}), files=files)
    for texts in (*_KNOWN, *_SUFFIX_FIRST):
        if ids := _all(id_of, texts):
            return Fill(ids, frozenset({*ids, *ends}), texts in _SUFFIX_FIRST, files)
    return None


def _all(id_of: Callable[[str], int | None], texts: tuple[str, ...]) -> tuple[int, ...]:
    """The ids of all of them, or none."""
    ids = tuple(i for text in texts if (i := id_of(text)) is not None)
    return ids if len(ids) == len(texts) else ()
