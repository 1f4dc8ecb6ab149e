"""Commands whose options come from elsewhere: from a dataclass, or from another function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, get_type_hints

Command = Callable[..., Any]


def takes(flags: type[Any]) -> Callable[[Command], Command]:
    """The decorated command's first parameter is a dataclass; each of its fields becomes a flag."""
    hints = get_type_hints(flags, include_extras=True)
    own = [_parameter(f.name, hints[f.name], f.default) for f in fields(flags)]
    return _replacing_first(own, lambda given: flags(**given))


def takes_arguments_of(function: Command) -> Callable[[Command], Command]:
    """The decorated command's first parameter is a dict of the arguments for `function`."""
    hints = get_type_hints(function, include_extras=True)
    found = inspect.signature(function).parameters.values()
    own = [_parameter(p.name, hints[p.name], p.default) for p in found]
    return _replacing_first(own, dict, documented=function)


def _replacing_first(
    own: list[inspect.Parameter],
    collect: Callable[[dict[str, Any]], Any],
    documented: Command | None = None,
) -> Callable[[Command], Command]:
    names = {parameter.name for parameter in own}

    def decorate(function: Command) -> Command:
        def command(**given: Any) -> Any:
            taken = {name: given.pop(name) for name in names}
            return function(collect(taken), **given)

        hints = get_type_hints(function, include_extras=True)
        _, *others = inspect.signature(function).parameters.values()
        _describe(command, [*own, *(_parameter(p.name, hints[p.name], p.default) for p in others)])
        command.__name__ = function.__name__
        command.__doc__ = (documented or function).__doc__
        return command

    return decorate


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    if default.__class__.__name__ == "_MISSING_TYPE":
        default = inspect.Parameter.empty
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _describe(command: Command, parameters: Iterable[inspect.Parameter]) -> None:
    """What typer reads."""
    listed = list(parameters)
    command.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in listed}
