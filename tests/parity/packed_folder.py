"""Models quantized to the layouts of GPTQ and AWQ, and written as their tools document them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

WHOLE = "model.safetensors"
# What GPTQ's first version is stored less by, a word of zeros at a time; of 3 bits each value is.
LESS_ONE = {2: 0x55555555, 3: 0, 4: 0x11111111, 8: 0x01010101}
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs of an AWQ word, from its lowest four bits on


@dataclass(frozen=True)
class Packing:
    """How a folder is quantized; group -1: one a row. Of version 1 zeros are stored less one."""

    method: str = "gptq"
    bits: int = 4
    group: int = 128
    act_order: bool = False
    version: int = 1
    symmetric: bool = False
    shared_order: bool = True  # of linears with one input, as GPTQ makes it
    bias: bool = False  # a bias of zeros where the model has none

    def __str__(self) -> str:
        order = "-act" if self.act_order else ""
        return f"{self.method}-{self.bits}-{self.group}{order}-v{self.version}"

    def config(self) -> dict[str, Any]:
        common = {"bits": self.bits, "group_size": self.group, "quant_method": self.method}
        if self.method == "awq":
            return common | {"version": "gemm", "zero_point": True}
        formats = {1: "gptq", 2: "gptq_v2"}
        return common | {
            "checkpoint_format": formats[self.version],
            "desc_act": self.act_order,
            "sym": self.symmetric,
        }


def to_words(codes: list[int], bits: int) -> list[int]:
    """Codes one after another, from the lowest bit of the first word on; they may span words."""
    string = sum(code << bits * i for i, code in enumerate(codes))
    assert len(codes) * bits % 32 == 0
    return [string >> 32 * i & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]


def awq_words(codes: list[int]) -> list[int]:
    return [
        sum(codes[first + NIBBLES[i]] << 4 * i for i in range(8))
        for first in range(0, len(codes), 8)
    ]


def words_array(rows: list[list[int]]) -> NDArray[np.int32]:
    return np.array(rows, np.uint32).view(np.int32)


def quantize(
    weight: NDArray[np.float32], packing: Packing, order: NDArray[Any]
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
    """The stored tensors of a weight [outputs, inputs], and what they stand for."""
    outputs, inputs = weight.shape
    group = inputs if packing.group == -1 else packing.group
    largest, groups = (1 << packing.bits) - 1, -(-inputs // group)
    g_idx = np.empty(inputs, np.int32)
    g_idx[order] = np.arange(inputs) // group
    codes = np.empty((outputs, inputs), int)
    zeros, scales = np.empty((groups, outputs), int), np.empty((groups, outputs), np.float16)
    for g in range(groups):
        part = weight[:, g_idx == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scales[g] = np.maximum((high - low) / largest, 1e-5)
        zeros[g] = np.rint(-low / scales[g])
        if packing.symmetric:
            zeros[g] = (largest + 1) // 2
        elif packing.version == 1:
            zeros[g, ::7] = 0
        zeros[g] = np.clip(zeros[g], packing.bits == 3, largest)
        steps = np.rint(part / scales[g][:, None]).astype(int) + zeros[g][:, None]
        codes[:, g_idx == g] = np.clip(steps, 0, largest)
    values = np.empty_like(weight)
    for i in range(inputs):
        values[:, i] = scales[g_idx[i]].astype(np.float32) * (codes[:, i] - zeros[g_idx[i]])
    if packing.method == "awq":
        stored = {
            "qweight": words_array([awq_words(codes[:, i].tolist()) for i in range(inputs)]),
            "qzeros": words_array([awq_words(zeros[g].tolist()) for g in range(groups)]),
        }
        return stored | {"scales": scales}, values
    less = LESS_ONE[packing.bits] if packing.version == 1 else 0
    kept = zeros - 1 if (packing.version, packing.bits) == (1, 3) else zeros
    stored = {
        "qweight": words_array(
            [to_words(codes[r].tolist(), packing.bits) for r in range(outputs)]
        ).T.copy(),
        "qzeros": words_array(
            [
                [word - less & 0xFFFFFFFF for word in to_words(kept[g].tolist(), packing.bits)]
                for g in range(groups)
            ]
        ),
        "g_idx": g_idx,
    }
    return stored | {"scales": scales}, values


def input_of(name: str) -> str:
    """What linears with the same input have in common."""
    layer, _, own = name.rpartition(".")
    shared = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    return layer if own in shared else name


def save(model: Any, packing: Packing, folder: Path, seed: int, head: bool = False) -> Any:
    """Writes the model quantized; returns it with the values that were written."""
    plain = folder.with_name("plain")
    model.save_pretrained(plain)
    values = load_file(plain / WHOLE)
    tensors: dict[str, NDArray[Any]] = {}
    orders: dict[str, NDArray[Any]] = {}
    rng = np.random.default_rng(seed)
    plain_stems = ("embed_tokens", ".gate") if head else ("embed_tokens", ".gate", "lm_head")
    for name, weight in values.items():
        stem = name.removesuffix(".weight")
        if weight.ndim != 2 or stem.endswith(plain_stems):
            tensors[name] = weight
            continue
        key = input_of(stem) if packing.shared_order else stem
        inputs = weight.shape[1]
        made = rng.permutation(inputs) if packing.act_order else np.arange(inputs)
        stored, values[name] = quantize(weight, packing, orders.setdefault(key, made))
        tensors |= {f"{stem}.{part}": array for part, array in stored.items()}
        if packing.bias and f"{stem}.bias" not in values:
            tensors[f"{stem}.bias"] = np.zeros(len(weight), np.float16)
    save_file(values, plain / WHOLE, {"format": "pt"})
    folder.mkdir()
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / WHOLE)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = packing.config()
    (folder / "config.json").write_text(json.dumps(config))
    return type(model).from_pretrained(plain, attn_implementation="eager").eval()
