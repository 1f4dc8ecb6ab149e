"""Pictures on terminals: what kitty, iTerm2 and sixel terminals are sent, and when nothing is."""

from __future__ import annotations

import base64
import fcntl
import io
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from squall.cli import screen
from squall.diffusion.request import Picture

ENVIRONMENT = ("KITTY_WINDOW_ID", "TERM_PROGRAM", "TERM", "TMUX")


def picture(width: int = 37, height: int = 21) -> NDArray[np.uint8]:
    """Four colors, so that a palette of 255 keeps them."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, :, 0] = 255
    pixels[:, width // 3 :, 1] = 255
    pixels[3:5, ::2] = 255
    return pixels


class Tty:
    """A terminal as standard input and output; what it was sent, and what it answers to DA1."""

    def __init__(self, answer: str) -> None:
        self.master, self.slave = pty.openpty()
        self.sent = b""
        self._answer = answer.encode()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        asked = False
        while True:
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:
                return
            self.sent += data
            if not asked and b"\x1b[c" in self.sent:
                asked = True
                os.write(self.master, self._answer)
            if self.sent.endswith(b"<end>"):
                return

    def text(self) -> str:
        os.write(self.slave, b"<end>")
        self._thread.join(10)
        return self.sent.decode().removesuffix("<end>").replace("\r\n", "\n")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    screen._attributes.cache_clear()


@pytest.fixture
def terminal(
    plain: None,  # noqa: ARG001
    request: pytest.FixtureRequest,
) -> Iterator[Tty]:
    tty = Tty(getattr(request, "param", "\x1b[?62;4;22c"))
    fcntl.ioctl(tty.slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 640, 480))
    yield tty
    os.close(tty.slave)
    os.close(tty.master)


def shown(
    terminal: Tty, monkeypatch: pytest.MonkeyPatch, pixels: NDArray[np.uint8], **environment: str
) -> bool:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with (
        os.fdopen(os.dup(terminal.slave), "r") as source,
        os.fdopen(os.dup(terminal.slave), "w") as sink,
        monkeypatch.context() as patched,
    ):
        patched.setattr("sys.stdin", source)
        patched.setattr("sys.stdout", sink)
        return screen.show(Picture(pixels, 1, 1))


def from_kitty(text: str) -> NDArray[np.uint8]:
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in chunks) == text
    keys = [dict(pair.split("=") for pair in keys.split(",")) for keys, _ in chunks]
    assert keys[0] | {"f": "100", "a": "T", "q": "2"} == keys[0]  # shown at once, and no answer
    assert [key["m"] for key in keys] == ["1"] * (len(keys) - 1) + ["0"]
    assert all(len(data) <= 4096 and len(data) % 4 == 0 for _, data in chunks)
    data = base64.b64decode("".join(data for _, data in chunks))
    return np.asarray(Image.open(io.BytesIO(data)))


def from_sixel(text: str) -> NDArray[np.uint8]:
    """What a terminal makes of it, by DEC's manual (colors in percent)."""
    body = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\', text, re.DOTALL)
    assert body is not None
    pixels = np.zeros((int(body[2]) + 6, int(body[1]), 3), np.uint8)
    palette: dict[int, tuple[int, ...]] = {}
    x = top = color = 0
    tokens = r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|([$-])"
    for token in re.finditer(tokens, body[3]):
        if token[1]:
            color = int(token[1])
            palette[color] = tuple(round(int(part) * 2.55) for part in token.groups()[1:4])
        elif token[5]:
            color = int(token[5])
        elif token[9]:
            x, top = 0, top + 6 * (token[9] == "-")
        else:
            count, sign = int(token[6] or 1), token[7] or token[8]
            for line in range(6):
                if ord(sign) - 63 >> line & 1:
                    pixels[top + line, x : x + count] = palette[color]
            x += count
            assert x <= int(body[1])
    assert not pixels[int(body[2]) :].any()
    return pixels[: int(body[2])]


@pytest.mark.parametrize("environment", [{"KITTY_WINDOW_ID": "1"}, {"TERM": "xterm-kitty"}])
def test_kitty(terminal: Tty, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (60, 80, 3), np.uint8)
    assert shown(terminal, monkeypatch, noise, **environment)
    assert np.array_equal(from_kitty(terminal.text().removesuffix("\n")), noise)


def test_iterm2(terminal: Tty, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(terminal, monkeypatch, picture(), TERM_PROGRAM="iTerm.app", TERM="xterm-256color")
    found = re.fullmatch(
        r"\x1b]1337;File=inline=1;size=(\d+);width=37px:([\w+/=]+)\x07\n", terminal.text()
    )
    assert found is not None
    data = base64.b64decode(found[2])
    assert len(data) == int(found[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), picture())


def test_sixel_where_the_terminal_says_so(terminal: Tty, monkeypatch: pytest.MonkeyPatch) -> None:
    before = termios.tcgetattr(terminal.slave)
    assert shown(terminal, monkeypatch, picture(), TERM="xterm-256color")
    asked, text = terminal.text().split("\x1b[c")
    assert asked == ""
    assert np.array_equal(from_sixel(text[text.index("\x1bP") :].removesuffix("\n")), picture())
    assert termios.tcgetattr(terminal.slave) == before


@pytest.mark.parametrize("terminal", ["\x1b[?62;22c", "\x1b[?1;2", "", "x" * 500], indirect=True)
def test_terminals_that_show_no_pictures(terminal: Tty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "ANSWER_S", 0.05)
    assert not shown(terminal, monkeypatch, picture(), TERM="xterm-256color")
    assert "\x1bP" not in terminal.text()


@pytest.mark.parametrize("term", ["dumb", "linux"])
def test_terminals_that_are_not_asked(
    terminal: Tty, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    assert not shown(terminal, monkeypatch, picture(), TERM=term)
    assert terminal.text() == ""


def test_within_tmux_the_terminal_is_asked(terminal: Tty, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(
        terminal, monkeypatch, picture(), TMUX="x", KITTY_WINDOW_ID="1", TERM="tmux-256color"
    )
    assert "\x1bPq" in terminal.text()


@pytest.mark.usefixtures("plain")
def test_pipes_get_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KITTY_WINDOW_ID", "1")
    assert not screen.show(Picture(picture(), 1, 1))
    assert capsys.readouterr().out == ""


def test_wide_pictures_are_made_to_fit(terminal: Tty, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(terminal, monkeypatch, picture(1280, 720), KITTY_WINDOW_ID="1")
    assert from_kitty(terminal.text().removesuffix("\n")).shape == (360, 640, 3)


def test_a_terminal_that_does_not_tell_its_pixels(
    terminal: Tty, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl.ioctl(terminal.slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 50, 0, 0))
    monkeypatch.setenv("COLUMNS", "50")
    assert shown(terminal, monkeypatch, picture(1280, 720), KITTY_WINDOW_ID="1")
    assert from_kitty(terminal.text().removesuffix("\n")).shape == (225, 400, 3)
