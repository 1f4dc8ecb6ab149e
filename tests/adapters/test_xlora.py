"""X-LoRA against PEFT's own model of it: logits and scalings, of a prompt and of an answer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from convert import convert
from gguf.quants import dequantize, quantize
from harness import distance, make_batch
from safetensors.torch import load_file, save_file
from test_ggml import QUANTS, old_file
from xlora_models import MODULES, PROMPT, Made, case, make, opened, tokens_of

from reference_executor import ReferenceExecutor
from squall import executors
from squall.adapters.xlora import Config, TwoPasses, XLora, place
from squall.errors import SquallError
from squall.executors import Limits
from squall.program import Program
from squall.quant import Plan
from squall.weights import WeightStore

DEEP = {"xlora_depth": 3, "xlora_size": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise": {"layerwise_scalings": True},
    "deep": DEEP,
    "deep-layerwise": DEEP | {"layerwise_scalings": True, "top_k_lora": 2},
    "linear": DEEP | {"enable_relu_and_dropout": False, "use_bias": False},
    "top-1": {"top_k_lora": 1, "layerwise_scalings": True},
    "no-softmax": {"enable_softmax": False},
    "temperature": {"softmax_temperature": 0.3, "global_scaling_weight": 1.7},
    "passing": {"scaling_pass_value": 0.5, "layerwise_scalings": True},
}
# What else each key may be, where it matters.
MUTATIONS: list[tuple[str, str, Any]] = [
    ("deep", "enable_relu_and_dropout", False),
    ("linear", "enable_relu_and_dropout", True),
    ("plain", "enable_softmax", False),
    ("no-softmax", "enable_softmax", True),
    ("plain", "softmax_temperature", 0.9),
    ("layerwise", "top_k_lora", 2),
    ("top-1", "top_k_lora", 3),
    ("plain", "scaling_pass_value", 0.1),
    ("passing", "scaling_pass_value", 0.0),
    ("passing", "global_scaling_weight", 0.9),
    ("plain", "adapters", ["1", "0", "2"]),
]
REFUSED: list[tuple[str, str, Any]] = [
    ("deep", "xlora_depth", 2),
    ("deep", "xlora_size", 25),
    ("deep", "xlora_size", None),
    ("plain", "layerwise_scalings", True),
    ("layerwise", "layerwise_scalings", False),
    ("plain", "use_bias", False),
    ("linear", "use_bias", True),
    ("plain", "hidden_size", 64),
    ("plain", "hidden_size", None),
    ("plain", "adapters", []),
    ("plain", "adapters", ["0", "1"]),
    ("plain", "adapters", ["0", "1", "3"]),
    ("plain", "adapters", {"0": 1}),
    ("plain", "enable_softmax_topk", True),
    ("plain", "softmax_temperature", 0),
    ("plain", "softmax_temperature", "1"),
    ("plain", "top_k_lora", 0),
    ("plain", "global_scaling_weight", float("nan")),
    ("plain", "enable_softmax", 1),
]
NEAR = 1e-4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    """A model with X-LoRA of a kind in CONFIGS, made once."""
    root, done = tmp_path_factory.mktemp("xlora"), dict[tuple[str, str], Made]()

    def get(name: str, config: str) -> Made:
        if (name, config) not in done:
            model, folder = tiny.build(case(name)), root / name / config
            if not (base := root / name / "base").exists():
                model.save_pretrained(base)
            done[name, config] = make(model, MODULES[name], folder, **CONFIGS[config])
        return done[name, config]

    return get


def answered(
    executor: TwoPasses, tokens: Sequence[int], steps: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and scalings of a prompt, and of what follows token by token."""
    logits, scalings, start = [], [], 0
    for length in steps or [PROMPT, *[1] * (len(tokens) - PROMPT)]:
        batch = make_batch([(tokens[start : start + length], start, 1)])
        batch = replace(batch, prompts=np.array([PROMPT], np.int32))
        scalings.append(executor.scalings(batch))
        logits.append(executor.step(batch).copy())
        start += length
    return np.concatenate(logits), np.concatenate(scalings)


def check(executor: TwoPasses, made: Made, frozen_from: int | None = None) -> None:
    tokens = tokens_of(made.model)
    logits, scalings = made.run(tokens, frozen_from)
    found, weighed = answered(executor, tokens)
    if weighed.shape != scalings.shape:  # one for all modules
        scalings = scalings[:, : weighed.shape[1]]
    assert distance(weighed, scalings) < NEAR
    assert distance(found, logits) < NEAR


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODULES)
def test_logits_and_scalings_are_pefts(name: str, config: str, made: Any) -> None:
    one = made(name, config)
    check(opened(one.folder.parent / "base", one.folder), one)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", MODULES)
def test_scalings_settle(name: str, k: int, made: Any) -> None:
    one = made(name, "layerwise")
    executor = opened(one.folder.parent / "base", one.folder, tgt_non_granular_index=k)
    check(executor, one, PROMPT + k - 1)


