"""Tiny models that see, made with transformers; what Squall makes of them is held against theirs.

case = Seer("llava", "LlavaForConditionalGeneration", {...}, Llava.of, "LlavaImageProcessorPil")
seen = build(case, tmp_path)          # random, saved, and opened by Squall
check_rows(seen, PICTURES.values())   # tower and connector
check_answers(seen, [[5, 6, image, 7], [8, other, 9]])  # logits of two turns
assert not unmoved(seen, image)       # no field of the specs goes unnoticed
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from mutate import mutations
from numpy.typing import NDArray
from pictures import PICTURES
from PIL import Image
from safetensors.torch import load_file, save_file

from squall import decoder, executors
from squall.batch import Batch
from squall.checkpoints.base import Checkpoint
from squall.checkpoints.folder import open_folder
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.executors import Limits
from squall.program import Program
from squall.recipes import Recipe, load
from squall.recipes.names import Part, locate
from squall.roles import roles
from squall.vision import tower
from squall.vision.family import Family, Processed
from squall.weights import WeightStore

Floats = NDArray[np.float32]
Int32 = NDArray[np.int32]
# What is held against other rows of Squall has moved where it is not the same.
CLOSE, MOVED, BLOCK = 1e-4, 1e-6, 16
TEXT: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 90, "hidden_size": 40, "intermediate_size": 56,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "rms_norm_eps": 0.01, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """Tokens, and which of them rows of images stand for.

    overlay: of each token the row, or negative. images: (first token, one past the last, grid).
    """

    tokens: list[int] = field(default_factory=list)
    overlay: list[int] = field(default_factory=list)
    rows: list[Floats] = field(default_factory=list)
    images: list[tuple[int, int, tuple[int, int] | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Seer:
    """A model that sees.

    model: a class of transformers, or one that has its methods; config: its arguments.
    family: from config.json and preprocessor_config.json. pil: the class of transformers that
        makes its pixels, or a function; processor: what is in preprocessor_config.json.
    specials: ids of special tokens. rename: what the published files call a tensor of ours.
    more: what transformers is given beside input_ids and pixels, of the ids.
    rotary: positions [axes, tokens] of a prompt, where an image's rows have their own.
    faint: pattern of weights that are a thousandth, so that the eps of norms shows.
    """

    name: str
    model: Any
    config: Mapping[str, Any]
    family: Callable[[Mapping[str, Any], Mapping[str, Any]], Family]
    pil: Any
    processor: Mapping[str, Any] = field(default_factory=dict)
    specials: Mapping[str, int] = field(default_factory=lambda: {"<image>": 80})
    rename: Callable[[str], str] | None = None
    more: Callable[[torch.Tensor], dict[str, Any]] = lambda _: {}
    rotary: Callable[[Prompt], Int32] | None = None
    context: int = 512
    faint: str = r"(?!)"

    def __str__(self) -> str:
        return self.name

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """What transformers' model is given of these."""
        make = getattr(transformers, self.pil)(**self.processor) if named(self.pil) else self.pil
        found = make(images=list(images), return_tensors="pt")
        return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}


def named(item: object) -> bool:
    return isinstance(item, str)


