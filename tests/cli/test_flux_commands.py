"""Commands with a whole FLUX.1 of random weights: run, quantize, inspect."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_flux
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from test_flux import original
from typer.testing import CliRunner

from squall import ImageModel
from squall.cli.app import app
from squall.convert import pictures
from squall.errors import InvalidCheckpoint, InvalidRequest, SquallError, UnsupportedModel
from squall.recipes import encoders

PROMPT = "a cat on a mat"
ASKED = f"'{PROMPT}' --size 48x32 --steps 2 --seed 3"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with FLUX.1 as diffusers has it, and in its original layout."""
    folder = tmp_path_factory.mktemp("flux")
    pipe = tiny_flux.pipeline(folder / "FLUX")
    lone = folder / "lone"
    lone.mkdir()
    state = pipe.transformer.state_dict()
    save_file(original(state), lone / "flux1-schnell.safetensors")
    whole = {f"model.diffusion_model.{name}": t for name, t in original(state).items()}
    whole["vae.something"] = state["x_embedder.weight"].clone()
    save_file(whole, lone / "flux1-all.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def invoke(line: str) -> Any:
    done = CliRunner().invoke(app, shlex.split(line))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def pixels(line: str, out: Path) -> NDArray[np.uint8]:
    invoke(f"run {line} {ASKED} -o {out}")
    with Image.open(out) as image:
        return np.asarray(image)


def made(**options: Any) -> NDArray[np.uint8]:
    with ImageModel.open("FLUX", **options) as model:
        (picture,) = model.generate(PROMPT, width=48, height=32, steps=2, seed=3)
        return picture.pixels


def test_a_picture_as_from_python(tmp_path: Path) -> None:
    assert np.array_equal(pixels("FLUX", tmp_path / "a.png"), made())
    offloaded = "FLUX --threads 1", "diffusion-plain -m FLUX -a flux-offloaded"
    for number, line in enumerate(offloaded):
        assert np.array_equal(pixels(line, tmp_path / f"{number}.png"), made())


@pytest.mark.parametrize("isq", ["Q8_0", "4"])
def test_a_quantized_folder_paints_as_if_quantized_on_the_way_in(tmp_path: Path, isq: str) -> None:
    done = invoke(f"quantize FLUX --isq {isq} -o {tmp_path / 'out'}")
    assert "bits a quantized weight" in done.stdout
    found = pixels(str(tmp_path / "out"), tmp_path / "a.png")
    assert np.array_equal(found, made(isq=isq))
    assert not np.array_equal(found, made())
    offloaded = f"diffusion-plain -m {tmp_path / 'out'} -a flux-offloaded"
    assert np.array_equal(pixels(offloaded, tmp_path / "b.png"), found)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model_index.json", "scheduler", "text_encoder", "text_encoder_2", "tokenizer",
        "tokenizer_2", "transformer", "vae",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["flux1-schnell", "flux1-all"])
def test_the_original_layout_quantized(tmp_path: Path, name: str) -> None:
    """Its parts have no folder of their own, and are named one by one."""
    parts = "--t5 FLUX/text_encoder_2 --clip FLUX/text_encoder --vae FLUX/vae"
    for place in ("tokenizer", "tokenizer_2"):
        link = Path("lone", place)
        if not link.exists():
            link.symlink_to(Path("..", "FLUX", place))
    out = tmp_path / "out"
    invoke(f"quantize lone/{name}.safetensors {parts} --isq Q8_0 -o {out}")
    config = json.loads((out / "transformer/config.json").read_text())
    assert (config["num_layers"], config["guidance_embeds"]) == (2, False)
    assert np.array_equal(pixels(str(out), tmp_path / "a.png"), made(isq="Q8_0"))


def test_encoders_of_lone_files_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ComfyUI's users have them, t5xxl_fp16.safetensors and clip_l.safetensors."""
    line = f"quantize FLUX --isq Q8_0 -o {tmp_path / 'out'}"
    for flag, place, taken_for in (("t5", "_2", "XXL"), ("clip", "", "LARGE")):
        folder = Path(f"FLUX/text_encoder{place}")
        (tmp_path / f"{flag}.safetensors").symlink_to((folder / "model.safetensors").absolute())
        config = json.loads((folder / "config.json").read_text())
        monkeypatch.setattr(encoders, taken_for, config)
        monkeypatch.setattr(pictures, taken_for, config)
        line += f" --{flag} {tmp_path / flag}.safetensors"
    invoke(line)
    assert np.array_equal(pixels(str(tmp_path / "out"), tmp_path / "a.png"), made(isq="Q8_0"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("quantize FLUX --isq Q4K -o out.uqff", "the name of a new folder"),
        ("quantize FLUX -o out", "--isq, --topology or both"),
        ("quantize FLUX --isq Q4K --force -o out", "no --imatrix"),
        ("quantize FLUX --isq nothing -o out", "unknown quantization"),
        ("quantize FLUX --isq Q4K -o lone", "lone exists"),
        ("quantize FLUX --isq Q4K --t5 none -o out", "none"),
        ("run diffusion-plain -m FLUX -a sdxl cat", "known: flux, flux-offloaded"),
        ("run diffusion-plain -m FLUX -a flux-offloaded --isq Q4K cat", "squall quantize"),
        ("run FLUX --num-device-layers 3 cat", "for models that make text"),
    ],
)
def test_what_is_refused(root: Path, line: str, problem: str) -> None:
    before = sorted(root.iterdir())
    with pytest.raises(SquallError, match=problem):
        invoke(line)
    assert sorted(root.iterdir()) == before


def test_what_is_quantized_already_is_not_again(tmp_path: Path) -> None:
    invoke(f"quantize FLUX --isq Q8_0 -o {tmp_path / 'out'}")
    with pytest.raises(UnsupportedModel, match="float weights"):
        invoke(f"quantize {tmp_path / 'out'} --isq Q4_0 -o {tmp_path / 'again'}")


def test_inspect() -> None:
    report = json.loads(invoke("inspect FLUX --json").stdout)
    assert report["runs"]
    parts = {part["part"]: part for part in report["parts"]}
    assert parts.keys() == {"transformer", "T5", "CLIP", "autoencoder"}
    stored = Path("FLUX/transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert 0.9 * stored < parts["transformer"]["bytes"] <= stored
    assert parts["transformer"]["bytes_by_layer"] < parts["transformer"]["bytes"] / 2
    assert parts["transformer"]["types"] == ["f32"]
    sizes = report["sizes"]
    assert sizes["512x512"]["bytes"] < sizes["1024x1024"]["bytes"]
    assert sizes["512x512"]["bytes_by_layer"] < sizes["512x512"]["bytes"]
    shown = invoke("inspect FLUX").stdout
    assert "1280x720" in shown
    assert shown.startswith("Squall runs it: flux")


def test_inspect_tells_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for part in Path("FLUX").iterdir():
        (tmp_path / "x" / part.name).symlink_to(part.absolute())
    (tmp_path / "x/vae").unlink()
    (tmp_path / "x/vae").mkdir()
    (tmp_path / "x/vae/diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    (tmp_path / "x/vae/config.json").write_text("{}")
    with pytest.raises((InvalidCheckpoint, InvalidRequest)):
        invoke(f"inspect {tmp_path / 'x'}")
