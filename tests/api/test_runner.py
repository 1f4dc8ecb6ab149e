"""mistral.rs's Python API, as its users call it."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

import pytest

import squall
from squall import ChatCompletionRequest, CompletionRequest, InvalidRequest, Model, Runner, Which
from squall.adapters.anymoe import AnyMoe, FineTuned
from squall.adapters.xlora import XLora
from squall.embedded import find
from squall.opening import Opening

ANYMOE = AnyMoe(8, "d.json", "layers", "mlp", ["e"], FineTuned())
MESSAGES = [{"role": "user", "content": "Tell me a story about the sea."}]


def chat(**fields: Any) -> ChatCompletionRequest:
    given: dict[str, Any] = {
        "model": "default", "messages": MESSAGES, "max_tokens": 8, "presence_penalty": 1.0,
        "top_p": 0.1, "temperature": 0.1,
    }  # fmt: skip
    return ChatCompletionRequest(**{**given, **fields})


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    path = find()
    selected = Which.GGUF(
        quantized_model_id=str(path.parent),
        quantized_filename=path.name,
    )
    with Runner(selected, max_seqs=4, seed=5, pa_ctxt_len=2048, context=512) as opened:
        yield opened


def test_chat_and_stream_are_the_same(runner: Runner) -> None:
    whole = runner.send_chat_completion_request(chat())
    assert isinstance(whole, squall.ChatCompletionResponse)
    text = whole.choices[0].message.content
    assert text
    assert whole.usage.completion_tokens == 8
    chunks = runner.send_chat_completion_request(chat(stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text


def test_runner_s_seed_is_for_requests_without_one(runner: Runner) -> None:
    free: dict[str, Any] = {"top_p": 1, "temperature": 1.5, "max_tokens": 12}
    texts = [
        runner.send_chat_completion_request(chat(**free, seed=seed)).choices[0].message.content
        for seed in (None, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_completion(runner: Runner) -> None:
    asked = CompletionRequest(
        prompt="One two", model="default", echo_prompt=True, best_of=1, max_tokens=4
    )
    found = runner.send_completion_request(asked)
    assert isinstance(found, squall.CompletionResponse)
    assert found.choices[0].text.startswith("One two")


def test_threads_share_a_runner(runner: Runner) -> None:
    expected = runner.send_chat_completion_request(chat())
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(runner.send_chat_completion_request(chat())))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.choices for one in found] == [expected.choices] * 6


def test_async_runner(runner: Runner) -> None:
    other = squall.AsyncRunner(runner.model, seed=5)

    async def ask() -> None:
        whole, chunks = await asyncio.gather(
            other.send_chat_completion_request(chat()),
            other.send_chat_completion_request(chat(stream=True)),
        )
        text = [chunk.choices[0].delta.content async for chunk in chunks]
        assert "".join(text) == whole.choices[0].message.content
        asked = CompletionRequest(prompt="One two", max_tokens=3)
        found = await other.send_completion_request(asked)
        assert found.choices[0].finish_reason == "length"

    asyncio.run(ask())


def test_streams_have_methods_of_their_own(runner: Runner) -> None:
    whole = runner.send_chat_completion_request(chat())
    parts = runner.stream_chat_completion_request(chat())
    assert "".join(part.choices[0].delta.content for part in parts) == (
        whole.choices[0].message.content
    )
    asked = CompletionRequest(prompt="One two", max_tokens=4, temperature=0)
    text = "".join(part.choices[0].text for part in runner.stream_completion_request(asked))
    assert text == runner.send_completion_request(asked).choices[0].text

    async def ask() -> str:
        other = squall.AsyncRunner(runner.model)
        chunks = await other.stream_completion_request(asked)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    assert asyncio.run(ask()) == text


def test_a_model_that_is_given_stays_open(model: Model) -> None:
    with Runner(model) as runner:
        runner.close()

    async def leave() -> None:
        async with squall.AsyncRunner(model):
            pass

    asyncio.run(leave())
    assert model.generate("Hi", max_tokens=1).read()
    with Runner(context=64) as own:
        pass
    with pytest.raises(InvalidRequest, match="closed"):
        own.model.encode_chat(MESSAGES) and own.model.generate("Hi")


def test_tokens_and_text(runner: Runner) -> None:
    ids = runner.tokenize_text("A cat <|im_end|>", add_special_tokens=False)
    assert runner.detokenize_text(ids) == "A cat <|im_end|>"
    end = [*ids, *runner.model.tokenizer.stop_ids]
    assert runner.detokenize_text(end, skip_special_tokens=True) == "A cat <|im_end|>"


@pytest.mark.parametrize("suffix", [".json", ".jinja", ""])
def test_chat_template(model: Model, tmp_path: Path, suffix: str) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}!"
    path = tmp_path / f"template{suffix}"
    path.write_text(json.dumps({"chat_template": source}) if suffix == ".json" else source)
    before = model.chat_template
    try:
        other = Runner(model, chat_template=str(path) if suffix else source)
        assert other.model.encode_chat(MESSAGES) == model.encode("Tell me a story about the sea.!")
    finally:
        model.chat_template = before
    with pytest.raises(InvalidRequest, match="is no chat template"):
        Runner(model, chat_template=str(tmp_path / "missing.json"))


def test_row_40_a_draft_model() -> None:
    path = find()
    selected = Which.GGUF(str(path.parent), path.name)
    with Runner(selected, which_draft=selected, speculative_gamma=3, context=256) as runner:
        speculation = runner.model.engine._stepper._speculation
        assert speculation.draft is not None
        assert speculation.most == 3
        response = runner.send_chat_completion_request(chat(max_tokens=5))
        assert response.usage.completion_tokens == 5
    with Runner(selected, speculative_gamma=3, context=256) as runner:
        assert runner.model.engine._stepper._speculation.most == 0


@pytest.mark.parametrize(
    "argument",
    [
        {"num_device_layers": ["0:3"]},
        {"in_situ_quant": "Q4K"},
        {"anymoe_config": object()},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_arguments_not_there_yet(model: Model, argument: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(argument))):
        Runner(model, **argument)


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "a-00001-of-00002.gguf").touch()
    names = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    with pytest.raises(squall.ModelNotFound, match="00002-of-00002"):
        Runner(Which.GGUF(str(tmp_path), names))
    with pytest.raises(squall.ModelNotFound, match="TheBloke"):
        Runner(Which.GGUF("TheBloke/Mistral-7B", "m.gguf"))
    with pytest.raises(squall.ModelNotFound, match="'none'"):
        Runner(Which.GGML("none", "m.bin", gqa=8))
    with pytest.raises(squall.ModelNotFound, match="'none'"):
        Runner(Which.Plain("none", squall.Architecture.Phi3_5MoE))


KINDS = {
    "XLora": "xlora_model_id order arch model_id tokenizer_json tgt_non_granular_index topology "
    "write_uqff from_uqff dtype",
    "Lora": "adapters_model_id order arch model_id tokenizer_json topology write_uqff from_uqff "
    "dtype",
    "XLoraGGUF": "quantized_model_id quantized_filename xlora_model_id order tok_model_id "
    "tgt_non_granular_index topology dtype",
    "LoraGGUF": "quantized_model_id quantized_filename adapters_model_id order tok_model_id "
    "topology dtype",
    "XLoraGGML": "quantized_model_id quantized_filename xlora_model_id order tok_model_id "
    "tgt_non_granular_index tokenizer_json gqa topology dtype",
    "LoraGGML": "quantized_model_id quantized_filename adapters_model_id order tok_model_id "
    "tokenizer_json gqa topology dtype",
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_with_adapters_are_classes_as_the_others(name: str) -> None:
    kind = getattr(Which, name)
    assert [field.name for field in fields(kind)] == KINDS[name].split()
    assert get_type_hints(kind)["dtype"] is squall.ModelDType
    made = kind(*(f"value {i}" for i in range(4)))
    assert pickle.loads(pickle.dumps(made)) == made
    assert hash(made)
    assert repr(made).startswith(f"Which.{name}({KINDS[name].split()[0]}='value 0', ")
    assert isinstance(made, kind)
    with pytest.raises(TypeError, match="model_id"):
        kind()
    with pytest.raises(FrozenInstanceError):
        made.order = "another"


def test_kinds_with_adapters_are_arguments_of_open(tmp_path: Path) -> None:
    order = tmp_path / "o.json"
    order.write_text('{"order": ["a"], "base_model_id": "x/y"}')
    opening = Which.Lora("c/d", str(order)).opening(Opening(context=7))
    adapters = {"a": "c/d:a"}
    assert opening == Opening("x/y", context=7, adapters=adapters, active={"a": 1.0}, merge=None)
    opening = Which.LoraGGUF("g/h", "f.gguf", "c/d").opening(Opening(adapters={"b": "e"}))
    assert (opening.adapters, opening.active) == ({"b": "e", "d": "c/d"}, {"d": 1.0})
    assert opening.merge is False
    opening = Which.XLoraGGML("g/h", "f.bin", "c/d", str(order), gqa=2).opening()
    assert opening == Opening("g/h:f.bin", gqa=2, xlora=XLora("c/d", str(order)))
    with pytest.raises(InvalidRequest, match="is for 'x/y', not for 'k/l'"):
        Which.XLora("c/d", str(order), model_id="k/l").opening()


CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "two kinds": ({"xlora": XLora("x"), "anymoe": ANYMOE}, "choose one"),
    "adapters of X-LoRA and more": ({"xlora": XLora("x"), "adapters": {"a": "b"}}, "its own"),
    "adapters beside experts": ({"anymoe": ANYMOE, "adapters": {"a": "b"}}, "adapters merge"),
    "a draft": ({"draft": Opening("x", adapters={"a": "b"})}, "a draft has no adapters"),
    "both written and merged": (
        {"write_uqff": "x.uqff", "merge": True, "adapters": {"a": "b"}}, "adapters merge",
    ),
    "no mapping": ({"adapters": ["a"]}, "a Mapping"),
    "no config": ({"anymoe": {"lr": 1}}, "it must be"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "problem"), CANNOT.values(), ids=CANNOT.keys())
def test_what_cannot_be_opened_together(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        Opening("x", **options)


def test_selections_are_arguments_of_open() -> None:
    plain = Which.Plain(
        "a/b", squall.Architecture.Phi3_5MoE, "t.json", organization=squall.IsqOrganization.MoQE,
        dtype=squall.ModelDType.BF16,
    )  # fmt: skip
    opening = plain.opening()
    assert opening == Opening(
        "a/b", architecture="phi3.5moe", tokenizer_json="t.json", experts_only=True, dtype="bf16"
    )
    assert replace(plain, organization=cast("Any", "MoQE")).opening() == opening
    with pytest.raises(InvalidRequest, match="organization is 'bla'; it must be one of default"):
        replace(plain, organization=cast("Any", "bla")).opening()
    for names in (["2.gguf", "1.gguf"], "2.gguf 1.gguf"):
        assert Which.GGUF("a/b", names).opening().path == "a/b:1.gguf"
    others = Opening(context=7, topology="t.yml")
    assert Which.GGML("a/b", "c.bin", gqa=8).opening(others) == replace(
        others, path="a/b:c.bin", gqa=8
    )
    assert plain.opening(others) == replace(opening, context=7, topology="t.yml")
    lent = Which.GGUF("a/b", "c.gguf", "d/e", "t.yml", squall.ModelDType.F32).opening()
    assert lent == Opening("a/b:c.gguf", tokenizer_from="d/e", topology="t.yml", dtype="f32")


def test_what_is_wrong_with_what_was_given_is_a_value_error(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(9))
    with pytest.raises(ValueError, match="no adapter 'law'"):
        runner.activate_adapters(["law"])
    with pytest.raises(ValueError, match="does not exist"):
        Runner(Which.Plain(str(tmp_path / "none")))
    with pytest.raises(ValueError, match="broken"):
        Runner(Which.GGUF(str(tmp_path), "broken.gguf"))


def test_what_the_model_cannot_do(runner: Runner) -> None:
    with pytest.raises(InvalidRequest, match="makes no pictures"):
        runner.generate_image("a cat", squall.ImageGenerationResponseFormat.Url)
    with pytest.raises(squall.UnknownAdapter, match="no adapter 'a'; there are none"):
        runner.activate_adapters(["a"])
    with pytest.raises(ValueError, match="n is 0"):
        chat(n_choices=0)
