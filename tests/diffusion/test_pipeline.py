"""Whole pictures against diffusers, and the same bytes however they are made."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import test_flux
import test_vae
import tiny_flux
import torch
from diffusers import FluxImg2ImgPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from memory import in_process, told_by_linux
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from transformers import T5Config, T5EncoderModel
from typer.testing import CliRunner

from squall import ImageModel, Model, Opening, PictureRequest
from squall.cli.app import app
from squall.diffusion import noise, pipeline
from squall.diffusion.files import is_image_model
from squall.errors import InvalidCheckpoint, InvalidRequest, OutOfMemory, UnsupportedModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
WIDTH, HEIGHT = 48, 32
LINES, COLUMNS = HEIGHT // 8, WIDTH // 8
PROMPT = "a cat on a mat, 8k"
WAIT_S = 60


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schnell")
    return folder, tiny_flux.pipeline(folder)


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dev")
    return folder, tiny_flux.pipeline(folder, guidance=True)


def asked(prompt: str = PROMPT, **fields) -> PictureRequest:
    given = {"width": WIDTH, "height": HEIGHT, "seed": 3, "steps": 3} | fields
    return PictureRequest(prompt=prompt, **given)


def made(folder: Path, request: PictureRequest | None = None, **options) -> np.ndarray:
    with ImageModel.open(folder, **options) as model:
        return model.submit(request or asked()).result(WAIT_S).pixels


def latents(seed: int = 3) -> torch.Tensor:
    """Noise as diffusers takes it."""
    return torch.from_numpy(noise.packed(seed, tiny_flux.LATENT, LINES, COLUMNS))[None]


def wanted(pipe, prompt: str = PROMPT, **options) -> np.ndarray:
    options = {"num_inference_steps": 3, "latents": latents()} | options
    image = pipe(prompt, width=WIDTH, height=HEIGHT, **options).images[0]
    return np.asarray(image).astype(int)


def differ(found: np.ndarray, picture: np.ndarray) -> int:
    return int(np.abs(found.astype(int) - picture).max())


# ---- against diffusers ----


def test_schnell(schnell):
    folder, pipe = schnell
    picture = wanted(pipe, max_sequence_length=256)
    assert picture.std() > 20
    assert differ(made(folder), picture) <= 1
    assert differ(made(folder, asked("a dog")), picture) > 1
    assert differ(made(folder, asked(seed=4)), picture) > 1
    one = wanted(pipe, max_sequence_length=256, num_inference_steps=1)
    assert differ(made(folder, asked(steps=1)), one) <= 1


@pytest.mark.parametrize("guidance", [None, 1.5])
def test_dev(dev, guidance):
    folder, pipe = dev
    options = {"guidance_scale": guidance or 4.0, "max_sequence_length": 512}
    picture = wanted(pipe, **options)
    assert differ(made(folder, asked(guidance=guidance)), picture) <= 1
    assert differ(made(folder, asked(guidance=9.0)), picture) > 1


def test_the_defaults_are_the_seeds(schnell, dev):
    for (folder, _), known in ((schnell, (4, None, 256)), (dev, (50, 4.0, 512))):
        with ImageModel.open(folder) as model:
            assert (model.steps, model.guidance, model.max_prompt) == known
            assert model.path == folder
            assert {total.format for total in model.formats} == {"f32"}


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_a_picture_to_begin_with(schnell, monkeypatch, strength):
    folder, pipe = schnell
    shown = np.random.default_rng(0).integers(0, 256, (2 * HEIGHT, 2 * WIDTH, 3), np.uint8)
    drawn = torch.from_numpy(noise.normals(3, tiny_flux.LATENT * LINES * COLUMNS))
    drawn = drawn.reshape(1, tiny_flux.LATENT, LINES, COLUMNS)
    module = diffusers.pipelines.flux.pipeline_flux_img2img
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: drawn)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mode())
    theirs = FluxImg2ImgPipeline.from_pipe(pipe)
    theirs.set_progress_bar_config(disable=True)
    picture = wanted(
        theirs, image=Image.fromarray(shown), strength=strength, latents=None,
        max_sequence_length=256, num_inference_steps=4,
    )  # fmt: skip
    request = asked(image=shown, strength=strength, steps=4)
    found = made(folder, request)
    assert differ(found, picture) <= 1
    if strength < 1:
        assert differ(made(folder, replace(request, image=shown[::-1])), picture) > 1


def test_a_picture_of_another_shape_is_cut_in_the_middle(schnell):
    """It covers the new one; what sticks out on two sides is cut off."""
    folder, _ = schnell
    shown = np.random.default_rng(0).integers(0, 256, (HEIGHT, 3 * WIDTH, 3), np.uint8)
    options = {"strength": 0.5, "steps": 2}
    middle = made(folder, asked(image=shown[:, WIDTH : 2 * WIDTH], **options))
    assert (made(folder, asked(image=shown, **options)) == middle).all()
    shown[:, :WIDTH] = 0
    assert (made(folder, asked(image=shown, **options)) == middle).all()


def test_progress_is_told_of_the_steps_that_are_made(schnell):
    folder, _ = schnell
    told, shown = [], np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    with ImageModel.open(folder) as model:
        model.submit(asked(), lambda *at: told.append(at)).result(WAIT_S)
        assert told == [(step, 3) for step in range(4)]
        told.clear()
        request = asked(image=shown, strength=0.5, steps=4)
        model.submit(request, lambda *at: told.append(at)).result(WAIT_S)
        assert told == [(step, 2) for step in range(3)]
        stats = model.stats()
        assert min(stats.text_s, stats.steps_s, stats.decode_s) > 0


def test_a_long_prompt_is_told(schnell):
    folder, pipe = schnell
    with ImageModel.open(folder) as model:
        with pytest.raises(InvalidRequest, match=r"300.* tokens, and this model reads 256"):
            model.submit(asked("a" * 298))
        prompt = "cat " * 100
        picture = model.submit(asked(prompt)).result(WAIT_S)
        assert picture.notes == ("CLIP read 77 of the prompt's 102 tokens; T5 read all of them",)
        assert differ(picture.pixels, wanted(pipe, prompt, max_sequence_length=256)) <= 1
        assert model.submit(asked()).result(WAIT_S).notes == ()


def test_the_same_prompt_is_read_once(schnell, monkeypatch):
    folder, _ = schnell
    with ImageModel.open(folder) as model:
        first = model.submit(asked()).result(WAIT_S)
        read = []
        monkeypatch.setattr(model._pipeline.parts["T5"], "opened", read.append)
        again = model.submit(asked()).result(WAIT_S)
        assert (first.pixels == again.pixels).all()
        with pytest.raises(TypeError):
            model.submit(asked("another")).result(WAIT_S)


# ---- however it is made ----


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bytes_whatever_the_threads(schnell, threads):
    folder, _ = schnell
    assert (made(folder, threads=threads) == made(folder, threads=2)).all()


@pytest.mark.parametrize("image", [None, np.full((20, 20, 3), 99, np.uint8)])
def test_the_same_bytes_layer_by_layer(dev, image):
    folder, _ = dev
    request = asked(image=image)
    whole = made(folder, request)
    assert (made(folder, request, architecture="flux-offloaded") == whole).all()


def test_the_same_bytes_with_weights_for_a_moment_only(schnell, monkeypatch):
    folder, _ = schnell
    whole = made(folder)
    with ImageModel.open(folder) as model:
        parts = model._pipeline.parts
        assert all(part.loaded for part in parts.values())
    needed = parts["transformer"].weight_bytes
    monkeypatch.setattr(pipeline.FluxPipeline, "needs", lambda *_, **__: 0)
    monkeypatch.setattr(pipeline.devices, "free_bytes", lambda _: int(needed * 1.2))
    with ImageModel.open(folder) as model:
        parts = model._pipeline.parts
        for _ in range(2):
            assert [name for name, part in parts.items() if part.loaded] == ["transformer"]
            assert (model.submit(asked()).result(WAIT_S).pixels == whole).all()


def test_the_same_bytes_beside_a_chat_and_another_picture(schnell):
    folder, _ = schnell
    alone, opening = made(folder), Opening(folder)
    with Model.open(context=256) as chat, ImageModel.open(folder) as other:
        pool, stop = chat.executor.pool, threading.Event()
        said = list(chat.generate("The tide", max_tokens=20, seed=1))

        def talk():
            while not stop.is_set():
                assert list(chat.generate("The tide", max_tokens=20, seed=1)) == said

        def paint():
            while not stop.is_set():
                other.submit(asked("a dog", width=64, height=64)).result(WAIT_S)

        with ImageModel.open_with(opening, pool=pool) as one, ThreadPoolExecutor() as threads:
            beside = [threads.submit(talk), threads.submit(paint)]
            try:
                for _ in range(3):
                    assert (one.submit(asked()).result(WAIT_S).pixels == alone).all()
                    assert one.submit(asked(width=64)).result(WAIT_S).pixels.shape == (32, 64, 3)
            finally:
                stop.set()
            assert [task.result(WAIT_S) for task in beside] == [None, None]


@pytest.fixture(scope="module")
def original(schnell, tmp_path_factory):
    """The same model in the layout of black-forest-labs, with the texts' parts beside it."""
    folder, _ = schnell
    made = tmp_path_factory.mktemp("original")
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        copied(folder / part, made / part)
    transformer, coder = (
        load_torch(folder / part / "diffusion_pytorch_model.safetensors")
        for part in ("transformer", "vae")
    )
    save_torch(test_flux.original(transformer), made / "flux1-schnell.safetensors")
    coder = {name: tensor.contiguous() for name, tensor in test_vae.original(coder, 4).items()}
    save_torch(coder, made / "ae.safetensors")
    return made


