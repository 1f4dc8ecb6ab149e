r"""The interactive chat: history and a few commands; Ctrl-C stops the answer, not the program."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from squall.cli.run import Settings, show, summary
from squall.errors import SquallError

if TYPE_CHECKING:
    from squall.model import Model

HELP = r"""\help          this text
\system TEXT   set the system message, from here on
\clear         forget the conversation; the system message stays
\exit          leave (so do Ctrl-D, and Ctrl-C at the prompt)
Ctrl-C stops an answer. Everything else is said to the model."""

Reader = Callable[[], str]


class Chat:
    """A conversation with a model, on the terminal."""

    def __init__(self, model: Model, settings: Settings, system: str | None) -> None:
        self._model = model
        self._settings = settings
        self._system = system
        self._history: list[dict[str, str]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "\\help": lambda _: _say(HELP),
            "\\system": self._set_system,
            "\\clear": lambda _: self._history.clear(),
        }

    def loop(self) -> None:
        """Read and answer until the user leaves."""
        model = self._model
        _note(f"{model.architecture}, context {model.context} tokens (of {model.spec.context}).")
        _note(r"\help lists the commands.")
        read = _reader()
        while True:
            try:
                text = read().strip()
            except (EOFError, KeyboardInterrupt):
                return
            command, _, argument = text.partition(" ")
            if command == "\\exit":
                return
            if command in self._commands:
                self._commands[command](argument.strip())
            elif text.startswith("\\"):
                _say(f"unknown command {command}; \\help lists them")
            elif text:
                self._reply(text)

    def _set_system(self, text: str) -> None:
        self._system = text or None
        _say("system message set" if text else "system message removed")

    def _messages(self) -> list[dict[str, str]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._history]

    def _reply(self, text: str) -> None:
        self._history.append({"role": "user", "content": text})
        try:
            generation = self._settings.answer(self._model, self._messages())
        except SquallError as error:
            self._history.pop()
            _say(f"error: {error}\n\\clear begins anew")
            return
        written: list[str] = []
        try:
            with generation:
                show(generation, written)
        except KeyboardInterrupt:
            sys.stdout.write(" ^C")
        sys.stdout.write("...\n" if generation.finish_reason == "length" else "\n")
        sys.stdout.flush()
        _note(summary(generation))
        self._history.append({"role": "assistant", "content": "".join(written)})


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _note(text: str) -> None:
    sys.stderr.write(f"\x1b[2m{text}\x1b[0m\n" if sys.stderr.isatty() else f"{text}\n")
    sys.stderr.flush()


def _reader() -> Reader:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_line
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession("> ")
    return session.prompt


def _read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
