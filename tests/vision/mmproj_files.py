"""Models of transformers that see -> a text GGUF file and an mmproj GGUF file.

By the rules of llama.cpp's converters; names are those of gguf-py's tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
from convert import _permute, convert
from gguf.quants import quantize
from numpy.typing import NDArray
from torch import Tensor

Change = Callable[[dict[str, Any], dict[str, NDArray[Any]]], None]
KINDS = {
    "llava": "mlp",
    "llava_next": "mlp",
    "qwen2_vl": "qwen2vl_merger",
    "qwen2_5_vl": "qwen2.5vl_merger",
    "gemma3": "gemma3",
    "idefics3": "idefics3",
    "smolvlm": "idefics3",
    "pixtral": "pixtral",
    "mistral3": "pixtral",
}


def write_text(
    model: Any, architecture: str, path: Path, extra: Mapping[str, Any], rows: int | None = None
) -> None:
    """The language model alone. rows: tokens of its vocabulary."""
    inner = getattr(model.model, "language_model", None) or model.model.text_model
    weights = {f"model.{name}": tensor for name, tensor in inner.state_dict().items()}
    weights["lm_head.weight"] = model.lm_head.weight.detach()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = weights[name][:rows]
    text = SimpleNamespace(config=model.config.get_text_config(), state_dict=lambda: weights)
    convert(text, architecture, path, extra=dict(extra))  # type: ignore[arg-type]


def write_mmproj(
    model: Any,
    processor: Mapping[str, Any],
    path: Path,
    number_format: str = "f32",
    change: Change = lambda _metadata, _tensors: None,
) -> None:
    """The rest. change: of what is written, before it is."""
    pixtral = getattr(model.config.vision_config, "model_type", "") == "pixtral"
    kind = model.config.model_type
    kind = "pixtral" if kind == "llava" and pixtral else kind
    early = kind in ("llava", "llava_next")
    found = (early_tensors if early else tensors)(model)
    weights = {name: tensor.float().contiguous().numpy() for name, tensor in found}
    values = (early_metadata if early else metadata)(model, kind, processor)
    change(values, weights)
    write(path, values, weights, number_format)


def write(
    path: Path, values: Mapping[str, Any], weights: Mapping[str, NDArray[Any]], number_format: str
) -> None:
    writer = gguf.GGUFWriter(path, values.get("general.architecture", "clip"))
    for key, value in values.items():
        if key != "general.architecture":
            add: dict[type, Any] = {
                bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
                str: writer.add_string, list: writer.add_array,
            }  # fmt: skip
            add[type(value)](key, value)
    for name, weight in weights.items():
        matrix = weight.ndim == 2 and "position" not in name
        if number_format == "q8_0" and matrix and weight.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
        else:
            small = matrix and number_format != "f32"
            writer.add_tensor(name, weight.astype(np.float16 if small else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- today's converter ----


def metadata(model: Any, kind: str, processor: Mapping[str, Any]) -> dict[str, Any]:
    config, v = model.config, model.config.vision_config
    heads = getattr(v, "num_attention_heads", None) or v.num_heads
    qwen2 = kind == "qwen2_vl"
    made = {
        "general.type": "mmproj",
        "general.file_type": 0,
        "clip.has_vision_encoder": True,
        "clip.projector_type": KINDS[kind],
        "clip.vision.projection_dim": config.get_text_config().hidden_size,
        "clip.vision.image_size": getattr(v, "image_size", 560),
        "clip.vision.patch_size": v.patch_size,
        "clip.vision.embedding_length": v.embed_dim if qwen2 else v.hidden_size,
        "clip.vision.feed_forward_length": v.hidden_size if qwen2 else v.intermediate_size,
        "clip.vision.block_count": getattr(v, "num_hidden_layers", None) or v.depth,
        "clip.vision.attention.head_count": heads,
        "clip.vision.image_mean": [float(n) for n in processor["image_mean"]],
        "clip.vision.image_std": [float(n) for n in processor["image_std"]],
    }
    eps = 1e-5 if "pixtral" in KINDS[kind] else getattr(v, "layer_norm_eps", None)
    eps = eps or config.get_text_config().rms_norm_eps
    made["clip.vision.attention.layer_norm_epsilon"] = eps
    if kind == "qwen2_5_vl":
        made["clip.use_silu"] = True
        made["clip.vision.n_wa_pattern"] = v.fullatt_block_indexes[0] + 1
    if kind in ("pixtral", "mistral3"):
        made["clip.use_silu" if v.hidden_act == "silu" else "clip.use_gelu"] = True
    if kind in ("gemma3", "idefics3", "smolvlm"):
        made["clip.use_gelu"] = True
    if kind == "mistral3":
        made["clip.vision.spatial_merge_size"] = config.spatial_merge_size
    if kind in ("idefics3", "smolvlm"):
        made["clip.vision.projector.scale_factor"] = config.scale_factor
        made["clip.vision.preproc_image_size"] = processor["size"]["longest_edge"]
    if kind == "gemma3":
        side = v.image_size // v.patch_size
        made["clip.vision.projector.scale_factor"] = side // int(config.mm_tokens_per_image**0.5)
    return made


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 64)
    for name, tensor in model.model.state_dict().items():
        name = re.sub(r"^(vision_tower)\.(?=embeddings|encoder|post)", r"\1.vision_model.", name)
        name = re.sub(r"^(vision_model|connector)", r"model.\1", name)
        name = name.replace("_weight", ".weight")
        if name.startswith(("language_model.", "model.text_model", "text_model.")):
            continue
        if name == "visual.patch_embed.proj.weight":
            yield "v.patch_embd.weight", tensor[:, :, 0]
            yield "v.patch_embd.weight.1", tensor[:, :, 1]
        elif ".qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                yield renamed(names, name.replace("qkv", part)), piece
        else:
            if "soft_emb_norm" in name:
                tensor = tensor + 1
            if re.search(r"attention\.[qk]_proj", name):
                tensor = _permute(tensor, model.config.vision_config.num_attention_heads)
            yield renamed(names, name), tensor
    if hasattr(model.model, "vision_tower") and "patch_conv" in str(model.model.vision_tower):
        yield "v.token_embd.img_break", model.get_input_embeddings().weight[12].detach()


def renamed(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


# ---- the converter of LLaVA's time ----

EARLY = [
    ("model.", ""), ("vision_tower.", "v."), ("vision_model.", ""), ("encoder.layers", "blk"),
    ("embeddings.", ""), ("_proj.", "."), ("self_attn.", "attn_"), ("layer_norm", "ln"),
    ("layernorm", "ln"), ("mlp.fc1", "ffn_down"), ("mlp.fc2", "ffn_up"), ("embedding", "embd"),
    ("layrnorm", "ln"), ("multi_modal_projector.linear_1", "mm.0"),
    ("multi_modal_projector.linear_2", "mm.2"),
]  # fmt: skip


def early_metadata(model: Any, kind: str, processor: Mapping[str, Any]) -> dict[str, Any]:
    v = model.config.vision_config
    made = {
        "general.file_type": 1,
        "general.description": "image encoder for LLaVA",
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.vision.image_size": v.image_size,
        "clip.vision.patch_size": v.patch_size,
        "clip.vision.embedding_length": v.hidden_size,
        "clip.vision.feed_forward_length": v.intermediate_size,
        "clip.vision.projection_dim": 768,
        "clip.vision.attention.head_count": v.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": v.layer_norm_eps,
        "clip.vision.block_count": v.num_hidden_layers - 1,
        "clip.vision.image_mean": [float(n) for n in processor["image_mean"]],
        "clip.vision.image_std": [float(n) for n in processor["image_std"]],
        "clip.use_gelu": v.hidden_act == "gelu",
    }
    layers = model.config.vision_feature_layer
    if isinstance(layers, list):
        layers = [n if n >= 0 else v.num_hidden_layers + 1 + n for n in layers]
        made["clip.vision.feature_layer"] = layers
        made["clip.vision.block_count"] = max(layers)
    if kind == "llava_next":
        pinpoints = model.config.image_grid_pinpoints
        made |= {
            "clip.projector_type": "mlp",
            "clip.vision.image_grid_pinpoints": [edge for pair in pinpoints for edge in pair],
            "clip.vision.image_aspect_ratio": "anyres",
            "clip.vision.mm_patch_merge_type": "spatial_unpad",
        }
    return made


def early_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    last = early_metadata(model, "llava", {"image_mean": [], "image_std": []})
    depth = last["clip.vision.block_count"]
    for name, tensor in model.model.state_dict().items():
        if name.startswith("language_model.") or "post_layernorm" in name or ".head." in name:
            continue
        if (match := re.search(r"layers\.(\d+)", name)) and int(match[1]) >= depth:
            continue
        if name == "image_newline":
            yield "model.image_newline", tensor
            continue
        for old, new in EARLY:
            name = name.replace(old, new)
        yield re.sub(r"(class_embd)\.weight", r"\1", name), tensor