def test_the_same_bytes_in_the_original_layout(schnell, original):
    whole = made(schnell[0])
    assert is_image_model(original)
    assert (made(original) == whole).all()
    assert (made(original / "flux1-schnell.safetensors") == whole).all()
    assert (made(original, architecture="flux-offloaded") == whole).all()


def test_a_transformer_in_gguf(original, tmp_path):
    writer, q8_0 = GGUFWriter(tmp_path / "flux.gguf", "flux"), GGMLQuantizationType.Q8_0
    for name, values in load_file(original / "flux1-schnell.safetensors").items():
        if values.ndim > 1 and not values.shape[1] % 32:
            writer.add_tensor(name, quantize(values, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert is_image_model(tmp_path / "flux.gguf")
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        copied(original / part, tmp_path / part)
    vae = original / "ae.safetensors"
    found = made(tmp_path / "flux.gguf", vae=vae)
    assert 0 < np.abs(found.astype(float) - made(original)).mean() < 4
    assert (made(tmp_path / "flux.gguf", vae=vae, architecture="flux-offloaded") == found).all()


@pytest.mark.parametrize("isq", ["Q8_0", "Q4K"])
def test_quantized(schnell, isq):
    folder, _ = schnell
    with ImageModel.open(folder, isq=isq) as model:
        formats = {total.format for total in model.formats}
        assert formats > {"f32"}  # CLIP and the autoencoder stay
        found = model.submit(asked()).result(WAIT_S).pixels
    exact = made(folder)
    assert differ(found, exact.astype(int)) > 0
    assert np.abs(found.astype(float) - exact).mean() < (4 if isq == "Q8_0" else 40)
    assert (made(folder, isq=isq, threads=1) == found).all()


def test_quantized_once(schnell, tmp_path):
    """The folder that `squall quantize` writes gives what quantizing it when it is opened does."""
    command = ["quantize", str(schnell[0]), "--isq", "Q8_0", "-o", str(tmp_path / "q8")]
    assert CliRunner().invoke(app, command).exit_code == 0
    whole = made(schnell[0], isq="Q8_0")
    assert (made(tmp_path / "q8") == whole).all()
    assert (made(tmp_path / "q8", architecture="flux-offloaded") == whole).all()


def test_a_topology(schnell, tmp_path):
    folder, _ = schnell
    (tmp_path / "t.yml").write_text("0-1:\n  isq: Q8_0\n")
    exact = made(folder)
    assert differ(made(folder, topology=tmp_path / "t.yml"), exact.astype(int)) > 0
    (tmp_path / "t.yml").write_text("0-9:\n  isq: Q8_0\n")
    with pytest.raises(InvalidRequest, match="layer 8"):
        made(folder, topology=tmp_path / "t.yml")
    (tmp_path / "t.yml").write_text("0-1:\n  device: cpu\n")
    with pytest.raises(InvalidRequest, match="no devices of their own"):
        made(folder, topology=tmp_path / "t.yml")


def test_on_pytorch(schnell):
    folder, _ = schnell
    exact = made(folder)
    assert differ(made(folder, device="torch", dtype="f32"), exact.astype(int)) <= 1


@told_by_linux
def test_layer_by_layer_takes_the_memory_of_one(tmp_path):
    wide = {"attention_head_dim": 64, "num_attention_heads": 8, "axes_dims_rope": (8, 28, 28)}
    pipe = tiny_flux.pipeline(tmp_path, **wide, num_layers=4, num_single_layers=10)
    pipe.transformer.bfloat16().save_pretrained(tmp_path / "transformer")
    peak, needed, stored = in_process(f"picture({str(tmp_path)!r})")
    assert peak < needed + (16 << 20) < stored / 2


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"architecture": "sdxl"}, UnsupportedModel, "flux, flux-offloaded"),
        ({"architecture": "flux-offloaded", "isq": "Q4K"}, InvalidRequest, "squall quantize"),
        ({"context": 99}, InvalidRequest, "context is not for models that make pictures"),
        ({"kv_dtype": "q8_0"}, InvalidRequest, "kv_dtype"),
        ({"mmproj": "none"}, InvalidRequest, "mmproj"),
        ({"device": "cuda:77"}, InvalidRequest, "no device cuda:77"),
        ({"device": "torch=2;cpu"}, InvalidRequest, "run on one"),
        ({"isq": "Q9"}, InvalidRequest, "unknown quantization"),
    ],
)
def test_options_that_are_not_for_pictures(schnell, options, error, match):
    with pytest.raises(error, match=match):
        ImageModel.open(schnell[0], **options)


