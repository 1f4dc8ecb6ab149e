"""What people do on the page, in Chromium, with the default model."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from browsers import COMPLETIONS, NARROW, WIDE, Screen, Screens, saying
from painters import serving
from PIL import Image
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from playwright.sync_api import expect
from servers import Running, in_thread

from squall import EngineConfig, Model


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open(context=512, engine=EngineConfig(max_seqs=2)) as found:
        yield found


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[Running]:
    with in_thread(model, seed=1, model_id="small") as found:
        yield found


@pytest.fixture
def screen(running: Running, screens: Screens) -> Iterator[Screen]:
    with screens(running.url) as found:
        yield found
        running.held.let()


def png(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(out, "PNG")
    return out.getvalue()


def test_an_answer_comes_with_its_rates(screen: Screen, running: Running) -> None:
    running.held.hold()
    screen.set(max_tokens="12", temperature="0")
    screen.say("What is rain?")
    expect(screen.page.locator(".state")).to_contain_text("Waiting for the first token")
    running.held.let(4)
    expect(screen.page.locator("article.assistant .answer")).not_to_be_empty()
    expect(screen.page.locator("#stop")).to_be_visible()
    running.held.let()
    answer = screen.answer()
    expect(answer.locator(".stats")).to_have_text(re.compile(r"12 tokens · [\d.]+ tokens/s.*small"))
    asked = {"model": "small", "messages": [{"role": "user", "content": "What is rain?"}]}
    asked |= {"max_tokens": 12, "temperature": 0}
    told = httpx.post(f"{running.url}/v1/chat/completions", json=asked, timeout=60).json()
    text = told["choices"][0]["message"]["content"]
    shown = answer.locator(".answer").inner_text()
    assert shown.split() == text.replace("*", "").split()


def test_stop_keeps_what_came(screen: Screen, running: Running) -> None:
    running.held.hold()
    screen.say("Tell me a long story.")
    running.held.let(8)
    expect(screen.page.locator("article.assistant .answer")).not_to_be_empty()
    screen.page.keyboard.press("Escape")
    running.held.let()
    text = screen.answer().locator(".answer").inner_text()
    assert text
    expect(screen.page.locator("#send")).to_be_visible()
    expect(screen.page.locator(".busy")).to_have_count(0)
    assert screen.answer().locator(".answer").inner_text() == text
    assert running.model.engine.stats().running == 0


def test_an_earlier_message_is_edited(screen: Screen) -> None:
    bodies = saying(screen, {"content": "Yes."})
    screen.say("One")
    screen.answer()
    screen.say("Two")
    screen.answer()
    screen.page.locator("article.user").first.get_by_role("button", name="Edit").click()
    editor = screen.page.get_by_role("textbox", name="Edit message")
    assert editor.input_value() == "One"
    editor.fill("Three")
    screen.page.locator(".editor").get_by_role("button", name="Send").click()
    expect(screen.page.locator("article.user")).to_have_count(1)
    assert [m["content"] for m in bodies[-1]["messages"]] == ["Three"]
    screen.answer()
    screen.page.get_by_role("button", name="Earlier version").first.click()
    expect(screen.page.locator("article.user")).to_have_count(2)
    expect(screen.page.locator("article.user").first).to_contain_text("One")


def test_an_answer_is_made_again(screen: Screen) -> None:
    screen.set(max_tokens="8", temperature="1")
    screen.say("Name a colour.")
    first = screen.answer().locator(".answer").inner_text()
    screen.page.get_by_role("button", name="Regenerate").click()
    expect(screen.answer()).to_contain_text("2 / 2")
    screen.page.get_by_role("button", name="Earlier version").click()
    expect(screen.answer().locator(".answer")).to_have_text(first, use_inner_text=True)
    expect(screen.page.locator("article.assistant")).to_have_count(1)


def test_an_answer_that_was_cut_goes_on(screen: Screen) -> None:
    screen.set(max_tokens="5", temperature="0")
    screen.say("What is rain?")
    begun = screen.answer().locator(".answer").inner_text()
    screen.page.get_by_role("button", name="Continue").click()
    expect(screen.page.locator(".busy")).to_have_count(0)
    whole = screen.answer().locator(".answer").inner_text()
    assert whole.startswith(begun.rstrip())
    assert len(whole) > len(begun)
    expect(screen.page.locator("article.assistant")).to_have_count(1)


MARKDOWN = """# Rivers

