"""`squall run`: one answer, or a chat."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from squall.cli.options import (
    ContextSize,
    File,
    Folder,
    Isq,
    KvDtype,
    KvDtypeOption,
    Quantization,
    Threads,
    TopologyFile,
    Weights,
    WeightsOption,
    open_model,
    read_text,
    source,
)

if TYPE_CHECKING:
    from squall.engine.generation import Generation
    from squall.model import Model, Prompt

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are made."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    stop: tuple[str, ...]

    def answer(self, model: Model, prompt: Prompt) -> Generation:
        """Begin an answer to `prompt`."""
        return model.generate(
            prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop,
        )


def run(
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; - reads it from stdin. None: a chat.")
    ] = None,
    file: File = None,
    model: Folder = None,
    max_tokens: Annotated[int, typer.Option(help="At most so many tokens an answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest that sum to p; 1: off.")] = 0.95,
    min_p: Annotated[
        float, typer.Option(help="Only tokens at least p times as likely as the first; 0: off.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file to use instead of the model's own template.")
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
) -> None:
    """Ask a model, or chat with it.

    Examples:

    squall run "Why is the sky blue?"

    squall run -f model.gguf --temperature 0 "Write a haiku."

    squall run
    """
    settings = Settings(max_tokens, temperature, top_k, top_p, min_p, seed, tuple(stop or ()))
    path = source(file, model)
    try:
        with open_model(
            path, context=context, threads=threads, weights=weights, kv_dtype=kv_dtype,
            quantization=Quantization(isq, topology),
        ) as opened:  # fmt: skip
            if isq is not None or topology is not None:
                sys.stderr.write(f"{formats(opened)}\n")
            if chat_template is not None:
                opened.set_chat_template(read_text(chat_template))
            if prompt is None:
                from squall.cli.chat import Chat

                Chat(opened, settings, system).loop()
            else:
                text = sys.stdin.read() if prompt == "-" else prompt
                _answer_once(opened, settings, _prompt(opened, text, system, raw=raw))
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        raise typer.Exit(INTERRUPTED) from None


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


def formats(model: Model) -> str:
    """What the weights are in memory, in one line."""
    parts = [
        f"{total.matrices} {total.format} ({total.nbytes / 2**20:.1f} MiB)"
        for total in model.weight_formats
    ]
    return f"[weights: {', '.join(parts)}]"


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
