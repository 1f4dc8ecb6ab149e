"""What a model is and does: of one that is open, or from headers of one that will be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from squall.assembly import open_tokenizer, prepare, template_of
from squall.checkpoints import describe, open_checkpoint
from squall.checkpoints.hub import Hub
from squall.checkpoints.inspect import FormatTotal as Stored
from squall.embeddings.files import judges, setup
from squall.engine.memory import DEFAULT_CONTEXT
from squall.errors import InvalidRequest
from squall.locate import locate
from squall.model import Model
from squall.needs import Kind
from squall.opening import Opening
from squall.quant import FormatTotal
from squall.recipes import embedders
from squall.spec import Decoder
from squall.text.chat import ChatTemplate
from squall.text.tokenizer import Tokenizer
from squall.text.tools import Tool

_TOOL = Tool("f", "", {"type": "object", "properties": {}})


@dataclass(frozen=True, slots=True)
class About:
    """sizes: by GGUF's names, and the context that requests have.

    capabilities: "completion", "tools", "thinking", "vision", "insert"; "embedding", "rerank"; of
    models that make pictures "image".
    """

    capabilities: tuple[str, ...]
    path: Path = Path()
    family: str = ""
    formats: Sequence[FormatTotal | Stored] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    template: str = ""


# What is known of a model whose headers cannot be read yet.
UNKNOWN: dict[Kind, About] = {
    "text": About(("completion",)), "pictures": About(("image",)),
    "embeddings": About(("embedding",)),
}  # fmt: skip


def of_model(kind: Kind, model: Any) -> About:
    """Of an open model: a `Model`, an `ImageModel` or an `Embedder`."""
    if isinstance(model, Model):
        sees = model.sight is not None
        found = _text(model.chat_template, model.tokenizer, model.spec, sees=sees)
        return replace(
            found, path=model.checkpoint.path, formats=model.weight_formats,
            family=model.architecture, sizes={**found.sizes, "context_length": model.context},
        )  # fmt: skip
    found = UNKNOWN[kind] if kind == "pictures" else _vectors(
        model.context, model.width, reranks=model.reranks
    )  # fmt: skip
    return replace(found, path=model.path, formats=model.formats)


def of_headers(kind: Kind, opening: Opening) -> About:
    """Of one that is here, and not open. Raises what opening it may."""
    return _KINDS[kind](replace(opening, hub=replace(opening.hub or Hub(), offline=True)))


def _of_text(opening: Opening) -> About:
    checkpoint, recipe, _ = prepare(opening)
    tokenizer = open_tokenizer(checkpoint, opening.tokenizer_json)
    template = template_of(checkpoint)
    if opening.chat_template:
        template = template.replaced(opening.chat_template)
    found = _text(template, tokenizer, recipe.decoder, sees=recipe.sees)
    context = opening.context or min(recipe.decoder.context, DEFAULT_CONTEXT)
    return replace(
        found, path=checkpoint.path, formats=describe(checkpoint).formats,
        family=recipe.architecture, sizes={**found.sizes, "context_length": context},
    )  # fmt: skip


def _text(template: ChatTemplate, tokenizer: Tokenizer, spec: Decoder, *, sees: bool) -> About:
    does, source = ["completion"], ""
    with suppress(InvalidRequest):  # there may be no template
        source = template.source(with_tools=False)
        prompt = template.prompt([{"role": "user", "content": "Hi"}], tokenizer, tools=[_TOOL])
        does += ["tools"] * bool(prompt.format) + ["thinking"] * bool(prompt.reasoning)
    does += ["vision"] * sees + ["insert"] * bool(tokenizer.filling)
    sizes = {
        "embedding_length": spec.hidden,
        "block_count": len(spec.layers),
        "vocab_size": spec.vocab,
    }
    return About(tuple(does), sizes=sizes, template=source)


def _of_embedder(opening: Opening) -> About:
    checkpoint = open_checkpoint(locate(opening.path, opening.hub, mmproj=False))
    recipe, context = embedders.load(checkpoint), setup(checkpoint).context
    asked = checkpoint.kind == "folder" and judges(checkpoint.path, checkpoint.metadata)
    found = _vectors(
        context or recipe.context, recipe.spec.hidden, reranks=asked or recipe.judges is not None
    )
    return replace(found, path=checkpoint.path, formats=describe(checkpoint).formats)


def _vectors(context: int, width: int, *, reranks: bool) -> About:
    sizes = {"context_length": context, "embedding_length": width}
    return About(("rerank" if reranks else "embedding",), family="encoder", sizes=sizes)


def _of_pictures(opening: Opening) -> About:
    return replace(UNKNOWN["pictures"], path=Path(opening.path or ""))


_KINDS: dict[Kind, Callable[[Opening], About]] = {
    "text": _of_text, "embeddings": _of_embedder, "pictures": _of_pictures,
}  # fmt: skip
