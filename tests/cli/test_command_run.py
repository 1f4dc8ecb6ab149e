"""`squall run`, in pipes."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command import squall

from squall import InvalidRequest, Model, Piece
from squall.cli import run
from squall.text.chat import ChatPrompt
from squall.text.reasoning import Reasoning

QUESTION = "What is the capital of France, and what is it known for?"
SHORT = ("--context", "512", "--max-tokens", "12")


def test_one_answer() -> None:
    done = squall("run", QUESTION, "--temperature", "0", *SHORT, fresh=True)
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


def asked(data: bytes | None, prompt: str | None, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The prompt where standard input is a pipe with `data`, or closed."""
    stream = None if data is None else io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(sys, "stdin", stream)
    return run._asked(prompt)


@pytest.mark.parametrize(
    ("data", "prompt", "wanted"),
    [
        (b"two\nlines\n", None, "two\nlines"), (b"a\r\n", None, "a"), (b"", "Hi", "Hi"),
        (b"a file\n", "What is it?", "What is it?\n\na file"), (b"text", "-", "text"),
        (None, "Hi", "Hi"), ("\ufeffcaf\u00e9".encode(), None, "caf\u00e9"),
    ],
)  # fmt: skip
def test_a_pipe_is_one_prompt(
    data: bytes | None, prompt: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(data, prompt, monkeypatch) == wanted


@pytest.mark.parametrize(
    ("data", "prompt", "problem"),
    [
        (b"", None, "is empty"), (None, "-", "is empty"), (b"caf\xe9\n", None, "not UTF-8"),
        (b"caf\xe9\n", "Hi", "not UTF-8"), (b"x" * (run.MOST_STDIN + 1), None, "more than 16 MiB"),
    ],
)  # fmt: skip
def test_a_pipe_with_nothing_to_read(
    data: bytes | None, prompt: str | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        asked(data, prompt, monkeypatch)


def test_stdout_has_the_models_text_alone() -> None:
    with Model.open(context=512) as model:
        text = [{"role": "user", "content": f"{QUESTION}\n\nIn one\nword."}]
        wanted = model.generate(text, max_tokens=3, temperature=0).read()
    short = ("--context", "512", "--max-tokens", "3", "--temperature", "0")
    done = squall("run", QUESTION, *short, stdin="In one\nword.\n")
    assert done.stdout == f"{wanted}\n"
    assert "stopped by length" in done.stderr


def test_a_prompt_by_pipe_that_is_too_long() -> None:
    done = squall("run", "--context", "64", stdin="x " * 9000)
    assert (done.returncode, done.stdout) == (1, "")
    assert "do not fit the context of 64 tokens" in done.stderr
    assert done.stderr.count("\n") == 1


def ending(act: str, *, shell: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """How a command ends that does this; `shell` redirects."""
    code = f"import sys\ndef app(**_):\n    {act}\n"
    code += "from squall.cli import _run\n_run('__main__:app', 'squall')"
    command = shlex.join([sys.executable, "-c", code]) + shell
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=os.environ | env, timeout=30
    )


@pytest.mark.parametrize(
    ("shell", "problem"), [(" >&-", "Bad file descriptor"), (" >/dev/full", "No space left")]
)
def test_an_output_that_cannot_be_written(shell: str, problem: str) -> None:
    for act in ("print('x')", "print('x', flush=True)", "print('x'); sys.exit(0)"):
        done = ending(act, shell=shell)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert problem in done.stderr


def test_streams_that_are_closed_and_not_used_are_no_error() -> None:
    assert ending("pass", shell=" >&- 2>&- <&-").returncode == 0


def test_files_that_cannot_be_read() -> None:
    done = ending("open('/none')")
    assert done.stderr == "error: cannot read or write /none: No such file or directory\n"


def test_errors_that_nobody_foresaw_are_one_line() -> None:
    done = ending("raise KeyError('what')")
    assert done.returncode == 1
    assert done.stderr == (
        "error: KeyError: 'what' (not foreseen; with SQUALL_DEBUG=1 it tells where)\n"
    )
    assert "Traceback" in ending("raise KeyError('what')", SQUALL_DEBUG="1").stderr


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


def test_a_word_that_was_no_model() -> None:
    done = squall("run", "missing.gguf", stdin="Hi")
    assert done.stderr.endswith("If missing.gguf is the prompt, write -- missing.gguf\n")


def test_a_broken_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    done = squall("run", "Hi", "-f", str(broken))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_wrong_usage() -> None:
    assert squall("run", "--no-such-option", fresh=True).returncode == 2
    assert squall("no-such-command").returncode == 2


def test_version_and_help() -> None:
    assert squall("--version", fresh=True).stdout.startswith("squall 0.")
    text = squall("run", "--help").stdout
    assert "squall run model.gguf" in text
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


def test_answers_in_a_shape(tmp_path: Path) -> None:
    schema, grammar, lark = (tmp_path / name for name in ("schema", "yacc", "lark"))
    schema.write_text(
        '{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}'
    )
    grammar.write_text('%%\nA: "a" A | "b";')
    lark.write_text('start: "x" | "y"')
    for flags, wanted in (
        (("--json-schema", str(schema)), r'\{\s*"age"\s*:\s*-?\d+\s*\}'),
        (("--grammar", str(grammar)), "a*b"),
        (("--grammar", str(lark)), "x|y"),
        (("--regex", "[0-9]{3}"), "[0-9]{3}"),
    ):
        done = squall("run", QUESTION, "--context", "512", "--max-tokens", "60", *flags)
        assert re.fullmatch(wanted, done.stdout.strip()), done


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--regex", "(a"), "regex"),
        (("--json-schema", "nothing.json"), "nothing.json"),
        (("--regex", "a", "--json-schema", "x.json"), "one of them"),
    ],
)
def test_shapes_that_are_wrong(flags: tuple[str, ...], named: str) -> None:
    done = squall("run", QUESTION, "--context", "512", *flags)
    assert done.returncode == 1, done
    assert named in done.stderr


def test_reasoning_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ChatPrompt((), None, Reasoning("<think>", "</think>"))
    parts = ("<thi", "nk>Hm", ".\n</think>\n", "\nYes", ".")
    for terminal, wanted in ((False, "Yes."), (True, "\x1b[2mHm\x1b[0m\x1b[2m.\x1b[0m\n\nYes.")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda told=terminal: told)
        said: list[str] = []
        pieces = [Piece(part, ()) for part in parts] + [Piece("", (), "stop")]
        run.show(pieces, prompt, said)  # type: ignore[arg-type]
        assert capsys.readouterr().out == wanted
        assert "".join(said) == "Yes."


def test_a_wrong_flag_behind_a_model_tells_of_the_command() -> None:
    done = squall("run", "model.gguf", "--temprature", "1")
    assert done.returncode == 2
    assert "Usage: squall run [OPTIONS] [MODEL] [PROMPT]" in done.stderr
    assert "Try 'squall run -h'" in done.stderr
    assert "--temperature" in done.stderr
