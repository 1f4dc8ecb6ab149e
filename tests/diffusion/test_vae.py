"""Autoencoders: pixels and latents as diffusers has them, from each layout of their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from reference_executor import ReferenceExecutor
from squall.checkpoints.base import Checkpoint
from squall.checkpoints.safetensors import open_part
from squall.diffusion import vae
from squall.program import Program
from squall.recipes.names import Part
from squall.recipes.vae import load_vae

Floats = NDArray[np.float32]
Tensors = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {
    "block_out_channels": [8, 16, 16], "layers_per_block": 2, "latent_channels": 3,
    "norm_num_groups": 4, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
MIXED = SMALL | {
    "use_quant_conv": True, "use_post_quant_conv": True, "layers_per_block": 1,
    "block_out_channels": [16, 8], "mid_block_add_attention": False, "shift_factor": None,
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
        spread = 0.02 if "conv_in" in name else 1.2 * weight[0].numel() ** -0.5
        weight.data = (around + torch.randn(weight.shape) * min(spread, 0.3)).to(dtype).float()
    return model.eval()


def original(tensors: Tensors, levels: int) -> Tensors:
    """The names and shapes of ae.safetensors, told by diffusers' converter of those."""
    attention = {
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "group_norm": "norm",
    }
    made = {}
    for name, tensor in tensors.items():
        for block in range(levels):
            for kind in ("weight", "bias"):  # of one tensor only, which is told by its end
                del kind
            name = name.replace(f"up_blocks.{block}.resnets", f"up.{levels - 1 - block}.block")
            name = name.replace(
                f"up_blocks.{block}.upsamplers.0", f"up.{levels - 1 - block}.upsample"
            )
            name = name.replace(f"down_blocks.{block}.resnets", f"down.{block}.block")
            name = name.replace(f"down_blocks.{block}.downsamplers.0", f"down.{block}.downsample")
        for theirs, own in attention.items():
            name = name.replace(f"mid_block.attentions.0.{theirs}", f"mid.attn_1.{own}")
        name = name.replace("mid_block.resnets.0", "mid.block_1")
        name = name.replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "attn_1" in name and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        made[name] = tensor
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


def case(given: Mapping[str, Any], path: Path, dtype: torch.dtype = torch.float32) -> Case:
    model = build(given, dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    config = json.loads(model.to_json_string())
    checkpoint = stored(tensors, config, path / "vae.safetensors")
    return Case(model, tensors, config, checkpoint, load_vae(checkpoint))


@pytest.fixture(scope="module", params=[SMALL, MIXED], ids=["small", "mixed"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(request.param, tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(SMALL, tmp_path_factory.mktemp("small"))


Make = Callable[[Program, Checkpoint, Mapping[str, NDArray[Any]]], Any]


def reference(program: Program, checkpoint: Checkpoint, _given: Mapping[str, NDArray[Any]]) -> Any:
    return ReferenceExecutor(program, checkpoint, blocks=0)


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


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decodes_as_diffusers(tiny: Case, size: tuple[int, int]) -> None:
    scaled = draw(tiny.model.config.latent_channels, *size)
    found = decode(tiny.part, tiny.checkpoint, scaled)
    assert distance(found, decoded(tiny, scaled)) < CLOSE


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encodes_as_diffusers(tiny: Case, size: tuple[int, int]) -> None:
    finer = 2 ** (len(tiny.part.spec.widths) - 1)  # type: ignore[union-attr]
    pixels = draw(3, *(finer * length for length in size))
    found = encode(tiny.part, tiny.checkpoint, pixels)
    assert distance(found, encoded(tiny, pixels)) < CLOSE
