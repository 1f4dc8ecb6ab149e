"""A Runner of a model that makes pictures, which are gradients here."""

from __future__ import annotations

import asyncio
import base64
import io
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import wait_for
from painter import Painter, opened
from PIL import Image

import squall
from squall import (
    AsyncRunner,
    ChatCompletionRequest,
    CompletionRequest,
    DiffusionArchitecture,
    EngineStopped,
    ImageModel,
    InvalidRequest,
    Model,
    ModelDType,
    Opening,
    Picture,
    Runner,
    Which,
    tools,
)
from squall.checkpoints.hub import Hub
from squall.diffusion.model import Painting

FLUX = "black-forest-labs/FLUX.1-schnell"
WHICH = Which.DiffusionPlain(FLUX, DiffusionArchitecture.FluxOffloaded)
FORMAT = squall.ImageGenerationResponseFormat
SMALL = {"height": 32, "width": 48}
CHAT = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "Hello!"}])


@pytest.fixture(autouse=True)
def openings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Opening]:
    """What is opened, with painters in place of models; temporary files are below tmp_path."""
    asked: list[Opening] = []

    def note(opening: Opening) -> ImageModel:
        asked.append(opening)
        return opened(opening)

    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(ImageModel, "open_with", note)
    monkeypatch.chdir(tmp_path / "here")
    return asked


@pytest.fixture
def runner() -> Iterator[Runner]:
    with Runner(WHICH, seed=7) as runner:
        yield runner


def painted(prompt: str = "a cat", seed: int = 7) -> np.ndarray:
    request = squall.PictureRequest(prompt=prompt, seed=seed, **SMALL)
    return Painter().paint(request, lambda *_: None).pixels


def test_a_file(runner: Runner, tmp_path: Path) -> None:
    first, other = (runner.generate_image("a cat", FORMAT.Url, **SMALL) for _ in range(2))
    (choice,) = first.data
    assert first.choices is first.data
    assert first.to_dict() == {
        "created": first.created, "data": [{"seed": 7, "url": choice.url}]
    }  # fmt: skip
    assert choice.url is not None
    assert choice.b64_json is None
    path = Path(choice.url)
    assert path.parents[1] == tmp_path / "temporary"
    assert sorted(path.parent.iterdir()) == sorted(Path(r.data[0].url) for r in (first, other))
    assert path.parent.stat().st_mode & 0o077 == 0
    assert not [*Path.cwd().iterdir()]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), painted())
    runner.close()
    assert path.exists()


def test_base64(runner: Runner, tmp_path: Path) -> None:
    (choice,) = runner.generate_image("a noted cat", FORMAT.B64Json, **SMALL).data
    begin, _, text = (choice.b64_json or "").partition(",")
    assert begin == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    np.testing.assert_array_equal(np.asarray(image), painted())
    assert choice.to_dict() == {"seed": 7, "b64_json": choice.b64_json, "notes": ["a note"]}
    assert not [*(tmp_path / "temporary").iterdir()]


def test_the_size_is_the_seeds(runner: Runner) -> None:
    (choice,) = runner.generate_image("a cat", FORMAT.Url).data
    with Image.open(choice.url or "") as image:
        assert image.size == (1280, 720)


def test_a_folder_that_is_given(tmp_path: Path) -> None:
    with Runner(WHICH, image_folder="new/one") as runner:
        (choice,) = runner.generate_image("a cat", FORMAT.Url, **SMALL).data
    assert Path(choice.url or "").parent == tmp_path / "here/new/one"


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/none"])
def test_a_folder_that_cannot_be_is_told_first(folder: str) -> None:
    Path("file").touch()
    with Runner(WHICH, image_folder=folder) as runner:
        with pytest.raises(InvalidRequest, match=r"image_folder: .*choose another"):
            runner.generate_image("a cat", FORMAT.Url)
        assert runner.model.stats().pictures == 0
        assert runner.generate_image("a cat", FORMAT.B64Json, **SMALL).data