def test_what_cannot_be_made(schnell):
    with ImageModel.open(schnell[0]) as model:
        for image in (np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), "x"):
            with pytest.raises(InvalidRequest, match=r"uint8 \[height, width, 3\]"):
                model.submit(asked(image=image))
        with pytest.raises(InvalidRequest, match="takes no guidance"):
            model.submit(asked(guidance=3.5))


def test_memory_is_told_before_it_is_missed(schnell, monkeypatch):
    free = [10**12]
    monkeypatch.setattr(pipeline.devices, "free_bytes", lambda _: free[0])
    with ImageModel.open(schnell[0]) as model:
        small, large = (model._pipeline.needs(asked(width=n, height=n)) for n in (256, 1024))
        assert small < large / 8
        free[0] = model._pipeline._budget = int(small * 1.1)
        model.submit(asked(width=256, height=256)).cancel()
        with pytest.raises(OutOfMemory, match=r"1024x1024 needs .* GiB.*; \d+x\d+ would fit"):
            model.submit(asked(width=1024, height=1024))
        model._pipeline._budget = 10**12  # somebody else took it since
        with pytest.raises(OutOfMemory, match="would fit"):
            model.submit(asked(width=1024, height=1024)).result(WAIT_S)
        free[0] = 1000
        with pytest.raises(OutOfMemory, match="no size would fit"):
            model.submit(asked()).result(WAIT_S)
    with pytest.raises(OutOfMemory, match=r"transformer takes .*isq.*flux-offloaded"):
        ImageModel.open(schnell[0])


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_numbers_that_are_none_are_no_black_picture(schnell, tmp_path, part):
    folder = copied(schnell[0], tmp_path)
    file = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in ("proj_out.bias", "decoder.conv_out.bias"):
        if name in tensors:
            tensors[name][:] = np.nan
    file.unlink()
    save_file(tensors, file)
    with ImageModel.open(folder) as model:
        painting = model.submit(asked())
        with pytest.raises(InvalidCheckpoint, match=r"no number at (step 1 of 3|its pixels)"):
            painting.result(WAIT_S)


