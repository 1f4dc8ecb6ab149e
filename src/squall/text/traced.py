"""Strings that know which of their characters a message wrote.

Templates see and make the plain strings that transformers shows them. Beside each string that holds
text of a message goes its mask: the same string with that text hidden, but for white space. What a
template does with the string is done with the mask too, so what is left of the mask tells what is
left of the message: after joins, slices, strips, formats and so on. Where the two come apart, as in
JSON, or where a text is split at what the message wrote, all of the result is the message's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

from jinja2.runtime import Undefined
from markupsafe import Markup

_HIDDEN = "\U0010fffd"  # a private character, in no token
_SHOWN = re.compile(r"\S")
_MESSAGE = re.compile(rf"({_HIDDEN}(?:[\s{_HIDDEN}]*{_HIDDEN})?)")


class Traced(str):
    """A string with its mask; without one, it is all a message's."""

    __slots__ = ("_mask",)
    _mask: str

    def __new__(cls, text: str, mask: str | None = None) -> Traced:
        made = super().__new__(cls, text)
        made._mask = _SHOWN.sub(_HIDDEN, text) if mask is None else mask
        return made

    def __getitem__(self, key: Any) -> Any:
        return type(self)(str.__getitem__(self, key), self._mask[key])

    def __iter__(self) -> Iterator[str]:
        return map(type(self), str.__iter__(self), self._mask)

    def __str__(self) -> str:
        return Traced(str.__str__(self), self._mask)


class _TracedMarkup(Traced, Markup):
    """What `safe` and `escape` return; Jinja escapes other strings that are added to it."""

    __slots__ = ()


def parts(text: str) -> Iterator[tuple[str, bool]]:
    """The parts of a text, and whether a message wrote them."""
    start, mask = 0, _masked(text)
    for n, part in enumerate(_MESSAGE.split(mask)):
        if part:
            yield str.__getitem__(text, slice(start, start + len(part))), n % 2 == 1
        start += len(part)


def mixed(given: Iterable[tuple[str, bool]]) -> Traced:
    """A text of such parts."""
    made = [(text, Traced(text)._mask if content else text) for text, content in given]
    return Traced("".join(text for text, _ in made), "".join(mask for _, mask in made))


def holds_content(value: Any) -> bool:
    """Whether a message wrote some of the value; unknown values may show anything."""
    if isinstance(value, str):
        return isinstance(value, Traced)
    if isinstance(value, Mapping):
        return any(map(holds_content, value)) or any(map(holds_content, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_content, value))
    return not (value is None or isinstance(value, (int, float, Undefined)))


def trace(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """The function's result on plain strings; if it makes texts, with their masks."""
    result = function(*map(_plain, given), **{key: _plain(value) for key, value in named.items()})
    texts = isinstance(result, str) or (
        isinstance(result, (list, tuple)) and isinstance(given[0], str)
    )
    if not texts or not holds_content([*given, *named.values()]):
        return result
    try:
        mask = function(*map(_masked, given), **{key: _masked(named[key]) for key in named})
    except Exception:  # the function needs what is hidden
        mask = ""
    return _paired(result, mask)


def shown(value: Any) -> Any:
    """A value as a template writes it."""
    return trace(str, value) if holds_content(value) else value


def joined(strings: Iterable[str]) -> str:
    return str(trace("".join, list(strings)))


def _plain(value: Any) -> Any:
    """The string without its mask; other values as they are."""
    if not isinstance(value, Traced):
        return value
    text = str.__str__(value)
    return Markup(text) if isinstance(value, Markup) else text


def _masked(value: Any) -> Any:
    if isinstance(value, Traced):
        return value._mask
    if isinstance(value, Mapping):
        return {_masked(key): _masked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_masked, value))
    if holds_content(value):
        raise TypeError(type(value))
    return value


def _paired(result: Any, mask: Any) -> Any:
    same = len(mask) == len(result)
    if isinstance(result, str):
        kind = _TracedMarkup if isinstance(result, Markup) else Traced
        return result if mask == result else kind(result, mask if same else None)
    return type(result)(map(_paired, result, mask if same else repeat("")))
