"""Answers about images are the same bytes, however they are cut, cached and computed together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import draw
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_seers import write_seer

from squall import EngineConfig, Model, UnsupportedModel
from squall.adapters.anymoe import AnyMoe, FineTuned
from squall.api.jobs import start_chat
from squall.api.requests import ChatCompletionRequest
from squall.engine.generation import Generation
from squall.engine.memory import KvSize
from squall.model import GREEDY
from squall.recipes.gguf_write import describe

FAMILIES = ["llava", "qwen2vl", "gemma3", "smolvlm", "vllama"]  # of each kind
A, B, C = draw("text", 60, 40), draw("gradient", 50, 70), draw("noise", 33, 28)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
RANK = 3
Told = tuple[tuple[int, ...], tuple[Any, ...]]
Asked = tuple[list[dict[str, Any]], dict[str, Any]]


def user(*content: Any) -> list[dict[str, Any]]:
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in content
    ]
    return [{"role": "user", "content": parts}]


def asked(**common: Any) -> list[Asked]:
    """Conversations that share beginnings, with images and without, drawn and greedy."""
    answer = {"role": "assistant", "content": "A cat."}
    chats = [
        user(A, "What?"), user(B, "What?"), user(A, B, "Which of them?"), user("Hi"),
        user(B, A, "Which of them?"), [*user(A, "What?"), answer, *user("Is it?", C)],
        [*user(B, "What?"), answer, *user("Is it?", C)], user("Hi " * 20),
        user(A, "What?"), user(C, "x"), user("x" * 45, C, "What?"), user("x" * 45, B, "What?"),
    ]  # fmt: skip
    return [
        (chat, {"temperature": n % 2 * 0.8, "seed": n, "max_tokens": 7, "logprobs": 2} | common)
        for n, chat in enumerate(chats)
    ]


def read(generation: Generation) -> Told:
    pieces = list(generation)
    return tuple(generation.ids), tuple(p for piece in pieces for p in piece.logprobs)


def together(model: Model, requests: Sequence[Asked]) -> list[Told]:
    return [read(one) for one in [model.generate(chat, **given) for chat, given in requests]]


def alone(model: Model, requests: Sequence[Asked]) -> list[Told]:
    """Each from nothing."""
    found = []
    for request in requests:
        model.engine.change_model(lambda: None)  # what is cached is forgotten
        if model.sight:
            model.sight._kept._found.clear()
        found += together(model, [request])
    return found


def adapter(folder: Path, model: Path, modules: Sequence[str]) -> Path:
    """LoRA of the linears whose names end so, the tower's too."""
    rng, tensors = np.random.default_rng(7), {}
    with safe_open(model / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118
            stem = name.removesuffix(".weight")
            if stem.endswith(tuple(f".{name}" for name in modules)) and stem != name:
                rows, *cut = file.get_slice(name).get_shape()
                cols = math.prod(cut)  # an image's patches may be a convolution
                for part, shape in (("A", (RANK, cols)), ("B", (rows, RANK))):
                    at = f"base_model.model.{stem}.lora_{part}.weight"
                    tensors[at] = (rng.standard_normal(shape) * 0.3).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in modules],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seer(tmp_path_factory.mktemp("seer") / request.param, request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with opened(folder) as found:
        yield found


def opened(folder: Path, *, context: int = 512, **options: Any) -> Model:
    engine = EngineConfig(**options.pop("engine", {}))
    return Model.open(folder, context=context, engine=engine, **{"threads": 1} | options)


@pytest.fixture(scope="module")
def wanted(model: Model) -> list[Told]:
    found = alone(model, asked())
    assert len(set(found)) == len(found) - 1  # one is asked twice
    return found


def test_together_and_cached(model: Model, wanted: list[Told]) -> None:
    assert together(model, asked()) == wanted
    assert together(model, asked()[::-1])[::-1] == wanted
    for request, answer in zip(asked(), wanted, strict=True):
        assert together(model, [request]) == [answer]


@pytest.mark.parametrize(
    "options",
    [
        {"engine": {"prompt_batchsize": 5}, "threads": 2},
        {"engine": {"max_seqs": 2, "prefix_cache_n": 0}, "image_bytes": 0},
        {"engine": {"no_kv_cache": True}},
        {"kv": KvSize(tokens=512, block_size=16), "engine": {"max_seqs": 8}},
        {"draft": "ngram", "draft_tokens": 5},
    ],
    ids=str,
)
def test_however_steps_are_cut(folder: Path, options: Any, wanted: list[Told]) -> None:
    with opened(folder, **options) as model:
        assert together(model, asked()) == wanted
        assert together(model, asked() * 2) == wanted * 2


def test_a_draft_model_changes_nothing(folder: Path, wanted: list[Told]) -> None:
    with opened(folder, draft=folder, draft_tokens=3) as model:
        assert together(model, asked()) == wanted


@pytest.mark.parametrize("kv_dtype", ["f32", "q8_0"])
def test_kinds_of_caches(folder: Path, kv_dtype: str) -> None:
    with opened(folder, kv_dtype=kv_dtype) as model:
        expected = alone(model, asked())
        assert together(model, asked()) == expected
    with opened(folder, kv_dtype=kv_dtype, engine={"prompt_batchsize": 7}, threads=2) as model:
        assert together(model, asked()) == expected


def test_grammars(folder: Path, model: Model) -> None:
    requests = asked(grammar=SCHEMA, max_tokens=12)
    expected = alone(model, requests)
    assert together(model, requests) == expected
    with opened(folder, draft="ngram", engine={"prompt_batchsize": 5}) as other:
        assert together(other, requests) == expected


def test_adapters(folder: Path, tmp_path: Path) -> None:
    """Of the text alone, and of the tower too; each has images and prefixes of its own."""
    text = adapter(tmp_path / "text", folder, ["mlp.down_proj", "self_attn.v_proj"])
    every = adapter(tmp_path / "every", folder, ["q_proj", "v_proj", "fc1", "qkv", "proj"])
    given = {"text": text, "every": every}
    requests = [
        (chat, options | {"adapters": name})
        for name in ([], ["text"], ["every"], {"text": 0.5, "every": 1.5})
        for chat, options in asked()[:7:2]
    ]
    with opened(folder, adapters=given, merge=False) as model:
        expected = alone(model, requests)
        assert len(set(expected)) == len(expected)
        assert together(model, requests) == expected
        assert together(model, requests[::-1])[::-1] == expected


def test_other_weights_see_images_anew(folder: Path) -> None:
    with opened(folder, isq="Q4_0") as model:
        expected = alone(model, asked())
    with opened(folder) as model:
        before = together(model, asked())
        model.re_isq("Q4_0")
        assert together(model, asked()) == expected != before
        # A request that was made, and its images read, before the weights changed.
        request = model.generate(*asked()[0][:1], max_tokens=40, ignore_eos=True)
        late = model.request(asked()[0][0], model.defaults.sampling({}), 5)
        model.re_isq(None)
        request.read()
        Generation(model.engine, late).read()
        assert together(model, asked()) == before


def test_nobody_notices_what_others_have_sent(folder: Path) -> None:
    """Neither prefixes nor images are found again by another tenant, or by another image."""

    def ask(image: object, tenant: str) -> tuple[bool, bool]:
        request = ChatCompletionRequest(messages=user(image, "What is that?"), max_tokens=2)
        assert model.sight
        encoded = model.sight.encoded
        usage = start_chat(model, request, tenant=tenant).response().usage
        cached = usage.prompt_tokens_details.cached_tokens
        return model.sight.encoded == encoded, cached > usage.prompt_tokens - 18

    with opened(folder) as model:
        assert [ask(A, tenant) for tenant in "abab"] == [(False, False)] * 2 + [(True, True)] * 2
        other = A.copy()
        other.putpixel((59, 39), (1, 2, 3))
        assert [ask(image, "a") for image in (other, A, other)] == [
            (False, False),
            *[(True, True)] * 2,
        ]


def test_what_is_kept_waits_for_nobody(model: Model) -> None:
    """A second turn does not wait until the tower has read another's image."""
    assert model.sight
    request = partial(model.request, user(A, "What?"), GREEDY, 2)
    request()
    with model.sight._lock, ThreadPoolExecutor(1) as pool:
        pool.submit(request).result(timeout=10)


def test_experts(folder: Path, tmp_path: Path) -> None:
    """AnyMoE's gates are trained by texts; images are for them as other tokens."""
    rows = [{"prompt": "abc", "expert": 0}, {"prompt": "x def", "expert": 1}]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    with safe_open(folder / "model.safetensors", "np") as file:
        name = next(name for name in file.keys() if "layers.0.mlp.gate_proj" in name)  # noqa: SIM118
    experts = AnyMoe(
        48, str(tmp_path / "rows.json"), name.partition(".0.")[0], "mlp", [str(folder)],
        FineTuned(), epochs=1,
    )  # fmt: skip
    with opened(folder, anymoe=experts) as model:
        expected = alone(model, asked()[:6])
        assert together(model, asked()[:6]) == expected


def test_gguf_has_no_place_for_towers(model: Model) -> None:
    with pytest.raises(UnsupportedModel, match=r"cannot be written as GGUF; known: .* Write UQFF"):
        describe(model.architecture, model.spec)


@pytest.mark.parametrize("name", ["smolvlm", "phi3v", "vllama"])
def test_written_to_a_file(tmp_path: Path, name: str) -> None:
    """UQFF has the towers, too, as they were."""
    requests = [(user("Hi"), asked()[0][1]), *asked()[:1]]
    folder, file = write_seer(tmp_path / name, name), tmp_path / "written/q.uqff"
    with opened(folder, isq="Q8_0", write_uqff=file, context=1024) as model:
        expected = together(model, requests)
    with opened(file.parent, from_uqff=file.name, context=1024) as model:
        assert together(model, requests) == expected
