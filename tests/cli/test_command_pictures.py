r"""`squall run` with a model that makes pictures, and its prompt by prompt: a stand-in paints."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from painter import Painter, opened, write_model
from PIL import Image
from test_command_chat import ANSWER, PROMPT, Terminal
from typer.testing import CliRunner, Result

from squall.cli import chat, pictures
from squall.cli.app import app
from squall.cli.opening import makes_pictures
from squall.cli.serve import server
from squall.diffusion.model import ImageModel
from squall.errors import InvalidRequest, SquallError
from squall.opening import Opening
from squall.server.options import ServerOptions

SMALL = "--size 32x16"


@pytest.fixture
def openings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Opening]:
    """What is opened, in a folder with a model."""
    write_model(tmp_path / "flux")
    (tmp_path / "text.gguf").touch()
    monkeypatch.chdir(tmp_path)
    found: list[Opening] = []

    def open_with(opening: Opening, **_: object) -> ImageModel:
        found.append(opening)
        return opened(opening)

    monkeypatch.setattr(ImageModel, "open_with", open_with)
    return found


@pytest.fixture
def asked(openings: list[Opening], monkeypatch: pytest.MonkeyPatch) -> list[object]:  # noqa: ARG001
    """What the painter was asked."""
    found: list[object] = []
    paint = Painter.paint
    monkeypatch.setattr(
        Painter,
        "paint",
        lambda self, request, step: found.append(request) or paint(self, request, step),
    )
    return found


def invoke(line: str, stdin: str = "", command: object = app) -> Result:
    done = CliRunner().invoke(command, shlex.split(line), input=stdin)  # type: ignore[arg-type]
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def size_of(name: str) -> tuple[int, int]:
    with Image.open(name) as image:
        return image.size


def files() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"flux", "text.gguf"}


@pytest.mark.parametrize(
    "line",
    ["run flux 'A red cat!'", "run -m flux 'A red cat!'", "run ./flux 'A red cat!'",
     "run diffusion-plain -m flux -a flux 'A red cat!'"],
)  # fmt: skip
def test_a_picture_is_saved_and_its_file_told(openings: list[Opening], line: str) -> None:
    done = invoke(f"{line} {SMALL} --seed 7")
    assert done.stdout == "image-a-red-cat-7.png\n"
    assert re.search(r"\[32x16; 4 steps; seed 7; \d+\.\d s\]", done.stderr)
    with Image.open("image-a-red-cat-7.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (16, 32, 3)
    assert pixels[0, 0, 0] == 7
    assert files() == {"image-a-red-cat-7.png"}
    (opening,) = openings
    assert str(opening.path).removeprefix("./") == "flux"
    assert opening.command == ()


def test_the_size_is_1280_by_720_unless_told(asked: list[object]) -> None:
    invoke("run flux 'a cat'")
    assert [(request.width, request.height) for request in asked] == [(1280, 720)]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("openings")
def test_what_is_there_is_never_overwritten() -> None:
    for _ in range(2):
        invoke(f"run flux cat {SMALL} --seed 1")
    done = invoke(f"run flux cat {SMALL} --seed 1")
    assert done.stdout == "image-cat-1-3.png\n"
    assert files() == {"image-cat-1.png", "image-cat-1-2.png", "image-cat-1-3.png"}


def test_prompts_of_any_text_name_files() -> None:
    assert pictures.free("../../etc/passwd\0\n", 3).name == "image-etc-passwd-3.png"
    assert pictures.free("...", 3).name == "image-3.png"
    assert len(pictures.free("word " * 500, 2**64 - 1).name.encode()) < 100
    assert pictures.free("Ein Käfer", 1).name == "image-ein-käfer-1.png"
    assert len(pictures.free("猫" * 500, 2**64 - 1).name.encode()) < 200


def test_several_pictures(asked: list[object]) -> None:
    done = invoke(f"run flux cat {SMALL} --n 3 --seed 18446744073709551615 --steps 2 -o cat.webp")
    assert done.stdout.split() == ["cat-1.webp", "cat-2.webp", "cat-3.webp"]
    assert [request.seed for request in asked] == [2**64 - 1, 0, 1]  # type: ignore[attr-defined]
    assert {request.steps for request in asked} == {2}  # type: ignore[attr-defined]
    assert size_of("cat-2.webp") == (32, 16)


@pytest.mark.parametrize("name", ["cat.png", "cat.PNG", "cat.jpg", "cat.jpeg", "cat.webp"])
@pytest.mark.usefixtures("openings")
def test_where_to_save(name: str) -> None:
    assert invoke(f"run flux cat {SMALL} -o {name}").stdout == f"{name}\n"
    assert size_of(name) == (32, 16)
    assert files() == {name}


def test_from_a_picture_to_another(asked: list[object]) -> None:
    Image.new("RGB", (20, 10), (1, 2, 3)).save("begin.png")
    invoke(f"run flux cat {SMALL} --image begin.png --strength 0.3 --guidance 2")
    (request,) = asked
    assert request.image.shape == (10, 20, 3)  # type: ignore[attr-defined]
    assert tuple(request.image[0, 0]) == (1, 2, 3)  # type: ignore[attr-defined]
    assert (request.strength, request.guidance) == (0.3, 2.0)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("openings")
def test_a_prompt_from_a_pipe() -> None:
    assert invoke(f"run flux {SMALL} --seed 1", "A dog.\n").stdout == "image-a-dog-1.png\n"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("run diffusion-plain -m flux -a flux-offloaded -d f32 cat",
         {"architecture": "flux-offloaded", "dtype": "f32"}),
        ("run diffusion-plain --model-id flux --arch flux cat", {"architecture": "flux"}),
        ("run flux --isq Q4K --t5 a --clip b --vae c cat --threads 1 --offline",
         {"isq": "Q4K", "t5": "a", "clip": "b", "vae": "c", "threads": 1}),
        ("run flux --topology t.yml cat", {"topology": Path("t.yml")}),
    ],
)  # fmt: skip
def test_how_it_is_opened(openings: list[Opening], line: str, wanted: dict[str, object]) -> None:
    invoke(f"{line} {SMALL}")
    (opening,) = openings
    assert {name: getattr(opening, name) for name in wanted} == wanted
    assert opening.hub is not None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("run flux cat --temperature 0", "--temperature is for models that make text"),
        ("run flux cat --max-tokens 5", "--max-tokens is for models that make text"),
        ("run flux cat --context 50", "--context is for models that make text"),
        ("run flux cat --adapter x", "--adapter is for models that make text"),
        ("run text.gguf Hi --steps 4", "--steps is for models that make pictures"),
        ("run text.gguf Hi --n 2", "--n is for models that make pictures"),
        ("run text.gguf Hi --no-show", "--show is for models that make pictures"),
        ("run text.gguf Hi --t5 x", "--t5 is for models that make pictures"),
        ("run flux cat --size 100", "give it as WxH"),
        ("run flux cat --size 100x100", "must be a multiple of 16"),
        ("run flux cat --size -16x16", "give it as WxH"),
        ("run flux cat --steps 0", "steps is 0"),
        ("run flux cat --seed -1", "seed"),
        ("run flux cat --image none.png", "none.png"),
        ("run flux cat --image a.png --image b.png", "one --image"),
        ("run flux cat -o cat.gif", "must end in one of .png"),
        ("run flux cat -o none/cat.png", "none is no folder"),
        ("run flux 'a prompt of far too many words for it'", "more than 32 tokens"),
        ("run diffusion-plain -m flux -a flux --temperature 0 cat", "--temperature is for"),
        ("bench flux", "makes pictures"),
        ("perplexity flux --text flux/model_index.json", "makes pictures"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("openings")
def test_what_is_refused(line: str, problem: str) -> None:
    with pytest.raises(SquallError, match=re.escape(problem)):
        invoke(line)
    assert files() == set()


@pytest.mark.usefixtures("openings")
def test_what_a_pipe_cannot_do() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        invoke("run flux")


@pytest.mark.usefixtures("openings")
def test_a_picture_that_cannot_be_saved_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Image.Image, file: object, *_kind: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SquallError, match="No space left"):
        invoke(f"run flux cat {SMALL}")
    assert files() == set()


def test_a_folder_that_cannot_be_written_to_is_told_before(
    openings: list[Opening], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures.os, "access", lambda *_: False)
    with pytest.raises(InvalidRequest, match="no folder that can be written to"):
        invoke(f"run flux cat {SMALL}")
    assert openings == []


@pytest.mark.usefixtures("openings")
def test_notes_are_told() -> None:
    assert "note: a note" in invoke(f"run flux 'noted cat' {SMALL}").stderr


# ---- prompt by prompt ----


def talk(monkeypatch: pytest.MonkeyPatch, line: str, *lines: str) -> Result:
    waiting = iter([*lines, "\\exit"])
    monkeypatch.setattr(chat, "_reader", lambda _: lambda: next(waiting))
    return invoke(line, command=server)


def test_prompt_by_prompt(asked: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 10)).save("a begin.png")
    lines = [
        "\\size 32x16", "\\seed 5", "a cat", "\\steps 2", "\\guidance 1.5", "a dog",
        "\\image 'a begin.png'", "\\strength 0.5", "\\seed", "\\steps", "a cow", "\\image",
        "\\size", "a bee", "\\help",
    ]  # fmt: skip
    done = talk(monkeypatch, "-i diffusion-plain -m flux -a flux", *lines)
    _, dog, cow, bee = asked
    paths = done.stdout.split()
    assert paths[:2] == ["image-a-cat-5.png", "image-a-dog-5.png"]
    assert set(paths) == files() - {"a begin.png"}
    sizes = [(request.width, request.height) for request in asked]  # type: ignore[attr-defined]
    assert sizes == [(32, 16)] * 3 + [(1280, 720)]
    assert [request.steps for request in asked] == [None, 2, None, None]  # type: ignore[attr-defined]
    assert dog.guidance == 1.5  # type: ignore[attr-defined]
    assert cow.image.shape == (10, 20, 3)  # type: ignore[attr-defined]
    assert (cow.strength, bee.image) == (0.5, None)  # type: ignore[attr-defined]
    assert "flux: 4 steps, guidance 3.5" in done.stderr
    assert "\\size WxH" in done.stderr


@pytest.mark.usefixtures("openings")
def test_errors_do_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "\\size 7x7", "\\steps many", "\\image none.png", "\\nonsense",
        "a prompt of far too many words for it", "\\size 16x16", "a cat",
    ]  # fmt: skip
    done = talk(monkeypatch, "-i -s 3 flux", *lines)
    for problem in ("multiple of 16", "it must be a number", "none.png", "unknown command",
                    "more than 32 tokens"):  # fmt: skip
        assert problem in done.stderr
    assert done.stdout == "image-a-cat-3.png\n"


@pytest.mark.usefixtures("openings")
def test_run_without_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    from squall.cli import run

    monkeypatch.setattr(run, "_asked", lambda prompt: prompt)
    waiting = iter(["a cat", "\\exit"])
    monkeypatch.setattr(chat, "_reader", lambda _: lambda: next(waiting))
    assert invoke(f"run flux {SMALL} --seed 4").stdout == "image-a-cat-4.png\n"
    with pytest.raises(InvalidRequest, match="need a PROMPT"):
        invoke("run flux --n 2")


# ---- served ----


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ServerOptions]]:
    """What would be served."""
    found: list[tuple[object, ServerOptions]] = []

    def serve_on(
        models: object, options: ServerOptions, listener: socket.socket, **how: Callable[[], None]
    ) -> int:
        listener.close()
        how["started"]()
        found.append((models, options))
        return 0

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "signal", lambda *_: handler)
    monkeypatch.setattr("squall.server.run.serve_on", serve_on)
    return found


def test_a_server_of_pictures(
    openings: list[Opening], served: list[tuple[object, ServerOptions]]
) -> None:
    done = invoke("serve flux --port 0 --isq Q4K --image-folder . --image-age 60")
    ((models, options),) = served
    assert isinstance(models, dict)
    assert list(models) == ["flux"]
    assert isinstance(models["flux"], ImageModel)
    assert (options.image_folder, options.image_age_s) == (Path("."), 60)
    assert openings[0].isq == "Q4K"
    assert re.match(r"flux at http://127.0.0.1:\d+/v1 \(pictures, 4 steps\)", done.stderr)


def test_a_server_of_text_and_pictures(
    openings: list[Opening], served: list[tuple[object, ServerOptions]]
) -> None:
    done = invoke("serve --context 64 --image-model flux --port 0 --t5 x --served-model-name chat")
    ((models, _),) = served
    assert isinstance(models, dict)
    assert list(models) == ["chat", "flux"]
    assert isinstance(models["flux"], ImageModel)
    (opening,) = openings
    assert (opening.path, opening.t5, opening.context) == ("flux", "x", None)
    assert "chat at http" in done.stderr
    assert "flux at http" in done.stderr


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("serve flux --image-model flux", "this one makes pictures"),
        ("serve --t5 x", "--t5 is for models that make pictures"),
        ("serve --image-folder x", "--image-folder is for models that make pictures"),
        ("serve flux --kv-tokens 5", "--kv-tokens is for models that make text"),
    ],
)
@pytest.mark.usefixtures("openings")
def test_servers_that_cannot_be(line: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        invoke(f"{line} --port 0")


# ---- on a terminal ----


@pytest.fixture
def terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Terminal]:
    write_model(tmp_path / "flux")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    monkeypatch.delenv("KITTY_WINDOW_ID", raising=False)
    monkeypatch.delenv("TMUX", raising=False)
    run = subprocess.Popen
    script = str(Path(__file__).with_name("painter.py"))
    monkeypatch.setattr(
        subprocess, "Popen",
        lambda command, **how: run([sys.executable, script, *command[3:]], **how),
    )  # fmt: skip
    opened = Terminal(tmp_path / "state", *request.param)
    yield opened
    opened.close()


RUN = ("run", "flux", *SMALL.split())


@pytest.mark.parametrize("terminal", [RUN], indirect=True)
def test_ctrl_c_ends_the_picture_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    terminal.type("a slow cat\r")
    terminal.wait_for(ANSWER)
    terminal.wait_for("step 2/4")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("ended")
    terminal.wait_for(PROMPT)
    assert files() == {"state"}
    terminal.type("a cat\r")
    terminal.wait_for("\x1b]1337;File=inline=1")
    terminal.wait_for("image-a-cat-")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


@pytest.mark.parametrize("terminal", [(*RUN, "stuck")], indirect=True)
def test_ctrl_c_twice_ends_the_program(terminal: Terminal) -> None:
    terminal.wait_for("step 2/4")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("Ctrl-C again")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(30) == 130
    assert files() == set()


@pytest.mark.parametrize("terminal", [(*RUN, "a slow cat")], indirect=True)
def test_ctrl_c_once_ends_a_command(terminal: Terminal) -> None:
    terminal.wait_for("step 1/4")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(30) == 130
    assert files() == set()


@pytest.mark.parametrize("terminal", [(*RUN, "a cat", "--no-show")], indirect=True)
def test_pictures_are_not_shown_if_told(terminal: Terminal) -> None:
    terminal.wait_for("[32x16; 4 steps")
    assert terminal.process.wait(30) == 0
    assert "1337" not in terminal.output


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("flux", True), ("text.gguf", False), ("none", False), ("owner/name", False),
        ("black-forest-labs/FLUX.1-schnell", True), ("owner/FLUX.1-dev-gguf:flux1-Q4_0.gguf", True),
        ("owner/fluxion-7b", False),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("openings")
def test_which_models_make_pictures(name: str, wanted: bool) -> None:
    assert makes_pictures(name) == wanted


def test_gguf_files_of_flux(tmp_path: Path) -> None:
    import gguf

    for architecture in ("flux", "llama"):
        writer = gguf.GGUFWriter(tmp_path / f"{architecture}.gguf", architecture)
        writer.add_tensor("img_in.weight", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert makes_pictures(str(tmp_path / "flux.gguf"))
    assert not makes_pictures(str(tmp_path / "llama.gguf"))
