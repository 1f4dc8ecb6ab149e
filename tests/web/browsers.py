"""The page at /ui in Chromium: a browser, pages that tell what went wrong in them, and answers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDE, NARROW = (1440, 900), (360, 740)
COMPLETIONS = "**/v1/chat/completions"
expect.set_options(timeout=30_000)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Chromium is missing (Debian: chromium)")
        pytest.skip("needs Chromium (Debian: chromium)")
    with sync_playwright() as playwright:
        # Sandboxes of containers do not let it have one of its own.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@dataclass
class Screen:
    """A page, and what it did: errors of scripts and of the policy, and where it asked."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.page.get_by_role("textbox", name="Message").fill(text)
        self.page.keyboard.press("Enter")

    def answer(self, number: int = -1) -> Any:
        """The answer with this number, when it has ended."""
        expect(self.page.locator("#send")).to_be_visible()
        found = self.page.locator("article.assistant")
        return found.nth(number) if number >= 0 else found.last

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


@pytest.fixture
def screens(browser: Browser) -> Iterator[Callable[..., Screen]]:
    """Opens a page of a server; at the end, nothing may have gone wrong in any."""
    contexts: list[BrowserContext] = []
    made: list[Screen] = []

    def open(url: str, size: tuple[int, int] = WIDE, **options: Any) -> Screen:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        contexts.append(context)
        page = context.new_page()
        screen = Screen(page, url)
        page.on("pageerror", lambda error: screen.errors.append(str(error)))
        page.on("console", lambda m: screen.errors.append(m.text) if m.type == "error" else None)
        page.on("request", lambda request: screen.asked.append(request.url))
        page.goto(f"{url}/ui")
        made.append(screen)
        return screen

    yield open
    for context in contexts:
        context.close()
    for screen in made:
        assert not screen.errors, screen.errors
        strange = [
            url for url in screen.asked if not url.startswith((screen.url, "data:", "blob:"))
        ]
        assert not strange, f"it asked elsewhere: {strange}"


def told(route: Route, *deltas: dict[str, Any], finish: str = "stop") -> None:
    """Answer a request of the page with these parts of a message, in place of the server."""
    parts = [{"delta": delta, "finish_reason": None, "index": 0} for delta in deltas]
    parts.append({"delta": {}, "finish_reason": finish, "index": 0})
    lines = [json.dumps({"choices": [part]}) for part in parts]
    body = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
    route.fulfill(status=200, content_type="text/event-stream", body=body)


def saying(screen: Screen, *deltas: dict[str, Any], finish: str = "stop") -> list[dict[str, Any]]:
    """From now on every answer is this one; what was asked for."""
    bodies: list[dict[str, Any]] = []

    def fulfill(route: Route) -> None:
        bodies.append(json.loads(route.request.post_data or ""))
        told(route, *deltas, finish=finish)

    screen.page.route(COMPLETIONS, fulfill)
    return bodies


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where screenshots go: where SQUALL_SCREENSHOTS says, for people to look at."""
    folder = Path(os.environ.get("SQUALL_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
