"""Autoencoders: pixels and latents as diffusers has them, from each layout of their files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from numpy.typing import NDArray
from safetensors.torch import save_file

from native_executor import opened
from reference_executor import ReferenceExecutor
from squall.checkpoints.base import Checkpoint
from squall.checkpoints.safetensors import open_part
from squall.diffusion import vae
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.program import Program
from squall.recipes.names import Part, place
from squall.recipes.vae import FOLDER, load_vae, naming
from squall.spec import AutoEncoder

Floats = NDArray[np.float32]
Tensors = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {
    "block_out_channels": [8, 16, 16], "layers_per_block": 2, "latent_channels": 3,
    "norm_num_groups": 4, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
BARE = SMALL | {
    "block_out_channels": [16, 8], "layers_per_block": 1, "mid_block_add_attention": False,
    "shift_factor": None,
}  # fmt: skip
FLUX = SMALL | {"block_out_channels": [32, 64], "norm_num_groups": 32, "layers_per_block": 1}
SIZES = [(3, 5), (1, 4), (2, 1)]
CLOSE = 1e-4


def build(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model whose weights all matter, with values as `dtype` has them."""
    torch.manual_seed(3)
    blocks = len(config["block_out_channels"])
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
    }
    model: Any = diffusers.AutoencoderKL(**config, **kinds)
    for name, weight in model.named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        spread = 0.003 if "conv_in" in name else 1.2 * weight[0].numel() ** -0.5
        weight.data = (around + torch.randn(weight.shape) * min(spread, 0.3)).to(dtype).float()
    return model.eval()


def original(tensors: Tensors, levels: int) -> Tensors:
    """The names and shapes of ae.safetensors."""
    parts = {
        "mid_block.attentions.0": "mid.attn_1", "to_out.0": "proj_out", "group_norm": "norm",
        "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
        "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "to_": "",
        "samplers.0": "sample", "down_blocks.": "down.", "resnets.": "block.",
    }  # fmt: skip
    made = {}
    for name, tensor in tensors.items():
        linear = tensor.dim() == 2
        for theirs, own in parts.items():
            name = name.replace(theirs, own)
        name = re.sub(r"up_blocks\.(\d)", lambda at: f"up.{levels - 1 - int(at[1])}", name)
        made[name] = tensor[:, :, None, None] if linear else tensor
    return made


