"""`squall run`: one answer, or a chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squall.cli.flags import command
from squall.cli.opening import ModelFlags
from squall.cli.options import ChatTemplate, ContextSize, Stop
from squall.cli.selectors import Selected
from squall.engine.sampling import SamplingFields

if TYPE_CHECKING:
    from squall.engine.generation import Generation
    from squall.model import Model, Prompt

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are made: `Model.generate`'s arguments, with those of DRY apart."""

    options: dict[str, Any]
    dry: dict[str, Any]

    def answer(self, model: Model, prompt: Prompt) -> Generation:
        """Begin an answer to `prompt`."""
        return model.generate(prompt, dry=model.dry(**self.dry), **self.options)


@dataclass(frozen=True, kw_only=True)
class RunFlags(SamplingFields, ModelFlags):
    """The flags of `squall run`, and what to ask."""

    max_tokens: Annotated[int, typer.Option(help="At most so many tokens an answer.")] = 1024
    stop: Stop = None
    system: Annotated[str | None, typer.Option(help="A system message.")] = None
    chat_template: ChatTemplate = None
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False
    context: ContextSize = None
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What to ask; -: what stdin says; none: a chat."),
    ] = None

    @property
    def settings(self) -> Settings:
        """How answers are made."""
        options, dry = self.arguments()
        options |= {"max_tokens": self.max_tokens, "stop": tuple(self.stop or ())}
        return Settings(options, {"multiplier": 0.0} | dry)


def run(flags: RunFlags, selected: Selected) -> None:
    """Ask a model, or without a PROMPT chat with it.

    squall run "Why is the sky blue?"

    squall run -f model.gguf --temperature 0 "Write a haiku."

    squall run plain -m FOLDER --isq Q4K "Why is the sky blue?"

    A PROMPT that is the name of a kind has -- before it: squall run -- plain
    """
    with _interruptible(), flags.open(selected, context=flags.context) as model:
        if flags.chat_template is not None:
            model.set_chat_template(flags.chat_template)
        _converse(model, flags)


app = command("run", RunFlags, run)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        raise typer.Exit(INTERRUPTED) from None


def _converse(model: Model, flags: RunFlags) -> None:
    if flags.prompt is None:
        from squall.cli.chat import Chat

        Chat(model, flags.settings, flags.system).loop()
    else:
        text = sys.stdin.read() if flags.prompt == "-" else flags.prompt
        _answer_once(model, flags.settings, _prompt(model, text, flags.system, raw=flags.raw))


def _prompt(model: Model, text: str, system: str | None, *, raw: bool) -> Prompt:
    if raw:
        return text
    if not model.chat_template.sources:
        sys.stderr.write("note: this model has no chat template; it continues the text\n")
        return text
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": text}]


def _answer_once(model: Model, settings: Settings, prompt: Prompt) -> None:
    generation = settings.answer(model, prompt)
    with generation:
        show(generation, [])
    sys.stdout.write("\n")
    sys.stdout.flush()
    sys.stderr.write(f"{summary(generation)}\n")


def show(generation: Generation, written: list[str]) -> None:
    """Write an answer to stdout as it comes, and keep in `written` what was, however it ends."""
    for piece in generation:
        written.append(piece.text)
        sys.stdout.write(piece.text)
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
