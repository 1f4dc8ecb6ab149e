"""Chat templates: messages to a prompt whose control tokens all come from the template.

Before rendering, each character of a message that could begin a control token gets a mark behind
it, a character that occurs nowhere else; afterwards the prompt is cut at the marks, and control
tokens are read inside of a part only. So templates see plain strings, and no message can hold a
token.
"""

from __future__ import annotations

import os
import re
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from squall.errors import InvalidRequest, TemplateError
from squall.text.files import parse_json, read_json, read_text, token_text
from squall.text.templates import TEMPLATES
from squall.text.tokenizer import Piece
from squall.text.vocabulary import CONTROL, UNKNOWN, Vocabulary, literals

if TYPE_CHECKING:
    import jinja2

MAX_SOURCE = 100_000  # characters
_KEY = "tokenizer.chat_template"
_USUAL_STARTS = "<[{|｜"  # noqa: RUF001
_REMEDY = "give one with --chat-template, or send a plain prompt instead of messages"
_Value = TypeVar("_Value")


class ChatTemplate:
    """A template, or several by name of which requests with tools use `tool_use`.

    `controls` are the texts of the control tokens that messages must not produce; without them
    every character that usually begins one is taken to do so.
    """

    def __init__(
        self,
        source: str | Mapping[str, str] | None,
        *,
        bos: str | None = None,
        eos: str | None = None,
        unk: str | None = None,
        controls: Sequence[str] = (),
    ) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source or {})
        self.sources: Mapping[str, str] = sources
        self._controls = controls
        self._constants = {
            name: text
            for name, text in (("bos_token", bos), ("eos_token", eos), ("unk_token", unk))
            if text is not None
        }
        self._compiled: dict[str, _Compiled] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> ChatTemplate:
        """The templates in a GGUF file's metadata; without any, rendering raises TemplateError."""
        sources = {
            key.removeprefix(_KEY).removeprefix(".") or "default": text
            for key, text in metadata.items()
            if (key == _KEY or key.startswith(_KEY + ".")) and isinstance(text, str)
        }
        vocabulary = Vocabulary.from_gguf(metadata)
        tokens = vocabulary.tokens
        return cls(
            sources,
            bos=None if vocabulary.bos is None else tokens[vocabulary.bos],
            eos=None if vocabulary.eos is None else tokens[vocabulary.eos],
            controls=[tokens[i] for i in vocabulary.of_type(CONTROL, UNKNOWN)],
        )

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], *, controls: Sequence[str] = ()
    ) -> ChatTemplate:
        """The templates of a Hugging Face folder; without any, rendering raises TemplateError.

        Of several sources the first counts: chat_template.jinja (with additional_chat_templates/),
        processor_config.json, chat_template.json, tokenizer_config.json.
        """
        folder = Path(path)
        config = read_json(folder / "tokenizer_config.json") or {}
        tokens = (read_json(folder / "special_tokens_map.json") or {}) | config
        sources = _jinja_files(folder)
        for name in ("processor_config.json", "chat_template.json", "tokenizer_config.json"):
            sources = sources or _named((read_json(folder / name) or {}).get("chat_template"))
        return cls(sources, **_special(tokens), controls=controls)

    def replaced(self, source: str) -> ChatTemplate:
        """With another template: a name in TEMPLATES, a .jinja or .json file, or Jinja itself.

        The object in a JSON file has a `chat_template`, and may have `bos_token`, `eos_token` and
        `unk_token`.
        """
        sources, tokens = _given(source)
        special = {name[:3]: text for name, text in self._constants.items()} | tokens
        return ChatTemplate(sources, **special, controls=self._controls)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, object] = MappingProxyType({}),
        **extra: Any,
    ) -> list[Piece]:
        """The prompt; `extra`, such as `tools`, goes to the template as it is.

        Raises TemplateError, with the template's line, for whatever goes wrong in it.
        """
        if not all(isinstance(message, Mapping) for message in messages):
            raise InvalidRequest("each message must be an object with a role and a content")
        given = {"tools": None, "documents": None, **kwargs, **extra, "messages": list(messages)}
        compiled = self._template(with_tools=bool(given["tools"]))
        mark = _absent([compiled.source, *self._constants.values(), *_strings(given)])
        given = _mapped(given, lambda text: compiled.starts.sub(_marker(mark), text))
        text = compiled.run(
            {**self._constants, "add_generation_prompt": add_generation_prompt, **given}
        )
        return list(_cut(text, mark))

    def _template(self, *, with_tools: bool) -> _Compiled:
        name = "tool_use" if with_tools and "tool_use" in self.sources else "default"
        if not self.sources:
            raise TemplateError(f"the model has no chat template; {_REMEDY}")
        if name not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise TemplateError(f"the model has no {name!r} chat template, only {names}; {_REMEDY}")
        with self._lock:
            if name not in self._compiled:
                self._compiled[name] = _Compiled(self.sources[name], self._controls)
            return self._compiled[name]


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
    if source in TEMPLATES:
        return {"default": TEMPLATES[source]}, {}
    if "{{" in source or "{%" in source:
        return {"default": source}, {}
    file = Path(source).expanduser()
    if not file.is_file():
        known = ", ".join(TEMPLATES)
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