def test_a_full_disk_leaves_nothing(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def some(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", some)
    with pytest.raises(InvalidRequest, match=r"No space left.*B64Json"):
        runner.generate_image("a cat", FORMAT.Url, **SMALL)
    assert not [*(tmp_path / "temporary").rglob("*.png")]


def test_what_is_opened(openings: list[Opening]) -> None:
    which = Which.DiffusionPlain(FLUX, DiffusionArchitecture.Flux, ModelDType.BF16)
    Runner(which, token_source="env:T", in_situ_quant="Q4K", threads=2, no_paged_attn=True).close()
    hub = Hub(token_source="env:T")
    options: Any = {"dtype": "bf16", "isq": "Q4K", "threads": 2, "hub": hub}
    assert openings == [Opening(FLUX, architecture="flux", **options)]


TEXTS: dict[str, Any] = {
    "max_seqs": 2, "no_kv_cache": True, "prefix_cache_n": 0, "speculative_gamma": 3,
    "which_draft": Which.Plain("x"), "chat_template": "chatml", "num_device_layers": ["0:3"],
    "anymoe_config": object(), "pa_gpu_mem": 9, "pa_gpu_mem_usage": 0.5, "pa_ctxt_len": 99,
    "pa_blk_size": 32, "prompt_batchsize": 9, "context": 99,
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_arguments_for_text(name: str, openings: list[Opening]) -> None:
    problem = f"^{name} is not for models that make pictures; there are image_folder, in_situ_quant"
    with pytest.raises(InvalidRequest, match=problem):
        Runner(WHICH, **{name: TEXTS[name]})
    assert not openings


def test_a_model_that_is_open_stays_open() -> None:
    with opened(Opening(FLUX)) as model:
        with Runner(model) as runner:
            assert runner.model is model
        with pytest.raises(InvalidRequest, match="threads is not for a model that is open"):
            Runner(model, threads=2)
        assert Runner(model).generate_image("a cat", FORMAT.B64Json, **SMALL).data


def test_text_asked_of_a_painter(runner: Runner) -> None:
    for ask in (
        lambda: runner.send_chat_completion_request(CHAT),
        lambda: runner.stream_chat_completion_request(CHAT),
        lambda: runner.send_completion_request(CompletionRequest(prompt="a", model="m")),
        lambda: runner.stream_completion_request(CompletionRequest(prompt="a", model="m")),
        lambda: runner.tokenize_text("a"),
        lambda: runner.detokenize_text([1]),
        lambda: runner.activate_adapters(["a"]),
        lambda: runner.send_re_isq("Q4K"),
        lambda: tools.run(runner, "a", []),
    ):
        with pytest.raises(InvalidRequest, match="makes pictures; use generate_image"):
            ask()


def test_pictures_asked_of_a_model_of_text(model: Model) -> None:
    with pytest.raises(InvalidRequest, match=r"makes no pictures; .*DiffusionPlain"):
        Runner(model).generate_image("a cat", FORMAT.Url)
    with pytest.raises(InvalidRequest, match="image_folder: the model makes no pictures"):
        Runner(model, image_folder="x")


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (("", FORMAT.Url), "the prompt is empty"),
        (("a" * 33, FORMAT.Url), "more than 32"),
        (("a", FORMAT.Url, 30, 48), "height is 30"),
        (("a", FORMAT.Url, 32, -16), "width is -16"),
        (("a", "gif"), "response_format is 'gif'; .*Url or .B64Json"),
    ],
)
def test_what_cannot_be_made(runner: Runner, asked: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        runner.generate_image(*asked)


def test_a_closed_model(runner: Runner) -> None:
    made: list[BaseException] = []

    def ask() -> None:
        try:
            runner.generate_image("a slow cat", FORMAT.B64Json, **SMALL)
        except EngineStopped as error:
            made.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: runner.model.busy)
    runner.close()
    thread.join()
    assert "closed before the picture was done" in str(made[0])
    with pytest.raises(EngineStopped):
        runner.generate_image("a cat", FORMAT.Url)


def test_an_interrupt_ends_the_picture(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Picture:
        wait_for(lambda: runner.model.busy)
        raise KeyboardInterrupt

    monkeypatch.setattr(Painting, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.generate_image("a slow cat", FORMAT.Url, **SMALL)
    wait_for(lambda: not runner.model.busy)
    assert runner.model.stats().pictures == 0


def test_async() -> None:
    async def ask() -> None:
        async with AsyncRunner(WHICH, seed=7) as runner:
            asked = [
                runner.generate_image("a cat", wanted, **SMALL)
                for wanted in (FORMAT.Url, FORMAT.B64Json)
            ]
            file, text = await asyncio.gather(*asked)
            data = Path(file.data[0].url or "").read_bytes()
            assert (text.data[0].b64_json or "").endswith(base64.b64encode(data).decode())
            with pytest.raises(InvalidRequest, match="makes pictures"):
                await runner.send_chat_completion_request(CHAT)
            with pytest.raises(InvalidRequest, match="width is 3"):
                await runner.generate_image("a cat", FORMAT.Url, width=3)

    asyncio.run(ask())


def test_who_waits_no_longer_ends_the_picture() -> None:
    async def ask() -> None:
        async with AsyncRunner(WHICH) as runner:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(runner.generate_image("a slow cat", FORMAT.Url), 0.2)
            await asyncio.to_thread(wait_for, lambda: not runner.model.busy)
            assert runner.model.stats().pictures == 0

    asyncio.run(ask())


def test_a_model_that_is_closed_cancels_no_task() -> None:
    async def ask() -> None:
        runner = AsyncRunner(WHICH)
        task = asyncio.ensure_future(runner.generate_image("a slow cat", FORMAT.Url))
        await asyncio.to_thread(wait_for, lambda: runner.model.busy)
        await asyncio.to_thread(runner.close)
        with pytest.raises(EngineStopped, match="closed before"):
            await task

    asyncio.run(ask())
