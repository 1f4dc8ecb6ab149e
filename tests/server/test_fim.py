"""Filling in what is between two texts, over HTTP and in Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from servers import Running, in_thread
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from squall import CompletionRequest, Model, Runner

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>")
BEFORE, AFTER = "def f(x):\n    return ", "\n\nprint(f(2)) # <|fim_middle|>\n"


def write_folder(folder: Path) -> Tokenizer:
    """A model with random weights and a tokenizer of bytes, whose tokens to fill in are words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(5)
    sizes: dict[str, Any] = {
        "vocab_size": 270, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.5,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    plain = Tokenizer.from_str(made.to_str())
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in FIM])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return plain


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, list[int]]]:
    """A server of a GGUF file, and the ids that are to be asked with."""
    from squall import convert
    from squall.checkpoints import open_checkpoint
    from squall.quant import Plan
    from squall.recipes import load

    folder = tmp_path_factory.mktemp("fim")
    plain = write_folder(folder)
    checkpoint, path = open_checkpoint(folder), folder / "model.gguf"
    convert.write(checkpoint, load(checkpoint), Plan.of("q8_0"), path, threads=1)
    ids = [258, *plain.encode(BEFORE).ids, 259, *plain.encode(AFTER).ids, 260]
    with Model.open(path, threads=1) as model, in_thread(model) as running:
        yield running, ids


@pytest.fixture
def client(tiny: tuple[Running, list[int]]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny[0].url}/v1", api_key="any", max_retries=0) as found:
        yield found


def test_a_suffix_asks_with_the_tokens(
    client: openai.OpenAI, tiny: tuple[Running, list[int]]
) -> None:
    running, ids = tiny
    fields: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 20}
    found = client.completions.create(prompt=BEFORE, suffix=AFTER, **fields)
    wanted = client.completions.create(prompt=ids, **fields)
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(ids)
    assert found.choices[0].text == wanted.choices[0].text
    assert found.choices[0].text
    parts = client.completions.create(prompt=[BEFORE], suffix=AFTER, stream=True, **fields)
    assert "".join(part.choices[0].text for part in parts) == wanted.choices[0].text
    several = client.completions.create(prompt=[BEFORE, "x"], suffix=AFTER, **fields)
    assert several.choices[0].text == wanted.choices[0].text
    runner = Runner(running.model)
    asked = CompletionRequest(prompt=BEFORE, suffix=AFTER, temperature=0, max_tokens=20)
    assert runner.send_completion_request(asked).choices[0].text == wanted.choices[0].text


def test_prompts_that_clients_put_together(
    client: openai.OpenAI, tiny: tuple[Running, list[int]]
) -> None:
    """A text with the tokens asks with them; one of them alone is text like any other."""
    running, _ = tiny
    fields: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 20}
    before, after = "x = ", "\nprint(x)"
    wanted = client.completions.create(prompt=before, suffix=after, **fields)
    texts = f"{FIM[0]}{before}{FIM[1]}{after}{FIM[2]}"
    found = client.completions.create(prompt=texts, **fields)
    assert found.choices[0].text == wanted.choices[0].text
    assert found.usage is not None
    assert found.usage == wanted.usage or found.usage.prompt_tokens == len(before + after) + 3
    one = client.completions.create(prompt=f"{before}{FIM[0]}", **fields)
    assert one.usage is not None
    assert one.usage.prompt_tokens == len(before + FIM[0])
    whole = running.model.tokenizer.encode(f"a{texts}", specials=True)
    assert [i for i in whole if i > 257] == [258, 259, 260]


@pytest.mark.parametrize("token", [1, 258, 259, 260, 261])
def test_what_ends_an_answer(client: openai.OpenAI, token: int) -> None:
    """The model's end, and the tokens that are no part of what is between."""
    found = client.completions.create(
        model="m", prompt=BEFORE, suffix=AFTER, logit_bias={str(token): 100}, temperature=0
    )
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("", "stop")


def test_no_suffix(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 8, "prompt": BEFORE}
    wanted = client.completions.create(**fields)
    assert wanted.usage is not None
    for nothing in ("", None):
        found = client.completions.create(suffix=nothing, **fields)
        assert found.choices[0].text == wanted.choices[0].text
        assert found.usage == wanted.usage or found.usage is not None


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": [1, 2], "suffix": "x"}, "invalid_value"),
        ({"prompt": "x", "suffix": "y", "echo": True}, "invalid_value"),
        ({"prompt": "x", "suffix": 5}, "invalid_value"),
        ({"prompt": "x", "suffix": "y" * 600}, "context_length_exceeded"),
        (
            {"prompt": "x", "suffix": "y" * 600, "truncate_sequence": True},
            "context_length_exceeded",
        ),
        ({"prompt": "x", "suffix": "y" * 10**6}, "context_length_exceeded"),
    ],
)
def test_refused(tiny: tuple[Running, list[int]], fields: dict[str, Any], code: str) -> None:
    found = httpx.post(f"{tiny[0].url}/v1/completions", json=fields, timeout=60)
    assert (found.status_code, found.json()["error"]["code"]) == (400, code)


def test_a_model_without_tokens_says_so(model: Model) -> None:
    runner = Runner(model)
    with pytest.raises(ValueError, match="suffix is not for this model"):
        runner.send_completion_request(CompletionRequest(prompt="x", suffix="y"))


