"""Chats with Llama 3.2 Vision, through the engine: answers as transformers' and PEFT's models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mllama_oracle
import numpy as np
import peft
import pytest
import torch
import transformers
from pictures import draw
from PIL import Image
from tiny_seers import SEERS, write_seer

from squall import Model, convert
from squall.adapters.lora import read
from squall.adapters.target import Target
from squall.checkpoints.folder import open_folder
from squall.recipes import load

pytestmark = pytest.mark.filterwarnings("ignore")
WIDE, HIGH, SQUARE = draw("gradient", 99, 20), draw("text", 40, 90), draw("noise", 70, 75)
GIVEN: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 1}
Turn = str | Sequence[str | Image.Image]


def chat(*turns: Turn) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn, of texts and images."""

    def part(said: str | Image.Image) -> dict[str, Any]:
        if isinstance(said, str):
            return {"type": "text", "text": said}
        return {"type": "image", "image": said}

    return [
        {
            "role": ("user", "assistant")[number % 2],
            "content": turn if isinstance(turn, str) else [part(said) for said in turn],
        }
        for number, turn in enumerate(turns)
    ]


CHATS = {
    "one": chat([WIDE, "What is this?"]),
    "a turn more": chat([WIDE, "What is this?"], "A cat", "And now?"),
    "side by side": chat(["Look: ", WIDE, HIGH, "which?"]),
    "later, apart": chat("Hello there", "Hi", ["Later", SQUARE, "and", HIGH]),
    "none": chat("Only text here, of some length, so that it fills blocks of the cache"),
    "another image": chat([WIDE, "What is this?"], "A cat", ["And ", SQUARE, " now?"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seer(tmp_path_factory.mktemp("mllama"), "vllama")


@pytest.fixture
def model(folder: Path) -> Iterator[Model]:
    with Model.open(folder, weights="f32", kv_dtype="f32", context=512) as opened:
        yield opened


def theirs(folder: Path) -> Any:
    kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def check(oracle: Any, model: Model, messages: Any, answer: Any) -> None:
    """The answer is what transformers' model finds likeliest, and as likely."""
    prompt = model.request(messages, model.defaults.sampling({})).ids
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    told = [sampled for piece in answer for sampled in piece.logprobs]
    found = mllama_oracle.logits(oracle, prompt, answer.ids, images, SEERS["vllama"].images)
    found = found[len(prompt) - 1 : -1]
    assert answer.ids == found.argmax(-1).tolist()
    right = torch.log_softmax(torch.tensor(found), -1).max(-1).values.numpy()
    assert np.abs(np.array([sampled.logprob for sampled in told]) - right).max() < 1e-4


def test_answers(folder: Path, model: Model) -> None:
    oracle = theirs(folder)
    for messages in CHATS.values():
        check(oracle, model, messages, model.generate(messages, **GIVEN))
    assert model.sight is not None
    assert model.sight.encoded == 3  # each image once


def test_together_and_cached_and_after_eviction(folder: Path, model: Model) -> None:
    """The same ids and the same log-probabilities to the last bit."""

    def told(answer: Any) -> Any:
        return [(piece.ids, piece.logprobs) for piece in answer]

    alone = [told(model.generate(messages, **GIVEN)) for messages in CHATS.values()]
    answers = [model.generate(messages, **GIVEN) for messages in CHATS.values()]
    with ThreadPoolExecutor(len(answers)) as threads:
        assert list(threads.map(told, answers)) == alone
    assert all(answer.usage.cached_tokens > 0 for answer in answers)
    options: dict[str, Any] = {"weights": "f32", "kv_dtype": "f32", "context": 512}
    with Model.open(folder, **options, image_bytes=1, kv_tokens=512) as small:
        for _ in range(2):
            assert [told(small.generate(m, **GIVEN)) for m in CHATS.values()] == alone


def test_caches_go_by_all_images(model: Model) -> None:
    """What stands before an image has seen it, so another image means another beginning."""
    said = "A beginning that fills some blocks of the cache, since it is long"
    first, second = chat([said, WIDE, "?"]), chat([said, HIGH, "?"])
    model.generate(first, **GIVEN).read()
    again, other = model.generate(first, **GIVEN), model.generate(second, **GIVEN)
    again.read()
    other.read()
    assert again.usage.cached_tokens > 32
    assert other.usage.cached_tokens == 0


def test_penalties_of_tokens_that_cannot_be_answers(model: Model) -> None:
    answer = model.generate(
        CHATS["side by side"], max_tokens=8, temperature=0.9, seed=3, repetition_penalty=1.4,
        frequency_penalty=0.5, presence_penalty=0.5, ignore_eos=True, dry=model.dry(0.8),
    )  # fmt: skip
    answer.read()
    assert len(answer.ids) == 8


def test_adapters_beside_the_weights_and_merged(folder: Path, tmp_path: Path) -> None:
    """PEFT's: of the tower, the connector, and both kinds of layers of the language model."""
    modules = r".*(q_proj|fc1|multi_modal_projector|cross_attn.*(k_proj|v_proj|o_proj)|down_proj)"
    torch.manual_seed(3)
    oracle = peft.get_peft_model(theirs(folder), peft.LoraConfig(r=4, target_modules=modules))
    for name, weight in oracle.named_parameters():
        if ".lora_B." in name:
            weight.data = torch.randn_like(weight) * 0.1
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    oracle.save_pretrained(adapter)
    options: dict[str, Any] = {"weights": "f32", "kv_dtype": "f32", "context": 512}
    for merge in (False, True):
        with Model.open(folder, **options, adapters={"a": adapter}, merge=merge) as model:
            given = GIVEN if merge else {**GIVEN, "adapters": "a"}
            for name in ("side by side", "later, apart"):
                check(oracle, model, CHATS[name], model.generate(CHATS[name], **given))
    checkpoint = open_folder(folder)
    recipe = load(checkpoint)
    lora = read(adapter, Target.of(checkpoint, recipe))
    convert.merge_folder(checkpoint, recipe, [(lora, 1.0)], merged)
    with Model.open(merged, **options) as model:
        check(oracle, model, CHATS["one"], model.generate(CHATS["one"], **GIVEN))
