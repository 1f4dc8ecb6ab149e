"""`squall run`: one answer, or a chat."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squall.cli import INTERRUPTED
from squall.cli.flags import HELP_OF, TEXT, command
from squall.cli.opening import PictureFlags
from squall.cli.options import ChatTemplate, ContextSize, DraftModel, option, read_text
from squall.cli.selectors import Selected
from squall.engine.sampling import SamplingFields
from squall.errors import InvalidRequest
from squall.files import printable

if TYPE_CHECKING:
    from squall.engine.generation import Generation
    from squall.model import Model
    from squall.text.chat import ChatPrompt
    from squall.text.grammar import Grammar

MOST_STDIN = 16 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are made: `Model.generate`'s arguments, with those of DRY apart."""

    options: dict[str, Any]
    dry: dict[str, Any]

    def answer(self, model: Model, prompt: str | ChatPrompt) -> Generation:
        return model.generate(prompt, dry=model.dry(**self.dry), **self.options)


@dataclass(frozen=True, kw_only=True)
class RunFlags(SamplingFields, PictureFlags):
    max_tokens: int = option(1024, help="At most so many tokens an answer.")
    stop: list[str] | None = option(None, help="Text that ends the answer.")
    system: str | None = option(None, help="A system message.")
    chat_template: ChatTemplate = None
    raw: bool = option(False, "--raw", help="Continue the text; no chat template.")
    context: ContextSize = None
    draft: DraftModel = None
    json_schema: Path | None = option(
        None, help="A file with a JSON schema: answer in JSON that fits it."
    )
    grammar: Path | None = option(
        None, help="A file with a grammar, yacc's or Lark's, of the answer."
    )
    regex: str | None = option(None, help="What the whole answer must match.")
    image: list[str] | None = option(
        None, metavar="FILE|URL",
        help="An image that the PROMPT is about, or several; or that a picture begins with.",
    )  # fmt: skip
    size: str | None = option(
        None, metavar="WxH", help="Of a picture, in multiples of 16; by default 1280x720."
    )
    steps: int | None = option(None, help="In which a picture is made.")
    guidance: float | None = option(None, help="How closely a picture is to follow the PROMPT.")
    strength: float | None = option(None, help="How much of the image to make anew, up to 1.")
    n: int = option(1, "--n", min=1, help="Pictures, each with the seed after the last one's.")
    output: Path | None = option(
        None, "-o", "--output", help="The picture's file; by default image-PROMPT-SEED.png here."
    )
    show: bool = option(True, "--show/--no-show", help="Show pictures too, on a terminal that can.")
    prompt: Annotated[str | None, typer.Argument(metavar=TEXT, help=HELP_OF[TEXT])] = None

    @property
    def settings(self) -> Settings:
        options, dry = self.arguments()
        options |= {"max_tokens": self.max_tokens, "stop": tuple(self.stop or ())}
        options |= {"grammar": _grammar(self)}
        return Settings(options, {"multiplier": 0.0} | dry)


def _grammar(flags: RunFlags) -> Grammar | None:
    from squall.text.grammar import Grammar

    given = (flags.json_schema, flags.grammar, flags.regex)
    if len(given) - given.count(None) > 1:
        raise InvalidRequest("--json-schema, --grammar and --regex: give one of them")
    if flags.json_schema is not None:
        return Grammar("json_schema", read_text(flags.json_schema))
    if flags.grammar is not None:
        text = read_text(flags.grammar)
        return Grammar("yacc" if re.search("^%%", text, re.MULTILINE) else "lark", text)
    return None if flags.regex is None else Grammar("regex", flags.regex)


def run(flags: RunFlags, selected: Selected) -> None:
    """Ask a model, or without a PROMPT chat with it.

    squall run "Why is the sky blue?"

    squall run model.gguf --temperature 0 "Write a haiku."

    squall run owner/name:Q4_K_M "What is this?" < notes.txt

    squall run plain -m FOLDER --isq Q4K "Why is the sky blue?"

    squall run FOLDER --image cat.png "What is this?"

    squall run FLUX --size 512x512 --seed 1 "A cat on a fence."

    A pipe or a file on stdin is one prompt, behind the PROMPT if there is one.

    A PROMPT that is the name of a kind or a file has -- before it: squall run -- plain
    """
    prompt, pictures = _asked(flags.prompt), flags.makes_pictures(selected)
    flags.check_kind(text=not pictures, pictures=pictures)
    if pictures:
        from squall.cli.pictures import draw

        with _interruptible():
            draw(replace(flags, prompt=prompt), selected)
        return
    with _interruptible(), flags.open(selected) as model:
        _converse(model, replace(flags, prompt=prompt))


