"""What bash, zsh and fish are offered for a line that is begun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from command import squall


def asked(variables: Mapping[str, str], folder: Path, *command: str) -> str:
    folders = {"XDG_CONFIG_HOME": str(folder / "config"), "HF_HOME": str(folder / "hf")}
    if not command:
        return squall(env={**folders, **variables}, cwd=folder).stdout
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, check=False,
        env=os.environ | folders | variables,
    )  # fmt: skip
    return done.stdout


def offered(line: str, folder: Path) -> list[str]:
    """As bash asks: the words of a line, of which the last one is not complete."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    return asked(words | {"_SQUALL_COMPLETE": "complete_bash"}, folder).split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    own = tmp_path / "config/squall/models.toml"
    own.parent.mkdir(parents=True)
    own.write_text("mine = 'owner/name'")
    for name in ("mistral-own.gguf", "mistral.txt", "other.gguf"):
        (tmp_path / name).write_bytes(b"")
    snapshot = tmp_path / "hf/hub/models--o--m/snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "m-Q8_0.gguf").write_bytes(b"1")
    (tmp_path / "hf/hub/models--o--m/refs").mkdir()
    (tmp_path / "hf/hub/models--o--m/refs/main").write_text("c" * 40)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("squall qu", ["quantize"]),
        ("squall run --temp", ["--temperature"]),
        ("squall run gguf --quantized-f", ["--quantized-filename"]),
        ("squall run mistral --temp", ["--temperature"]),
        ("squall serve --kv-d", ["--kv-dtype"]),
        ("squall serve --kv-dtype q", ["q8_0"]),
        ("squall run x-lora-g", ["x-lora-gguf", "x-lora-ggml"]),
        ("squall bench tinyl", ["tinyllama", "tinyllama:1.1b"]),
        ("squall bench -m mi", ["mine", "mistral", "mistral-nemo", "mistral-nemo:12b",
                                "mistral-small", "mistral-small:24b", "mistral:7b",
                                "mistral-own.gguf"]),
        # With nothing offered the shell looks for files.
        ("squall run other", []), ("squall run ./", []), ("squall inspect other", []),
        ("squall run --image m", []), ("squall perplexity -f other", []),
        ("squall pull qwen3 : 4", ["4b"]),
        ("squall rm o", ["o/m:m-Q8_0.gguf"]),
        ("squall show def", ["default"]),
        ("squall inspect o/", ["o/m:m-Q8_0.gguf"]),
        ("squall --show", ["--show-completion"]),
    ],
)  # fmt: skip
def test_what_is_offered(line: str, wanted: list[str], folder: Path) -> None:
    assert offered(line, folder) == wanted


def test_the_first_word_may_be_a_kind_or_a_model(folder: Path) -> None:
    found = offered("squall run ", folder)
    assert {"plain", "gguf", "qwen3:4b", "mine", "o/m:m-Q8_0.gguf", "default"} <= {*found}
    assert not {"MODEL", "PROMPT"} & {*found}


def test_a_table_that_is_wrong_is_no_obstacle(folder: Path) -> None:
    (folder / "config/squall/models.toml").write_text("mine = ")
    assert offered("squall run toml", folder) == ["toml"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell: str, folder: Path) -> None:
    line = {"_TYPER_COMPLETE_ARGS": "squall run tinyllama"}
    action = {"_SQUALL_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert "tinyllama:1.1b" in asked(line | action, folder).replace("\\", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_shells_install(shell: str, folder: Path) -> None:
    script = asked({"_SQUALL_COMPLETE": f"source_{shell}"}, folder)
    assert "_SQUALL_COMPLETE=complete_" in script
    if path := shutil.which(shell):
        assert subprocess.run([path, "-n"], input=script, text=True, check=False).returncode == 0


def test_bash_itself(folder: Path) -> None:
    """A bash that has read the script, and then asks as a tab does."""
    (folder / "squall").write_text(f'#!/bin/sh\nexec {sys.executable} -m squall "$@"\n')
    (folder / "squall").chmod(0o755)
    source = asked({"_SQUALL_COMPLETE": "source_bash"}, folder)
    code = (
        f"PATH={folder}:$PATH\n{source}\nCOMP_WORDS=(squall run x-lora-gg) COMP_CWORD=2\n"
        "_squall_completion squall x-lora-gg run\necho ${COMPREPLY[@]}"
    )
    assert asked({}, folder, "bash", "-c", code).split() == ["x-lora-gguf", "x-lora-ggml"]


def test_little_is_imported_for_a_tab(folder: Path) -> None:
    code = (
        "import sys\nfrom squall.cli import main\ntry:\n    main()\nexcept SystemExit:\n    print("
        "*sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'fastapi', 'prompt_toolkit', "
        "'PIL', 'transformers', 'tokenizers', 'uvicorn'}), 'end')"
    )
    words = {"COMP_WORDS": "squall run x-lora-gg", "COMP_CWORD": "2"}
    words |= {"_SQUALL_COMPLETE": "complete_bash"}
    found = asked(words, folder, sys.executable, "-c", code).split()
    assert found == ["x-lora-gguf", "x-lora-ggml", "end"]
