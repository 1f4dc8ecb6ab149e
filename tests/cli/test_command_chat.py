"""The interactive chat, with lines from a list, and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from squall import Model
from squall.cli import chat as module
from squall.cli.chat import Chat
from squall.cli.chat_file import load, save
from squall.cli.run import RunFlags
from squall.engine.fields import numbers_of
from squall.engine.sampling import SamplingFields
from squall.vision.images import OWN

OPTIONS = ("run", "--context", "1024", "--temperature", "0")
Talk = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open(context=256) as opened:
        yield opened


@pytest.fixture
def talk(model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Say lines to the model; the model's words, and what is said beside them."""

    def say(*lines: str, system: str | None = None, **flags: Any) -> tuple[str, str]:
        waiting = iter([*lines, "\\exit"])
        monkeypatch.setattr(module, "_reader", lambda _: lambda: next(waiting))
        Chat(model, RunFlags(**{"temperature": 0.0} | flags).settings, system).loop()
        return capsys.readouterr()

    return say


def test_history_is_kept_and_not_read_again(talk: Talk) -> None:
    _, notes = talk("My name is Ada. Say hello.", "What is my name?", max_tokens=20)
    first, second = re.findall(r"\[(\d+) prompt tokens.*?(?:\((\d+) known\))?[;,]", notes)
    assert int(second[0]) > int(first[0])
    assert int(second[1] or re.findall(r"\((\d+) known\)", notes)[-1]) >= int(first[0])


def test_commands(talk: Talk) -> None:
    said, notes = talk("\\help", "\\system Be brief.", "\\nonsense", "\\clear")
    assert said == ""
    for wanted in ("\\system TEXT", "system message set", "unknown command \\nonsense"):
        assert wanted in notes


def test_only_the_models_words_are_on_stdout(talk: Talk, model: Model) -> None:
    said, notes = talk("Tell me a story.", max_tokens=5)
    story = [{"role": "user", "content": "Tell me a story."}]
    assert said == model.generate(story, max_tokens=5, temperature=0).read() + "\n"
    assert "stopped by length" in notes


def test_a_message_that_is_too_long(talk: Talk) -> None:
    said, notes = talk(
        "word " * 500, "\\clear", "What is the capital of France, and what is it known for?"
    )
    assert "\\clear begins anew" in notes
    assert "Paris" in said


def test_a_full_context_forgets_the_oldest_turns_but_not_the_system_message(
    talk: Talk, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[dict[str, str]]] = []
    seen: list[list[dict[str, str]]] = []
    generate, chat_prompt = model.generate, model.chat_prompt
    monkeypatch.setattr(
        model, "chat_prompt", lambda m, **o: asked.append([*m]) or chat_prompt(m, **o)
    )
    monkeypatch.setattr(
        model, "generate", lambda *a, **o: seen.append(asked[-1]) or generate(*a, **o)
    )
    lines = [f"{n} " + "word " * 40 for n in range(6)]
    _, notes = talk(*lines, system="Be brief.", max_tokens=4)
    assert notes.count("forgot the oldest turns: 1") >= 2
    assert "error" not in notes
    for said, line in zip(seen, lines, strict=True):
        assert said[0] == {"role": "system", "content": "Be brief."}
        assert [message["role"] for message in said[1::2]] == ["user"] * (len(said) // 2)
        assert said[-1]["content"] == line.strip()
    assert seen[-1][1]["content"] != lines[0].strip()


def test_settings_are_shown_and_changed(talk: Talk) -> None:
    lines = ("\\temperature 0.5", "\\top_k 3", "\\temperature", "\\top_k default", "\\set")
    _, notes = talk(*lines, "\\seed 7", "Say hi.", max_tokens=3)
    assert notes.count("temperature: 0.5\n") == 2
    assert "top_k: 3\ntemperature: 0.5\ntop_k: default\n" in notes
    shown = notes.partition("top_k: default\n")[2]
    for name, value in {"temperature": "0.5", "top_k": "default", "max_tokens": "3"}.items():
        assert re.search(rf"^\\{name} +{value} +\S", shown, re.MULTILINE)
    assert "seed 7]" in notes


def test_every_field_of_sampling_is_a_setting(talk: Talk) -> None:
    values = dict.fromkeys(numbers_of(SamplingFields), "1")
    values |= {"dry_sequence_breakers": '[".", "!"]', "max_tokens": "2"}
    said, notes = talk(*(f"\\{name} {value}" for name, value in values.items()), "Hi")
    assert said.strip()
    assert "error" not in notes
    assert "dry_sequence_breakers: ['.', '!']" in notes


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("\\temperature hot", "temperature is 'hot'; it must be a number, at least 0"),
        ("\\temperature -1", "must be a number, at least 0"),
        ("\\temperature NaN", "must be a number"),
        ("\\top_k 1.5", "a whole number"),
        ("\\top_p [[1]]", "must be a number"),
        ("\\dry_sequence_breakers .", "a list of texts"),
        ("\\dry_sequence_breakers [1]", "a list of texts"),
        ("\\max_tokens 0", "at least 1"),
    ],
)
def test_a_setting_that_is_wrong(line: str, reason: str, talk: Talk) -> None:
    _, notes = talk(line, "\\set")
    assert f"error: {line[1:].split()[0]} is" in notes
    assert reason in notes
    assert re.search(r"max_tokens +1024 ", notes)