def older(tensors: Tensors) -> Tensors:
    """The names of diffusers before 0.18."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    made = {}
    for name, tensor in tensors.items():
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        made[name] = tensor
    return made


def stored(tensors: Tensors, config: Mapping[str, Any], path: Path) -> Checkpoint:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    found = {tensor.name: tensor for tensor in open_part(path).tensors()}
    return Checkpoint(path, config, found, path.stat().st_size, kind="folder")


@dataclass
class Case:
    model: Any
    tensors: Tensors
    config: dict[str, Any]
    checkpoint: Checkpoint
    part: Part

    @property
    def spec(self) -> Any:
        return self.part.spec


def case(given: Mapping[str, Any], path: Path, dtype: torch.dtype = torch.float32) -> Case:
    model = build(given, dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    config = json.loads(model.to_json_string())
    checkpoint = stored(tensors, config, path / "vae.safetensors")
    return Case(model, tensors, config, checkpoint, load_vae(checkpoint))


@pytest.fixture(scope="module", params=[SMALL, BARE], ids=["small", "bare"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(request.param, tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(SMALL, tmp_path_factory.mktemp("small"))


Make = Callable[[Program, Checkpoint, Mapping[str, NDArray[Any]]], Any]


def reference(program: Program, checkpoint: Checkpoint, _given: Mapping[str, NDArray[Any]]) -> Any:
    return ReferenceExecutor(program, checkpoint, blocks=0)


def native(program: Program, checkpoint: Checkpoint, given: Mapping[str, NDArray[Any]]) -> Any:
    rows = {value.rows: len(given[value.name]) for value in program.inputs}
    rows |= {index.rows: given[index.name].shape[-1] for index in program.indices}
    return opened(program, checkpoint, rows)


EXECUTORS = pytest.mark.parametrize("make", [reference, native])


def decode(part: Part, checkpoint: Checkpoint, scaled: Floats, make: Make = reference) -> Floats:
    """Pixels [3, lines, columns] of latents [channels, lines, columns] as they are stored."""
    spec: Any = part.spec
    _, lines, columns = scaled.shape
    rows = scaled.reshape(len(scaled), -1).T / np.float32(spec.scale) + np.float32(spec.shift)
    given: dict[str, Any] = vae.decoder_inputs(spec, lines, columns) | {"latents": rows}
    executor = make(vae.compile_decoder(spec, part.names), checkpoint, given)
    finer = 2 ** (len(spec.widths) - 1)
    return executor.run(given)["pixels"].T.reshape(3, lines * finer, columns * finer)


def encode(part: Part, checkpoint: Checkpoint, pixels: Floats, make: Make = reference) -> Floats:
    """Moments [2 * channels, lines, columns] of pixels [3, lines, columns]."""
    spec: Any = part.spec
    lines, columns = (size // 2 ** (len(spec.widths) - 1) for size in pixels.shape[1:])
    given: dict[str, Any] = vae.encoder_inputs(spec, lines, columns)
    given["pixels"] = np.ascontiguousarray(pixels.reshape(3, -1).T)
    executor = make(vae.compile_encoder(spec, part.names), checkpoint, given)
    return executor.run(given)["moments"].T.reshape(-1, lines, columns)


def draw(*shape: int) -> Floats:
    return np.random.default_rng(5).standard_normal(shape, np.float32)


def distance(found: Floats, wanted: torch.Tensor) -> float:
    assert found.shape == tuple(wanted.shape[1:])
    return float(np.abs(found - wanted[0].numpy()).max() / wanted.abs().max())


@torch.no_grad()
def decoded(tiny: Case, scaled: Floats) -> torch.Tensor:
    config = tiny.model.config
    latents = torch.tensor(scaled)[None] / config.scaling_factor + (config.shift_factor or 0)
    found: torch.Tensor = tiny.model.decode(latents).sample
    return found


@torch.no_grad()
def encoded(tiny: Case, pixels: Floats) -> torch.Tensor:
    found: torch.Tensor = tiny.model.encode(torch.tensor(pixels)[None]).latent_dist.parameters
    return found


@EXECUTORS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decodes_as_diffusers(tiny: Case, size: tuple[int, int], make: Make) -> None:
    scaled = draw(tiny.model.config.latent_channels, *size)
    found = decode(tiny.part, tiny.checkpoint, scaled, make)
    assert distance(found, decoded(tiny, scaled)) < CLOSE


@EXECUTORS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encodes_as_diffusers(tiny: Case, size: tuple[int, int], make: Make) -> None:
    finer = 2 ** (len(tiny.spec.widths) - 1)
    pixels = draw(3, *(finer * length for length in size))
    found = encode(tiny.part, tiny.checkpoint, pixels, make)
    assert distance(found, encoded(tiny, pixels)) < CLOSE


def test_every_layout_gives_the_same_bytes(small: Case, tmp_path: Path) -> None:
    scaled, pixels = draw(3, 2, 3), draw(3, 8, 12)
    renamed = original(small.tensors, 3)
    convert: Any = convert_ldm_vae_checkpoint
    back = convert(renamed, small.config)
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in small.tensors.items()
    }
    for number, tensors in enumerate([renamed, older(small.tensors)]):
        checkpoint = stored(tensors, small.config, tmp_path / f"{number}.safetensors")
        part = load_vae(checkpoint)
        assert part.spec == small.spec
        for run, given in ((decode, scaled), (encode, pixels)):
            found = run(part, checkpoint, given, native)
            assert found.tobytes() == run(small.part, small.checkpoint, given, native).tobytes()


def test_sizes_of_flux_are_those_of_its_tensors(tmp_path: Path) -> None:
    """Beside ae.safetensors there is no config.json, or that of the transformer."""
    folder = case(FLUX, tmp_path)
    for config in ({}, {"_class_name": "FluxTransformer2DModel", "in_channels": 64}):
        found = stored(original(folder.tensors, 2), config, tmp_path / "ae.safetensors")
        assert load_vae(found).spec == folder.spec
    for tensors in (folder.tensors, older(folder.tensors)):  # the file of a folder, by itself
        assert load_vae(stored(tensors, {}, tmp_path / "vae.safetensors")).spec == folder.spec


@EXECUTORS
def test_bf16_weights_decode_as_diffusers(tmp_path: Path, make: Make) -> None:
    rounded = case(SMALL, tmp_path, torch.bfloat16)
    scaled = draw(3, 3, 2)
    assert {t.format for t in rounded.checkpoint.tensors.values()} == {"bf16"}
    found = decode(rounded.part, rounded.checkpoint, scaled, make)
    assert distance(found, decoded(rounded, scaled)) < CLOSE


OTHER: dict[str, Callable[[Any], Any]] = {
    "latent": lambda value: value + 1,
    "widths": lambda value: tuple(2 * width for width in value),
    "blocks": lambda value: value + 1,
    "groups": lambda value: value // 2,
    "scale": lambda value: value * 1.5,
    "shift": lambda value: value * 1.5,
    "attends": lambda value: not value,
    "eps": lambda value: value * 10,
}


@pytest.mark.parametrize("name", [field.name for field in fields(AutoEncoder)])
def test_no_field_goes_unnoticed(small: Case, name: str) -> None:
    spec: Any = replace(small.spec, **{name: OTHER[name](getattr(small.spec, name))})
    scaled = draw(3, 2, 3)
    try:
        part = replace(small.part, spec=spec, naming=naming(spec, FOLDER))
        (part,) = place([part], small.checkpoint.tensors, read=set())
    except (InvalidCheckpoint, UnsupportedModel):
        return
    found = decode(part, small.checkpoint, scaled)
    assert distance(found, decoded(small, scaled)) > 4 * CLOSE


def test_missing_and_misshapen_tensors_are_refused(small: Case, tmp_path: Path) -> None:
    tensors, path = small.tensors, tmp_path / "bad.safetensors"
    for name, wrong in {
        "decoder.up_blocks.1.resnets.2.conv1.bias": None,
        "encoder.conv_in.weight": (3, 8, 3, 3),
        "decoder.conv_in.weight": (16, 3, 1, 9),
        "encoder.mid_block.attentions.0.to_q.weight": (4, 64),
        "decoder.conv_norm_out.weight": (9,),
        "decoder.mid_block.resnets.0.conv1.weight": (16, 16, 1, 1),
    }.items():
        bad = {other: tensor for other, tensor in tensors.items() if other != name}
        if wrong is not None:
            bad[name] = torch.zeros(wrong)
        with pytest.raises(InvalidCheckpoint, match=re.escape(name)):
            load_vae(stored(bad, small.config, path))
    with pytest.raises(UnsupportedModel, match="more"):
        load_vae(stored(tensors | {"more": torch.zeros(1)}, small.config, path))
    with pytest.raises(InvalidCheckpoint, match="no autoencoder"):
        load_vae(stored({"more": torch.zeros(1)}, small.config, path))
    with pytest.raises(InvalidCheckpoint, match="block_out_channels is"):
        load_vae(stored(tensors, {}, path))
    with pytest.raises(UnsupportedModel, match="quant_conv"):  # as early files of others have them
        load_vae(
            stored(tensors | {"quant_conv.weight": torch.zeros(6, 6, 1, 1)}, small.config, path)
        )


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"block_out_channels": [8, 16, 1 << 40]}, "block_out_channels"),
        ({"block_out_channels": [8, 16, 18]}, "multiples of"),
        ({"block_out_channels": []}, "1 to 8"),
        ({"block_out_channels": [4] * 9}, "1 to 8"),
        ({"block_out_channels": 8}, "a list"),
        ({"block_out_channels": [8, -16, 16]}, "block_out_channels"),
        ({"block_out_channels": [8, 16, 4096]}, "metadata asks for"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"latent_channels": 1 << 30}, "latent_channels"),
        ({"layers_per_block": 10**6}, "layers_per_block"),
        ({"layers_per_block": 3}, "missing"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"scaling_factor": float("inf")}, "scaling_factor"),
        ({"shift_factor": "1"}, "shift_factor"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"in_channels": 4}, "in_channels"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"latents_mean": [1.0, 2.0, 3.0]}, "latents_mean"),
        ({"use_quant_conv": True}, "use_quant_conv"),
        ({"use_post_quant_conv": True}, "use_post_quant_conv"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_are_refused(
    small: Case, changed: dict[str, Any], told: str
) -> None:
    bad = replace(small.checkpoint, metadata=small.config | changed)
    with pytest.raises((InvalidCheckpoint, UnsupportedModel), match=told):
        load_vae(bad)


def test_indices_of_large_pictures_are_made_at_once(small: Case) -> None:
    flux: Any = replace(small.spec, widths=(128, 256, 512, 512))
    found = vae.decoder_inputs(flux, 90, 160)
    assert {one.dtype for one in found.values()} == {np.dtype(np.int32)}
    assert found["finer.s3"].shape == found["same.s3"].shape == (9, 720 * 1280)
    assert found["finer.s3"].max() == 360 * 640 - 1
    assert found["same.s3"].min() == -1


def test_few_large_values_are_there_at_once(tmp_path: Path) -> None:
    """At the finest level: a value of both widths together, which is normed in place, and two."""
    tiny = case(FLUX | {"mid_block_add_attention": False}, tmp_path)
    rows = {"s0": 24 * 24, "s1": 48 * 48}
    executor = opened(vae.compile_decoder(tiny.spec, tiny.part.names), tiny.checkpoint, rows)
    assert executor._native.buffer_bytes < 1.01 * 4 * rows["s1"] * (64 + 32 + 32)
