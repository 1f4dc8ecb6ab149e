r"""The interactive chat: history and a few commands; Ctrl-C stops the answer, not the program."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.cli.chat_file import FIELDS, changed, load, parsed, save, values
from squall.cli.run import Settings, show, summary
from squall.embedded import user_folder
from squall.engine.fields import help_of
from squall.errors import InvalidRequest, SquallError
from squall.files import printable, quote
from squall.text.images import BLIND

if TYPE_CHECKING:
    from prompt_toolkit.history import History

    from squall.model import Model
    from squall.server.log import Log

HELP = r"""\help              this text
\system TEXT       set the system message, from here on
\image PLACE TEXT  say TEXT about an image: a file, in quotes if its name has spaces, or a URL
\regenerate        another answer to the last text
\clear             forget the conversation; the system message stays
\set               all settings; \temperature 0.2 and the like change one, default unsets it
\save FILE         keep conversation and settings, as JSON; \load FILE takes them up again
\exit              leave (so do Ctrl-D, and Ctrl-C at the prompt)
Ctrl-C stops an answer. Everything else is said to the model."""

# A place may be quoted.
_PLACE_TEXT = re.compile(r"""(?:"([^"]+)"|'([^']+)'|(\S+))\s+(.+)""", re.DOTALL)
# One part in so many of the context is kept for the next answer.
ROOM = 4


