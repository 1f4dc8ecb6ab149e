"""The queue of a model that makes pictures, on a pipeline that makes none."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

import squall
from squall.diffusion.model import ImageModel
from squall.diffusion.request import Picture, PictureRequest
from squall.errors import EngineStopped, InvalidRequest, QueueFull

WAIT_S = 20


class Painter:
    """A pipeline whose steps go on when they are let."""

    steps, guidance, max_prompt = 3, 4.0, 512
    formats = ()

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.stepped = threading.Semaphore(0)
        self.made: list[str] = []
        self.closed = 0

    def check(self, request: PictureRequest) -> None:
        if request.prompt == "too long":
            raise InvalidRequest("too long")

    def paint(self, request, on_step):
        steps = request.steps or self.steps
        on_step(-1, steps)
        on_step(0, steps)
        on_step(0, steps)
        for step in range(steps):
            if request.prompt == "broken":
                raise RuntimeError("broken")
            self.stepped.release()
            assert self.free.wait(WAIT_S)
            on_step(step + 1, steps)
        on_step(steps, steps)
        self.made.append(request.prompt)
        pixels = np.zeros((request.height, request.width, 3), np.uint8)
        return Picture(pixels, request.seed, steps)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def painter():
    return Painter()


@pytest.fixture
def model(painter):
    with ImageModel(painter, path=Path("x"), max_queue=3) as model:
        yield model
        painter.free.set()


def asked(prompt: str = "a cat", **fields) -> PictureRequest:
    return PictureRequest(prompt=prompt, width=16, height=32, **fields)


def begun(painter: Painter, model: ImageModel, prompt: str = "first"):
    """A picture in its first step."""
    painter.free.clear()
    painting = model.submit(asked(prompt))
    assert painter.stepped.acquire(timeout=WAIT_S)
    return painting


def test_prompts_that_no_model_reads_are_refused_before_their_tokens_are_counted():
    with pytest.raises(InvalidRequest, match="100001 characters"):
        asked("a" * 100_001)


def test_pictures_are_made_in_order_and_progress_is_told(model, painter):
    told = []
    paintings = [model.submit(asked(name), lambda *at: told.append(at)) for name in "abc"]
    pictures = [painting.result(WAIT_S) for painting in paintings]
    assert painter.made == ["a", "b", "c"]
    assert told == [(step, 3) for _ in range(3) for step in range(4)]
    assert all(picture.pixels.shape == (32, 16, 3) for picture in pictures)
    assert len({picture.seed for picture in pictures}) == 3  # random
    assert [(p.step, p.steps) for p in paintings] == [(3, 3)] * 3
    assert model.drain(WAIT_S)
    stats = model.stats()
    assert (stats.pictures, stats.waiting, stats.busy, stats.stalled_s) == (3, 0, False, 0)
    assert min(stats.text_s, stats.steps_s, stats.decode_s) > 0


def test_a_waiting_picture_can_be_cancelled(model, painter):
    first = begun(painter, model)
    second, third = model.submit(asked("second")), model.submit(asked("third"))
    assert model.waiting == 2
    assert second.cancel()
    assert model.waiting == 1
    with pytest.raises(CancelledError):
        second.result(WAIT_S)
    assert second.future in concurrent.futures.wait([second.future], WAIT_S).done
    painter.free.set()
    third.result(WAIT_S)
    assert first.future.done()
    assert painter.made == ["first", "third"]


def test_a_running_picture_ends_at_the_next_step(model, painter):
    first, second = begun(painter, model), model.submit(asked("second"))
    assert model.busy
    assert first.cancel()
    painter.free.set()
    second.result(WAIT_S)
    assert first.future in concurrent.futures.wait([first.future], WAIT_S).done
    assert first.future.cancelled()
    assert painter.made == ["second"]
    assert not second.cancel()


def test_an_error_reaches_its_picture_and_the_queue_goes_on(model, painter):
    broken, whole = model.submit(asked("broken")), model.submit(asked("whole"))
    with pytest.raises(RuntimeError, match="broken"):
        broken.result(WAIT_S)
    whole.result(WAIT_S)

    def raises(*_):
        raise ValueError("nobody listens")

    with pytest.raises(ValueError, match="nobody"):
        model.submit(asked(), raises).result(WAIT_S)
    assert painter.made == ["whole"]


def test_a_full_queue_refuses_and_says_when_to_come_again(model, painter):
    begun(painter, model)
    waiting = [model.submit(asked()) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 pictures wait") as caught:
        model.submit(asked())
    assert caught.value.retry_after_s >= 1
    waiting[1].cancel()
    model.submit(asked())


def test_what_cannot_be_made_is_refused_before_it_waits(model, painter):
    with pytest.raises(InvalidRequest, match="too long"):
        model.submit(asked("too long"))
    model.guidance = None
    with pytest.raises(InvalidRequest, match="takes no guidance"):
        model.submit(asked(guidance=2.0))
    assert model.waiting == 0
    assert not painter.made


def test_closing_ends_what_is_made_and_what_waits(model, painter):
    first, second = begun(painter, model), model.submit(asked())
    threading.Timer(0.05, painter.free.set).start()
    model.close()
    assert first.future.cancelled()
    assert second.future.cancelled()
    assert painter.closed == 1
    assert not painter.made
    model.close()
    assert painter.closed == 1
    with pytest.raises(EngineStopped, match="closed"):
        model.submit(asked())


def test_draining_waits_for_pictures_and_takes_no_more(model, painter):
    first = begun(painter, model)
    assert not model.drain(0.01)
    with pytest.raises(EngineStopped, match="shutting down"):
        model.submit(asked())
    painter.free.set()
    assert model.drain(WAIT_S)
    assert first.future.done()


def test_several_have_seeds_one_after_another(model):
    told = []
    pictures = model.generate(
        "a cat", n=3, seed=2**64 - 2, width=16, height=16, progress=lambda *at: told.append(at)
    )
    assert [picture.seed for picture in pictures] == [2**64 - 2, 2**64 - 1, 0]
    assert told[-1] == (9, 9)
    assert len(model.generate("a cat", width=16, height=16)) == 1
    for n in (0, -1, True, 1.5, "2"):
        with pytest.raises(InvalidRequest, match="n is"):
            model.generate("a cat", n=n)


def test_what_ends_waiting_ends_the_picture(model, painter, monkeypatch):
    painter.free.clear()
    monkeypatch.setattr(squall.diffusion.model.Painting, "result", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate("a cat")
    painter.free.set()
    assert model.drain(WAIT_S)
    assert not painter.made


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_is_told(model, monkeypatch):
    monkeypatch.setattr(model, "_process", -1)
    with pytest.raises(EngineStopped, match="forked"):
        model.submit(asked())
    monkeypatch.undo()


def test_the_public_names():
    assert squall.ImageModel is ImageModel
    assert squall.Picture is Picture
    assert squall.PictureRequest is PictureRequest


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("can't start new thread")])
def test_a_thread_that_does_not_start_leaves_nothing_behind(model, painter, monkeypatch, error):
    def start(_: threading.Thread) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(type(error)):
            model.submit(asked("lost"))
    assert model.waiting == 0
    assert model.submit(asked("next")).result(WAIT_S).steps == 3
    assert painter.made == ["next"]


def test_it_closes_though_its_thread_has_not_begun(painter, monkeypatch):
    model, begun = ImageModel(painter, path=Path("x")), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: begun.append(thread))
        paintings = [model.submit(asked(name)) for name in "ab"]
    model.close()
    for thread in begun:
        thread.start()
    for thread in begun:
        thread.join(WAIT_S)
    assert all(painting.future.cancelled() for painting in paintings)
    assert (painter.made, painter.closed) == ([], 1)


def test_two_threads_that_begin_make_each_picture_once(model, painter, monkeypatch):
    begun = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: begun.append(thread))
        paintings = [model.submit(asked(name)) for name in "abc"]
    assert not model.drain(0)
    for thread in begun:
        thread.start()
    for painting in paintings:
        painting.result(WAIT_S)
    assert sorted(painter.made) == ["a", "b", "c"]
    assert model.drain(WAIT_S)
