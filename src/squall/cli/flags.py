"""Commands whose flags are dataclasses, and that may be told what kind of model it is.

`COMMAND [FLAGS] [MODEL] [TEXT]`, or
`COMMAND [FLAGS] KIND [FLAGS OF THE KIND OR THE COMMAND] [TEXT]`.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo

from squall.cli.completion import complete_known
from squall.cli.options import HELP, keyword, taking
from squall.cli.selectors import SELECTORS, Selected
from squall.engine.fields import Number, described, help_of
from squall.errors import ModelNotFound
from squall.locate import looks_like_model
from squall.names import known

Command = Callable[..., Any]
Flags = TypeVar("Flags")

PANEL = "Kinds of models, instead of -f and -m"
MORE = "Options of the command, which may come before the kind too"
# The commands for words that are no kind, and how help calls the words.
MODEL, TEXT = "MODEL", "PROMPT"
HELP_OF = {
    MODEL: "A GGUF file, a folder, a model of the hub, or a short name, as -f and -m take.",
    TEXT: "What to ask, before what a pipe says; -: that alone; none, on a terminal: a chat.",
}
# What names a model where no kind does.
_NAMES = ("file", "model")
_GIVEN, _QUOTED = "squall.given", "squall.quoted"


class _Kinds(TyperGroup):
    """The first word that is no flag is a kind, or else a model or a text."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_GIVEN] = list(args)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        quoted = ctx.meta[_GIVEN][: -len(args)][-1:] == ["--"]
        ctx.meta[_QUOTED] = quoted
        if quoted or args[0] not in SELECTORS:
            return "", self.commands[MODEL], ["--", *args] if quoted else args
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Kinds, options, and what a model may be."""
        found = super().shell_complete(ctx, incomplete)
        words = next(p for p in self.commands[MODEL].params if p.name == "words")
        models = words.shell_complete(ctx, incomplete)
        return [item for item in found if item.value not in (MODEL, TEXT)] + models


class _Rest(TyperCommand):
    """What follows where no kind is named: what is wrong there is wrong with the whole command."""

    def make_context(self, *args: Any, **settings: Any) -> Any:
        try:
            return super().make_context(*args, **settings)
        except Exception as error:
            if getattr(error, "ctx", None) is not None:
                error.ctx = settings.get("parent")  # type: ignore[attr-defined]
            raise


def plain(flags: type[Flags], act: Callable[[Flags], None]) -> Command:
    """What calls `act` with an object of the dataclass `flags`, as typer reads it."""

    def begin(**given: Any) -> None:
        act(flags(**given))

    begin.__doc__ = act.__doc__
    return taking(sorted(_fields(flags), key=lambda p: p.name not in flags.__annotations__), begin)


def command(
    name: str, flags: type[Flags], act: Callable[[Flags, Any], None], *, several: bool = False,
    **settings: Any,
) -> typer.Typer:  # fmt: skip
    """The command that calls `act` with an object of the dataclass `flags`, and the kind.

    several: it takes more than one model, and then `act` gets a tuple of them.
    All fields have defaults. Those that are arguments come last: after the kind, if there is one.
    """
    own = _fields(flags)
    takes_text = any(map(_is_argument, own))
    models = f"[{MODEL}{' ...' * several} | KIND ...]"
    metavar = f"[{MODEL}] [{TEXT}] | KIND ... [{TEXT}]" if takes_text else models
    app = typer.Typer(
        name=name, cls=_Kinds, help=act.__doc__, subcommand_metavar=metavar, context_settings=HELP,
        invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False,
        **settings,
    )  # fmt: skip

    def begin(invocation: typer.Context, **given: Any) -> None:
        invocation.obj = flags(**given)
        if invocation.invoked_subcommand is None:
            act(invocation.obj, None)

    app.callback()(_taking([p for p in own if not _is_argument(p)], begin))
    for name in (MODEL, TEXT) if takes_text else (MODEL,):
        going_on = _words(own, act, HELP_OF[name], several=several)
        how: dict[str, Any] = {
            "cls": _Rest,
            "rich_help_panel": "Arguments",
            "context_settings": HELP,
        }
        app.command(name, **how)(going_on)
    for word, selector in SELECTORS.items():
        more = [p for p in own if p.name not in _NAMES]
        going_on = _after(more, selector, act, selector.__doc__)
        app.command(word, rich_help_panel=PANEL, context_settings=HELP)(going_on)
    return app


def _after(
    own: list[inspect.Parameter],
    selector: Callable[..., Selected],
    act: Callable[[Any, Selected], None],
    doc: str | None,
) -> Command:
    """The rest of the command, from the kind on; what is given here wins over what came before."""
    chosen = _parameters(selector)
    names = {parameter.name for parameter in chosen}

    def run(invocation: typer.Context, **given: Any) -> None:
        selected = {name: given.pop(name) for name in names}
        act(_changed(invocation, given), selector(**selected))

    run.__doc__ = doc
    return _taking([*chosen, *_without(own, chosen)], run)


def _words(
    own: list[inspect.Parameter], act: Callable[[Any, Any], None], doc: str, *, several: bool
) -> Command:
    """The rest of the command where no kind is named: a model, a text, or both."""
    takes_text = any(map(_is_argument, own))

    def run(invocation: typer.Context, words: list[str], **given: Any) -> None:
        flags, fail = _changed(invocation, given), (invocation.parent or invocation).fail
        if several and len(words) > 1:
            act(flags, tuple(words))
            return
        text_only = invocation.meta[_QUOTED] or flags.file is not None or flags.model is not None
        is_text = takes_text and text_only and len(words) == 1
        model = words[0] if not is_text and looks_like_model(words[0]) else None
        text = words[model is not None :]
        if len(text) > 1 or (text and model and not takes_text):
            fail(f"one prompt at most, in quotes, and no more words: {shlex.quote(' '.join(text))}")
        if not takes_text and not model:
            close = [
                *difflib.get_close_matches(words[0], [*SELECTORS, *known()], 1),
                "-f FILE or -m owner/name",
            ]
            fail(f"no model is named {words[0]!r}. Did you mean {close[0]}?")
        try:
            act(replace(flags, prompt=text[0]) if takes_text and text else flags, model)
        except ModelNotFound as error:
            meant = model and takes_text and model in str(error)
            doubt = f". If {model} is the prompt, write -- {model}" if meant else ""
            raise ModelNotFound(f"{error}{doubt}") from None

    run.__doc__ = doc
    words = typer.Argument(hidden=True, autocompletion=complete_known)
    argument = Annotated[list[str], words]
    return _taking([keyword("words", argument), *(p for p in own if not _is_argument(p))], run)


def _changed(invocation: typer.Context, given: Mapping[str, Any]) -> Any:
    """The flags from before, with what is given behind the first word."""
    sources = {name: invocation.get_parameter_source(name) for name in given}
    typed = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    return replace(invocation.obj, **{name: given[name] for name in typed})


def _without(
    own: Iterable[inspect.Parameter], chosen: Iterable[inspect.Parameter]
) -> list[inspect.Parameter]:
    """A command's parameters beside those of a kind, which takes names that both have."""
    names = {p.name for p in chosen}
    taken = {flag for parameter in chosen for flag in _names(parameter)}
    found = []
    for parameter in own:
        flags = [flag for flag in _names(parameter) if flag not in taken]
        if parameter.name in names or (_names(parameter) and not flags):
            continue
        kind, info = get_args(parameter.annotation)
        info = copy.copy(info)
        if flags:
            # In annotations typer keeps the first name where otherwise the default is.
            info.default, info.param_decls = flags[0], flags[1:]
        if taken and not _is_argument(parameter):
            info.rich_help_panel = MORE
        found.append(parameter.replace(annotation=Annotated[kind, info]))
    return found