def changed(folder: Path, to: Path, key: str, value: Any) -> Path:
    """The same folder with another value in xlora_config.json."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).symlink_to(path)
    config = json.loads((folder / "xlora_config.json").read_text()) | {key: value}
    (to / "xlora_config.json").unlink()
    (to / "xlora_config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(("config", "key", "value"), MUTATIONS)
def test_keys_matter(config: str, key: str, value: Any, made: Any, tmp_path: Path) -> None:
    one = made("llama", config)
    folder = changed(one.folder, tmp_path / "changed", key, value)
    tokens = tokens_of(one.model)
    executor = opened(one.folder.parent / "base", folder)
    found, _ = answered(executor, tokens, [len(tokens)])
    assert distance(found, one.run(tokens)[0]) > 10 * NEAR


@pytest.mark.parametrize(("config", "key", "value"), REFUSED)
def test_what_does_not_fit_is_refused(
    config: str, key: str, value: Any, made: Any, tmp_path: Path
) -> None:
    one = made("llama", config)
    folder = changed(one.folder, tmp_path / "changed", key, value)
    with pytest.raises(SquallError):
        opened(one.folder.parent / "base", folder)


@pytest.mark.parametrize("value", [{"\x1b[31m\n": 0}, {"\x1b[31m\n": "0"}, ["\x1b[31m\n"]])
def test_names_of_strangers_are_printed_safely(value: Any, made: Any, tmp_path: Path) -> None:
    one = made("llama", "deep-layerwise")
    folder, order = changed(one.folder, tmp_path / "x", "adapters", value), tmp_path / "order.json"
    order.write_text(json.dumps({"order": ["\x1b[31m\n0"]}))
    with pytest.raises(SquallError) as caught:
        opened(one.folder.parent / "base", folder, order=order)
    assert str(caught.value).isprintable()


def test_a_weight_of_a_classifier_is_there_once(made: Any, tmp_path: Path) -> None:
    one = made("llama", "deep-layerwise")
    folder = changed(one.folder, tmp_path / "changed", "use_bias", True)
    path = folder / "xlora_classifier.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(tensors | {"other.last.weight": tensors["last.weight"] * 2}, path)
    with pytest.raises(SquallError, match="classifier of"):
        opened(one.folder.parent / "base", folder)


@pytest.mark.parametrize("count", [0, -1, True, 1.0])
def test_answers_settle_after_a_number_of_tokens(count: Any) -> None:
    with pytest.raises(SquallError, match="at least 1"):
        XLora("somewhere", tgt_non_granular_index=count)


def test_an_ordering_file_orders(made: Any, tmp_path: Path) -> None:
    one = made("phi3", "layerwise")
    config = json.loads((one.folder / "xlora_config.json").read_text())
    paths = {name: str(one.folder / name) for name in reversed(config["adapters"])}
    folder = changed(one.folder, tmp_path / "changed", "adapters", paths)
    for name in paths:
        (folder / name).unlink()
    modules = [name for name, _ in one.model.named_modules() if name.endswith("_proj")]
    modules = sorted({name.partition(".model.")[2].partition("model.")[2] for name in modules})
    layers = {f"model.{name}": number for number, name in enumerate(sorted(modules, key=place))}
    order = tmp_path / "order.json"
    base = folder.parent / "base"
    base.symlink_to(one.folder.parent / "base")
    given = {"order": ["0", "1", "2"], "base_model_id": "tiny", "layers": layers}
    order.write_text(json.dumps(given))
    check(opened(base, folder, order=order), one)
    for wrong in ({"order": ["0", "1"]}, {"layers": {}}, {"base_model_id": "other"}):
        order.write_text(json.dumps(given | wrong))
        if wrong == {"layers": {}}:
            check(opened(base, folder, order=order), one)
            continue
        with pytest.raises(SquallError):
            opened(base, folder, order=order)


@pytest.fixture
def quantizing(monkeypatch: pytest.MonkeyPatch) -> QUANTS:
    """The matrices of GGUF files that are written become this."""
    add, kind = gguf.GGUFWriter.add_tensor, QUANTS.Q4_0

    def quantized(self: Any, name: str, values: np.ndarray) -> None:
        matrix = values.ndim == 2
        add(self, name, quantize(values, kind) if matrix else values, raw_dtype=matrix and kind)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", quantized)
    return kind


def dequantize_all(model: Any, kind: QUANTS) -> Any:
    """The model with the values that the matrices of a quantized file stand for."""
    import torch

    for weight in model.state_dict().values():
        if weight.ndim == 2:
            weight.copy_(torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind)))
    return model


@pytest.mark.parametrize("name", MODULES)
def test_on_gguf(name: str, quantizing: QUANTS, tmp_path: Path) -> None:
    model, base = tiny.build(case(name)), tmp_path / "base.gguf"
    convert(model, name, base)
    dequantize_all(model, quantizing)
    one = make(model, MODULES[name], tmp_path / "mixed", **CONFIGS["deep-layerwise"])
    exact = opened(base, one.folder)
    assert {total.format for total in opened(base, one.folder, exact=False).formats} == {"q4_0"}
    check(exact, one)


def test_on_ggml(tmp_path: Path) -> None:
    model = tiny.build(case("llama"))
    old = {"rms_norm_eps": 1e-5, "intermediate_size": 256}
    model = tiny.build(replace(case("llama"), config=case("llama").config | old))
    convert(model, "llama", tmp_path / "base.gguf")
    base = old_file(tmp_path / "base.bin", (model, tmp_path / "base.gguf"), QUANTS.Q8_0)
    dequantize_all(model, QUANTS.Q8_0)
    one = make(model, MODULES["llama"], tmp_path / "mixed", **CONFIGS["layerwise"])
    check(opened(base, one.folder, gqa=2), one)


def test_on_weights_quantized_at_load(made: Any) -> None:
    one = made("llama", "layerwise")
    executor = opened(one.folder.parent / "base", one.folder, exact=False)
    tokens = tokens_of(one.model)
    logits, scalings = answered(executor, tokens, [len(tokens)])
    weights, caches = executor.weight_bytes, executor.kv_bytes
    for isq, near in (("Q8_0", 0.1), (None, 0.0)):
        executor.requantize(Plan.of(isq))
        found, weighed = answered(executor, tokens, [len(tokens)])
        assert near / 100 <= distance(found, logits) <= near
        assert near / 100 <= distance(weighed, scalings) <= near
        assert (executor.weight_bytes < weights / 2) == (isq is not None)
        assert executor.plan == Plan.of(isq)
        assert executor.kv_bytes == caches


def test_a_profile_is_of_both_passes(made: Any) -> None:
    one = made("phi3", "deep")
    executor, tokens = opened(one.folder.parent / "base", one.folder), tokens_of(one.model)
    phases = executor.profile(lambda: answered(executor, tokens, [len(tokens)]))
    names = [phase.name for phase in phases]
    assert len(names) > len(set(names))
    assert sum(phase.fmas for phase in phases) > 0


@pytest.mark.parametrize("each", tiny.CASES, ids=str)
def test_modules_have_the_order_of_transformers(each: tiny.Case) -> None:
    import torch

    wanted = [name for name, module in tiny.build(each).named_modules()
              if isinstance(module, torch.nn.Linear | torch.nn.Embedding)]  # fmt: skip
    assert sorted(sorted(wanted), key=place) == wanted


def test_unknown_modules_have_no_order() -> None:
    with pytest.raises(SquallError, match="ordering file"):
        place("model.layers.0.self_attn.W_pack")


def reference(program: Program, store: WeightStore, limits: Limits, **_: Any) -> Any:
    checkpoint, others = store.checkpoints[""], store.checkpoints
    return ReferenceExecutor(program, checkpoint, blocks=limits.blocks, others=others)


@pytest.mark.parametrize("config", ["deep-layerwise", "passing"])
def test_the_reference_agrees(config: str, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "open", reference)
    one = made("phi3", config)
    check(opened(one.folder.parent / "base", one.folder), one)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("passing", [0.0, 0.5])
def test_the_head_is_adapted(
    passing: float, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's X-LoRA knows no heads; the reference does. The first pass has none."""
    from peft import LoraConfig, get_peft_model

    one = made("llama", "plain")
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    head = get_peft_model(tiny.build(case("llama")), config)
    head.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    paths = {"0": "", "1": str(tmp_path / "head"), "2": "2"}
    folder = changed(one.folder, tmp_path / "changed", "adapters", paths)
    (folder / "1").unlink()
    folder = changed(folder, tmp_path / "passing", "scaling_pass_value", passing)
    base, tokens = one.folder.parent / "base", tokens_of(one.model)
    found = answered(opened(base, folder), tokens)
    monkeypatch.setattr(executors, "open", reference)
    wanted = answered(opened(base, folder), tokens)
    assert all(distance(a, b) < NEAR for a, b in zip(found, wanted, strict=True))
    assert distance(found[0], one.run(tokens)[0]) > 10 * NEAR


def test_no_row_depends_on_others() -> None:
    rng = np.random.default_rng(2)
    for adapters, layers, top in itertools.product((1, 2, 3, 9, 33), (1, 7), (None, 2)):
        names = dict.fromkeys(map(str, range(adapters)), "")
        config = Config(hidden_size=1, adapters=names, top_k_lora=top)
        logits = rng.normal(0, 9, (67, adapters * layers)).astype(np.float32)
        whole = config.scalings(logits)
        for start, stop in ((0, 1), (1, 2), (3, 16), (17, 67)):
            assert config.scalings(logits[start:stop]).tobytes() == whole[start:stop].tobytes()


def test_pefts_own_files(made: Any, tmp_path: Path) -> None:
    one = made("llama", "deep")
    one.model.peft_config["default"].save_pretrained(tmp_path)
    # What PEFT saves lacks those parts whose numbers are names of adapters.
    save_file(one.model.state_dict(), tmp_path / "adapter_model.safetensors")
    check(opened(one.folder.parent / "base", tmp_path), one)