def infill(running: Running, **fields: Any) -> Any:
    body = {"input_prefix": BEFORE, "input_suffix": AFTER, "temperature": 0, **fields}
    found = httpx.post(f"{running.url}/infill", json=body, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()


def test_infill_is_a_completion_with_a_suffix(
    client: openai.OpenAI, tiny: tuple[Running, list[int]]
) -> None:
    """As llama.cpp's server answers; the prompt is the end of the prefix."""
    running, ids = tiny
    fields: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 20}
    wanted = client.completions.create(prompt=BEFORE, suffix=AFTER, **fields).choices[0]
    found = infill(running, n_predict=20)
    assert found["content"] == wanted.text
    assert found["stop_type"] == ("limit" if wanted.finish_reason == "length" else "eos")
    assert (found["stop"], found["truncated"], found["tokens_evaluated"]) == (True, False, len(ids))
    assert found["tokens_cached"] == len(ids) + found["tokens_predicted"]
    timings = found["timings"]
    assert timings["predicted_n"] == found["tokens_predicted"]
    assert timings["prompt_n"] + timings["cache_n"] == len(ids)
    cut = infill(running, input_prefix=BEFORE[:9], prompt=BEFORE[9:], n_predict=20)
    assert cut["content"] == wanted.text
    word = infill(running, n_predict=20, stop=[wanted.text[3:6]])
    assert (word["stop_type"], word["stopping_word"]) == ("word", wanted.text[3:6])
    assert word["content"] == wanted.text[: wanted.text.index(wanted.text[3:6])]


def test_what_editors_send_to_infill(tiny: tuple[Running, list[int]]) -> None:
    """llama.vim's requests: one that warms the cache up, and one that names what it reads."""
    running, _ = tiny
    chunks = [{"text": "y = 1\n", "time": [5, 7], "filename": "a.py"}]
    common = {"input_extra": chunks, "cache_prompt": True, "t_max_prompt_ms": 500, "stream": False}
    warm = infill(
        running, input_prefix="", input_suffix="", prompt="", n_predict=0, samplers=[],
        t_max_predict_ms=1, response_fields=[""], **common,
    )  # fmt: skip
    assert warm == {}
    fields = ["content", "timings/prompt_n", "timings/predicted_per_second", "tokens_cached"]
    found = infill(
        running, n_predict=8, n_indent=4, top_k=40, top_p=0.99, t_max_predict_ms=10_000,
        samplers=["top_k", "top_p", "infill"], response_fields=fields, **common,
    )  # fmt: skip
    assert found.keys() == {*fields}
    assert found["timings/prompt_n"] > 0


def test_infill_streams(tiny: tuple[Running, list[int]]) -> None:
    running, _ = tiny
    whole = infill(running, n_predict=12)
    body = {"input_prefix": BEFORE, "input_suffix": AFTER, "temperature": 0, "n_predict": 12}
    text = httpx.post(f"{running.url}/infill", json=body | {"stream": True}, timeout=60).text
    *parts, last = (json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line)
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert not any(part["stop"] for part in parts)
    assert (last["stop"], last["content"], last["stop_type"]) == (True, "", whole["stop_type"])
    assert last["tokens_predicted"] == whole["tokens_predicted"]


def test_infill_ends_when_its_time_is_over(tiny: tuple[Running, list[int]]) -> None:
    """But not before it has a line."""
    running, _ = tiny
    fields: dict[str, Any] = {"n_predict": 100, "t_max_predict_ms": 1e-3}
    newline = running.model.encode("\n")[-1]
    one = infill(running, logit_bias={str(newline): 100}, **fields)
    assert (one["content"], one["stop_type"]) == ("\n", "limit")
    letter = running.model.encode("a")[-1]
    assert infill(running, logit_bias={str(letter): 100}, **fields)["content"] == "a" * 100


def test_other_files_have_the_room_that_is_left(tiny: tuple[Running, list[int]]) -> None:
    """They come before; of what has no room the beginning is left out."""
    running, ids = tiny
    tokenizer = running.model.tokenizer
    files = [("a.py", "y = 1\n"), ("b.py", "z = 2\n")]
    shown = [*b"y = 1\nz = 2\n"]
    found = tokenizer.encode_fill(BEFORE, AFTER, files, 500)
    assert tokenizer.decode(found[: -len(ids)]).encode() == bytes(shown)
    assert found[-len(ids) :] == ids
    for most, kept in ((len(ids) + 3, 3), (len(ids), 0), (0, 0)):
        cut = tokenizer.encode_fill(BEFORE, AFTER, files, most)
        assert tokenizer.decode(cut[: len(cut) - len(ids)]).encode() == bytes(shown[12 - kept :])
        assert cut[len(cut) - len(ids) :] == ids
    large = infill(running, input_extra=[{"text": "x" * 10**6}] * 3, n_predict=4)
    assert large["tokens_evaluated"] == 512 - 4


def test_infill_refuses(tiny: tuple[Running, list[int]]) -> None:
    url = tiny[0].url
    for fields, code in (
        ({"input_prefix": "x" * 600, "input_suffix": ""}, "context_length_exceeded"),
        ({"input_prefix": "x" * 10**7, "input_suffix": ""}, "context_length_exceeded"),
        ({"input_prefix": "x"}, "missing_required_parameter"),
        ({"input_prefix": "x", "input_suffix": 5}, "invalid_value"),
        ({"input_prefix": "x", "input_suffix": "", "input_extra": [5]}, "invalid_value"),
        ({"input_prefix": "x", "input_suffix": "", "n_predict": 1.5}, "invalid_value"),
        ({"input_prefix": "x", "input_suffix": "", "n": 2}, "invalid_value"),
    ):
        found = httpx.post(f"{url}/infill", json=fields, timeout=60)
        assert (found.status_code, found.json()["error"]["code"]) == (400, code), fields
