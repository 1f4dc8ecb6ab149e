"""Tools of MCP servers: of programs that are started here, or at URLs. Needs the package `mcp`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from squall.closing import Closing
from squall.errors import InvalidRequest
from squall.text.tools import Tool

if TYPE_CHECKING:
    import mcp
    import mcp_types
    from anyio import CancelScope

CONNECT_S = 30.0
CALL_S = 60.0
END_S = 10.0  # for programs to end by themselves
MOST_TOOLS = 128  # as of a request
MOST_LISTED = 1000  # of one server
MOST_RESULT = 20_000  # characters
MOST_DESCRIPTION = 2_000
MOST_WORDS = 1_000  # of what a program writes to stderr
MOST_NAME = 64

_Value = TypeVar("_Value")


class Server(BaseModel):
    """A server as clients' files have it: a program with its arguments, or a URL.

    allow: names of its tools that may be run, or patterns.
    """

    model_config = ConfigDict(extra="ignore")

    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = {}
    type: Literal["stdio", "http", "streamable-http", "streamableHttp"] | None = None
    disabled: bool = False
    allow: list[str] = []


class _File(BaseModel):
    servers: dict[str, Server] = Field(alias="mcpServers")


@dataclass(frozen=True)
class _Known:
    """A tool that may be run: what models are told, where it is, and its name there."""

    told: dict[str, Any]
    at: _Connection
    name: str


class McpTools(Closing):
    """The tools of MCP servers that may be run; thread safe.

    servers: a JSON file, or what is in one: {"mcpServers": {name: {"command", "args", "env",
        "cwd"}}}, or {"url", "headers"} for a server at a URL.
    allow: tools that may be run, as "server.tool", or patterns such as "server.*"; a server of the
        file may have an `allow` of its own. Models are not told of others.
    call_s: seconds that a call may take.

    Raises InvalidRequest if a server does not start, or nothing is allowed.
    """

    def __init__(
        self, servers: str | os.PathLike[str] | Mapping[str, Any], allow: Iterable[str] = (),
        *, call_s: float = CALL_S,
    ) -> None:  # fmt: skip
        _check_package()
        found = _read(servers)
        self._connections = [_Connection(name, s, call_s) for name, s in found.items()]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="squall-mcp")
        self._thread.daemon = True  # a program that does not end must not hold up this one
        self._thread.start()
        try:
            listed = self._soon(self._list()).result()
            own = (f"{name}.{tool}" for name, s in found.items() for tool in s.allow)
            self._known = _allowed(listed, [*allow, *own])
        except BaseException:
            self.close()
            raise

    @property
    def tools(self) -> list[dict[str, Any]]:
        """In OpenAI's shape; the names are "server__tool"."""
        return [known.told for known in self._known.values()]

    def call(self, name: str, arguments: str) -> str:
        """The result of a tool for arguments in JSON; what goes wrong is told in it."""
        return self.submit(name, arguments).result()

    def submit(self, name: str, arguments: str, most: int = MOST_RESULT) -> Future[str]:
        """`call` beside this thread; most: characters of the result."""
        return self._soon(self._call(self._known[name], arguments, most))

    @property
    def calls(self) -> dict[str, tuple[dict[str, Any], Callable[[str], str]]]:
        """By name what models are told of a tool, and what calls it with arguments in JSON."""
        known = self._known.items()
        return {name: (tool.told["function"], partial(self.call, name)) for name, tool in known}

    def close(self) -> None:
        """End the servers' programs."""
        if not self._loop.is_closed():
            self._soon(self._end()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _soon(self, work: Coroutine[Any, Any, _Value]) -> Future[_Value]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _list(self) -> list[tuple[_Connection, mcp_types.Tool]]:
        asked = (at.tools() for at in self._connections)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found: list[tuple[_Connection, mcp_types.Tool]] = []
        for at, tools in zip(self._connections, answers, strict=True):
            if isinstance(tools, BaseException):
                raise tools
            found += [(at, tool) for tool in tools]
        return found

    async def _call(self, known: _Known, arguments: str, most: int) -> str:
        try:
            result = await known.at.call(known.name, json.loads(arguments or "{}"))
        except Exception as error:
            return f"error: {_why(error)}"
        text = ("error: " if result.is_error else "") + _text(result)
        text = text.encode(errors="replace").decode()
        return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most} more are cut)"

    async def _end(self) -> None:
        await asyncio.gather(*(c.end() for c in self._connections))


