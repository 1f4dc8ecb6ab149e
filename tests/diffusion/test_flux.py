"""FLUX.1's transformer against diffusers, in every kind of file, and no field unnoticed."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from harness import distance
from mutate import mutations
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from native_executor import opened
from reference_executor import ReferenceExecutor
from squall import convert
from squall.checkpoints import open_checkpoint, open_file, open_uqff
from squall.checkpoints.base import Checkpoint
from squall.checkpoints.folder import open_folder
from squall.diffusion import transformer
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.quant import Plan
from squall.recipes.flux import PREFIX, alone, load_flux
from squall.recipes.names import Part, locate
from squall.roles import roles
from squall.spec import Flux

Arrays = dict[str, NDArray[Any]]
CLOSE, MOVED = 1e-4, 1e-4
# Heads whose axes are those that files without a config are taken to have.
CONFIG: dict[str, Any] = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32,
    "num_attention_heads": 3, "joint_attention_dim": 40, "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 14, 14), "guidance_embeds": True,
}  # fmt: skip
TEXT, LINES, COLUMNS = 7, 3, 5
TIME, GUIDANCE = 0.625, 4.0
ROWS = {"text": TEXT, "picture": LINES * COLUMNS, "all": TEXT + LINES * COLUMNS, "one": 1}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def random(**changes: Any) -> Any:
    """Every weight large enough to matter."""
    torch.manual_seed(5)
    model = diffusers.FluxTransformer2DModel(**CONFIG | changes).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm_" in name and weight.dim() == 1 and "linear" not in name:
                weight.uniform_(0.5, 1.5)
            elif weight.dim() < 2:
                weight.normal_(0.0, 0.3)
            else:
                weight.normal_(0.0, 1.2 * weight[0].numel() ** -0.5)
    return model


def saved(path: Path, **changes: Any) -> tuple[Any, Checkpoint]:
    model = random(**changes)
    model.save_pretrained(path)
    return model, open_folder(path)


def tensors(spec: Flux) -> Arrays:
    """What a run is given, but for indices."""
    made = np.random.default_rng(9)
    timesteps = diffusers.models.embeddings.Timesteps(256, True, 0)
    sinusoid = {
        name: timesteps(torch.tensor([1000.0 * value])).numpy()
        for name, value in (("time", TIME), ("guidance", GUIDANCE))
        if name == "time" or spec.guidance
    }
    widths = {"picture": spec.patch, "text": spec.text}
    values = {
        name: made.standard_normal((ROWS[name], width), np.float32)
        for name, width in widths.items()
    }
    return sinusoid | values | {"pooled": made.standard_normal((1, spec.pooled), np.float32)}


def wanted(model: Any, given: Arrays) -> NDArray[np.float32]:
    ids = torch.zeros(LINES, COLUMNS, 3)
    ids[..., 1] += torch.arange(LINES)[:, None]
    ids[..., 2] += torch.arange(COLUMNS)
    with torch.no_grad():
        out = model(
            hidden_states=torch.from_numpy(given["picture"])[None],
            encoder_hidden_states=torch.from_numpy(given["text"])[None],
            pooled_projections=torch.from_numpy(given["pooled"]),
            timestep=torch.tensor([TIME]),
            guidance=torch.tensor([GUIDANCE]) if "guidance" in given else None,
            img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(TEXT, 3),
        ).sample
    return out[0].numpy()


def velocity(
    part: Part, checkpoint: Checkpoint, executor: str = "reference", plan: str | None = None
) -> NDArray[np.float32]:
    program = transformer.compile(part.spec, part.names)
    given = tensors(part.spec) | transformer.inputs(TEXT, LINES, COLUMNS)
    if executor == "reference":
        return ReferenceExecutor(program, checkpoint, blocks=0).run(given)["velocity"].copy()
    return opened(program, checkpoint, ROWS, plan=plan).run(given)["velocity"].copy()


EXECUTORS = ("reference", "native")


# ---- parity ----


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("guidance", [True, False])
def test_flux(tmp_path: Path, guidance: bool, executor: str) -> None:
    model, checkpoint = saved(tmp_path, guidance_embeds=guidance)
    part = load_flux(checkpoint)
    found = velocity(part, checkpoint, executor)
    assert distance(found, wanted(model, tensors(part.spec))) < CLOSE


@pytest.mark.parametrize("changes", [
    {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12,
     "axes_dims_rope": (2, 4, 6)},
    {"num_layers": 3, "num_attention_heads": 1, "attention_head_dim": 128,
     "axes_dims_rope": (16, 56, 56), "pooled_projection_dim": 768},
])  # fmt: skip
def test_other_sizes(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, checkpoint = saved(tmp_path, **changes)
    part = load_flux(checkpoint)
    found = velocity(part, checkpoint, "native")
    assert distance(found, wanted(model, tensors(part.spec))) < CLOSE


def test_cut_after_every_layer(tmp_path: Path) -> None:
    """Stages give the bytes of the whole."""
    _, checkpoint = saved(tmp_path)
    part = load_flux(checkpoint)
    program = transformer.compile(part.spec, part.names)
    assert program.layers == [f"layers.{n}" for n in range(5)]
    for plan in (None, "Q8_0"):
        values: Arrays = tensors(part.spec) | transformer.inputs(TEXT, LINES, COLUMNS)
        for stage in program.stages(*program.layers):
            values |= opened(stage, checkpoint, ROWS, plan=plan).run(values)
        whole = velocity(part, checkpoint, "native", plan)
        assert values["velocity"].tobytes() == whole.tobytes()


# ---- mutations ----


def test_no_field_goes_unnoticed(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path)
    part = load_flux(checkpoint)
    before = velocity(part, checkpoint)
    unmoved = [
        name
        for name, changed in [
            *mutations(part.spec, 1),
            ("other axes", replace(part.spec, axes=(14, 14, 4))),
        ]
        if _effect(part, changed, checkpoint, before) <= MOVED
    ]
    assert not unmoved


def _effect(
    part: Part, changed: Flux, checkpoint: Checkpoint, before: NDArray[np.float32]
) -> float:
    """How far the rows move; infinitely, where the files do not fit."""
    if max(changed.double - part.spec.double, changed.single - part.spec.single) > 0:
        return math.inf
    try:
        (found,) = locate([(roles(changed), part.naming)], checkpoint.tensors, read=set())
    except (InvalidCheckpoint, UnsupportedModel):
        return math.inf
    names = {f"flux.{role}": places for role, places in found.items()}
    try:
        rows = velocity(Part("flux", changed, part.naming, names), checkpoint)
    except (InvalidRequest, ValueError, KeyError, AssertionError):  # axes that are no head
        return math.inf
    return math.inf if rows.shape != before.shape else distance(rows, before)


# ---- files ----


def original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' tensors as black-forest-labs has them."""
    names = {
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        **{
            f"time_text_embed.{theirs}.linear_{n}": f"{own}_in.{side}_layer"
            for theirs, own in (
                ("timestep_embedder", "time"), ("guidance_embedder", "guidance"),
                ("text_embedder", "vector"),
            )
            for n, side in ((1, "in"), (2, "out"))
        },
    }  # fmt: skip
    double = {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",),
        "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
        "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
    }  # fmt: skip
    single = {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",), "modulation.lin": ("norm.linear",),
    }  # fmt: skip
    norms = {
        "double_blocks": {
            "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
        },
        "single_blocks": {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"},
    }  # fmt: skip
    made: dict[str, torch.Tensor] = {}
    for kind in ("weight", "bias"):
        made |= {f"{own}.{kind}": state[f"{t}.{kind}"] for t, own in names.items() if
                 f"{t}.{kind}" in state}  # fmt: skip
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        made[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        for own, theirs, blocks, count in (
            ("double_blocks", "transformer_blocks", double, CONFIG["num_layers"]),
            ("single_blocks", "single_transformer_blocks", single, CONFIG["num_single_layers"]),
        ):
            for n in range(count):
                made |= {
                    f"{own}.{n}.{name}.{kind}": torch.cat(
                        [state[f"{theirs}.{n}.{part}.{kind}"] for part in parts]
                    )
                    for name, parts in blocks.items()
                }
                made |= {
                    f"{own}.{n}.{name}.scale": state[f"{theirs}.{n}.{part}.weight"].clone()
                    for name, part in norms[own].items()
                }
    return made


@pytest.fixture
def both(tmp_path: Path) -> tuple[Checkpoint, dict[str, torch.Tensor], Path]:
    """A folder of diffusers', and its tensors with their original names."""
    _, checkpoint = saved(tmp_path / "folder")
    state = load_file(tmp_path / "folder/diffusion_pytorch_model.safetensors")
    return checkpoint, original(state), tmp_path / "flux1-dev.safetensors"


def converted(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By diffusers' converter, which knows one width alone; here is the same for another."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    width = len(named["img_in.weight"])
    assert "inner_dim = 3072" in source
    made: dict[str, Any] = {"torch": torch}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), made)
    return made["convert_flux_transformer_checkpoint_to_diffusers"](dict(named))


def test_the_original_names_are_those_that_diffusers_reads() -> None:
    state = random().state_dict()
    back = converted(original(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_both_layouts_give_the_same_bytes(both: Any, executor: str, prefix: str) -> None:
    folder, named, path = both
    others = {"vae.decoder.conv_in.weight": torch.zeros(1)} if prefix else {}
    save_file({prefix + name: t for name, t in named.items()} | others, path)
    file, part = alone(open_file(path)), load_flux(folder)
    assert load_flux(file).spec == part.spec
    found = velocity(load_flux(file), file, executor)
    assert found.tobytes() == velocity(part, folder, executor).tobytes()


@pytest.mark.parametrize("plan", ["Q8_0", "Q4K"])
def test_the_same_bytes_quantized_once_or_when_opened(both: Any, plan: str) -> None:
    """From either layout, as UQFF or not."""
    folder, named, path = both
    save_file(named, path)
    found = []
    for checkpoint in (folder, open_file(path)):
        part, made = load_flux(checkpoint), path.with_name(f"{checkpoint.path.name}.uqff")
        convert.write_pictures({"flux": (checkpoint, part)}, {}, Plan.of(plan), made)
        written = open_uqff(made / "flux/model.uqff")
        assert load_flux(written).spec == part.spec
        found.append(velocity(part, checkpoint, "native", plan).tobytes())
        found.append(velocity(load_flux(written), written, "native").tobytes())
    assert found == found[:1] * 4


@pytest.mark.parametrize(("dtype", "close"), [
    (torch.bfloat16, CLOSE), (torch.float16, CLOSE), (torch.float8_e4m3fn, CLOSE),
])  # fmt: skip
def test_short_floats(both: Any, dtype: torch.dtype, close: float) -> None:
    folder, named, path = both
    save_file({name: t.to(dtype) for name, t in named.items()}, path)
    file = open_file(path)
    rounded = {name: t.to(dtype).float() for name, t in named.items()}
    save_file(rounded, path.with_name("flux1-same.safetensors"))
    same = open_file(path.with_name("flux1-same.safetensors"))
    assert load_flux(file).spec == load_flux(folder).spec
    found = velocity(load_flux(file), file, "native")
    assert distance(found, velocity(load_flux(same), same)) < close


Quantized = tuple[NDArray[Any], gguf.GGMLQuantizationType]


def gguf_file(path: Path, stored: dict[str, Quantized]) -> Checkpoint:
    """As ComfyUI's are: original names, the architecture, and nothing else."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, (data, type) in stored.items():
        writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


def quantized(tensor: torch.Tensor, kind: str) -> Quantized:
    type = gguf.GGMLQuantizationType[kind]
    return gguf.quantize(tensor.numpy(), type), type


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_gguf(both: Any, kind: str) -> None:
    folder, named, path = both
    stored = {
        name: quantized(t, kind if t.dim() > 1 and not t.shape[1] % 32 else "F32")
        for name, t in named.items()
    }
    file = gguf_file(path.with_suffix(".gguf"), stored)
    part = load_flux(file)
    assert part.spec == load_flux(folder).spec
    found, exact = velocity(part, file, "native"), velocity(part, file)
    assert distance(found, exact) < 0.05  # the rows that kernels multiply are of 8 bits
    assert distance(exact, velocity(load_flux(folder), folder)) < (0.05 if kind == "Q8_0" else 0.6)


@pytest.mark.parametrize(("kind", "scales"), [
    ("Q2_K", slice(80, 84)), ("Q3_K", slice(108, 110)), ("Q4_K", slice(4)), ("Q5_K", slice(4)),
    ("Q6_K", slice(208, 210)),
])  # fmt: skip
def test_gguf_of_large_blocks(tmp_path: Path, kind: str, scales: slice) -> None:
    """gguf writes no such blocks: they are random, with small scales, and it reads them."""
    size = {
        "attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": (16, 56, 56)
    }  # fmt: skip
    model, type, made = random(**size), gguf.GGMLQuantizationType[kind], np.random.default_rng(1)
    named, stored = original(model.state_dict()), dict[str, Quantized]()
    _, nbytes = gguf.GGML_QUANT_SIZES[type]
    for name, tensor in named.items():
        if "_blocks." in name and tensor.dim() > 1:
            rows, cols = tensor.shape
            blocks = made.integers(0, 256, (rows, cols // 256, nbytes), np.uint8)
            blocks[..., scales].view("<f2")[:] = 4e-3 if kind == "Q2_K" else 2e-4
            stored[name] = blocks.reshape(rows, -1), type
        else:
            kinds = {1: "F16" if name.endswith("scale") else "F32", 2: "BF16"}
            stored[name] = quantized(tensor, kinds[tensor.dim()])
    exact = {n: torch.tensor(gguf.dequantize(*s)).view(named[n].shape) for n, s in stored.items()}
    model.load_state_dict(converted(exact))
    file = gguf_file(tmp_path / "flux.gguf", stored)
    part = load_flux(file)
    right = wanted(model, tensors(part.spec))
    assert distance(velocity(part, file), right) < CLOSE
    assert distance(velocity(part, file, "native"), right) < 0.05


def test_what_is_quantized(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path)
    part, plan = load_flux(checkpoint), Plan.of("Q8_0")
    program = transformer.compile(part.spec, part.names)
    found = {
        weight.role: plan.target(weight.role, "f32", weight.cols)
        for weight in program.weights()
        if hasattr(weight, "cols")
    }
    assert {role for role, format in found.items() if format == "q8_0"} == {
        role for role in found if ".layers." in role
    }
    exact = velocity(part, checkpoint)
    assert distance(velocity(part, checkpoint, "native", "Q8_0"), exact) < 0.05


# ---- what is refused ----


@pytest.mark.parametrize(("changes", "message"), [
    ({"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
    ({"patch_size": 2}, "patch_size"),
    ({"out_channels": 20}, "out_channels"),
    ({"axes_dims_rope": [3, 14, 15]}, "axes"),
    ({"axes_dims_rope": [4, 14]}, "axes"),
    ({"num_layers": 0}, "num_layers"),
    ({"num_layers": 10**6}, "num_layers"),
    ({"num_attention_heads": 4}, "shape"),
    ({"num_single_layers": 4}, "single_transformer_blocks.3"),
    ({"num_single_layers": 2}, "does not use"),
    ({"new_option": 3}, "new_option"),
])  # fmt: skip
def test_other_configs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((InvalidCheckpoint, UnsupportedModel), match=message):
        load_flux(open_folder(tmp_path))


@pytest.mark.parametrize("name", [
    "img_in.weight", "double_blocks.0.img_attn.norm.query_norm.scale", "txt_in.weight",
    "single_blocks.1.linear1.weight", "double_blocks.1.txt_attn.qkv.bias",
])  # fmt: skip
@pytest.mark.parametrize("shape", [None, (3,), (0, 2), (5, 7)])
def test_hostile_files(both: Any, name: str, shape: tuple[int, ...] | None) -> None:
    _, named, path = both
    del named[name]
    if shape is not None:
        named[name] = torch.zeros(shape)
    save_file(named, path)
    with pytest.raises((InvalidCheckpoint, UnsupportedModel)):
        load_flux(open_file(path))


def test_layers_far_apart(both: Any) -> None:
    _, named, path = both
    save_file(named | {"double_blocks.9999.img_mod.lin.bias": torch.zeros(1)}, path)
    with pytest.raises(InvalidCheckpoint, match="double_blocks"):
        load_flux(open_file(path))


def test_other_architectures(both: Any) -> None:
    folder, *_ = both
    other = replace(folder, kind="gguf", metadata={"general.architecture": "llama"})
    with pytest.raises(UnsupportedModel, match="llama"):
        load_flux(other)
