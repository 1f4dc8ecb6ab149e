"""Rows S1 and S2: a model's chat template is a stranger's code, and runs where it harms nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import Running, chat, in_thread, until

from squall import Model
from squall.text import sandbox

CHAT = "/v1/chat/completions"
HOSTILE = {
    "globals": "{{ lipsum.__globals__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "init": "{{ cycler.__init__.__globals__['os'].system('true') }}",
    "a message's class": "{{ messages[0].__class__.__base__ }}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "product": "{{ 'a' * 10**9 }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}


@pytest.fixture
def running(model: Model) -> Iterator[Running]:
    before = model.chat_template
    with in_thread(model) as found:
        yield found
    model.chat_template = before


def ask(running: Running, path: str) -> httpx.Response:
    fields: dict[str, Any] = {} if path == "/tokenize" else {"max_tokens": 4}
    return httpx.post(running.url + path, json=chat(**fields), timeout=60)


@pytest.mark.parametrize("name", HOSTILE)
def test_row_s1_hostile_templates(
    running: Running, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever one is rendered: for a chat, and to count its tokens."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    before = running.model.chat_template
    running.model.set_chat_template(HOSTILE[name])
    for path in (CHAT, "/tokenize"):
        answer = ask(running, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "template_error")
        assert len(answer.content) < 2000
    running.model.chat_template = before
    assert ask(running, CHAT).status_code == 200
    until(running.quiet)


def test_row_s2_others_go_on_while_a_template_runs(running: Running) -> None:
    """Rendering is not on the event loop, and ends by itself."""
    running.model.set_chat_template(HOSTILE["loops"])
    found: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(ask(running, CHAT)))
    thread.start()
    until(lambda: running.service.active == 1)
    body = {"prompt": "One, two,", "max_tokens": 4}
    for _ in range(3):
        assert httpx.get(f"{running.url}/health").text == "OK"
        assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == 200
    assert not found
    thread.join()
    assert found[0].json()["error"]["code"] == "template_error"
