"""docs/supported.md is what the code says, and has all text models of mistral.rs's tables."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from project import ROOT

from squall.recipes import KNOWN, config

PAGE = (ROOT / "docs/supported.md").read_text()
ROWS = {
    cells[0].strip("`"): cells
    for line in PAGE.splitlines()
    if (cells := [cell.strip() for cell in line.strip("|").split("|")]) and line.startswith("| `")
}
# Its rows of text models; GGUF as its loader has it, which knows more than its table.
SEED = {
    "mistral": "llama", "gemma": "", "llama": "llama", "mixtral": "llama", "phi2": "phi2",
    "phi3": "phi3", "phi3.5moe": "", "qwen2": "qwen2", "gemma2": "", "starcoder2": "starcoder2",
}  # fmt: skip
ISQ = {
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", "q2k", "q3k", "q4k", "q5k", "q6k", "q8k",
    "hqq8", "hqq4", "fp8",
}  # fmt: skip


def test_the_page_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/supported.py", "--check"])
    assert done.returncode == 0, "run `make docs`"


def test_what_images_cost_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/vision.py", "--check"])
    assert done.returncode == 0, "run `make docs`"


@pytest.mark.parametrize("name", ["phi3v", "idefics2", "llava_next", "llava", "vllama", "qwen2vl"])
def test_models_of_the_seed_that_see(name: str) -> None:
    _, main_class, models = ROWS[name]
    assert main_class.strip("`") in config.SEERS
    assert models


@pytest.mark.parametrize("name", SEED)
def test_models_of_the_seed(name: str) -> None:
    _, _, gguf, ggml, models = ROWS[name]
    assert SEED[name] in gguf
    assert models
    assert ggml == ("yes" if name == "llama" else "")


def test_everything_that_is_registered() -> None:
    assert ROWS.keys() >= ISQ
    named = set(re.findall(r"`([^`]+)`", "\n".join(map(str, ROWS.values()))))
    assert set(KNOWN) <= named
    assert config.NAMES.keys() <= ROWS.keys()