| river | km |
|:--|--:|
| Rhine | 1230 |

1. one
   - two

```python
print("a < b")
```

*soft* **strong** `code` [a link](https://example.org/x)

**_all_ of it**

| שלום | ב |
|--|--|
| one |
"""


def test_markdown(screen: Screen) -> None:
    saying(screen, *({"content": part} for part in re.findall(r"(?s).{1,3}", MARKDOWN)))
    screen.say("Rivers?")
    answer = screen.answer().locator(".answer")
    expect(answer.locator("table").first.locator("td").last).to_have_text("1230")
    expect(answer.locator("ol li ul li")).to_have_text("two")
    assert answer.locator(".code pre").inner_text().strip() == 'print("a < b")'
    expect(answer.locator("em")).to_have_text(["soft", "all"])
    expect(answer.locator("strong")).to_have_text(["strong", "all of it"])
    expect(answer.locator("td")).to_have_count(3)
    sides = "all => all.map(e => getComputedStyle(e).direction)"
    assert answer.locator("table").evaluate_all(sides) == ["ltr", "rtl"]
    link = answer.get_by_role("link", name="a link")
    assert link.get_attribute("href") == "https://example.org/x"
    assert "noopener" in (link.get_attribute("rel") or "")
    screen.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer.get_by_role("button", name="Copy code").click()
    assert "a < b" in screen.page.evaluate("navigator.clipboard.readText()")


HOSTILE = """<img src=x onerror="window.hit=1"><script>window.hit=2</script>
[a](javascript:window.hit=3) ![b](https://example.org/spy.png) 
[c](data:text/html,<script>1</script>)

```<img src=x onerror=window.hit=4>
</code></pre><svg onload="window.hit=5">
```

| <b onclick="window.hit=6">x</b> |
|--|
| <iframe src="//example.org"></iframe> |
"""


def test_nothing_of_an_answer_runs(screen: Screen) -> None:
    calls = [{"index": 0, "id": "1", "type": "function", "function": {
        "name": "<img src=x onerror=window.hit=7>", "arguments": '{"a": "<script>"}',
    }}]  # fmt: skip
    saying(
        screen, {"content": HOSTILE}, {"reasoning_content": "<svg onload=window.hit=8>"},
        {"tool_calls": calls}, finish="tool_calls",
    )  # fmt: skip
    screen.say(HOSTILE)
    answer = screen.answer()
    expect(answer.locator(".call")).to_be_visible()
    assert screen.page.evaluate("window.hit") is None
    for element in ("img", "script", "iframe", "svg[onload]", "[onclick]"):
        assert screen.page.locator(f".message .answer {element}").count() == 0
    links = answer.locator(".answer a").evaluate_all("all => all.map(a => a.protocol)")
    assert set(links) <= {"http:", "https:", "mailto:"}


def test_reasoning_is_folded(screen: Screen) -> None:
    saying(screen, {"reasoning_content": "Let me think."}, {"content": "42"})
    screen.say("What is six times seven?")
    answer = screen.answer()
    expect(answer.locator(".answer")).to_have_text("42")
    expect(answer.get_by_text("Let me think.")).to_be_hidden()
    answer.get_by_text("Reasoning").click()
    expect(answer.get_by_text("Let me think.")).to_be_visible()


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"], "additionalProperties": False,
    }}}
]  # fmt: skip


def test_a_tool_is_called_and_its_result_given(screen: Screen) -> None:
    screen.set(tools=json.dumps(TOOLS), tool_choice="required", max_tokens="64")
    screen.say("How is the weather in Rome?")
    call = screen.answer().locator(".call").first
    expect(call.locator(".name")).to_have_text("weather")
    assert json.loads(call.locator("code").inner_text())["city"] in ("Paris", "Rome")
    screen.set(tool_choice="none", max_tokens="6")
    call.get_by_role("textbox", name="Result of weather").fill("sunny")
    with screen.page.expect_request("**/v1/chat/completions") as request:
        screen.page.get_by_role("button", name=re.compile("Send results?")).click()
    asked, called, result, *_ = json.loads(request.value.post_data or "")["messages"]
    assert (asked["role"], result["content"]) == ("user", "sunny")
    assert called["tool_calls"][0]["id"] == result["tool_call_id"]
    expect(screen.answer().locator(".answer")).not_to_be_empty()


def test_a_call_that_was_cut_is_not_told(screen: Screen) -> None:
    whole = {"index": 0, "id": "1", "function": {"name": "weather", "arguments": '{"city": 1}'}}
    cut = {"index": 1, "id": "2", "function": {"name": "weather", "arguments": '{"cit'}}
    bodies = saying(screen, {"content": "Well."}, {"tool_calls": [whole, cut]}, finish="length")
    screen.say("How is it?")
    expect(screen.answer().get_by_role("textbox", name="Result of weather")).to_have_count(1)
    screen.say("Never mind.")
    screen.answer()
    (call,) = bodies[-1]["messages"][1]["tool_calls"]
    assert call["id"] == "1"


def test_calls_that_the_server_made_are_shown(screen: Screen) -> None:
    made = [{"name": "far__search", "arguments": '{"q": "<b>"}', "result": "<i>found</i>"}]
    bodies = saying(screen, {"content": "I look."}, {"content": " It is 7."}, squall_tools=made)
    screen.say("What is it?")
    call = screen.answer().locator(".call")
    call.get_by_text("Called far__search").click()
    expect(call.get_by_label("Arguments")).to_have_text('{ "q": "<b>" }')
    expect(call.get_by_label("Result")).to_have_text("<i>found</i>")
    screen.say("And?")
    assert screen.answer(0).locator(".call").count() == 1
    told = bodies[-1]["messages"][1]
    assert told == {"role": "assistant", "content": "I look. It is 7."}


def test_an_answer_has_the_shape_that_is_asked_for(screen: Screen) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}}
    schema |= {"required": ["n"], "additionalProperties": False}
    screen.set(shape="json_schema", grammar=json.dumps(schema), max_tokens="40")
    screen.say("How many planets are there?")
    assert list(json.loads(screen.answer().locator(".answer code").inner_text())) == ["n"]
    screen.set(tools="[1]")
    screen.say("And stars?")
    expect(screen.page.get_by_role("alert").first).to_contain_text("no list of functions")


def test_probabilities_by_mouse_and_keyboard(screen: Screen) -> None:
    screen.set(probabilities="true", max_tokens="6", temperature="0")
    screen.say("What is rain?")
    tokens = screen.answer().locator(".token")
    expect(tokens).to_have_count(6)
    tokens.nth(2).hover()
    tip = screen.page.get_by_role("tooltip")
    expect(tip).to_be_visible()
    shares = [float(x) for x in re.findall(r"([\d.]+) ?%", tip.locator("table").inner_text())]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) < 100.5
    expect(tip.locator(".chosen")).to_have_count(1)
    screen.page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    tokens.first.focus()
    screen.page.keyboard.press("ArrowRight")
    expect(tip).to_be_visible()
    assert screen.page.evaluate("document.activeElement.className").startswith("token")


def test_settings_are_sent_and_stay(screen: Screen) -> None:
    bodies = saying(screen, {"content": "Yes."})
    given = {"temperature": "0.5", "top_p": "0.9", "top_k": "7", "seed": "3", "max_tokens": "9"}
    screen.set(system="Be brief.", stop="END", **given)
    screen.page.reload()
    screen.say("Hi")
    screen.answer()
    body = bodies[-1]
    assert {name: body[name] for name in given} == {n: float(v) for n, v in given.items()}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["stop"] == ["END"]
    assert "min_p" not in body


def given(screen: Screen, *cards: dict[str, Any]) -> None:
    """From now on the server has these models."""
    expect(screen.page.locator("#model option")).not_to_have_count(0)  # its scripts run
    fulfil = json.dumps({"data": cards})
    screen.page.route("**/v1/models", lambda route: route.fulfill(body=fulfil))
    screen.page.evaluate("dispatchEvent(new Event('focus'))")


SEES = {"id": "small", "kind": "text", "capabilities": ["completion", "vision"]}


def test_a_model_that_sees_nothing_gets_no_images(screen: Screen) -> None:
    expect(screen.page.locator("#model")).to_have_value("small")
    expect(screen.page.locator("#attach")).to_be_hidden()
    file = {"name": "red.png", "mimeType": "image/png", "buffer": png()}
    screen.page.locator("#file").set_input_files([file])
    expect(screen.page.get_by_role("alert").first).to_contain_text("takes no images")
    given(screen, {"id": "vectors", "kind": "embeddings", "capabilities": ["embedding"]})
    expect(screen.page.locator("#model")).to_have_text("no model for chats")
    given(screen, {"id": "old", "max_model_len": 9})
    expect(screen.page.locator("#attach")).to_be_visible()


def test_images_go_with_a_message(screen: Screen) -> None:
    bodies = saying(screen, {"content": "Red."})
    given(screen, SEES)
    expect(screen.page.locator("#attach")).to_be_visible()
    file = {"name": "red.png", "mimeType": "image/png", "buffer": png()}
    screen.page.locator("#file").set_input_files([file | {"buffer": b"no"}, file, file])
    expect(screen.page.get_by_role("alert").first).to_have_text(
        "red.png cannot be read as an image."
    )
    expect(screen.page.locator("#attached .thumb")).to_have_count(2)
    screen.page.get_by_role("button", name="Remove image 1").click()
    expect(screen.page.locator("#attached .thumb")).to_have_count(1)
    screen.say("What colour?")
    expect(screen.page.locator("article.user img")).to_have_count(1)
    screen.answer()
    image, text = bodies[-1]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What colour?"}
    data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).convert("RGB").getpixel((5, 5)) == (200, 30, 30)
    new = screen.page.get_by_role("button", name="New chat")
    new.click()
    screen.page.locator("#file").set_input_files([file])
    expect(screen.page.locator("#attached .thumb")).to_have_count(1)
    screen.page.get_by_role("button", name="What colour?", exact=True).click()
    expect(screen.page.locator("#attached .thumb")).to_have_count(0)
    new.click()
    screen.say("And this one?")
    screen.answer()
    new.click()
    expect(screen.page.locator("#attached .thumb")).to_have_count(0)


def test_a_refusal_is_shown_and_nothing_is_lost(screen: Screen) -> None:
    screen.say("rain " * 600)
    error = screen.page.locator("article.assistant .error")
    expect(error).to_contain_text("too long")
    screen.errors.clear()  # the browser tells of the status too
    expect(screen.page.locator("article.user")).to_contain_text("rain rain")
    screen.page.get_by_role("textbox", name="Message").fill("a draft")
    screen.page.reload()
    expect(screen.page.locator("article.user")).to_contain_text("rain rain")
    expect(screen.page.get_by_role("textbox", name="Message")).to_have_value("a draft")


def test_a_server_that_is_gone(screen: Screen) -> None:
    screen.page.route("**/v1/chat/completions", lambda route: route.abort())
    screen.say("Anyone?")
    error = screen.page.locator("article.assistant .error")
    expect(error).to_contain_text("cannot be reached")
    screen.errors.clear()
    page = "<html><h1>502</h1></html>"
    screen.page.route(COMPLETIONS, lambda route: route.fulfill(status=502, body=page))
    error.get_by_role("button", name="Try again").click()
    expect(error).to_contain_text("answered with 502 Bad Gateway.")
    screen.errors.clear()
    saying(screen, {"content": "Here."})
    error.get_by_role("button", name="Try again").click()
    expect(screen.answer().locator(".answer")).to_have_text("Here.")


def test_what_broke_off_goes_on(screen: Screen, running: Running) -> None:
    saying(screen, {"content": "Half an"}, finish=None)
    screen.say("Well?")
    answer = screen.answer()
    expect(answer.locator(".error")).to_contain_text("broke off")
    expect(answer.locator(".answer")).to_have_text("Half an")
    bodies = saying(screen, {"content": " answer."})
    answer.get_by_role("button", name="Continue").click()
    expect(screen.answer().locator(".answer")).to_have_text("Half an answer.")
    assert bodies[-1]["continue_final_message"]
    screen.page.unroute(COMPLETIONS)
    running.held.hold()
    screen.say("What is rain?")
    running.held.let(4)
    expect(screen.page.locator("article.assistant .answer").last).not_to_be_empty()
    screen.page.wait_for_timeout(1200)  # it is kept every second
    screen.page.reload()
    running.held.let()
    expect(screen.answer()).to_contain_text("stopped")
    expect(screen.page.get_by_role("button", name="Continue")).to_be_visible()


def test_conversations_are_kept_named_and_given_away(screen: Screen, tmp_path: Path) -> None:
    saying(screen, {"content": "Yes."})
    page = screen.page
    screen.say("First talk")
    screen.answer()
    page.get_by_role("button", name="New chat").click()
    screen.say("Second talk")
    screen.answer()
    page.reload()
    rows = page.locator("#conversations > li")
    expect(rows).to_have_count(2)
    rows.last.hover()
    page.get_by_role("button", name="Rename First talk").click()
    page.get_by_role("textbox", name="Name of the conversation").fill("Rivers")
    page.keyboard.press("Enter")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    file = tmp_path / "talks.json"
    download.value.save_as(file)
    rows.filter(has_text="Rivers").hover()
    page.get_by_role("button", name="Delete Rivers").click()
    expect(rows).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(rows).to_have_count(2)
    for row in ("Rivers", "Second talk"):
        rows.filter(has_text=row).hover()
        page.get_by_role("button", name=f"Delete {row}").click()
    expect(rows).to_have_count(0)
    page.locator("#import-file").set_input_files(file)
    expect(rows).to_have_count(2)
    page.get_by_role("button", name="Rivers", exact=True).click()
    expect(page.locator("article.user")).to_have_text(re.compile("First talk"))
    wrong: list[Any] = [None, {"format": "squall-conversations", "conversations": [None]}]
    for one in wrong:
        given = {"name": "x.json", "mimeType": "text/json", "buffer": json.dumps(one).encode()}
        page.locator("#import-file").set_input_files([given])
        expect(page.get_by_text("Nothing was imported: The file is no export")).to_be_visible()
        page.get_by_role("button", name="Dismiss").click()


def test_a_long_conversation_is_shown_in_parts(screen: Screen) -> None:
    roles, before = ("user", "assistant"), [None, *map(str, range(99))]
    messages = [
        {"id": str(i), "parent": parent, "role": roles[i % 2], "text": f"text {i}"}
        for i, parent in enumerate(before)
    ]
    talk = {"title": "Long", "named": True, "at": "99", "messages": messages, "settings": {}}
    file = {"format": "squall-conversations", "conversations": [talk]}
    given = {"name": "x.json", "mimeType": "text/json", "buffer": json.dumps(file).encode()}
    screen.page.locator("#import-file").set_input_files([given])
    screen.page.get_by_role("button", name="Long", exact=True).click()
    articles = screen.page.locator("article")
    expect(articles).to_have_count(60)
    first = articles.first.get_attribute("data-id")
    screen.page.get_by_role("button", name="Earlier messages").click()
    expect(articles).to_have_count(100)
    expect(screen.page.locator(f"[data-id='{first}']")).to_be_in_viewport()
    bodies = saying(screen, {"content": "Yes."})
    screen.say("Still there?")
    screen.answer()
    assert len(bodies[-1]["messages"]) == 101


def test_what_another_tab_deletes_is_gone(screen: Screen) -> None:
    saying(screen, {"content": "Yes."})
    screen.say("First talk")
    screen.answer()
    other = screen.page.context.new_page()
    other.goto(f"{screen.url}/ui")
    other.locator("#conversations > li").hover()
    other.get_by_role("button", name="Delete First talk").click()
    expect(other.locator("#conversations > li")).to_have_count(0)
    other.close()
    screen.page.evaluate("dispatchEvent(new Event('focus'))")
    expect(screen.page.locator("#conversations > li")).to_have_count(0)


def test_by_keyboard_alone(screen: Screen) -> None:
    saying(screen, {"content": "Yes."})
    page = screen.page
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator("article.user .plain")).to_have_text("one\ntwo", use_inner_text=True)
    screen.answer()
    page.keyboard.press("Control+/")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_hidden()
    page.keyboard.press("Alt+s")
    expect(page.get_by_role("complementary", name="Settings")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+n")
    expect(page.locator("article")).to_have_count(0)
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert {"prompt", "model", "theme", "settings-toggle", "new", "export"} <= seen


def test_metrics_are_live(screen: Screen) -> None:
    page = screen.page
    screen.set(max_tokens="6")
    screen.say("Hi")
    screen.answer()
    page.get_by_role("link", name="Metrics").click()
    expect(page.locator("#settings-toggle")).to_be_hidden()
    card = page.locator("#metrics-models section").first
    expect(card).to_contain_text("small")
    expect(card.locator(".chart svg").first).to_be_visible()
    served = page.locator("#metrics-server")
    before = served.inner_text()
    page.evaluate(
        "fetch('/v1/completions', {method: 'POST', body: '{\"prompt\": \"x\", \"max_tokens\": 2}'})"
    )
    expect(served).not_to_have_text(before, use_inner_text=True)
    waiting: list[Any] = []
    page.route("**/metrics", lambda route: waiting.append(route))
    with page.expect_request("**/metrics"):
        pass
    with pytest.raises(PlaywrightTimeout), page.expect_request("**/metrics", timeout=2500):
        pass  # as long as the server has not answered
    assert len(waiting) == 1


def test_a_key_is_asked_for(model: Model, screens: Screens) -> None:
    with (
        in_thread(model, api_keys=("secret",), model_id="small") as running,
        screens(running.url) as screen,
    ):
        page = screen.page
        dialog = page.get_by_role("dialog", name="The server asks for a key")
        for key in ("wrong", "secret"):
            expect(dialog).to_be_visible()
            dialog.get_by_label("API key").fill(key)
            dialog.get_by_role("button", name="Use key").click()
        expect(dialog).to_be_hidden()
        expect(page.locator("#model")).to_contain_text("small")
        screen.errors.clear()
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_pictures(screens: Screens) -> None:
    with serving() as found, screens(found.url.rstrip("/")) as screen:
        screen.set(width="64", height="64", steps="2", picture_seed="77")
        screen.say("a red panda")
        picture = screen.answer().locator(".pictures img")
        expect(picture).to_have_count(1)
        pixel = picture.evaluate(
            "async e => { await e.decode(); const c = document.createElement('canvas');"
            "c.width = c.height = 1; const x = c.getContext('2d'); x.drawImage(e, 0, 0);"
            "return [e.naturalWidth, ...x.getImageData(0, 0, 1, 1).data]; }"
        )
        assert pixel == [64, 77, 77, 77, 255]
        assert found.brush.asked[-1].steps == 2


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
def test_layout_and_accessibility(
    running: Running, screens: Screens, shots: Path, size: tuple[int, int], scheme: str
) -> None:
    """Nothing is wider than the screen, and axe finds nothing serious on any page."""
    axe, wanted = Axe(), "SQUALL_SCREENSHOTS" in os.environ

    def look(name: str) -> None:
        for each in ["dark" if scheme == "light" else "light"] * wanted + [scheme]:
            page.emulate_media(color_scheme=each)  # type: ignore[arg-type]
            page.screenshot(path=shots / f"{name}-{size[0]}-{each}.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
        serious = [v["help"] for v in found if v["impact"] in ("serious", "critical")]
        assert not serious, f"{name}: {serious}"

    with screens(running.url, size, scheme) as screen:
        page = screen.page
        look("empty")
        saying(
            screen, {"reasoning_content": "Hm."}, {"content": MARKDOWN + "x" * 200},
            squall_tools=[{"name": "far__search", "arguments": "{}", "result": "y" * 200}],
        )  # fmt: skip
        screen.say("Rivers? " + "y" * 200)
        screen.answer().get_by_text("Called far__search").click()
        look("chat")
        page.unroute(COMPLETIONS)
        screen.set(probabilities="true", max_tokens="8")
        screen.say("Hi")
        screen.answer()
        page.get_by_role("button", name="Settings", exact=True).click()
        if size == WIDE:
            page.locator(".token").nth(1).hover()
        look("settings")
        page.get_by_role("button", name="Close settings").click()
        page.goto(f"{running.url}/ui#metrics")
        expect(page.locator("#metrics-models section").first).to_be_visible()
        look("metrics")


# What Markdown is made of, and what tries to be HTML or a link to somewhere else.
SCRAPS = (
    "*", "**", "_", "~~", "`", "```\n", "\n", "\n\n", "- ", "  - ", "1. ", "# ", "> ", "a", "b c",
    "|", "|-|\n", "[x](http://a)", "[", "](", ")", "<script>", "<img src=x onerror=alert(1)>",
    "\\", "$", "---\n", "==\n", "  ", "![i](http://b)", "[j](javascript:alert(1))", "http://z.z",
    "'", '"',
)  # fmt: skip
STREAMED = """async (texts) => {
    const { Markdown, show } = await import("/ui/markdown.js");
    const found = [];
    for (const text of texts) {
        const [whole, parts] = [document.createElement("div"), document.createElement("div")];
        show(whole, text);
        const streamed = new Markdown(parts);
        for (let i = 1; i <= text.length; i++) streamed.update(text.slice(0, i));
        if (whole.innerHTML !== parts.innerHTML) found.push(`differs: ${text}`);
        if (whole.querySelector("script, img, iframe, style, object")) found.push(`HTML: ${text}`);
        const links = [...whole.querySelectorAll("[href]")].map((a) => a.getAttribute("href"));
        const bad = links.filter((href) => !/^(https?:\\/\\/|mailto:|#i-)/.test(href));
        if (bad.length) found.push(`${bad}: ${text}`);
    }
    return found;
}"""
LASTS = """async (texts) => {
    const { Markdown } = await import("/ui/markdown.js");
    const long = {};
    for (const [name, text] of Object.entries(texts)) {
        const [root, from] = [document.createElement("div"), performance.now()];
        const streamed = new Markdown(root);
        for (let i = 0; i < text.length; i += 20000) streamed.update(text.slice(0, i + 20000));
        let deep = 0;
        for (let e = root; e; e = e.querySelector(":scope > *")) deep++;
        const took = performance.now() - from;
        if (took > 2000 || deep > 200) long[name] = [took, deep];
    }
    return long;
}"""
MOST = 60_000
HARD = {
    "heading": "# a" + " " * MOST + "b", "divider": "a|b\n-" + " " * MOST + "x",
    "columns": "|" * 20_000 + "\n" + "|-" * 20_000 + "\n" + "|\n" * 10_000,
    "table": "|a" * 1500 + "\n" + "|-" * 1500 + "\n" + ("|b" * 1500 + "\n") * 18,
    "code": "` " + "a" * MOST + "`", "stars": "*" * 30_000 + "a" + "*" * 30_000,
    "h": "h" * MOST, "brackets": "[" * MOST, "images": "![" * 4000 + "](http://a)" * 4000,
    "backquotes": "".join("`" * i + "a" for i in range(1, 350)), "quotes": ">" * MOST,
    "formulas": "\\[" * 30_000, "template": "```js\n" + "`\\" * 24_000 + "\n```\n",
    "string": '```js\n' + '"\\' * 24_000 + "\n```\n", "comment": "```c\n" + "/*" * 24_000,
    "lists": "".join("  " * (i % 200) + "- a\n" for i in range(300)), "words": "word " * 12_000,
    "paragraphs": "A line of text.\n\n" * 4000, "items": "- an item\n" * 6000,
    "lines": "```\n" + "    code\n" * 7000, "fences": "```\n" * 5000,
}  # fmt: skip


def test_markdown_that_streams_is_that_which_is_whole(screen: Screen) -> None:
    draw = random.Random(7)
    texts = ["".join(draw.choices(SCRAPS, k=draw.randint(1, 60))) for _ in range(200)]
    assert screen.page.evaluate(STREAMED, texts) == []


def test_no_text_takes_long_or_is_nested_deep(screen: Screen) -> None:
    assert screen.page.evaluate(LASTS, HARD) == {}