def _names(parameter: inspect.Parameter) -> list[str]:
    """The names of a flag, if they are not made of its own."""
    info = get_args(parameter.annotation)[1]
    first = [] if info.default is ... else [info.default]
    return [*first, *(info.param_decls or ())]


def _fields(flags: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(flags, include_extras=True)
    own = {f.name: f.metadata["option"] for f in fields(flags) if "option" in f.metadata}
    hints |= {name: Annotated[hints[name], option] for name, option in own.items()}
    hints |= _described(flags)
    needed = {f.name for f in fields(flags) if f.default is MISSING}
    found = [keyword(f.name, hints[f.name], f.default) for f in fields(flags)]
    return [p.replace(default=p.empty) if p.name in needed else p for p in found]


def _described(flags: type[Any]) -> dict[str, Any]:
    """The fields that are described where requests have them."""
    found: dict[str, Any] = {}
    for name, about in described(flags).items():
        kind: Any = list[str]
        if isinstance(about, Number):
            kind = int if about.whole else float
        found[name] = Annotated[kind | None, typer.Option(help=help_of(about))]
    return found


def _parameters(function: Command) -> list[inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    found = inspect.signature(function).parameters.values()
    return [keyword(p.name, hints[p.name], p.default) for p in found]


def _is_argument(parameter: inspect.Parameter) -> bool:
    return isinstance(get_args(parameter.annotation)[1], ArgumentInfo)


def _taking(parameters: list[inspect.Parameter], function: Command) -> Command:
    return taking([keyword("invocation", typer.Context), *parameters], function)