def copied(folder: Path, to: Path) -> Path:
    """The model's files again, as links."""
    for file in filter(Path.is_file, folder.rglob("*")):
        there = to / file.relative_to(folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, there)
    return to


def test_parts_of_different_models(schnell, tmp_path):
    folder = copied(schnell[0], tmp_path / "a")
    wider = T5Config(vocab_size=99, **tiny_flux.T5 | {"d_model": 64})
    tiny_flux.scattered(T5EncoderModel(wider)).save_pretrained(tmp_path / "t5")
    with pytest.raises(InvalidCheckpoint, match=r"T5 gives rows of 64 .* reads 32"):
        ImageModel.open(folder, t5=tmp_path / "t5")


@pytest.mark.parametrize("name", ["../t5.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_leads_elsewhere(schnell, tmp_path, name):
    folder = copied(schnell[0], tmp_path)
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.unlink()
    index = {"weight_map": {"proj_out.bias": name}}
    weights.with_name(weights.name + ".index.json").write_text(json.dumps(index))
    (folder / "transformer/x.safetensors").write_bytes(b"")
    with pytest.raises(InvalidCheckpoint, match="plain names"):
        ImageModel.open(folder)


def test_a_scheduler_that_is_not_known(schnell, tmp_path):
    folder = copied(schnell[0], tmp_path)
    file = folder / "scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps(config | {"use_beta_sigmas": True}))
    with pytest.raises(UnsupportedModel, match="use_beta_sigmas"):
        ImageModel.open(folder)
    file.write_text(json.dumps(config | {"shift": 3.0}))
    assert differ(made(folder), made(schnell[0]).astype(int)) > 1


def test_nothing_is_left_on_the_disk(schnell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(schnell[0].rglob("*"))
    with ImageModel.open(schnell[0], architecture="flux-offloaded") as model:
        model.submit(asked()).result(WAIT_S)
        model.submit(asked("b")).cancel()
    assert not list(tmp_path.iterdir())
    assert sorted(schnell[0].rglob("*")) == before


@pytest.mark.parametrize("architecture", ["flux", "flux-offloaded"])
def test_a_picture_is_cancelled_between_its_parts(schnell, architecture):
    with ImageModel.open(schnell[0], architecture=architecture) as model:
        found = []
        painting = model.submit(asked(steps=200), lambda step, _: found.append(step))
        while not found:
            assert not painting.future.done()
        painting.cancel()
        assert model.drain(WAIT_S)
        assert painting.future.cancelled()
        assert len(found) < 190
