"""mistral.rs's Python examples of adapters, call by call.

What is a model of the hub there is a folder of that name here, with a tiny model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_adapter, write_folder, write_gguf, write_xlora

from squall import (
    AnyMoeConfig,
    AnyMoeExpertType,
    Architecture,
    ChatCompletionRequest,
    InvalidRequest,
    Runner,
    Which,
)
from squall.errors import SquallError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ZEPHYR, INSTRUCT = "HuggingFaceH4/zephyr-7b-beta", "mistralai/Mistral-7B-Instruct-v0.1"
GEMMA, NAMES = "google/gemma-7b-it", [f"adapter_{i}" for i in range(1, 5)]
QUESTION = [{"role": "user", "content": "Tell me a story about the Rust type system."}]
ROWS = [("Discuss the impact of Renaissance art", 0), ("Explain the theory of relativity", 1)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the examples name."""
    root = tmp_path_factory.mktemp("seed")
    zephyr = write_folder(root / ZEPHYR, "MistralForCausalLM")
    instruct = write_folder(root / INSTRUCT, "MistralForCausalLM")
    gemma = write_folder(root / GEMMA, "GemmaForCausalLM", head_dim=16)
    write_gguf(root / "TheBloke/zephyr-7B-beta-GGUF/zephyr-7b-beta.Q4_0.gguf", zephyr)
    write_xlora(root / "lamm-mit/x-lora", zephyr, NAMES, ZEPHYR)
    write_xlora(root / "lamm-mit/x-lora-gemma-7b", gemma, NAMES[:2], GEMMA)
    write_adapter(
        root / "typeof/zephyr-7b-beta-lora", instruct, rank=8, target_modules=["gate_proj"]
    )
    orderings = {
        "xlora-paper": {"order": NAMES, "base_model_id": ZEPHYR},
        "xlora-gemma-paper": {"order": NAMES[:2], "base_model_id": GEMMA},
        "lora-paper": {
            "order": NAMES[:1],
            "base_model_id": ZEPHYR,
            "preload_adapters": [{"name": "adapter_2", "adapter_model_id": "lamm-mit/x-lora"}],
        },
        "one": {"order": NAMES[2:3], "base_model_id": ZEPHYR},
    }
    for name, ordering in orderings.items():
        (root / "orderings").mkdir(exist_ok=True)
        (root / "orderings" / f"{name}-ordering.json").write_text(json.dumps(ordering))
    rows = [{"prompt": prompt, "expert": expert} for prompt, expert in ROWS]
    (root / "examples").mkdir()
    (root / "examples/amoe.json").write_text(json.dumps({"rows": rows}))
    return root


@pytest.fixture(autouse=True)
def _in_the_folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)


def ask(runner: Runner, **fields: Any) -> str:
    res = runner.send_chat_completion_request(
        ChatCompletionRequest(
            model="mistral", messages=QUESTION, max_tokens=8, presence_penalty=1.0, top_p=0.1,
            temperature=0.5, **fields,
        )
    )  # fmt: skip
    assert res.usage.completion_tokens
    text: str = res.choices[0].message.content
    return text


def zephyr_gguf(order: str = "xlora-paper") -> Any:
    return Which.LoraGGUF(
        tok_model_id=None,  # Automatically determine from ordering file
        quantized_model_id="TheBloke/zephyr-7B-beta-GGUF",
        quantized_filename="zephyr-7b-beta.Q4_0.gguf",
        adapters_model_id="lamm-mit/x-lora",
        order=f"orderings/{order}-ordering.json",
    )


def test_lora_zephyr() -> None:
    with Runner(which=zephyr_gguf(), seed=1) as runner:
        all_four = ask(runner)
        # Example: Make adapter_3 the active adapter
        runner.activate_adapters(["adapter_3"])
        third = ask(runner)
        runner.activate_adapters([])
        none = ask(runner)
    with Runner(which=zephyr_gguf("one"), seed=1) as runner:
        assert ask(runner) == third
    assert len({all_four, third, none}) == 3


