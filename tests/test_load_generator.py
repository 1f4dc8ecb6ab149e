"""What `squall bench --url` counts of servers that are not ours."""

from __future__ import annotations

import asyncio
import json

import pytest

from squall.load import Load, Trace, over_http


def chunked(*events: dict[str, object] | str, end: bool = True) -> bytes:
    """An event stream as HTTP sends it in chunks."""
    found = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for event in events:
        text = event if isinstance(event, str) else json.dumps(event)
        part = f"data: {text}\n\n".encode()
        found += f"{len(part):x}\r\n".encode() + part + b"\r\n"
    return found + (b"0\r\n\r\n" if end else b"")


def text(content: str) -> dict[str, object]:
    return {"choices": [{"delta": {"content": content}}]}


def asked(answer: bytes) -> Trace:
    """What one request to a server that says `answer` comes to."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def run() -> Trace:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await over_http(f"http://127.0.0.1:{port}", key=None)(Load(1, 4, 8, 1), 0)

    return asyncio.run(run())


def test_usage_counts() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}}
    trace = asked(chunked(text("a"), text("b"), usage, "[DONE]"))
    assert (trace.error, trace.prompt_tokens, trace.answer_tokens) == (None, 7, 9)


def test_without_usage_texts_count() -> None:
    trace = asked(chunked(text("a"), text(""), text("b"), text("c"), "[DONE]"))
    assert (trace.error, trace.answer_tokens, len(trace.gaps_s)) == (None, 3, 2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (chunked(text("a"), end=False), "incomplete chunked read"),
        (chunked({"error": {"message": "no room"}}), "no room"),
        (b"HTTP/1.1 429 Busy\r\n\r\nlater\n", "status 429: later"),
        (b"", "disconnected without sending a response"),
        (b"SSH-2.0-x\r\n\r\n", "illegal status line"),
    ],
)
def test_errors(answer: bytes, message: str) -> None:
    assert message in str(asked(answer).error)