app = command("run", RunFlags, run)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        raise typer.Exit(INTERRUPTED) from None


def _asked(prompt: str | None) -> str | None:
    """The prompt, with what a pipe says; None is for a chat."""
    if sys.stdin is not None and sys.stdin.isatty() and prompt != "-":
        return prompt
    parts = [text for text in (None if prompt == "-" else prompt, _stdin()) if text]
    if not parts:
        raise InvalidRequest("standard input is empty; give a prompt, there or as an argument")
    return "\n\n".join(parts)


def _stdin() -> str:
    """All of standard input, without the line's end that a shell would strip, too."""
    if sys.stdin is None:
        return ""
    data = sys.stdin.buffer.read(MOST_STDIN + 1)
    if len(data) > MOST_STDIN:
        raise InvalidRequest(f"standard input has more than {MOST_STDIN >> 20} MiB; give less")
    try:
        return data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"standard input is not UTF-8 text (byte {error.start}); convert it first, with iconv"
        ) from None


def _converse(model: Model, flags: RunFlags) -> None:
    if flags.prompt is None:
        from squall.cli.chat import Chat

        if flags.image:
            raise InvalidRequest("--image needs a PROMPT; in a chat say \\image FILE TEXT")
        Chat(model, flags.settings, flags.system).loop()
    else:
        _answer_once(model, flags.settings, _prompt(model, flags.prompt, flags))


def _prompt(model: Model, text: str, flags: RunFlags) -> str | ChatPrompt:
    if not flags.image and (flags.raw or not model.chat_template.sources):
        if not flags.raw:
            sys.stderr.write("note: this model has no chat template; it continues the text\n")
        return text
    first = [{"role": "system", "content": flags.system}] if flags.system is not None else []
    images = [{"type": "image", "source": source} for source in flags.image or ()]
    content = [*images, {"type": "text", "text": text}]
    return model.chat_prompt([*first, {"role": "user", "content": content}])


def _answer_once(model: Model, settings: Settings, prompt: str | ChatPrompt) -> None:
    with settings.answer(model, prompt) as generation:
        show(generation, prompt, [])
    sys.stdout.write("\n")
    sys.stdout.flush()
    sys.stderr.write(f"{summary(generation)}\n")


def show(generation: Generation, prompt: str | ChatPrompt, said: list[str]) -> None:
    """Write an answer as it comes, to stdout and `said`; the reasoning dim, on a terminal alone."""
    from squall.text.answer import AnswerParser, Reasoned, Said

    parser = AnswerParser() if isinstance(prompt, str) else prompt.parser()
    gap, terminal = "", sys.stdout.isatty()
    for piece in generation:
        for event in parser.push(piece.text, final=piece.finish_reason is not None):
            if isinstance(event, Said):
                said.append(event.text)
                sys.stdout.write(gap + (printable(event.text) if terminal else event.text))
                gap = ""
            elif isinstance(event, Reasoned) and terminal:
                sys.stdout.write(f"\x1b[2m{printable(event.text)}\x1b[0m")
                gap = "\n\n"
        sys.stdout.flush()


def summary(generation: Generation) -> str:
    """Counts, rates and, if it mattered, the seed, in one line."""
    usage = generation.usage
    parts = [f"{usage.prompt_tokens} prompt tokens, {usage.prompt_rate:.0f} tokens/s"]
    if usage.cached_tokens:
        parts[0] += f" ({usage.cached_tokens} known)"
    parts.append(f"{usage.answer_tokens} answer tokens, {usage.answer_rate:.1f} tokens/s")
    if generation.finish_reason == "length":
        parts.append("stopped by length")
    if generation.sampling.temperature > 0:
        parts.append(f"seed {generation.seed}")
    return f"[{'; '.join(parts)}]"