def test_lora_activation() -> None:
    with Runner(which=zephyr_gguf(), seed=1) as runner:
        fourth = ask(runner, adapters=["adapter_4"])
        runner.activate_adapters(["adapter_4"])
        assert ask(runner) == fourth
        with pytest.raises(SquallError, match="adapter_1"):
            runner.activate_adapters(["adapter_9"])


def zephyr(order: str) -> Any:
    return Which.Lora(
        adapters_model_id="lamm-mit/x-lora", order=f"orderings/{order}-ordering.json",
        arch=Architecture.Mistral,
    )  # fmt: skip


def test_adapters_of_a_folder_become_part_of_it() -> None:
    with Runner(which=zephyr("xlora-paper"), seed=1) as runner:
        merged = ask(runner)
        assert not runner.model.adapters.list()
    with Runner(which=zephyr("lora-paper"), seed=1) as runner:
        assert [info.name for info in runner.model.adapters.list()] == ["adapter_1", "adapter_2"]
        assert runner.model.adapters.active == ("adapter_1",)
        runner.activate_adapters(["adapter_2"])
        assert ask(runner) != merged


@pytest.mark.parametrize("k", [None, 2])
def test_xlora_zephyr(k: int | None) -> None:
    selected = Which.XLora(
        model_id=None,  # Automatically determine from ordering file
        tokenizer_json=None,
        xlora_model_id="lamm-mit/x-lora",
        order="orderings/xlora-paper-ordering.json",
        tgt_non_granular_index=k,
        arch=Architecture.Mistral,
    )
    with Runner(which=selected, seed=1) as runner:
        assert ask(runner) == ask(runner)


def test_xlora_gemma() -> None:
    selected = Which.XLora(
        model_id=GEMMA,
        tokenizer_json=None,
        xlora_model_id="lamm-mit/x-lora-gemma-7b",
        order="orderings/xlora-gemma-paper-ordering.json",
        tgt_non_granular_index=None,
        arch=Architecture.Gemma,
    )
    with Runner(which=selected, seed=1) as runner:
        assert ask(runner)


def test_xlora_gguf() -> None:
    selected = Which.XLoraGGUF(
        quantized_model_id="TheBloke/zephyr-7B-beta-GGUF",
        quantized_filename="zephyr-7b-beta.Q4_0.gguf",
        xlora_model_id="lamm-mit/x-lora",
        order="orderings/xlora-paper-ordering.json",
    )
    with Runner(which=selected, seed=1) as runner:
        assert ask(runner)


def anymoe(expert_type: Any, model_ids: Sequence[str], **config: Any) -> Runner:
    return Runner(
        which=Which.Plain(model_id=INSTRUCT, arch=Architecture.Mistral),
        seed=1,
        context=256,
        anymoe_config=AnyMoeConfig(
            hidden_size=64,
            dataset_json="examples/amoe.json",
            prefix="model.layers",
            mlp="mlp",
            expert_type=expert_type,
            lr=1e-3,
            epochs=3,
            batch_size=4,
            model_ids=model_ids,
            **config,
        ),
    )


def test_anymoe_and_anymoe_inference() -> None:
    kind, experts = AnyMoeExpertType.FineTuned(), [ZEPHYR]
    given: dict[str, Any] = {"layers": [0, 1], "loss_csv_path": "loss.csv", "gate_model_id": "gate"}
    with anymoe(kind, experts, **given) as runner:
        trained = ask(runner)
    assert Path("loss.csv").read_text().startswith("Step,Gating layer 0,Gating layer 1\n")
    # Use a pretrained gating layer
    with anymoe(kind, experts, **given, training=False) as runner:
        assert ask(runner) == trained


def test_anymoe_lora() -> None:
    kind = AnyMoeExpertType.LoraAdapter(rank=8, alpha=16.0, target_modules=["gate_proj"])
    with anymoe(kind, ["typeof/zephyr-7b-beta-lora"]) as runner:
        assert ask(runner)


def test_what_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text('{"order": ["adapter_1"]}')
    with pytest.raises(InvalidRequest, match="which model"):
        Runner(Which.Lora("lamm-mit/x-lora", str(tmp_path / "o.json")))
    with pytest.raises(InvalidRequest, match="the ordering file is for"):
        Runner(Which.Lora("a", "orderings/one-ordering.json", model_id="other/model"))
