"""`squall run`, in pipes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import squall

QUESTION = "What is the capital of France, and what is it known for?"
SHORT = ("--context", "512", "--max-tokens", "12")


def test_one_answer() -> None:
    done = squall("run", QUESTION, "--temperature", "0", *SHORT)
    assert done.returncode == 0
    assert "Paris" in done.stdout
    assert re.search(r"\d+ answer tokens, [\d.]+ tokens/s", done.stderr)


def test_the_same_seed_gives_the_same_answer() -> None:
    first, second = (squall("run", QUESTION, "--seed", "3", *SHORT) for _ in range(2))
    assert first.stdout == second.stdout
    assert "seed 3]" in first.stderr


def test_the_flags_of_dry() -> None:
    text = ("one two three " * 20, "--raw", "--temperature", "0", *SHORT)
    dry = ("--dry-multiplier", "5", "--dry-allowed-length", "1", "--dry-sequence-breakers", "#")
    outs = {squall("run", *text, *more).stdout for more in ((), dry, (*dry, "--dry-range", "4"))}
    assert len(outs) == 3


def test_prompt_from_stdin() -> None:
    done = squall("run", "-", "--temperature", "0", *SHORT, stdin=QUESTION)
    assert "Paris" in done.stdout


def test_raw() -> None:
    done = squall("run", "The capital of France is", "--raw", "--temperature", "0", *SHORT)
    assert done.stdout.startswith(" Paris")


def test_stop() -> None:
    done = squall("run", QUESTION, "--temperature", "0", "--stop", "Paris", *SHORT)
    assert "Paris" not in done.stdout
    assert done.returncode == 0


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "squall", "run", "Count to a thousand.", "--max-tokens", "300"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(60) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-f", "missing.gguf"], "'missing.gguf' does not exist"),
        (["-m", "owner/model", "--offline"], "owner/model is not, or not wholly, in the cache"),
        (["-f", "a.gguf", "-m", "b"], "give one of them"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--context", "9000"], "1 to 8192"),
        (["--context", "8"], "do not fit the context of 8 tokens"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    done = squall("run", "Hi", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_broken_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    done = squall("run", "Hi", "-f", str(broken))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_wrong_usage() -> None:
    assert squall("run", "--no-such-option").returncode == 2
    assert squall("no-such-command").returncode == 2


def test_version_and_help() -> None:
    assert squall("--version").stdout.startswith("squall 0.")
    text = squall("run", "--help").stdout
    assert "squall run -f model.gguf" in text
    assert "--temperature" in text


def test_penalties_reach_the_sampler() -> None:
    ask = ("run", "--raw", "one two three one two three one two three one", "--max-tokens", "6")
    plain = squall(*ask, "--temperature", "0").stdout
    for options in (
        ("--repetition-penalty", "20"),
        ("--dry-multiplier", "20", "--dry-allowed-length", "1", "--dry-base", "2"),
    ):
        assert squall(*ask, "--temperature", "0", *options).stdout not in ("", plain)
    for option in ("--frequency-penalty", "--presence-penalty"):
        done = squall(*ask, option, "3")
        assert done.returncode != 0
        assert option[2:].replace("-", "_") in done.stderr


def test_isq_of_a_quantized_file_is_refused() -> None:
    done = squall("run", QUESTION, "--isq", "q4k", *SHORT)
    assert done.returncode != 0
    assert "has its number formats already" in " ".join(done.stderr.split())