class Chat:
    def __init__(
        self, model: Model, settings: Settings, system: str | None, log: Log | None = None
    ) -> None:
        """log: where what is said is appended, too."""
        self._model = model
        self._log = log
        self._settings = settings
        self._system = system
        self._history: list[dict[str, Any]] = []
        self._file: Path | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "\\help": lambda _: note(HELP),
            "\\system": self._set_system,
            "\\image": self._show_image,
            "\\regenerate": self._regenerate,
            "\\clear": lambda _: self._history.clear(),
            "\\set": lambda _: note(self._shown()),
            "\\save": partial(self._on_file, self._save),
            "\\load": partial(self._on_file, self._load),
        }
        self._commands |= {f"\\{name}": partial(self._set, name) for name in FIELDS}

    def loop(self) -> None:
        model = self._model
        note(f"{model.architecture}, context {model.context} tokens (of {model.spec.context}).")
        note(r"\help lists the commands.")
        converse(self._commands, self._reply)

    def _set_system(self, text: str) -> None:
        self._system = text or None
        note("system message set" if text else "system message removed")

    def _show_image(self, argument: str) -> None:
        """Answer a text about an image, which stays in the conversation."""
        from squall.vision.images import read

        sight, found = self._model.sight, _PLACE_TEXT.fullmatch(argument)
        if sight is None or found is None:
            note(f"error: {BLIND}" if sight is None else r"say \image PLACE TEXT")
            return
        *places, text = found.groups()
        place = "".join(filter(None, places))
        try:
            image = read(place, self._model.media)
            seen = sight.process(image).processed.text
            count = len(self._model.tokenizer.encode(seen, add_bos=False, specials=True))
        except SquallError as error:
            note(f"error: {error}")
            return
        number = 1 + sum(isinstance(message["content"], list) for message in self._history)
        name = quote(re.split(r"[/\\]", place)[-1])[1:-1]
        note(f"[image {number}: {name}, {image.width} x {image.height}, {count} tokens]")
        self._reply([{"type": "image", "source": image}, {"type": "text", "text": text}])

    def _set(self, name: str, text: str) -> None:
        try:
            if text:
                self._settings = changed(self._settings, name, parsed(name, text))
        except SquallError as error:
            note(f"error: {error}")
            return
        note(f"{name}: {values(self._settings).get(name, 'default')}")

    def _shown(self) -> str:
        given = values(self._settings)
        return "\n".join(
            f"\\{name:22}{given.get(name, 'default')!s:10} {help_of(about)}"
            for name, about in FIELDS.items()
        )

    def _on_file(self, act: Callable[[Path], None], text: str) -> None:
        """Save or load, with a file's name or that of the last time."""
        path = Path(os.path.expanduser(text)) if text else self._file
        try:
            if path is None:
                raise InvalidRequest("name a file")
            act(path)
        except SquallError as error:
            note(f"error: {error}")
        else:
            self._file = path

    def _save(self, path: Path) -> None:
        if path.exists() and path != self._file:
            raise InvalidRequest(f"{path} exists already; name another file")
        save(path, self._messages(), self._settings)
        note(f"saved {len(self._history) // 2} turns in {path}")

    def _load(self, path: Path) -> None:
        messages, self._settings = load(path, self._settings, self._model.media)
        has_system = bool(messages) and messages[0]["role"] == "system"
        self._system = messages[0]["content"] if has_system else None
        self._history = messages[has_system:]
        note(f"loaded {len(self._history) // 2} turns from {path}")

    def _regenerate(self, _: str) -> None:
        """Answer once more, with another seed; what fails leaves the answer there is."""
        if not self._history:
            note("there is no answer yet")
            return
        last = self._history[-2:]
        del self._history[-2:]
        if not self._reply(last[0]["content"], changed(self._settings, "seed", None)):
            self._history += last

    def _messages(self) -> list[dict[str, Any]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._history]

    def _reply(self, content: str | list[dict[str, Any]], settings: Settings | None = None) -> bool:
        """Whether there is an answer."""
        self._history.append({"role": "user", "content": content})
        try:
            self._make_room()
            prompt = self._model.chat_prompt(self._messages())
            generation = (settings or self._settings).answer(self._model, prompt)
        except SquallError as error:
            self._history.pop()
            note(f"error: {error}\n\\clear begins anew")
            return False
        said: list[str] = []
        try:
            with generation:
                show(generation, prompt, said)
        except KeyboardInterrupt:
            sys.stdout.write(" ^C")
        except SquallError as error:
            note(f"\nerror: {error}")
        sys.stdout.write("\n")
        sys.stdout.flush()
        note(summary(generation))
        self._history.append({"role": "assistant", "content": "".join(said)})
        self._write_log()
        return True

    def _write_log(self) -> None:
        if self._log is not None:
            for kind, message in zip(("request", "response"), self._history[-2:], strict=True):
                said = json.dumps(message, default=str, ensure_ascii=False)  # images by their kind
                self._log.body(kind, "chat", said.encode())

    def _make_room(self) -> None:
        """Forget the oldest turns while an answer of some length would not fit the context."""
        before, context = len(self._history), self._model.context
        while len(self._history) > 1 and (
            len(self._model.encode_chat(self._messages())) > context - context // ROOM
        ):
            del self._history[:2]
        if forgotten := (before - len(self._history)) // 2:
            note(f"the context of {context} tokens is full; forgot the oldest turns: {forgotten}")


def converse(commands: Mapping[str, Callable[[str], None]], say: Callable[[str], object]) -> None:
    r"""Lines until \exit: commands, or what is said."""
    read = _reader([*commands, "\\exit"])
    while True:
        try:
            text = read().strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, argument = text.partition(" ")
        if command == "\\exit":
            return
        if command in commands:
            commands[command](argument.strip())
        elif text.startswith("\\"):
            note(f"unknown command {command}; \\help lists them")
        elif text:
            say(text)


def note(text: str) -> None:
    """On stderr, as stdout has the model's words alone."""
    text = printable(text)
    sys.stderr.write(f"\x1b[2m{text}\x1b[0m\n" if sys.stderr.isatty() else f"{text}\n")
    sys.stderr.flush()


def _reader(commands: Sequence[str]) -> Callable[[], str]:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    session: PromptSession[str] = PromptSession(
        "> ", history=_history(), complete_while_typing=False,
        completer=WordCompleter(sorted(commands), sentence=True),
    )  # fmt: skip
    return session.prompt


def _history() -> History:
    """What was typed in earlier chats, for the arrow keys; readable by its owner alone."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # such as a full disk: what matters is the chat
                super().store_string(string)

    path = user_folder("XDG_STATE_HOME", ".local/state") / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return Kept(path)
