"""`squall serve` and `squall-server` up to where the server begins, and the chat."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from command import squall

from squall import InvalidRequest
from squall.api.which import IsqOrganization, ModelDType, Which
from squall.cli.selectors import SELECTORS
from squall.load import percentiles

server = partial(squall, entry="server")


@pytest.mark.parametrize(
    "flags",
    [("--isq", "Q4K"), ("-n", "10"), ("-n", "0:4;1:4"), ("-c", "none.jinja"), ("-c", "none.json")],
)
def test_what_would_have_no_effect(flags: tuple[str, ...]) -> None:
    done = server("-i", *flags, "gguf")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_options_of_the_seed_and_a_chat(tmp_path: Path) -> None:
    flags = (
        "--log", str(tmp_path / "log"),
        "-i", "-s", "5", "--max-seqs", "2", "--prefix-cache-n", "4", "--prompt-batchsize", "64",
        "-n", "0", "--pa-gpu-mem", "500", "--pa-gpu-mem-usage", "0.5", "--pa-blk-size", "32",
        "--pa-ctxt-len", "900", "--no-paged-attn", "--token-source", "none", "--context", "800",
        "--draft", "ngram",
    )  # fmt: skip
    done = server(*flags, "gguf", stdin="What is the capital of France?\n\\exit\n")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    asked, said = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert json.loads(asked["request"])["content"] == "What is the capital of France?"
    assert "Paris" in json.loads(said["response"])["content"]


def test_a_wrong_word_or_flag() -> None:
    assert server("--port", "1", "gguuf").returncode == 2
    assert server("--port", "1", "gguf", "--nothing").returncode == 2
    assert squall("serve", "--port", "99999").returncode == 2
    assert squall("serve", "-f", "none.gguf", "--port", "0").returncode == 1


def test_gguf_files() -> None:
    gguf = SELECTORS["gguf"]
    assert gguf() is None
    assert gguf(quantized_model_id="folder", quantized_filename=None) == "folder"
    assert gguf(quantized_model_id="folder", quantized_filename="a.gguf b.gguf") == Which.GGUF(
        "folder", "a.gguf b.gguf"
    )
    assert gguf(quantized_filename="a.gguf") == Which.GGUF(".", "a.gguf")


def test_folders_and_old_files() -> None:
    plain = SELECTORS["plain"]
    given = {"model_id": "a/b", "arch": "llama", "dtype": "BF16", "organization": "moqe"}
    assert plain(**given) == Which.Plain(
        "a/b", "llama", organization=IsqOrganization.MoQE, dtype=ModelDType.BF16
    )
    with pytest.raises(InvalidRequest, match="--dtype is 'f8'; it must be one of auto, bf16"):
        plain(model_id="a/b", dtype="f8")
    assert SELECTORS["ggml"](
        quantized_model_id="a", quantized_filename="b.bin", gqa=8
    ) == Which.GGML("a", "b.bin", gqa=8)


def test_percentiles() -> None:
    assert percentiles([]) == {}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert percentiles([float(i) for i in range(100, 0, -1)]) == {"p50": 50, "p95": 95, "p99": 99}


@pytest.mark.parametrize("text", ["0", "x", "", "1,,2", "5000", "-1"])
def test_wrong_concurrency(text: str) -> None:
    assert squall("bench", "-c", text).returncode == 1
