"""Whether Squall runs a model, and what that takes; only headers are read."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from squall.errors import SquallError
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.checkpoints import Checkpoint, Inspection
    from squall.recipes import Recipe
    from squall.text.tokenizer import Tokenizer

USUAL = 640, 480  # pixels of an image whose cost is told


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a model is, and whether Squall can run it: `obstacle` says why not.

    context: tokens it was trained for. memory: bytes that it takes for what `usual` says; free:
    those that are. can: tools, reasoning, images. sees: what it sees with, and at what cost.
    """

    parameters: int
    quantization: str
    license: str | None = None
    obstacle: str | None = None
    architecture: str | None = None
    context: int | None = None
    memory: int | None = None
    usual: str | None = None
    free: int | None = None
    can: tuple[str, ...] = ()
    sees: str | None = None

    def __str__(self) -> str:
        if self.obstacle is not None:
            return f"Squall cannot run it: {self.obstacle}"
        count = f"{self.parameters / 1e6:.1f} million parameters"
        parts = [self.architecture, count, self.quantization, *self.can]
        needs = f"needs about {mib(self.memory)} MiB for {self.usual}"
        free = "" if self.free is None else f", of {mib(self.free)} MiB free"
        return f"Squall runs it: {', '.join(filter(None, parts))}; {needs}{free}"

    def report(self) -> dict[str, Any]:
        """For JSON."""
        return {"text": str(self), "runs": self.obstacle is None} | asdict(self)


def mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.1f}"


def of_header(found: Inspection, obstacle: str | None = None) -> Verdict:
    """What a file says of itself."""
    texts = {field.key: str(field) for field in found.metadata}
    most = found.formats[0].format if found.formats else ""
    return Verdict(
        parameters=found.parameters, quantization=found.quantization or most,
        license=texts.get("general.license") or texts.get("license"), obstacle=obstacle,
    )  # fmt: skip


def of_embedder(path: Path, found: Inspection) -> Verdict:
    """Of a model that embeds, or judges pairs."""
    from squall.about import of_headers
    from squall.machine import available_bytes

    try:
        about = of_headers("embeddings", Opening(path))
    except SquallError as error:
        return of_header(found, str(error))
    return replace(
        of_header(found), can=("reranks" if "rerank" in about.capabilities else "embeds",),
        context=about.sizes["context_length"], architecture=about.family,
        memory=found.size_bytes, usual="its weights", free=available_bytes(),
    )  # fmt: skip


def of_model(path: Path, found: Inspection) -> Verdict:
    """Of a model of text, which may see, or embed."""
    from squall.assembly import open_tokenizer, place, prepare, template_of
    from squall.embeddings.files import is_embedding_model
    from squall.engine.memory import DEFAULT_CONTEXT
    from squall.text.reasoning import reasoning_of

    if is_embedding_model(path):
        return of_embedder(path, found)
    opening = Opening(path)
    try:
        prepared = prepare(opening)
        checkpoint, recipe, _ = prepared
        tokenizer = open_tokenizer(checkpoint)
        source = "\n".join(template_of(checkpoint).sources.values())
        sees = _sight(checkpoint, recipe, tokenizer) if recipe.sees else None
        loads = place([prepared], opening)[1]
    except SquallError as error:
        return of_header(found, str(error))
    can = {"tools": re.search(r"\btools\b", source), "reasoning": reasoning_of(source, "")}
    usual = min(recipe.decoder.context, DEFAULT_CONTEXT)
    return replace(
        of_header(found), architecture=recipe.architecture, sees=sees,
        can=(*(name for name, has in can.items() if has), *(["images"] if sees else [])),
        context=recipe.decoder.context, usual=f"a context of {usual} tokens",
        memory=sum(load.weights + usual * load.kv for load in loads), free=loads[0].free,
    )  # fmt: skip


def _sight(checkpoint: Checkpoint, recipe: Recipe, tokenizer: Tokenizer) -> str:
    from PIL import Image

    from squall.spec import Tower
    from squall.vision.families import family

    found, tower = family(recipe.architecture, checkpoint), cast(Tower, recipe.part("tower").spec)
    text = found.process(Image.new("RGB", USUAL)).text
    count = len(tokenizer.encode(text, add_bos=False, specials=True))
    return (
        f"a tower of {len(tower.layers)} layers, {tower.hidden} wide; tokens of an image of "
        f"{USUAL[0]} x {USUAL[1]} pixels: {count} ({found.cost})"
    )
