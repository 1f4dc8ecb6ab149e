"""Conversations about images with whole models: what transformers answers, and at what cost."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pictures import draw
from PIL import Image
from tiny_seers import FIRST, SEERS, write_seer
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from squall import ContextLengthExceeded, InvalidRequest, Model
from squall.api.jobs import chat_ids, start_chat
from squall.api.requests import ChatCompletionRequest

CAT, DOG = draw("text", 60, 40), draw("gradient", 90, 140)
EXACT: dict[str, Any] = {"weights": "f32", "kv_dtype": "f32", "threads": 2}
PIL = {
    "llava": "Llava", "qwen2vl": "Qwen2VL", "llava_next": "LlavaNext", "idefics2": "Idefics2",
    "vllama": "Mllama", "smolvlm": "SmolVLM", "gemma3": "Gemma3",
}  # fmt: skip


@pytest.fixture(scope="module", params=SEERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seer(tmp_path_factory.mktemp("seer") / request.param, request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with Model.open(folder, **EXACT) as opened:
        yield opened


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model.open(write_seer(tmp_path_factory.mktemp("llava")), **EXACT) as opened:
        yield opened


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def image(source: object, **more: str) -> dict[str, Any]:
    return {"type": "image", "image": source, **more}


def ask(model: Model, *messages: dict[str, Any], **options: Any) -> tuple[int, ...]:
    generation = model.generate([*messages], temperature=0, **{"max_tokens": 8} | options)
    generation.read()
    return tuple(generation.ids)


def theirs(folder: Path, ids: list[int], pictures: list[Image.Image]) -> tuple[int, ...]:
    """The answer of transformers to a prompt."""
    name = folder.name
    kind = getattr(transformers, SEERS[name].model)
    model = kind.from_pretrained(folder, dtype=torch.float32)
    processor = getattr(transformers, f"{PIL[name]}ImageProcessorPil")(**SEERS[name].images)
    nested: Any = [pictures] if name in ("idefics2", "vllama", "smolvlm") else pictures
    given: dict[str, Any] = dict(processor(nested, return_tensors="pt")) if pictures else {}
    given["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
    if name == "qwen2vl":
        given["mm_token_type_ids"] = torch.tensor([[int(i == 262) for i in ids]])
    if name == "gemma3":
        given["token_type_ids"] = torch.tensor([[int(i == FIRST + 15) for i in ids]])
        given.pop("num_crops", None)
    if name == "vllama" and pictures:
        seen = get_cross_attention_token_mask(ids, FIRST + 7)
        tiles = given.pop("num_tiles")
        mask = convert_sparse_cross_attention_mask_to_dense([seen], tiles, 4, len(ids))
        given["cross_attention_mask"] = torch.tensor(mask)
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 299, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(input_ids=torch.tensor([ids]), **given, **asked)
    return tuple(found[0, len(ids) :].tolist())


def test_answers_of_transformers(model: Model, folder: Path) -> None:
    answer = {"role": "assistant", "content": "A cat."}
    chats: list[list[dict[str, Any]]] = [
        [user(image(CAT), text("What?"))],
        [user(image(CAT), image(DOG), text("Which?"))],
        [user(image(DOG), text("a")), answer, user(text("b"), image(CAT))],
        [user(text("Hi"))],
    ]
    for chat in chats if folder.name in PIL else ():  # transformers has no Phi 3 Vision
        ids = model.encode_chat(chat)
        pictures = [part["image"] for m in chat for part in m["content"] if "image" in part]
        assert ask(model, *chat, ignore_eos=True) == theirs(folder, ids, pictures)
    assert len({ask(model, *chat) for chat in chats}) == len(chats)


def test_forms_of_an_image(llava: Model, tmp_path: Path) -> None:
    data = io.BytesIO()
    CAT.save(data, "PNG")
    (tmp_path / "a cat.png").write_bytes(data.getvalue())
    coded = base64.b64encode(data.getvalue()).decode()
    forms = [
        image(np.asarray(CAT)), image(data.getvalue()), image(tmp_path / "a cat.png"),
        image(str(tmp_path / "a cat.png")), image(coded), image(f"data:image/png;base64,{coded}"),
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}},
        {"type": "input_image", "image_url": (tmp_path / "a cat.png").as_uri()},
    ]  # fmt: skip
    wanted = ask(llava, user(image(CAT), text("x")))
    encoded = llava.sight.encoded if llava.sight else 0
    assert {ask(llava, user(form, text("x"))) for form in forms} == {wanted}
    assert llava.sight
    assert llava.sight.encoded == encoded


def test_a_second_turn_reads_nothing_again(model: Model) -> None:
    assert model.sight
    first = user(image(draw("noise", 50, 50)), text("What is this?"))
    ask(model, first)
    read = model.sight.encoded
    answer = {"role": "assistant", "content": "A cat."}
    with model.generate([first, answer, user(text("Is it?"))], max_tokens=1) as generation:
        generation.read()
    assert model.sight.encoded == read
    assert generation.usage.cached_tokens > 16


def test_images_that_do_not_fit_are_not_read(folder: Path) -> None:
    with Model.open(folder, context=32, **EXACT) as small:
        assert small.sight
        many = user(image(DOG), image(draw("noise", 50, 50)), text("x"))
        with pytest.raises(ContextLengthExceeded, match=r"tokens, \d+ of them of 2 images, do not"):
            ask(small, many)
        assert small.sight.encoded == 0
        request = ChatCompletionRequest(messages=[many], truncate_sequence=True, max_tokens=2)
        usage = start_chat(small, request).response().usage
        assert usage.prompt_tokens < 32


def test_low_detail(model: Model) -> None:
    large = draw("noise", 700, 700)
    full, low = (user(image(large, detail=detail), text("x")) for detail in ("high", "low"))
    counts = [len(model.encode_chat([message])) for message in (full, low)]
    assert counts[1] <= counts[0]
    # Nor are the rows of one those of the other.
    assert ask(model, full) == ask(model, user(image(large), text("x")))
    assert model.sight
    read = model.sight.encoded
    ask(model, low)
    assert model.sight.encoded == read + 1


def test_requests_have_the_same_prompt(llava: Model) -> None:
    messages = [user(image(CAT), text("What is this?"))]
    request = ChatCompletionRequest(messages=messages, temperature=0, max_tokens=8)
    assert chat_ids(llava, request) == llava.encode_chat(messages)
    response = start_chat(llava, request).response()
    assert response.usage.prompt_tokens == len(llava.encode_chat(messages))
    assert response.choices[0].message.content == llava.decode(ask(llava, *messages))


def test_a_word_that_looks_like_an_image_is_none(llava: Model) -> None:
    assert llava.sight
    read, token = llava.sight.encoded, llava.tokenizer.encode("<image>", specials=True)
    assert token[0] not in llava.encode_chat([{"role": "user", "content": "<image>"}])
    ask(llava, user(text("What does <image> mean?")))
    assert llava.sight.encoded == read


def test_models_without_eyes() -> None:
    with Model.open(context=64) as model, pytest.raises(InvalidRequest, match="reads no images"):
        model.generate([user(image(CAT), text("x"))])


def test_a_longest_edge(folder: Path) -> None:
    large = user(image(draw("noise", 200, 100)), text("x"))
    with Model.open(folder, max_edge=60, **EXACT) as small, Model.open(folder, **EXACT) as model:
        counts = [len(opened.encode_chat([large])) for opened in (small, model)]
    assert (counts[0] < counts[1]) == (folder.name == "qwen2vl")


def test_a_file_is_no_long_text(llava: Model) -> None:
    """However many characters an image has, its tokens are what counts."""
    data = io.BytesIO()
    draw("noise", 400, 400).save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    assert len(url) > 64 * llava.context
    messages = [user({"type": "image_url", "image_url": {"url": url}}, text("x"))]
    request = ChatCompletionRequest(messages=messages, max_tokens=2)
    assert start_chat(llava, request).response().usage.prompt_tokens < 64
    with pytest.raises(ContextLengthExceeded, match="characters cannot fit"):
        start_chat(llava, ChatCompletionRequest(messages=[user(text(url))]))
