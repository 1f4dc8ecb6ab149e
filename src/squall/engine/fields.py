"""Fields of requests, each described once, as a field of a dataclass with its `Number` or help.

Python's and HTTP's requests and the command's flags inherit the dataclass, and so have its fields.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from squall.errors import InvalidRequest

_SHOWN = 100  # characters of a wrong value


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """What a number may be, and what it is for.

    above: `least` itself is too small. off: the value without effect.
    stored: a model's generation_config.json may say it.
    """

    help: str
    whole: bool = False
    least: float = 0
    most: float = math.inf
    above: bool = False
    off: int | None = None
    stored: bool = False

    @property
    def allowed(self) -> str:
        """In words."""
        kind = "a whole number" if self.whole else "a number"
        if self.most == math.inf:
            bounds = f"above {self.least}" if self.above else f"at least {self.least}"
        elif self.above:
            bounds = f"above {self.least} and at most {self.most}"
        else:
            bounds = f"between {self.least} and {self.most}"
        return f"{kind}, {bounds}" + (f" ({self.off}: off)" if self.off is not None else "")

    def allows(self, value: object) -> bool:
        """Whether this is such a number; NaN and bools are none."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        number: Any = value
        try:
            finite = self.whole or math.isfinite(number)
        except OverflowError:
            return False
        enough = self.least < number if self.above else self.least <= number
        return bool(finite and enough and number <= self.most)

    def check(self, name: str, value: object) -> None:
        check(self.allows(value), name, value, self.allowed)


def real(help: str, **bounds: Any) -> Any:
    """A field that is a `Number`; None unless given."""
    return field(default=None, metadata={"about": Number(help=help, **bounds)})


def whole(help: str, *, default: int | None = None, **bounds: Any) -> Any:
    """The same without fractions."""
    return field(default=default, metadata={"about": Number(help=help, whole=True, **bounds)})


def texts(help: str) -> Any:
    """A field that is a list of texts; None unless given."""
    return field(default=None, metadata={"about": help})


def described(kind: type[Any]) -> Mapping[str, Number | str]:
    return {f.name: f.metadata["about"] for f in fields(kind) if "about" in f.metadata}


def help_of(about: Number | str) -> str:
    """The description for people, with what turns it off."""
    if not isinstance(about, Number):
        return about
    return about.help if about.off is None else f"{about.help.rstrip('.')}; {about.off}: off."


def numbers_of(kind: type[Any]) -> dict[str, Number]:
    return {name: about for name, about in described(kind).items() if isinstance(about, Number)}


def check_fields(values: Any) -> None:
    """Raises InvalidRequest if a number, a list of texts or a bool of a dataclass is none."""
    for f in fields(values):
        value, about = getattr(values, f.name), f.metadata.get("about")
        if isinstance(about, Number) and (value is not None or f.default is not None):
            about.check(f.name, value)
        elif isinstance(about, str) and value is not None:
            check_texts(f.name, value)
        elif f.type == "bool":
            check(isinstance(value, bool), f.name, value, "true or false")


def check_texts(name: str, value: object) -> None:
    right = isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
    check(right, name, value, "a list of texts")


def check(right: bool, name: str, value: object, allowed: str) -> None:
    if not right:
        raise InvalidRequest(complaint(name, value, allowed))


def complaint(name: str, value: object, allowed: str) -> str:
    return f"{name} is {shown(value)}; it must be {allowed}"


def shown(value: object) -> str:
    """A value as an error may show it."""
    try:
        text = repr(value)
    except Exception:  # a number of too many digits, or an object with a repr that fails
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
