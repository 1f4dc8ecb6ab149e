r"""Images in `squall run` and in its chat, on a terminal and with lines from a list."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import squall
from pictures import draw
from test_command_chat import ANSWER, PROMPT, Terminal
from tiny_seers import write_seer

from squall import Model
from squall.cli import chat as module
from squall.cli.chat import Chat
from squall.cli.run import RunFlags

Talk = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_seer(root / "llava")
    draw("text", 60, 40).save(root / "cat.png")
    draw("noise", 90, 140).save(root / "a dog.png")
    return root


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with Model.open(folder / "llava") as opened:
        yield opened


@pytest.fixture
def talk(
    model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Talk:
    """Say lines to a model, in the folder; its words, and what is said beside them."""

    def say(*lines: str, to: Model = model, **flags: Any) -> tuple[str, str]:
        waiting = iter([*lines, "\\exit"])
        monkeypatch.chdir(folder)
        monkeypatch.setattr(module, "_reader", lambda _: lambda: next(waiting))
        settings = RunFlags(**{"temperature": 0.0, "max_tokens": 4} | flags).settings
        Chat(to, settings, None).loop()
        return capsys.readouterr()

    return say


def content(text: str, *images: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "path": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_images_stay_in_the_conversation(
    talk: Talk, model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, notes = talk(
        r"\image cat.png What's this?", "Sure?", r'\image "a dog.png" And <this>?', max_tokens=3
    )
    assert "[image 1: cat.png, 60 x 40, 16 tokens]" in notes
    assert "[image 2: a dog.png, 90 x 140, 16 tokens]" in notes
    prompts = [int(count) for count in re.findall(r"\[(\d+) prompt tokens", notes)]
    assert len(prompts) == 3
    assert prompts[2] > prompts[1] + 16
    monkeypatch.chdir(folder)
    alone = model.generate(content("What's this?", "cat.png"), max_tokens=3, temperature=0)
    assert said.startswith(alone.read())
    assert prompts[0] == alone.usage.prompt_tokens


def test_images_that_cannot_be(talk: Talk) -> None:
    said, notes = talk(r"\image none.png What?", r"\image cat.png", r"\image", r"\help")
    assert said == ""
    assert "none.png" in notes
    assert notes.count(r"say \image PLACE TEXT") == 2
    assert r"\image PLACE TEXT  say TEXT about an image" in notes


def test_clear_forgets_images_too(talk: Talk) -> None:
    _, notes = talk(r"\image cat.png What?", r"\clear", r"\image cat.png What?")
    assert notes.count("[image 1: cat.png") == 2


def test_a_full_context_forgets_images_too(talk: Talk, folder: Path) -> None:
    with Model.open(folder / "llava", context=160) as small:
        _, notes = talk(*[r"\image cat.png And what is there to be seen here?"] * 4, to=small)
    assert "error" not in notes
    assert "forgot the oldest turns" in notes


def test_a_chat_with_a_model_without_eyes(talk: Talk) -> None:
    with Model.open(context=64) as blind:
        said, notes = talk(r"\image cat.png What?", to=blind)
    assert said == ""
    assert "error: this model reads no images" in notes


def test_one_answer_about_images(folder: Path, model: Model) -> None:
    cat, dog = str(folder / "cat.png"), str(folder / "a dog.png")
    options = ("--temperature", "0", "--max-tokens", "4")
    place = str(folder / "llava")
    done = squall("run", place, "--image", cat, "--image", dog, "Which?", *options)
    wanted = model.generate(content("Which?", cat, dog), max_tokens=4, temperature=0)
    assert done.returncode == 0, done.stderr
    assert done.stdout == wanted.read() + "\n"
    assert f"[{wanted.usage.prompt_tokens} prompt tokens" in done.stderr
    kind = squall("run", "vision-plain", "-m", place, "--image", cat, "--image", dog, "Which?",
                  *options)  # fmt: skip
    assert kind.stdout == done.stdout


def test_images_and_a_model_without_eyes(folder: Path) -> None:
    done = squall("run", "--image", str(folder / "cat.png"), "What?", "--context", "64")
    assert done.returncode != 0
    assert "this model reads no images" in done.stderr


def test_a_terminal(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    terminal = Terminal(tmp_path, "run", "vision-plain", "-m", "llava", "--max-tokens", "3")
    try:
        terminal.wait_for(PROMPT)
        terminal.type("\\image cat.png What is this?\r")
        terminal.wait_for(ANSWER)
        terminal.wait_for("[image 1: cat.png, 60 x 40, 16 tokens]")
        terminal.wait_for("prompt tokens")
        terminal.wait_for(PROMPT)
        terminal.type('\\image "a dog.png" And this?\r')
        terminal.wait_for("[image 2: a dog.png, 90 x 140, 16 tokens]")
        terminal.wait_for("prompt tokens")
        terminal.wait_for(PROMPT)
        terminal.type("\\exit\r")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()


def test_inspect_tells_what_an_image_costs(folder: Path) -> None:
    report = json.loads(squall("inspect", "--json", str(folder / "llava")).stdout)
    assert report["runs"]
    assert report["sees"].startswith(
        "a tower of 1 layers, 24 wide; tokens of an image of 640 x 480 pixels: 16 (one a patch"
    )
    shown = squall("inspect", str(folder / "llava")).stdout
    assert "It sees images: a tower of 1 layers" in shown
    assert json.loads(squall("inspect", "--json").stdout)["sees"] is None


def test_doctor_names_what_reads_images() -> None:
    report = json.loads(squall("doctor", "--json").stdout)
    assert report["pillow"]
    assert report["httpx"]
