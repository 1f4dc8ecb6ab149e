"""Images in messages, in the words of every client, as templates are to see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from squall.api.messages import conversation, images_of
from squall.errors import InvalidRequest

URL = "https://example.org/a.png"
PATH = Path("a.png")
ARRAY = np.zeros((2, 2), np.uint8)
PICTURE = Image.new("RGB", (2, 2))


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def image(source: Any = URL, detail: str | None = None) -> dict[str, Any]:
    return {"type": "image", "source": source, "detail": detail}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("part", "source", "detail"),
    [
        ({"type": "image_url", "image_url": {"url": URL}}, URL, None),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, URL, "low"),
        ({"type": "image_url", "image_url": URL}, URL, None),
        ({"type": "input_image", "image_url": URL, "detail": "auto"}, URL, "auto"),
        ({"type": "input_image", "image_url": URL, "detail": "high", "file_id": None}, URL, "high"),
        ({"type": "image", "image": URL}, URL, None),
        ({"type": "image", "url": URL}, URL, None),
        ({"type": "image", "path": "a.png"}, "a.png", None),
        ({"type": "image", "path": PATH}, PATH, None),
        ({"type": "image", "base64": "AAAA"}, "AAAA", None),
        ({"type": "image", "image": b"abc"}, b"abc", None),
        ({"type": "image", "image": ARRAY}, ARRAY, None),
        ({"type": "image", "image": PICTURE}, PICTURE, None),
        ({"type": "image", "source": {"type": "url", "url": URL}}, URL, None),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "a/b", "data": "AAAA"}},
            "AAAA", None,
        ),
        ({"type": "image", "source": URL, "detail": None}, URL, None),
    ],
)  # fmt: skip
def test_every_form_of_an_image(part: dict[str, Any], source: Any, detail: str | None) -> None:
    (message,) = conversation([user(part)])
    (found,) = message["content"]
    assert found.pop("source") is source
    assert found == {"type": "image", "detail": detail}


def test_texts_and_images_in_any_order_and_number() -> None:
    parts = [text("a"), image("1"), text("b"), text("c"), image("2"), image("3")]
    said = conversation([{"role": "system", "content": "s"}, user(*parts), user(image("4"))])
    assert said[0] == {"role": "system", "content": "s"}
    assert said[1]["content"] == parts
    assert [part["source"] for part in images_of(said)] == ["1", "2", "3", "4"]


def test_without_images_a_content_stays_a_text() -> None:
    said = conversation([user(text("a"), {"type": "input_text", "text": "b"})])
    assert said == [{"role": "user", "content": "ab"}]
    assert images_of(said) == []
    assert images_of("Hi") == []


def test_what_is_checked_may_be_checked_again() -> None:
    once = conversation([user(image(), text("a")), {"role": "assistant", "content": "b"}])
    assert conversation(once) == once


@pytest.mark.parametrize("detail", ["medium", "", 3, ["low"], {}])
def test_details(detail: Any) -> None:
    for part in (
        {"type": "image_url", "image_url": {"url": URL, "detail": detail}},
        {"type": "input_image", "image_url": URL, "detail": detail},
    ):
        with pytest.raises(InvalidRequest, match=r"whose detail is .* must be one of"):
            conversation([user(part)])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url"}, {"type": "image_url", "image_url": {}}, {"type": "image"},
        {"type": "image_url", "image_url": None}, {"type": "image_url", "image_url": 5},
        {"type": "image_url", "image_url": {"url": None}}, {"type": "image", "source": {}},
        {"type": "image_url", "image_url": {"url": {"url": URL}}}, {"type": "image", "image": [1]},
        {"type": "image", "source": {"type": "file", "file_id": "x"}}, {"type": "input_image"},
        {"type": "input_image", "file_id": "file-1"}, {"type": "image", "image": True},
        {"type": "image", "source": {"type": "base64", "data": None}},
    ],
)  # fmt: skip
def test_images_that_are_none(part: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages\[0\]\.content has an image that"):
        conversation([user(part)])


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_who_shows_no_images(role: str) -> None:
    with pytest.raises(InvalidRequest, match=r"content has a part of type 'image_url'; .* 'text'$"):
        conversation([{"role": role, "content": [{"type": "image_url", "image_url": URL}]}])


def result(*parts: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "a", "content": list(parts)}


def test_images_of_tools_results_come_after_them() -> None:
    """The results stay texts, side by side; what they show is the user's."""
    assistant = {"role": "assistant", "content": "so"}
    first, second = result(image("1"), text("one"), image("2")), result(text("two"), image("3"))
    shown = [image("1"), image("2"), image("3")]
    texts = [{**first, "content": "one"}, {**second, "content": "two"}]
    for after, wanted in (
        ([], [user(*shown)]),
        ([assistant], [user(*shown), assistant]),
        ([user(text("a"))], [user(*shown, text("a"))]),
        ([user(image("4"), text("a"))], [user(*shown, image("4"), text("a"))]),
        ([result(text("three"))], [{**result(), "content": "three"}, user(*shown)]),
    ):
        said = conversation([assistant, first, second, *after])
        assert said == [assistant, *texts, *wanted]
        assert conversation(said) == said


def test_two_rounds_of_results() -> None:
    assistant = {"role": "assistant", "content": "so"}
    said = conversation([result(image("1")), assistant, result(image("2")), assistant])
    shown = [[part["source"] for part in images_of([message])] for message in said]
    assert shown == [[], ["1"], [], [], ["2"], []]
    assert said[0]["content"] == ""
