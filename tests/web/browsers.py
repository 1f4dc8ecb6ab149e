"""The page at /ui in Chromium: a browser, pages that tell what went wrong in them, and answers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import (
    ConsoleMessage,
    Error,
    Locator,
    Page,
    Request,
    Route,
    expect,
    sync_playwright,
)  # fmt: skip

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDE, NARROW = (1440, 900), (360, 740)
COMPLETIONS = "**/v1/chat/completions"
expect.set_options(timeout=30_000)


@pytest.fixture(scope="session")
def tab() -> Iterator[Page]:
    """One page for all tests, since each of its own would take a second."""
    if CHROMIUM is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Chromium is missing (Debian: chromium)")
        pytest.skip("needs Chromium (Debian: chromium)")
    with sync_playwright() as playwright:
        # Sandboxes of containers do not let it have one of its own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_context().new_page()
        browser.close()


@dataclass
class Screen:
    """A page, and what it did: errors of scripts and of the policy, and where it asked."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def on_error(self, error: Error) -> None:
        self.errors.append(str(error))

    def on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def on_request(self, request: Request) -> None:
        self.asked.append(request.url)

    def say(self, text: str) -> None:
        self.page.get_by_role("textbox", name="Message").fill(text)
        self.page.keyboard.press("Enter")

    def answer(self, number: int = -1) -> Locator:
        """The answer with this number, when it has ended."""
        expect(self.page.locator("#send")).to_be_visible()
        found = self.page.locator("article.assistant")
        return found.nth(number) if number >= 0 else found.last

    def answer_so_far(self) -> Locator:
        return self.page.locator("article.assistant .answer").last

    def set(self, **settings: str) -> None:
        """Fill in settings, and close them."""
        self.page.get_by_role("button", name="Settings", exact=True).click()
        for name, value in settings.items():
            control = self.page.locator(f"#setting-{name}")
            match control.evaluate("e => e.type"):
                case "checkbox":
                    control.set_checked(value == "true")
                case "select-one":
                    control.select_option(value)
                case _:
                    control.fill(value)
                    control.blur()
        self.page.get_by_role("button", name="Close settings").click()

    def body(self) -> dict[str, Any]:
        """What the page asks for, as soon as somebody sends something."""
        with self.page.expect_request(COMPLETIONS) as request:
            self.page.keyboard.press("Enter")
        return json.loads(request.value.post_data or "")


Screens = Callable[..., AbstractContextManager[Screen]]


@pytest.fixture
def screens(tab: Page) -> Screens:
    """Shows the page of a server as somebody sees it who comes first; left before the server ends.

    Nothing may have gone wrong until then.
    """

    @contextmanager
    def show(url: str, size: tuple[int, int] = WIDE, scheme: Any = "light") -> Iterator[Screen]:
        screen = Screen(tab, url)
        heard = {
            "pageerror": screen.on_error, "console": screen.on_console, "request": screen.on_request
        }  # fmt: skip
        tab.set_viewport_size({"width": size[0], "height": size[1]})
        tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        cleared = {"origin": url, "storageTypes": "indexeddb,local_storage"}
        devtools = tab.context.new_cdp_session(tab)
        devtools.send("Storage.clearDataForOrigin", cleared)
        devtools.detach()
        for event, listener in heard.items():
            tab.on(event, listener)
        try:
            tab.goto(f"{url}/ui")
            yield screen
        finally:
            for event, listener in heard.items():
                tab.remove_listener(event, listener)
            tab.unroute_all()
            tab.goto("about:blank")
        assert not screen.errors, screen.errors
        own = (url, "data:", "blob:")
        strange = [one for one in screen.asked if not one.startswith(own)]
        assert not strange, f"it asked elsewhere: {strange}"

    return show


def saying(
    screen: Screen, *deltas: dict[str, Any], finish: str | None = "stop", **more: Any
) -> list[dict[str, Any]]:
    """From now on every answer is made of these parts; what was asked for.

    finish: None for one that breaks off; more: fields of the chunk beside the last part.
    """
    bodies: list[dict[str, Any]] = []
    parts = [{"choices": [{"delta": delta, "index": 0}]} for delta in deltas]
    parts[-1] |= more
    lines = [json.dumps(part) for part in parts]
    if finish is not None:
        end = {"delta": {}, "finish_reason": finish, "index": 0}
        lines += [json.dumps({"choices": [end]}), "[DONE]"]
    body = "".join(f"data: {line}\n\n" for line in lines)

    def fulfill(route: Route) -> None:
        bodies.append(json.loads(route.request.post_data or ""))
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    screen.page.unroute(COMPLETIONS)
    screen.page.route(COMPLETIONS, fulfill)
    return bodies


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where screenshots go: where SQUALL_SCREENSHOTS says, for people to look at."""
    folder = Path(os.environ.get("SQUALL_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
