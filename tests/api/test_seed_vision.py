"""mistral.rs's Python and server examples of models that see, call by call.

What is a model of the hub there is a folder of that name here, with a tiny model, and the picture
of the web is a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from pictures import draw
from tiny_seers import write_seer

import squall
from squall import ChatCompletionRequest, InvalidRequest, Runner, VisionArchitecture, Which
from squall.server.app import create_app
from squall.server.options import ServerOptions
from squall.vision.images import Media

QUESTION = "What is shown in this image? Write a detailed response analyzing the scene."
# By mistral.rs's name: its model, its architecture, and what its example says.
EXAMPLES = {
    "phi3v": ("microsoft/Phi-3.5-vision-instruct", "Phi3V", f"<|image_1|>\n{QUESTION}"),
    "idefics2": ("HuggingFaceM4/idefics2-8b-chatty", "Idefics2", QUESTION),
    "llava_next": ("llava-hf/llava-v1.6-mistral-7b-hf", "LLaVANext", f"<image>{QUESTION}"),
    "llava": ("llava-hf/llava-1.5-7b-hf", "LLaVA", f"<image>{QUESTION}"),
    "vllama": ("meta-llama/Llama-3.2-11B-Vision-Instruct", "VLlama", f"<|image|>{QUESTION}"),
    "qwen2vl": (
        "Qwen/Qwen2-VL-2B-Instruct", "Qwen2VL",
        f"<|vision_start|><|image_pad|><|vision_end|>{QUESTION}",
    ),
}  # fmt: skip
PICTURE = "picture.png"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the examples name."""
    root = tmp_path_factory.mktemp("seed")
    for name, (model, _, _) in EXAMPLES.items():
        write_seer(root / model, name)
    draw("text", 80, 60).save(root / PICTURE)
    return root


@pytest.fixture(autouse=True)
def _in_the_folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)


def messages(text: str, url: str = PICTURE) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("name", EXAMPLES)
def test_python(name: str) -> None:
    model, arch, text = EXAMPLES[name]
    runner = Runner(
        which=Which.VisionPlain(
            model_id=model,
            tokenizer_json=None,
            arch=VisionArchitecture[arch],
        ),
    )
    with runner:
        given: dict[str, Any] = {
            "model": name, "max_tokens": 8, "presence_penalty": 1.0, "top_p": 0.1,
            "temperature": 0.1, "seed": 3,
        }  # fmt: skip
        res = runner.send_chat_completion_request(
            ChatCompletionRequest(messages=messages(text), **given)
        )
        without = runner.send_chat_completion_request(
            ChatCompletionRequest(messages=messages(QUESTION), **given)
        )
    assert res.usage.completion_tokens
    # A placeholder says where the image goes; it adds nothing to what a part does.
    if name in ("idefics2", "vllama", "qwen2vl", "phi3v"):
        assert res.choices[0].message.content == without.choices[0].message.content
    assert abs(res.usage.prompt_tokens - without.usage.prompt_tokens) <= 1


def test_quantized_while_it_is_read() -> None:
    model, _, text = EXAMPLES["llava"]
    which = Which.VisionPlain(model, VisionArchitecture.LLaVA, max_edge=40)
    with Runner(which, in_situ_quant="Q8_0") as runner:
        request = ChatCompletionRequest(messages=messages(text), max_tokens=4)
        assert runner.send_chat_completion_request(request).usage.prompt_tokens > 16


def test_an_architecture_that_it_is_not() -> None:
    with pytest.raises(squall.SquallError):
        Runner(Which.VisionPlain(EXAMPLES["llava"][0], VisionArchitecture.Qwen2VL))
    with pytest.raises(squall.UnsupportedModel, match="qwen2vl"):
        Runner(Which.VisionPlain(EXAMPLES["llava"][0], "kosmos"))


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[openai.OpenAI]:
    """The official client at a server that may read the pictures of the folder."""
    with squall.Model.open(models / EXAMPLES["llava"][0]) as model:
        options = ServerOptions(media=Media(folder=models))
        with TestClient(create_app(model, options), base_url="http://127.0.0.1") as transport:
            yield openai.OpenAI(
                base_url="http://127.0.0.1/v1", api_key="foobar", http_client=transport
            )


def test_server(client: openai.OpenAI, models: Path) -> None:
    url = (models / PICTURE).as_uri()
    completion = client.chat.completions.create(
        model="default", messages=messages(EXAMPLES["llava"][2], url), max_tokens=8,
        frequency_penalty=1.0, top_p=0.1, temperature=0,
    )  # fmt: skip
    assert completion.choices[0].message.content
    assert completion.usage
    assert completion.usage.prompt_tokens > 16


def test_a_server_refuses_what_its_owner_did_not_allow(client: openai.OpenAI) -> None:
    for url in ("file:///etc/passwd", "http://127.0.0.1:1/x.png"):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="default", messages=messages("x", url))


def test_wrong_counts_of_placeholders(client: openai.OpenAI, models: Path) -> None:
    url = (models / PICTURE).as_uri()
    with pytest.raises(openai.BadRequestError, match="images: 1, and placeholders <image> in its"):
        client.chat.completions.create(
            model="default", messages=messages("<image> and <image>", url)
        )


def test_names(models: Path) -> None:
    assert {arch.name for arch in VisionArchitecture} >= {arch for _, arch, _ in EXAMPLES.values()}
    with pytest.raises(InvalidRequest, match="max_edge"):
        Which.VisionPlain(str(models), max_edge="large").opening()  # type: ignore[arg-type]
