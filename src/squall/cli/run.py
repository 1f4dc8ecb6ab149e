"""`squall run`: one answer, or a chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squall.checkpoints.hub import Hub
from squall.cli.options import (
    ContextSize,
    DryAllowedLength,
    DryBase,
    DryMultiplier,
    File,
    Folder,
    FrequencyPenalty,
    Isq,
    KvDtype,
    KvDtypeOption,
    MinP,
    Offline,
    PresencePenalty,
    Quantization,
    RepetitionPenalty,
    Revision,
    Seed,
    Stop,
    Temperature,
    Threads,
    TokenSource,
    TopK,
    TopologyFile,
    TopP,
    Weights,
    WeightsOption,
    open_model,
    source,
)

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


def run(
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; - reads it from stdin. None: a chat.")
    ] = None,
    file: File = None,
    model: Folder = None,
    max_tokens: Annotated[int, typer.Option(help="At most so many tokens an answer.")] = 1024,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    repetition_penalty: RepetitionPenalty = None,
    dry_multiplier: DryMultiplier = 0.0,
    dry_base: DryBase = 1.75,
    dry_allowed_length: DryAllowedLength = 2,
    stop: Stop = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="Instead of the model's: a .jinja or .json file, Jinja, or a name."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text; no chat template.")
    ] = False,
    context: ContextSize = None,
    threads: Threads = None,
    weights: WeightsOption = Weights.packed,
    kv_dtype: KvDtypeOption = KvDtype.f16,
    isq: Isq = None,
    topology: TopologyFile = None,
    revision: Revision = "main",
    token_source: TokenSource = "cache",
    offline: Offline = False,
) -> None:
    """Ask a model, or chat with it.

    squall run "Why is the sky blue?"

    squall run -f model.gguf --temperature 0 "Write a haiku."
    """
    options = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "seed": seed, "stop": tuple(stop or ()),
        "repetition_penalty": repetition_penalty, "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
    }  # fmt: skip
    dry = {"multiplier": dry_multiplier, "base": dry_base, "allowed_length": dry_allowed_length}
    with _interruptible(), open_model(
        source(file, model), context=context, threads=threads, weights=weights, kv_dtype=kv_dtype,
        quantization=Quantization(isq, topology), hub=Hub(revision, token_source, offline),
    ) as opened:  # fmt: skip
        if chat_template is not None:
            opened.set_chat_template(chat_template)
        _converse(opened, Settings(options, dry), prompt, system, raw=raw)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        raise typer.Exit(INTERRUPTED) from None


def _converse(
    model: Model, settings: Settings, prompt: str | None, system: str | None, *, raw: bool
) -> None:
    if prompt is None:
        from squall.cli.chat import Chat

        Chat(model, settings, system).loop()
    else:
        text = sys.stdin.read() if prompt == "-" else prompt
        _answer_once(model, settings, _prompt(model, text, system, raw=raw))


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
