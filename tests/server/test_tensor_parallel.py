"""`squall serve --tensor-parallel`: it answers, and a rank that is killed ends the server."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from servers import chat, in_process, until
from tiny_models import write_folder

pytest.importorskip("torch.distributed")
FLAGS = ("--device", "torch", "--tensor-parallel", "2", "--context", "512")
PATH = "/v1/chat/completions"


def others_of(pid: int) -> list[int]:
    """The processes that a process started."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for children in found for child in children.read_text().split()]


def ended(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("ranks") / "model"))


@pytest.mark.slow("two processes import torch")
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_rank_that_is_killed_ends_the_server(model: str, tmp_path: Path, busy: bool) -> None:
    with in_process(tmp_path / "stderr", model, *FLAGS) as server:
        answer = httpx.post(server.url + PATH, json=chat(max_tokens=3), timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 3
        (other,) = others_of(server.process.pid)
        if busy:
            body = chat(max_tokens=400, ignore_eos=True)

            def ask() -> None:
                with suppress(httpx.HTTPError):
                    httpx.post(server.url + PATH, json=body, timeout=60)

            asking = threading.Thread(target=ask)
            asking.start()
            time.sleep(0.5)
        os.kill(other, signal.SIGKILL)
        assert server.process.wait(10) == 1
        assert "rank 1 of 2 has ended: SIGKILL" in server.stderr()
        if busy:
            asking.join()


@pytest.mark.slow("two processes import torch")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_other_ranks_end_with_the_first(
    model: str, tmp_path: Path, number: signal.Signals
) -> None:
    with in_process(tmp_path / "stderr", model, *FLAGS) as server:
        (other,) = others_of(server.process.pid)
        assert server.stop(number) == (0 if number == signal.SIGTERM else -number)
        until(lambda: ended(other), 10)
        assert "error" not in server.stderr()
