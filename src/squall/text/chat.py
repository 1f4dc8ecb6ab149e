"""Chat templates: messages to a prompt whose control tokens all come from the template.

Templates see the strings that transformers shows them, and the prompt knows of each character
whether a message wrote it (see `squall.text.traced`). Control tokens are read only where all
characters are the template's own, or a role's: roles are part of many tokens, as in `<|user|>`.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from squall.errors import InvalidRequest, TemplateError
from squall.files import parse_json, read_json, read_text
from squall.text.answer import AnswerParser
from squall.text.conversation import conversation
from squall.text.images import Image, Placeholder, as_parts, as_texts, take
from squall.text.reasoning import Reasoning, control_ids, reasoning_of
from squall.text.tokenizer import Piece, Tokenizer
from squall.text.tool_formats import ToolFormat, tool_format
from squall.text.tools import Tool
from squall.text.vocabulary import Vocabulary, token_text

MAX_SOURCE = 100_000  # characters
MAX_DEPTH = 64  # of lists and objects in each other
_KEY = "tokenizer.chat_template"
NAMED = Path(__file__).parent / "templates"  # for models whose files have none
RESERVED = frozenset({
    "messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "tokenize",
    "chat_template", "range", "dict", "cycler", "joiner", "namespace", "raise_exception",
    "strftime_now",
})  # fmt: skip
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing
_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PROBE = "a text that is tried"
_REMEDY = "give one with --chat-template, or send a plain prompt instead of messages"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the model reads it; what its answer may have beside a text.

    format: how calls look; None without tools. images: what the placeholders in it stand for.
    """

    pieces: Sequence[Piece]
    format: ToolFormat | None
    reasoning: Reasoning | None
    images: tuple[Image, ...] = ()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def shown(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The control tokens that an answer's text must show to be read."""
        marks = [m for part in (self.format, self.reasoning) if part for m in part.marks()]
        return frozenset(control_ids(tokenizer, marks).values())

    def parser(self, names: Collection[str] = ()) -> AnswerParser:
        """What reads one answer. names: of the tools that may be called."""
        return AnswerParser(tools=self.format, names=names, reasoning=self.reasoning)


class ChatTemplate:
    """A template, or several by name of which requests with tools use `tool_use`."""

    def __init__(
        self,
        source: str | Mapping[str, str] | None,
        *,
        bos: str | None = None,
        eos: str | None = None,
        unk: str | None = None,
    ) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source or {})
        self.sources: Mapping[str, str] = sources
        given = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
        self._shows: dict[str, tuple[bool, bool]] = {}  # by source: contents as texts, as parts
        self._constants = {name: text for name, text in given.items() if text is not None}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> ChatTemplate:
        """The templates in a GGUF file's metadata; without any, rendering raises TemplateError."""
        sources = {
            key.removeprefix(_KEY).removeprefix(".") or "default": text
            for key, text in metadata.items()
            if (key == _KEY or key.startswith(_KEY + ".")) and isinstance(text, str)
        }
        vocabulary = Vocabulary.from_gguf(metadata)
        ids = {"bos": vocabulary.bos, "eos": vocabulary.eos}
        special = {name: vocabulary.tokens[i] for name, i in ids.items() if i is not None}
        return cls(sources, **special)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> ChatTemplate:
        """The templates of a Hugging Face folder; without any, rendering raises TemplateError.

        Of several sources the first counts: chat_template.jinja (with additional_chat_templates/),
        processor_config.json, chat_template.json, tokenizer_config.json.
        """
        folder = Path(path)
        tokens = read_json(folder / "special_tokens_map.json") or {}
        tokens |= read_json(folder / "tokenizer_config.json") or {}
        sources = _jinja_files(folder)
        for name in ("processor_config.json", "chat_template.json", "tokenizer_config.json"):
            sources = sources or _named((read_json(folder / name) or {}).get("chat_template"))
        return cls(sources, **_special(tokens))

    def replaced(self, source: str) -> ChatTemplate:
        """With another template: the name of one in NAMED, a .jinja or .json file, or Jinja itself.

        The object in a JSON file has a `chat_template`, and may have `bos_token`, `eos_token` and
        `unk_token`.
        """
        sources, tokens = _given(source)
        special = {name[:3]: text for name, text in self._constants.items()} | tokens
        return ChatTemplate(sources, **special)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, object] = MappingProxyType({}),
    ) -> list[Piece]:
        """The prompt; `kwargs`, such as `enable_thinking`, are variables for the template.

        Raises TemplateError, with the template's line, for whatever goes wrong in it.
        """
        from squall.text.traced import parts

        for name in kwargs.keys() & RESERVED:
            raise InvalidRequest(f"chat_template_kwargs may not set {name!r}; leave it out")
        variables = {
            "documents": None,
            **{name: _written(value, name) for name, value in kwargs.items()},
            **self._constants,
            "add_generation_prompt": add_generation_prompt,
            "messages": [_message(message, f"messages[{i}]") for i, message in enumerate(messages)],
            "tools": _written(tools, "tools"),
        }
        text = _rendered(self.source(with_tools=bool(tools)), variables)
        return [Piece(*part) for part in parts(text)]

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Tool] = (),
        kwargs: Mapping[str, object] = MappingProxyType({}),
        continues: bool = False,
        placeholder: Placeholder | None = None,
    ) -> ChatPrompt:
        """The prompt with what it says of the answer, which may go on with the last message.

        placeholder: of models that read images.
        """
        source = self.source(with_tools=bool(tools))
        format_ = tool_format(source, tokenizer)
        messages, images = take(messages, placeholder)
        messages, given = conversation(format_, messages, tools)
        shown = messages if placeholder is None else self._shown(messages, placeholder, source)
        new = not continues
        pieces = self.render(shown, add_generation_prompt=new, tools=given, kwargs=kwargs)
        if placeholder and (count := placeholder.count(pieces)) != len(images):
            raise TemplateError(
                f"the chat template makes {count} placeholders {placeholder.text} of "
                f"{len(images)} images; {_REMEDY}"
            )
        if continues:
            pieces, source = _open_ended(pieces, str(messages[-1]["content"])), ""
        reasoning = reasoning_of(source, "".join(piece.text for piece in pieces))
        return ChatPrompt(pieces, format_ if tools else None, reasoning, images)

    def _shown(
        self, messages: list[dict[str, Any]], placeholder: Placeholder, source: str
    ) -> list[dict[str, Any]]:
        """The messages as this template shows them: with contents as texts, as parts, or both."""
        if source not in self._shows:
            as_list = [{"type": "image"}, {"type": "text", "text": _PROBE}]
            text, found = self._tried(source, _PROBE), self._tried(source, as_list)
            as_data = "'type': " in found or '"type": ' in found
            parts = _PROBE in found and placeholder.of(1) in found and not as_data
            self._shows[source] = _PROBE in text, parts
        texts, parts = self._shows[source]
        if not parts:
            return as_texts(messages, placeholder)
        return messages if texts else as_parts(messages)

    def _tried(self, source: str, content: object) -> str:
        """What the template makes of a user's message; nothing if that fails."""
        message = {"role": "user", "content": content}
        try:
            return _rendered(source, {**self._constants, "messages": [message]})
        except TemplateError:
            return ""

    def source(self, *, with_tools: bool) -> str:
        name = "tool_use" if with_tools and "tool_use" in self.sources else "default"
        if not self.sources:
            raise TemplateError(f"the model has no chat template; {_REMEDY}")
        if name not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise TemplateError(f"the model has no {name!r} chat template, only {names}; {_REMEDY}")
        source = self.sources[name]
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are allowed"
            )
        return source


