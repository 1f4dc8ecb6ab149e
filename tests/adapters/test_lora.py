"""LoRA against PEFT in float32, on tiny models of every architecture: merged, and beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from harness import distance
from peft_models import CASES, adapt, beside, merged
from safetensors.torch import load_file, save_file

from squall.errors import InvalidRequest

TOLERANCE = 1e-4
MODULES = [
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "dense", "gate_proj", "up_proj",
    "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "c_proj", "embed_tokens", "lm_head",
]  # fmt: skip
OUT_BIASES = {f"model.layers.0.self_attn.{name}.bias" for name in ("o_proj", "dense")} | {
    "blk.0.attn_output.bias"
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
EVERYTHING = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": MODULES,
    "rank_pattern": {r"layers\.[12]\..*\.(q|qkv|up)_proj": 7, "lm_head": 2, "fc2": 3},
    "alpha_pattern": {"layers.1.self_attn.v_proj": 3, "down_proj": 12, "self_attn.dense": 1},
    "use_rslora": True,
}

pytestmark = pytest.mark.filterwarnings("ignore")


def check(case: tiny.Case, path: Path, kind: str, **config: Any) -> None:
    model = adapt(case, path, kind, **config)
    lora = model.read()
    assert distance(model.plain, model.logits) > 0.05
    if config.get("lora_bias") and model.checkpoint.tensors.keys().isdisjoint(OUT_BIASES):
        with pytest.raises(InvalidRequest, match="keep it beside"):
            merged(model, (lora, 1.0))
    else:
        assert distance(merged(model, (lora, 1.0)), model.logits) < TOLERANCE
    if not lora.vectors:
        assert distance(beside(model, (lora, 1.0)), model.logits) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_folders(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path, "folder", **EVERYTHING)


@pytest.mark.parametrize("case", tiny.CASES, ids=str)
def test_gguf_bases(case: tiny.Case, tmp_path: Path) -> None:
    check(case, tmp_path, "gguf", **EVERYTHING)


OPTIONS: dict[str, dict[str, Any]] = {
    "regex": {"target_modules": r".*layers\.[02]\.(self_attn|mlp)\.(\w+_proj|dense|fc[12])"},
    "looking ahead": {
        "target_modules": r"^(?!.*(?:layers\.1|lm_head)).*(?:q_proj|v_proj|down_proj|fc2)$"
    },
    "all-linear": {"target_modules": "all-linear"},
    "layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["layers.1.mlp.down_proj", "lm_head"]},
    "excluded by pattern": {"exclude_modules": r".*\.self_attn\..*"},
    "biases": {"bias": "all"},
    "own biases": {"bias": "lora_only"},
    "biases of B": {
        "lora_bias": True,
        "target_modules": ["q_proj", "o_proj", "dense", "up_proj", "fc1", "fc2"],
    },
    "norms saved": {"modules_to_save": ["input_layernorm", "norm", "final_layernorm"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "head saved": {"modules_to_save": ["lm_head", "k_proj"], "target_modules": ["q_proj"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["v_proj"]},
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama-biased-tied", "gguf"), ("phi2", "folder"), ("gemma", "folder"), ("qwen2", "gguf")],
)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, name: str, kind: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path, kind, **EVERYTHING | OPTIONS[option])


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_tied_adapters_of_tied_weights(name: str, field: str, kind: str, tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"], "r": 4, "ensure_weight_tying": True}
    config[field] = [*(["q_proj"] if field == "target_modules" else []), name]
    check(CASES["llama-biased-tied"], tmp_path, kind, **config)


@pytest.mark.parametrize(
    "pattern", ["q_pro.", "layers.1.self.attn.q_proj", "^model.layers.0", r".*\.[12]\..*q_proj$"]
)
def test_patterns_of_alphas(pattern: str, tmp_path: Path) -> None:
    check(
        CASES["llama-2"], tmp_path, "folder", target_modules=["q_proj", "v_proj"], r=4,
        alpha_pattern={pattern: 40},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_stacked_experts(name: str, kind: str, tmp_path: Path) -> None:
    config = EVERYTHING | {
        "target_modules": ["o_proj"],
        "target_parameters": EXPERTS,
        "rank_pattern": {"down_proj": 3, "mlp.gate.weight": 2},
        "alpha_pattern": {r".*\.gate_up_proj": 5},
    }
    check(CASES[name], tmp_path, kind, **config)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "phi-3.5-moe"])
def test_experts_by_themselves(name: str, kind: str, tmp_path: Path) -> None:
    """As adapters from before transformers 5 have them: a pair of matrices an expert's linear."""
    case = CASES[name]
    config = EVERYTHING | {
        "target_modules": ["o_proj"],
        "target_parameters": EXPERTS[:2],
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"down_proj": 3},
        "use_rslora": False,
    }
    if kind == "gguf" and name == "phi-3.5-moe":
        pytest.skip("GGUF has no such model")
    model = adapt(case, tmp_path, kind, **config)
    stems = ("block_sparse_moe", "w1", "w3", "w2") if name != "qwen3moe" else (
        "mlp", "gate_proj", "up_proj", "down_proj")  # fmt: skip
    split_experts(model.folder, *stems)
    lora = model.read()
    assert any(module.endswith(f"experts.5.{stems[1]}") for module in lora.modules)
    assert distance(merged(model, (lora, 1.0)), model.logits) < TOLERANCE
    assert distance(beside(model, (lora, 1.0)), model.logits) < TOLERANCE


def split_experts(folder: Path, block: str, gate: str, up: str, down: str) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name in [
        name for name in tensors if ".experts." in name and name.endswith("lora_A.weight")
    ]:
        a, b = tensors.pop(name), tensors.pop(name.replace("lora_A", "lora_B"))
        a = a.reshape(6, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, 6).permute(2, 0, 1)
        stem = name.partition(".mlp.experts")[0] + f".{block}.experts."
        parts = (
            {gate: b.chunk(2, 1)[0], up: b.chunk(2, 1)[1]} if "base_layer" in name else {down: b}
        )
        for part, rows in parts.items():
            for expert in range(6):
                tensors[f"{stem}{expert}.{part}.lora_A.weight"] = a[expert].contiguous().clone()
                tensors[f"{stem}{expert}.{part}.lora_B.weight"] = rows[expert].contiguous().clone()
    save_file(tensors, weights)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    changes = {"target_modules": ["o_proj", gate, up, down], "target_parameters": None}
    changes |= {key: {down: 3} for key in ("rank_pattern", "alpha_pattern")}
    path.write_text(json.dumps(config | changes))
