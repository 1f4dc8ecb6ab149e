"""mistral.rs's examples of a model that makes pictures, in Python and over HTTP, call by call."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image
from tiny_flux import pipeline

from squall import (
    AsyncRunner,
    ChatCompletionRequest,
    DiffusionArchitecture,
    ImageGenerationResponseFormat,
    ImageModel,
    InvalidRequest,
    Runner,
    Which,
)
from squall.server.app import create_app

MODEL, PROMPT = "black-forest-labs/FLUX.1-schnell", "A vibrant sunset in the mountains."
SIZE = {"height": 32, "width": 48}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model that the examples name."""
    root = tmp_path_factory.mktemp("seed")
    pipeline(root / MODEL)
    return root


@pytest.fixture(autouse=True)
def _in_the_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def painter(root: Path) -> Iterator[ImageModel]:
    with ImageModel.open(root / MODEL) as found:
        yield found


def pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)))


def wanted(painter: ImageModel, seed: int) -> NDArray[np.uint8]:
    return painter.generate(PROMPT, seed=seed, **SIZE)[0].pixels


@pytest.mark.parametrize("arch", ["Flux", "FluxOffloaded"])
def test_python(painter: ImageModel, arch: str, root: Path) -> None:
    before = sorted(root.iterdir())
    which = Which.DiffusionPlain(model_id=MODEL, arch=DiffusionArchitecture[arch])
    with Runner(which=which, seed=3) as runner:
        res = runner.generate_image(PROMPT, ImageGenerationResponseFormat.Url, **SIZE)
        file = Path(res.choices[0].url or "")
        assert (pixels(file.read_bytes()) == wanted(painter, 3)).all()
        res = runner.generate_image(PROMPT, ImageGenerationResponseFormat.B64Json, **SIZE)
        head, _, text = (res.data[0].b64_json or "").partition(",")
        assert head == "data:image/png;base64"
        assert (pixels(base64.b64decode(text)) == wanted(painter, 3)).all()
        assert res.data[0].seed == 3
    file.unlink()
    file.parent.rmdir()
    assert sorted(root.iterdir()) == before  # not where the program is


def test_python_awaited(painter: ImageModel, tmp_path: Path) -> None:
    async def ask() -> str:
        async with AsyncRunner(painter, image_folder=tmp_path / "new") as runner:
            res = await runner.generate_image(PROMPT, ImageGenerationResponseFormat.Url, **SIZE)
        return res.data[0].url or ""

    file = Path(asyncio.run(ask()))
    assert file.parent == tmp_path / "new"
    seed = painter.generate(PROMPT, seed=1, **SIZE)[0].seed  # it is open still
    assert (seed, pixels(file.read_bytes()).shape) == (1, (32, 48, 3))


def test_what_is_not_for_pictures(painter: ImageModel, tmp_path: Path) -> None:
    runner, chat = Runner(painter), ChatCompletionRequest(messages="Hi!", model="")
    for ask in (
        lambda: runner.send_chat_completion_request(chat),
        lambda: runner.tokenize_text("Hi!"),
        lambda: runner.send_re_isq("Q4K"),
    ):
        with pytest.raises(InvalidRequest, match="makes pictures"):
            ask()
    with pytest.raises(InvalidRequest, match="response_format"):
        runner.generate_image(PROMPT, "Url", **SIZE)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    runner, url = Runner(painter, image_folder=tmp_path / "file"), ImageGenerationResponseFormat.Url
    with pytest.raises(InvalidRequest, match="image_folder"):
        runner.generate_image(PROMPT, url, **SIZE)
    with pytest.raises(InvalidRequest, match="chat_template"):
        Runner(Which.DiffusionPlain(MODEL, DiffusionArchitecture.Flux), chat_template="x")


def test_http(painter: ImageModel) -> None:
    with TestClient(create_app(painter), base_url="http://127.0.0.1") as http:
        client = openai.OpenAI(
            api_key="foobar", base_url="http://127.0.0.1/v1/", http_client=http, max_retries=0
        )
        result = client.images.generate(
            model="flux", prompt=PROMPT, n=1, extra_body={**SIZE, "seed": 4},
        )  # fmt: skip
        (image,) = result.data or []
        found = http.get(image.url or "")
        assert (pixels(found.content) == wanted(painter, 4)).all()
