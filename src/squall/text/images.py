"""Images in messages: taken out of them, and what stands for each in a prompt.

Where a message's text has as many of the model's placeholders as the message has images, these are
where the images go; in texts without images placeholders are words like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from squall.errors import InvalidRequest
from squall.text.tokenizer import Piece

_SOURCES = ("url", "data", "image_url", "source", "image", "base64", "path")
DETAILS = ("auto", "low", "high")
BLIND = "this model reads no images; send texts only"
_NUMBER = "{}"
# {"type": "image", "source": a URL, a path, bytes..., "detail": "low" for few tokens, or None}
Image = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What stands for an image in a prompt, such as `<image>`; {} is its number, from 1 on."""

    text: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """Splits a text into what is between placeholders, and placeholders in turn."""
        return re.compile("(" + re.escape(self.text).replace(re.escape(_NUMBER), r"\d{1,4}") + ")")

    def of(self, number: int) -> str:
        return self.text.replace(_NUMBER, str(number))

    def count(self, pieces: Sequence[Piece]) -> int:
        """Those in a prompt that the template wrote, or that messages were allowed to."""
        owned = (piece.text for piece in pieces if not piece.content)
        return sum(len(self.pattern.findall(text)) for text in owned)


def take(
    messages: Sequence[Mapping[str, Any]], placeholder: Placeholder | None
) -> tuple[list[dict[str, Any]], tuple[Image, ...]]:
    """The messages for a template, and their images in order.

    The content of a message with images becomes a list of parts `{"type": "image"}` and `{"type":
    "text", "text": ...}`, that of others a text. placeholder: None for models that read no images.
    """
    taken: list[dict[str, Any]] = []
    images: list[Image] = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list | tuple):
            taken.append(dict(message))
            continue
        parts = [part_of(part, f"messages[{i}].content") for part in content]
        found = [part for part in parts if part["type"] == "image"]
        if found and placeholder is None:
            raise InvalidRequest(BLIND)
        if found and placeholder:
            made: Any = list(_placed(parts, len(found), placeholder, len(images), i))
        else:
            made = "".join(part["text"] for part in parts)
        taken.append({**message, "content": made})
        images += found
    return taken, tuple(images)


def part_of(part: object, where: str, *, sees: bool = True) -> dict[str, Any]:
    """A part of a content, in any client's words, as a text or an image of this module's."""
    match part:
        case {"type": "text" | "input_text" | "output_text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "refusal", "refusal": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image" | "image_url" | "input_image", **image} if sees:
            return _image(image, f"{where} has an image")
    kind = part.get("type") if isinstance(part, Mapping) else None
    known = "a whole 'text' or 'image_url'" if sees else "a whole 'text'"
    raise InvalidRequest(f"{where} has a part of type {kind!r:.99}; it must be {known}")


def _image(image: Mapping[object, Any], what: str) -> dict[str, Any]:
    """An image in the words of OpenAI's chats or Responses, Anthropic's, or transformers'."""
    named = image.get("image_url", image.get("source"))
    own = named if isinstance(named, Mapping) else image
    source = next((own[name] for name in _SOURCES if own.get(name) is not None), None)
    detail = own.get("detail")
    if source is None or isinstance(source, Mapping | list | tuple | int | float):
        raise InvalidRequest(f"{what} that is neither a URL nor data; give image_url")
    if detail not in (None, *DETAILS):
        raise InvalidRequest(f"{what} whose detail is {detail!r:.99}; it must be one of {DETAILS}")
    return {"type": "image", "source": source, "detail": detail}


def _placed(
    parts: Sequence[Mapping[str, Any]],
    count: int,
    placeholder: Placeholder,
    before: int,
    message: int,
) -> Iterator[dict[str, Any]]:
    """The parts for a template; `before`: images of earlier messages."""
    from squall.text.traced import mixed

    pattern = placeholder.pattern
    written = [name for part in parts for name in pattern.findall(part.get("text", ""))]
    if len(written) not in (0, count):
        raise InvalidRequest(
            f"messages[{message}] has images: {count}, and placeholders {placeholder.text} in its "
            f"text: {len(written)}; write one for each image, or none"
        )
    wanted = [placeholder.of(before + n) for n in range(1, count + 1)]
    if written and written != wanted:
        raise InvalidRequest(
            f"messages[{message}] has the placeholders {', '.join(written):.200}; it must have "
            f"{', '.join(wanted):.200}, in this order"
        )
    for part in parts:
        if part["type"] == "text":
            # A placeholder is the template's own, as if it had written it.
            texts = enumerate(pattern.split(part["text"]) if written else [part["text"]])
            yield {"type": "text", "text": mixed((text, n % 2 == 0) for n, text in texts)}
        elif not written:
            yield {"type": "image"}


def as_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages for templates that show parts alone."""
    made = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        made.append({**message, "content": content})
    return made


def as_texts(
    messages: Sequence[Mapping[str, Any]], placeholder: Placeholder
) -> list[dict[str, Any]]:
    """The messages for templates that show no parts: images are lines of their own."""
    from squall.text.traced import mixed, parts

    made, images = [], 0
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            shown: list[Piece] = []
            for part in content:
                if part["type"] == "text":
                    own = [Piece(*piece) for piece in parts(part["text"])]
                    images += placeholder.count(own)
                    shown += own
                else:
                    images += 1
                    shown.append(Piece(placeholder.of(images) + "\n"))
            content = mixed(shown)
        made.append({**message, "content": content})
    return made