class _Connection:
    """To one server; begun anew with the next call if it ended. Lives in the loop's thread.

    A task holds it, as who enters the package's client has to leave it.
    """

    def __init__(self, name: str, server: Server, call_s: float) -> None:
        self.name = name
        self._server = server
        self._call_s = call_s
        self._words = b""  # the last ones on stderr
        self._holding: asyncio.Task[None] | None = None

    async def tools(self) -> list[mcp_types.Tool]:
        """All that there are."""
        found: list[mcp_types.Tool] = []
        cursor = None
        try:
            client = await self._client()
            while len(found) < MOST_LISTED:
                page = await asyncio.wait_for(client.list_tools(cursor=cursor), CONNECT_S)
                found += page.tools
                if (cursor := page.next_cursor) is None:
                    break
        except Exception as error:
            raise InvalidRequest(
                f"the MCP server {self.name!r} did not start: {_why(error)}"
            ) from None
        return found[:MOST_LISTED]

    async def call(self, tool: str, arguments: dict[str, Any]) -> mcp_types.CallToolResult:
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        client = await self._client()
        try:
            return await asyncio.wait_for(client.call_tool(tool, arguments), self._call_s)
        except asyncio.TimeoutError:
            raise TimeoutError(f"{tool} took more than {self._call_s:g} s") from None
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                raise
            await self.end()
            raise ConnectionError(f"the MCP server ended{self._last_words}") from None

    async def end(self) -> None:
        if self._holding is not None:
            self._scope.cancel()
            await asyncio.wait({self._holding}, timeout=END_S)

    @property
    def _last_words(self) -> str:
        words = self._words.decode(errors="replace").strip()
        return f"; its last words: {words}" if words else ""

    async def _client(self) -> mcp.Client:
        from anyio import CancelScope

        if self._holding is None or self._holding.done():
            self._ready: asyncio.Future[mcp.Client] = asyncio.Future()
            self._scope = CancelScope()  # unlike a task's cancel it lets programs end in order
            self._holding = asyncio.create_task(self._hold(self._scope))
        try:
            return await asyncio.wait_for(asyncio.shield(self._ready), CONNECT_S)
        except asyncio.TimeoutError:
            self._scope.cancel()
            raise TimeoutError(f"no answer in {CONNECT_S:g} s{self._last_words}") from None

    async def _hold(self, scope: CancelScope) -> None:
        import mcp

        try:
            with scope:
                async with self._transport() as transport, mcp.Client(transport) as client:
                    self._ready.set_result(client)
                    await asyncio.Event().wait()
        except Exception as error:
            if not self._ready.done():
                self._ready.set_exception(ConnectionError(f"{_why(error)}{self._last_words}"))

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        server = self._server
        if server.url is not None:
            import httpx2
            from mcp.client.streamable_http import streamable_http_client

            limit = httpx2.Timeout(CONNECT_S, read=self._call_s)
            async with httpx2.AsyncClient(headers=server.headers, timeout=limit) as http:
                yield streamable_http_client(server.url, http_client=http)
            return
        from mcp.client.stdio import StdioServerParameters, stdio_client

        given = server.model_dump(include={"command", "args", "env", "cwd"})
        with self._listening() as errors:
            yield stdio_client(StdioServerParameters(**given), errlog=errors)

    @contextmanager
    def _listening(self) -> Iterator[TextIO]:
        """What a program's stderr may be."""
        read, write = os.pipe()
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        with os.fdopen(write, "w") as errors:
            yield errors

    def _listen(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while words := pipe.read(65536):
                self._words = (self._words + words)[-MOST_WORDS:]


def _check_package() -> None:
    try:
        from mcp import Client  # noqa: F401
    except ImportError:
        text = "tools of MCP servers need the package mcp, 2 or later: pip install 'squall[mcp]'"
        raise InvalidRequest(text) from None


def _read(given: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Server]:
    where = "mcpServers" if isinstance(given, Mapping) else f"{os.fspath(given)!r}"
    try:
        file = given if isinstance(given, Mapping) else json.loads(Path(given).read_bytes())
        servers = _File.model_validate(file).servers
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            error = ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        form = '{"mcpServers": {"NAME": {"command": "PROGRAM", "args": []}}}, or with a "url"'
        raise InvalidRequest(f"{where}: {error}; it must be {form}") from None
    for name, server in servers.items():
        if (server.command is None) == (server.url is None):
            raise InvalidRequest(f"{where}: {name!r} must have a command or a url, one of them")
        if "." in name:  # or one server's tool could have the name of another's
            raise InvalidRequest(f"{where}: {name!r} must be a name without a dot")
    return {name: server for name, server in servers.items() if not server.disabled}


def _allowed(
    listed: list[tuple[_Connection, mcp_types.Tool]], patterns: list[str]
) -> dict[str, _Known]:
    """The tools that the patterns allow, by the names that models are told."""
    there = {f"{at.name}.{tool.name}": (at, tool) for at, tool in reversed(listed)}
    names = ", ".join(map(ascii, reversed(there)))[:MOST_DESCRIPTION] or "none"
    idle = [p for p in patterns if not any(fnmatchcase(name, p) for name in there)]
    if idle or not patterns:
        what = f"{idle[0]!r} allows no tool" if idle else "no tool is allowed"
        raise InvalidRequest(f"MCP: {what}; those there are, as SERVER.TOOL: {names}")
    found: dict[str, _Known] = {}
    for place, (at, tool) in reversed(there.items()):
        if not any(fnmatchcase(place, pattern) for pattern in patterns):
            continue
        name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{at.name}__{tool.name}")
        if len(name) > MOST_NAME or name in found:
            digest = hashlib.blake2b(place.encode(errors="replace"), digest_size=6).hexdigest()
            name = f"{name[: MOST_NAME - 13]}_{digest}"
        told = Tool(name, (tool.description or "")[:MOST_DESCRIPTION], tool.input_schema).shown()
        found[name] = _Known(told, at, tool.name)
    if len(found) > MOST_TOOLS:
        raise InvalidRequest(f"MCP: {len(found)} tools are allowed; at most {MOST_TOOLS} may be")
    return found


def _text(result: mcp_types.CallToolResult) -> str:
    texts = [_text_of(block) for block in result.content]
    if not texts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(texts)


def _text_of(block: mcp_types.ContentBlock) -> str:
    text = block.model_dump().get("text") or block.model_dump().get("resource", {}).get("text")
    return f"[{block.type}]" if text is None else str(text)


def _why(error: BaseException) -> str:
    while members := getattr(error, "exceptions", None):
        error = members[0]
    return (str(error) or type(error).__name__)[:MOST_WORDS]
