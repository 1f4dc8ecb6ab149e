"""Where images stand in a prompt: its ids, and which of them the rows of an image replace."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from squall.errors import InvalidRequest, UnsupportedModel
from squall.text.images import Placeholder
from squall.text.reasoning import control_id
from squall.text.tokenizer import Piece, Tokenizer
from squall.vision.family import Family, Processed


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens `start:stop` of a prompt, which the rows of an image from `offset` on replace."""

    image: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A prompt's ids, and the runs of the family's `token` in them that images replace."""

    ids: tuple[int, ...]
    token: int
    runs: tuple[Run, ...] = ()


def stand_in(family: Family, tokenizer: Tokenizer, template: str) -> Family:
    """The family with a token that the vocabulary has: its own, or one that prompts do not have."""
    if control_id(tokenizer, family.token) is not None:
        return family
    ends = {tokenizer.bos, tokenizer.eos}
    names = [n for n, i in tokenizer.controls.items() if i not in ends and n not in template]
    token = min(names, key=lambda n: tokenizer.controls[n] in tokenizer.stop_ids, default=None)
    return family if token is None else replace(family, token=token)


def place(
    pieces: Sequence[Piece], images: Sequence[Processed], family: Family, tokenizer: Tokenizer
) -> Placed:
    """The ids of a prompt whose placeholders, but for those in messages' texts, become images."""
    token = control_id(tokenizer, family.token)
    if token is None:
        raise UnsupportedModel(f"the tokenizer has no token {family.token}, which images become")
    ids = tokenizer.encode_pieces(_expanded(pieces, images, Placeholder(family.placeholder)))
    places = [i for i, id_ in enumerate(ids) if id_ == token]
    rows = [(image, row) for image, of in enumerate(images) for row in range(of.rows)]
    if len(places) != len(rows):
        raise InvalidRequest(
            f"the prompt has {len(places)} tokens {family.token} and images with {len(rows)} rows; "
            "use the model's own chat template"
        )
    runs: list[Run] = []
    for place, (image, row) in zip(places, rows, strict=True):
        if runs and (runs[-1].image, runs[-1].stop) == (image, place):
            runs[-1] = replace(runs[-1], stop=place + 1)
        else:
            runs.append(Run(image, place, place + 1, row))
    return Placed(tuple(ids), token, tuple(runs))


def _expanded(
    pieces: Sequence[Piece], images: Sequence[Processed], placeholder: Placeholder
) -> Iterator[Piece]:
    """The pieces with each image's own text."""
    if (count := placeholder.count(pieces)) != len(images):
        raise InvalidRequest(f"the prompt has {count} placeholders for {len(images)} images")
    left = iter(images)
    for i, (text, content) in enumerate(pieces):
        if not content:
            parts = enumerate(placeholder.pattern.split(text))
            text = "".join(next(left).text if n % 2 else part for n, part in parts)
            after = pieces[i + 1].text[:1] if i + 1 < len(pieces) else ""
            for seam in {image.seam for image in images if image.seam}:
                text = text.replace(seam * 2, seam)
                text = re.sub(rf"({re.escape(seam)})(?=[^\s<])", r"\1 ", text + after)
                text = text.removesuffix(after)
        yield Piece(text, content)