@dataclass(frozen=True)
class Seen:
    """A tiny model, in transformers and as Squall has opened its files."""

    case: Seer
    model: Any
    checkpoint: Checkpoint
    recipe: Recipe
    family: Family

    @cached_property
    def store(self) -> WeightStore:
        return WeightStore(self.checkpoint, exact=True)

    @cached_property
    def decoder(self) -> executors.Executor:
        names, context = self.recipe.names, self.case.context
        program = decoder.compile(self.recipe.decoder, names, context=context)
        rows = dict.fromkeys(program.spaces, context)
        limits = Limits(rows=rows, blocks=context // BLOCK, block_size=BLOCK, kv_dtype="f32")
        return executors.open(program, self.store, limits, pool=executors.thread_pool(1))

    def rows(self, image: Image.Image) -> Floats:
        """Of an image, for the decoder."""
        return self.see(self.family.process(image))

    def see(self, processed: Processed, changed: Part | None = None) -> Floats:
        """The same of pixels; changed: a part in place of the recipe's."""
        parts = {part.kind: part for part in self.recipe.parts}
        parts |= {changed.kind: changed} if changed else {}
        names = {role: place for part in parts.values() for role, place in part.names.items()}
        program = tower.compile(parts["tower"].spec, parts["connector"].spec, names)
        return run(program, self.store, processed.inputs)[tower.IMAGE]


def run(
    program: Program, store: WeightStore, inputs: Mapping[str, NDArray[Any]]
) -> dict[str, Floats]:
    """A program without caches, by the native executor."""
    sizes = {v.rows: len(inputs[v.name]) for v in program.inputs}
    sizes |= {i.rows: inputs[i.name].shape[-1] for i in program.indices if i.name in inputs}
    rows = {space: max(sizes.get(space, 1), 1) for space in program.spaces}
    limits = Limits(rows=rows, kv_dtype="f32")
    executor = executors.open(program, store, limits, pool=executors.thread_pool(1))
    return executor.run(inputs)


# ---- models ----


def build(case: Seer, path: Path) -> Seen:
    """The model of a case with random weights, saved, and opened."""
    model = randomize(case)
    model.save_pretrained(path)
    if case.rename is not None:
        for file in path.glob("*.safetensors"):
            tensors = {case.rename(name): tensor for name, tensor in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})
    (path / "preprocessor_config.json").write_text(json.dumps(case.processor))
    checkpoint = open_folder(path)
    config = json.loads((path / "config.json").read_text())
    return Seen(case, model, checkpoint, load(checkpoint), case.family(config, case.processor))


def randomize(case: Seer) -> Any:
    """Every weight, norm, bias and gate random, and large enough to matter."""
    torch.set_num_threads(1)
    torch.manual_seed(sum(map(ord, case.name)))
    kind = getattr(transformers, case.model) if named(case.model) else case.model
    model = kind(kind.config_class(**json.loads(json.dumps(case.config)))).eval().float()
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                _fill(type(module).__name__, name, weight)
        for name, weight in model.named_parameters():
            weight.mul_(1e-3 if re.search(case.faint, name) else 1.0)
    return model


def _fill(module: str, name: str, weight: torch.Tensor) -> None:
    if weight.dim() == 0 or "gate" in name:
        weight.normal_(0.0, 0.7)
    elif name.endswith("bias"):
        weight.normal_(0.0, 0.3)
    elif "Norm" in module:
        weight.uniform_(-0.5, 0.5).add_(0.0 if module.startswith("Gemma") else 1.0)
    elif module == "Linear":
        weight.normal_(0.0, 1.3 * weight.shape[-1] ** -0.5)
    elif module.startswith("Conv"):
        weight.normal_(0.0, math.prod(weight.shape[1:]) ** -0.5)
    elif weight.dim() > 2 and "mbedding" not in name:  # stacked experts
        weight.normal_(0.0, weight.shape[-1] ** -0.5)
    else:  # embeddings, class tokens, newlines, latents; Gemma's are scaled up by the model
        weight.normal_(0.0, weight.shape[-1] ** -0.5 if module.startswith("Gemma") else 1.0)


# ---- what is held against what ----


def distance(found: Floats, wanted: Floats) -> float:
    """The largest difference, relative to the root of the mean square."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    if not wanted.size:
        return 0.0
    wide = wanted.astype(np.float64)
    return float(np.abs(found - wide).max() / np.sqrt((wide**2).mean()))


def features(seen: Seen, image: Image.Image) -> Floats:
    """The rows of transformers."""
    with torch.no_grad():
        found = seen.model.get_image_features(**seen.case.pixels([image]))
    found = getattr(found, "pooler_output", found)
    parts = [found] if isinstance(found, torch.Tensor) else list(found)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).numpy()


def check_rows(seen: Seen, images: Iterable[Image.Image], close: float = CLOSE) -> None:
    """Tower and connector: rows as transformers' `get_image_features` has them."""
    for image in images:
        processed = seen.family.process(image)
        found = seen.see(processed)
        assert processed.rows == len(found), image.size
        assert processed.text.count(seen.family.token) == processed.rows, image.size
        assert distance(found, features(seen, image)) < close, image.size


Part_ = int | Image.Image
"""A token, or an image."""