def test_a_chat_is_saved_and_loaded(talk: Talk, tmp_path: Path) -> None:
    file, ask, first = tmp_path / "chat.json", "What is my name?", ("My name is Ada.", "\\top_k 5")
    given = {"system": "Be brief.", "max_tokens": 12}
    _, notes = talk(*first, f"\\save {file}", "\\save", **given)
    assert notes.count(f"saved 1 turns in {file}") == 2
    kept = json.loads(file.read_text())
    assert [message["role"] for message in kept["messages"]] == ["system", "user", "assistant"]
    assert kept["messages"][1]["content"] == "My name is Ada."
    assert (kept["settings"]["temperature"], kept["settings"]["top_k"]) == (0.0, 5)
    one, _ = talk(*first, ask, **given)
    two, _ = talk(f"\\load {file}", ask, temperature=1.0, max_tokens=99)
    assert one.endswith(two)
    assert len(two.strip()) > 0
    _, notes = talk(f"\\save {file}", "\\save")
    assert "exists already" in notes
    assert "name a file" in notes


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no file"),
        ("not JSON", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "needs a list of messages"),
        ('{"messages": [], "settings": {"heat": 1}}', "'heat' is no setting"),
        ('{"messages": [], "settings": {"top_k": "x"}}', "top_k is 'x'"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "take turns"),
        ('{"messages": [{"role": "root", "content": "Hi"}, 3]}', "take turns"),
        ('{"messages": [{"role": "system", "content": [1]}]}', "must be a text"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": '
         '"file:///etc/passwd"}}]}, {"role": "assistant", "content": ""}]}', "data: URL"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_chat_leaves_this_one(
    text: str | None, reason: str, talk: Talk, tmp_path: Path
) -> None:
    file = tmp_path / "bad.json"
    if text is not None:
        file.write_text(text)
    _, notes = talk(
        "Say hi.", f"\\load {file}", f"\\save {tmp_path}/own.json", system="Be brief.", max_tokens=3
    )
    assert reason in notes
    kept = json.loads((tmp_path / "own.json").read_text())
    assert [message["content"] for message in kept["messages"]][:2] == ["Be brief.", "Say hi."]
    assert kept["settings"]["max_tokens"] == 3


def test_images_are_kept_as_the_api_has_them(tmp_path: Path) -> None:
    image = PIL.Image.frombytes("RGB", (2, 2), bytes(range(12)))
    parts = [{"type": "image", "source": image}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    settings = RunFlags().settings
    save(tmp_path / "a.json", messages, settings)
    kept = json.loads((tmp_path / "a.json").read_text())
    assert kept["messages"][0]["content"][0]["image_url"]["url"].startswith(
        "data:image/png;base64,"
    )
    (first, second), _ = load(tmp_path / "a.json", settings, OWN)
    assert first["content"][0]["source"].tobytes() == image.tobytes()
    assert (first["content"][1], second) == (parts[1], messages[1])


def test_an_answer_is_made_anew(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    said, notes = talk(
        "\\regenerate", "Tell me a story.", "\\regenerate", f"\\save {file}",
        temperature=1.5, seed=3, max_tokens=8,
    )  # fmt: skip
    assert "there is no answer yet" in notes
    first, second = said.strip("\n").split("\n", 1)
    messages = json.loads(file.read_text())["messages"]
    assert messages[0]["content"] == "Tell me a story."
    assert len(messages) == 2
    assert messages[1]["content"] != first
    assert first != second


def test_a_place_that_no_file_can_have_is_no_end(talk: Talk) -> None:
    for place in ("~nobody-here/x", "a\0b", "/", "missing/x"):
        _, notes = talk(f"\\save {place}", f"\\load {place}", "\\set")
        assert (notes.count("error: "), notes.count("max_tokens")) == (2, 1)


def test_an_answer_does_not_steer_a_terminal(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = talk("Hi", regex="\x1b\\[2J\ta\x9b\x7f\nb", max_tokens=40)
    assert said == "\x1b[2J\ta\x9b\x7f\nb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    said, _ = talk("Hi", regex="\x1b\\[2J\ta\x9b\x7f\nb", max_tokens=40)
    assert said == "\\x1b[2J\ta\\x9b\\x7f\nb\n"
    _, notes = talk("\\load \x1b]0;mine\x07")
    assert "\x1b" not in notes


# What the line editor sends when it begins to wait for a line, and when it has one.
PROMPT, ANSWER = "\x1b[?2004h", "\x1b[?2004l"


class Terminal:
    """`squall run`, or another command, on a pseudo-terminal."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.output = ""
        master, slave = pty.openpty()
        self._master = master
        self.process = subprocess.Popen(
            [sys.executable, "-m", "squall", *(command or OPTIONS)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # Who is started in the background ignores it, and would hand that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env=os.environ
            | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(folder)},
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read until `text` comes; what came before it is forgotten."""
        stop_s = time.monotonic() + seconds
        while text not in self.output:
            ready, _, _ = select.select([self._master], [], [], stop_s - time.monotonic())
            assert ready, f"no {text!r} in {self.output!r}"
            self.output += os.read(self._master, 65536).decode(errors="replace")
        self.output = self.output.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    terminal.type("Write a long story about a ship, with many chapters.\r")
    terminal.wait_for(ANSWER)
    terminal.wait_for(" ")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("^C")
    terminal.wait_for(PROMPT)
    terminal.type("What is the capital of France, and what is it known for?\r")
    terminal.wait_for(ANSWER)
    terminal.wait_for("Paris")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for(PROMPT)
    terminal.type("\\exit\r")
    assert terminal.process.wait(30) == 0


def test_tab_completes_commands(terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    terminal.type("\\temper\t")
    terminal.wait_for("ature")
    terminal.type(" 0.25\r")
    terminal.wait_for("temperature: 0.25")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_what_was_typed_is_there_the_next_time(tmp_path: Path) -> None:
    for attempt in range(2):
        terminal = Terminal(tmp_path)
        try:
            terminal.wait_for(PROMPT)
            # Up is the line before, which leaves.
            terminal.type("\x1b[A\r" if attempt else "\\exit\r")
            assert terminal.process.wait(30) == 0
        finally:
            terminal.close()
    kept = tmp_path / "squall/history"
    assert "\\exit" in kept.read_text()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "squall").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = module._history()
    history.append_string("Hi")
    assert list(history.load_history_strings()) == [] or history.get_strings() == ["Hi"]