def _open_ended(pieces: Sequence[Piece], text: str) -> list[Piece]:
    """The prompt without what the template has after the last message's text."""
    last = max((i for i, piece in enumerate(pieces) if piece.content), default=0)
    if not text.strip().endswith(pieces[last].text):
        raise TemplateError("the prompt does not end with a text of the last message to go on with")
    space, rest = text[len(text.rstrip()) :], "".join(piece.text for piece in pieces[last + 1 :])
    kept = pieces[last].text + space * rest.startswith(space)
    return [*pieces[:last], Piece(kept, content=True)]


def _jinja_files(folder: Path) -> dict[str, str]:
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files = {"default": folder / "chat_template.jinja", **{file.stem: file for file in others}}
    found = {name: read_text(file, 4 * MAX_SOURCE) for name, file in files.items()}
    return {name: text for name, text in found.items() if text is not None}


def _named(value: object) -> dict[str, str]:
    """One template, or several as a list of objects with `name` and `template`, or as an object."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if not isinstance(value, dict):
        return {}
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, str)}


def _special(tokens: Mapping[str, Any]) -> dict[str, str]:
    texts = {name: token_text(tokens.get(f"{name}_token")) for name in ("bos", "eos", "unk")}
    return {name: text for name, text in texts.items() if text is not None}


def _given(source: str) -> tuple[dict[str, str], dict[str, str]]:
    """Templates by name, and special tokens, from what the user calls a chat template."""
    named = {file.stem: file for file in sorted(NAMED.glob("*.jinja"))}
    if source in named:
        return {"default": named[source].read_text(encoding="utf-8")}, {}
    if "{{" in source or "{%" in source:
        return {"default": source}, {}
    file = Path(source).expanduser()
    if not file.is_file():
        known = ", ".join(named)
        raise TemplateError(
            f"{source[:200]!r} is no chat template: give a .jinja or .json file, a template, or "
            f"one of the names {known}"
        )
    text = read_text(file, 4 * MAX_SOURCE) or ""
    if file.suffix != ".json":
        return {"default": text}, {}
    config = parse_json(text, file.name)
    sources = _named(config.get("chat_template"))
    if not sources:
        raise TemplateError(f"{file.name} has no chat_template; give it one")
    return sources, _special(config)


def _rendered(source: str, variables: Mapping[str, Any]) -> str:
    # Jinja takes a tenth of a second to import, and who sends no messages needs none of it.
    from squall.text import sandbox

    try:
        return sandbox.render(source, variables)
    except Exception as error:  # any that Python code can raise, and always the template's fault
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f"chat template, line {line}" if line else "chat template"
        raise TemplateError(f"{where}: {str(error) or type(error).__name__}") from error


def _message(message: object, where: str) -> dict[str, Any]:
    """A message as transformers shows it to templates: what is null is left out."""
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be an object with a role and a content")
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in REASONING if key in given), None)
    if reasoning is not None:
        given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
    made: dict[str, Any] = _written(given, where)
    role = given.get("role")
    if isinstance(role, str) and _ROLE.fullmatch(role):
        made["role"] = role
    return made


def _written(value: object, where: str, depth: int = MAX_DEPTH) -> Any:
    """JSON-like data with strings that are known to be a message's."""
    from squall.text.traced import Traced

    if isinstance(value, str):
        return Traced(str.__str__(value)) if value and not isinstance(value, Traced) else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if not depth:
        raise InvalidRequest(f"{where} is nested too deep; at most {MAX_DEPTH} levels are allowed")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {Traced(key): _written(item, where, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(item, where, depth - 1) for item in value]
    raise InvalidRequest(
        f"{where} holds a {type(value).__name__}; give strings, numbers, booleans, null, lists and "
        "objects with names"
    )