class _Compiled:
    """One template, ready to run, and where messages for it need marks."""

    def __init__(self, source: str, controls: Sequence[str]) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are allowed"
            )
        # Jinja takes a tenth of a second to import, and who sends no messages needs none of it.
        from squall.text.sandbox import Environment

        self.source = source
        self._environment = Environment()
        self._template: jinja2.Template = _attempt(lambda: self._environment.from_string(source))
        self.starts = _starts(_constants(self._environment, source), controls)

    def run(self, variables: Mapping[str, Any]) -> str:
        """The text the template writes."""
        return _attempt(lambda: self._environment.run(self._template, variables))


def _attempt(action: Callable[[], _Value]) -> _Value:
    """Templates fail in any way that Python code can, and it is always the template's fault."""
    try:
        return action()
    except Exception as error:
        line = _line(error)
        reason = str(error) or type(error).__name__
        where = f", line {line}" if line else ""
        raise TemplateError(f"chat template{where}: {reason}") from error


def _line(error: Exception) -> int | None:
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno for f in reversed(frames) if f.filename == "<template>"), None)


def _constants(environment: Any, source: str) -> set[str]:
    """The strings in a template's code, which it may look for in messages."""
    from jinja2 import nodes

    tree = environment.parse(source)
    return {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}


def _starts(constants: Iterable[str], controls: Sequence[str]) -> re.Pattern[str]:
    """Matches characters that may begin a control token; with group 1 where no mark is wanted.

    That is where a string of the template's code begins: the template may look for it there, as for
    `</think>`, and a mark would hide it. Not so for the beginning of a control token.
    """
    starts = {text[0] for text in controls} or set(_USUAL_STARTS)
    wanted = [
        text
        for text in constants
        if text[:1] in starts and not any(c.startswith(text) or c in text for c in controls)
    ]
    control, constant = literals(controls).pattern, literals(wanted).pattern
    first = "".join(map(re.escape, sorted(starts)))
    return re.compile(f"((?!{control})(?={constant}))?[{first}]")


def _marker(mark: str) -> Callable[[re.Match[str]], str]:
    return lambda match: match[0] if match[1] is not None else match[0] + mark


def _cut(text: str, mark: str) -> Iterable[Piece]:
    *marked, last = text.split(mark)
    for part in marked:
        if part[:-1]:
            yield Piece(part[:-1])
        if part:
            yield Piece(part[-1], content=True)
    if last:
        yield Piece(last)


def _absent(texts: Iterable[str]) -> str:
    """A private-use character that is in none of the texts."""
    everything = "".join(texts)
    return next(c for c in map(chr, range(0x10FFFD, 0x100000, -1)) if c not in everything)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change) for item in value]
    return value