def extend(seen: Seen, prompt: Prompt, parts: Sequence[Part_]) -> None:
    """Add tokens and images to a prompt."""
    ids = seen.case.specials
    for part in parts:
        if isinstance(part, int):
            prompt.tokens.append(part)
            prompt.overlay.append(-1)
            continue
        processed, first = seen.family.process(part), len(prompt.tokens)
        for text in re.findall("|".join(map(re.escape, sorted(ids, reverse=True))), processed.text):
            is_row = text == seen.family.token
            row = sum(o >= 0 for o in prompt.overlay)
            prompt.tokens.append(ids[text])
            prompt.overlay.append(row if is_row else -1)
        prompt.rows.append(seen.see(processed))
        prompt.images.append((first, len(prompt.tokens), processed.grid))


def step(seen: Seen, prompt: Prompt, start: int, stop: int) -> Floats:
    """The logits of these tokens, which are computed in one step."""
    overlay = np.array(prompt.overlay[start:stop], np.int32)
    first = int(overlay[overlay >= 0].min(initial=1 << 30))
    rows = np.concatenate([np.empty((0, seen.recipe.decoder.hidden), np.float32), *prompt.rows])
    shown = rows[first : int(overlay.max()) + 1] if (overlay >= 0).any() else rows[:0]
    positions = np.arange(start, stop, dtype=np.int32)
    ends = positions + 1
    if seen.family.mutual:
        stops = np.flatnonzero(np.array([*prompt.overlay, -1]) < 0)
        ends = np.where(overlay >= 0, stops[np.searchsorted(stops, positions)], ends)
    rotary = None if seen.case.rotary is None else seen.case.rotary(prompt)[:, start:stop]
    batch = Batch(
        tokens=np.array(prompt.tokens[start:stop], np.int32), positions=positions,
        bounds=np.array([0, stop - start], np.int32),
        block_tables=np.arange(seen.case.context // BLOCK, dtype=np.int32)[None, ::-1].copy(),
        outputs=np.arange(stop - start, dtype=np.int32),
        spans=np.stack([np.zeros_like(ends), ends]).astype(np.int32),
        rotary=None if rotary is None else np.ascontiguousarray(rotary, np.int32),
        images=np.ascontiguousarray(shown),
        overlay=np.where(overlay >= 0, overlay - first, -1).astype(np.int32),
    )  # fmt: skip
    return seen.decoder.step(batch).copy()


def answers(
    seen: Seen, turns: Sequence[Sequence[Part_]], drawn: int = 16, cut: int | None = None
) -> tuple[Prompt, Floats, list[int]]:
    """Each turn is computed, and as many tokens drawn after it; logits of every token.

    cut: tokens of a step, by default a whole turn. The ints are where tokens were drawn.
    """
    prompt, logits, draws = Prompt(), [], []
    for turn in turns:
        start = len(prompt.tokens)
        extend(seen, prompt, turn)
        while start < len(prompt.tokens):
            stop = min(start + (cut or len(prompt.tokens)), len(prompt.tokens))
            logits.append(step(seen, prompt, start, stop))
            start = stop
        for _ in range(drawn):
            draws.append(start - 1)
            extend(seen, prompt, [best(seen, logits[-1][-1])])
            logits.append(step(seen, prompt, start, start + 1))
            start += 1
    return prompt, np.concatenate(logits), draws


def check_answers(
    seen: Seen,
    turns: Sequence[Sequence[Part_]],
    drawn: int = 16,
    cut: int | None = None,
    close: float = CLOSE,
) -> None:
    """The whole model: logits of prompts and of greedy answers as those of transformers.

    Where steps are cut changes no bit of them.
    """
    prompt, found, draws = answers(seen, turns, drawn, cut)
    if cut is not None:
        np.testing.assert_array_equal(found, answers(seen, turns, drawn)[1])
    images = [part for turn in turns for part in turn if not isinstance(part, int)]
    ids = torch.tensor([prompt.tokens])
    with torch.no_grad():
        pixels = seen.case.pixels(images) if images else {}
        out = seen.model(input_ids=ids, **pixels, **seen.case.more(ids))
    wanted = out.logits[0].float().numpy()
    assert distance(found, wanted) < close
    assert [best(seen, wanted[at]) for at in draws] == [prompt.tokens[at + 1] for at in draws]


def best(seen: Seen, logits: Floats) -> int:
    """The token to draw, which is no special one."""
    return max(set(range(len(logits))) - {*seen.case.specials.values()}, key=lambda i: logits[i])


# ---- mutations ----

# pattern of a mutation -> (of which specs, why nothing can move)
EQUIVALENT: dict[str, tuple[Callable[[Any], bool], str]] = {
    r".*qk_norm_scope=\w+": (
        lambda tower: tower.layers[0].attention.qk_norm is None,
        "there is no norm to scope",
    ),
    r".*recalls=True": (lambda _: True, "what rows of a tower see is no memory"),
    r"mean=True": (lambda connector: connector.merge == 1, "the mean of one row"),
    r"early=True": (lambda connector: not connector.newlines, "there are no newlines"),
    r"activation=\w+": (lambda connector: len(connector.widths) < 2, "nothing is between linears"),
}


def unmoved(seen: Seen, image: Image.Image) -> list[str]:
    """Changes of tower and connector that change no row of an image, and should."""
    processed = seen.family.process(image)
    wanted, found = seen.see(processed), []
    for part in seen.recipe.parts:
        if part.kind == "decoder":
            continue
        for name, changed in mutations(part.spec, 1):
            holds, _ = next((v for k, v in EQUIVALENT.items() if re.fullmatch(k, name)), (None, ""))
            if holds is not None and holds(part.spec):
                continue
            moved = _effect(seen, part, changed, processed, wanted)
            if moved <= MOVED:
                found.append(f"{part.kind}.{name}: {moved:.1e}")
    return found


def _effect(seen: Seen, part: Part, changed: Any, processed: Processed, wanted: Floats) -> float:
    """How far the rows move; infinitely, where the files or the pixels do not fit."""
    own = {place.tensor for places in part.names.values() for place in places}
    read = seen.checkpoint.tensors.keys() - own
    stems = {part.naming.split(role)[1] for role in roles(changed)}
    if not stems <= part.naming.stems.keys():
        return math.inf
    try:
        (found,) = locate([(roles(changed), part.naming)], seen.checkpoint.tensors, read=read)
        names = {part.prefix + role: places for role, places in found.items()}
        rows = seen.see(processed, replace(part, spec=changed, names=names))
    except (InvalidCheckpoint, InvalidRequest, UnsupportedModel, ValueError):
        return math.inf
    return math.inf if rows.shape != wanted.shape else distance(rows, wanted)


# ---- processors ----


def unfold(pixels: NDArray[Any], size: int) -> Floats:
    """Tiles [..., channels, height, width] as [tiles * patches, channels * size * size]."""
    tiles = torch.as_tensor(np.asarray(pixels, np.float32)).reshape(-1, *pixels.shape[-3:])
    cut = torch.nn.functional.unfold(tiles, size, stride=size)
    return cut.transpose(1, 2).reshape(-1, cut.shape[1]).numpy()


def given(processed: Processed) -> Floats:
    """The patches of pixels that a tower is given, without the places of class tokens."""
    patches = processed.inputs[tower.PATCHES]
    place = processed.inputs.get(tower.PATCH.name)
    return (patches if place is None else patches[place >= 0]).astype(np.float32)


def same_pixels(
    process: Callable[[Image.Image], Processed],
    wanted: Callable[[Image.Image], Floats],
    *,
    close: float = 1e-5,
    share: float = 0.0,
) -> None:
    """All pictures give the patches wanted; `share` of the pixels may differ by a byte's step."""
    for name, picture in PICTURES.items():
        found, right = given(process(picture)), wanted(picture)
        assert found.shape == right.shape, (name, found.shape, right.shape)
        off = np.abs(found - right)
        assert (off > close).mean() <= share, (name, float(off.max()))
        assert off.max() <= (1 / 255 / 0.26 * 1.01 if share else close), (name, float(off.max()))


def expansion(kind: str, inputs: Mapping[str, Any], **attributes: Any) -> str:
    """What a Processor class of transformers puts in place of the first image's token."""
    made = object.__new__(getattr(transformers, kind))
    made.__dict__.update(attributes)
    found: str = made.replace_image_token(inputs, 0)
    return found
