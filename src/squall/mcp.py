"""Tools of MCP servers: of programs that are started here, or at URLs. Needs the package `mcp`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, asynccontextmanager, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anyio import CancelScope, Event, Lock, create_task_group, move_on_after, sleep_forever
from anyio.from_thread import start_blocking_portal
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from squall.closing import Closing
from squall.errors import InvalidRequest
from squall.text.tools import Tool

if TYPE_CHECKING:
    import httpx2
    import mcp
    import mcp_types
    from anyio.abc import TaskGroup, TaskStatus

    _Run = Callable[[dict[str, Any]], Awaitable[mcp_types.CallToolResult]]

CONNECT_S = 30.0
CALL_S = 60.0
MOST_TOOLS = 128  # as of a request
MOST_LISTED = 1000  # of one server
MOST_RESULT = 20_000  # characters
MOST_DESCRIPTION = 2_000
MOST_WORDS = 1_000  # of what a program writes to stderr
MOST_NAME = 64
# What the package says then, with codes that servers use as well.
ENDED = {"Connection closed", "Session terminated"}


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
    servers: dict[str, Server] = Field(validation_alias=AliasChoices("mcpServers", "servers"))


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
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal(name="squall-mcp"))
            work, group = self._portal.start_task(_group)
            stack.callback(work.cancel)
            connections = [_Connection(name, s, call_s, group) for name, s in found.items()]
            asked = [self._portal.start_task_soon(at.tools) for at in connections]
            wait(asked)  # a program that has half begun could not be ended
            listed = [
                (at, t) for at, one in zip(connections, asked, strict=True) for t in one.result()
            ]
            own = (f"{name}.{tool}" for name, s in found.items() for tool in s.allow)
            self._known = _allowed(listed, [*allow, *own])
            self._stack = stack.pop_all()

    @property
    def tools(self) -> list[dict[str, Any]]:
        """In OpenAI's shape; the names are "server__tool"."""
        return [told for told, _ in self._known.values()]

    def call(self, name: str, arguments: str) -> str:
        """The result of a tool for arguments in JSON; what goes wrong is told in it."""
        return self.submit(name, arguments).result()

    def submit(self, name: str, arguments: str, most: int = MOST_RESULT) -> Future[str]:
        """`call` beside this thread; most: characters of the result."""
        if name not in self._known:
            raise InvalidRequest(f"there is no tool {name!r}; there are {', '.join(self._known)}")
        return self._portal.start_task_soon(_call, self._known[name][1], arguments, most)

    def close(self) -> None:
        """End the servers' programs."""
        self._stack.close()


async def _group(*, task_status: TaskStatus[TaskGroup]) -> None:
    async with create_task_group() as group:
        task_status.started(group)
        await sleep_forever()


async def _call(run: _Run, arguments: str, most: int) -> str:
    try:
        result = await run(json.loads(arguments or "{}"))
    except Exception as error:
        return f"error: {_why(error)}"
    text = ("error: " if result.is_error else "") + _text(result)
    text = text.encode(errors="replace").decode()
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most} more are cut)"


class _Connection:
    """To one server; begun anew with the next call if it ended.

    A task of the group holds it, as who enters the package's client has to leave it.
    """

    def __init__(self, name: str, server: Server, call_s: float, group: TaskGroup) -> None:
        self.name = name
        self._server = server
        self._call_s = call_s
        self._group = group
        self._words = b""  # the last ones on stderr, or how HTTP answered
        self._lock = Lock()
        self._client: mcp.Client | None = None

    async def tools(self) -> list[mcp_types.Tool]:
        """All that there are."""
        found: list[mcp_types.Tool] = []
        cursor = None
        try:
            client = await self._opened()
            with _within(CONNECT_S, "no answer in"):
                while len(found) < MOST_LISTED:
                    page = await client.list_tools(cursor=cursor)
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

        client = await self._opened()
        try:
            with _within(self._call_s, f"{tool} took more than"):
                return await client.call_tool(tool, arguments)
        except MCPError as error:
            if str(error) not in ENDED:
                raise
        if self._client is client:
            self._scope.cancel()
            await self._over.wait()
        raise ConnectionError(f"the MCP server ended{self._last_words}")

    @property
    def _last_words(self) -> str:
        words = self._words.decode(errors="replace").strip()
        return f"; its last words: {words}" if words else ""

    async def _opened(self) -> mcp.Client:
        async with self._lock:
            try:
                with _within(CONNECT_S, "no answer in"):
                    return self._client or await self._group.start(self._hold)
            except Exception as error:
                raise ConnectionError(f"{_why(error)}{self._last_words}") from None

    async def _hold(self, *, task_status: TaskStatus[mcp.Client]) -> None:
        import mcp

        self._over = Event()
        try:
            with CancelScope() as self._scope:
                async with self._transport() as transport, mcp.Client(transport) as client:
                    self._client = client
                    task_status.started(client)
                    await sleep_forever()
        except Exception:
            if self._client is None:
                raise
        finally:
            self._client = None
            self._over.set()

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        server = self._server
        if server.url is not None:
            import httpx2
            from mcp.client.streamable_http import streamable_http_client

            # Who waits longer for an answer than for a call loses the call, not the connection.
            limit = httpx2.Timeout(CONNECT_S, read=self._call_s + CONNECT_S)
            hooks = {"response": [self._heed]}
            async with httpx2.AsyncClient(
                headers=server.headers, timeout=limit, event_hooks=hooks
            ) as http:
                yield streamable_http_client(server.url, http_client=http)
            return
        from mcp.client.stdio import StdioServerParameters, stdio_client

        given = server.model_dump(include={"command", "args", "env", "cwd"})
        form = StdioServerParameters(**given, encoding_error_handler="replace")
        read, write = os.pipe()
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        with os.fdopen(write, "w") as errors:
            yield stdio_client(form, errlog=errors)

    async def _heed(self, response: httpx2.Response) -> None:
        told = f"HTTP {response.status_code} {response.reason_phrase}"
        self._words = told.encode() if response.is_error else b""

    def _listen(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while words := pipe.read(65536):
                self._words = (self._words + words)[-MOST_WORDS:]


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    with move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise TimeoutError(f"{what} {seconds:g} s")


def _check_package() -> None:
    try:
        from mcp import Client  # noqa: F401
    except ImportError:
        text = "tools of MCP servers need the package mcp, 2 or later: pip install 'squall[mcp]'"
        raise InvalidRequest(text) from None
    # Or each line of a program that is no message would be a traceback on stderr.
    logging.getLogger("mcp").addHandler(logging.NullHandler())


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
) -> dict[str, tuple[dict[str, Any], _Run]]:
    """By its name what models are told of each tool that the patterns allow, and what calls it."""
    there = {f"{at.name}.{tool.name}": (at, tool) for at, tool in reversed(listed)}
    names = ", ".join(map(ascii, reversed(there)))[:MOST_DESCRIPTION] or "none"
    idle = [p for p in patterns if not any(fnmatchcase(name, p) for name in there)]
    if idle or not patterns:
        what = f"{idle[0]!r} allows no tool" if idle else "no tool is allowed"
        raise InvalidRequest(f"MCP: {what}; those there are, as SERVER.TOOL: {names}")
    found: dict[str, tuple[dict[str, Any], _Run]] = {}
    for place, (at, tool) in reversed(there.items()):
        if not any(fnmatchcase(place, pattern) for pattern in patterns):
            continue
        name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{at.name}__{tool.name}")
        if len(name) > MOST_NAME or name in found:
            digest = hashlib.blake2b(place.encode(errors="replace"), digest_size=6).hexdigest()
            name = f"{name[: MOST_NAME - 13]}_{digest}"
        told = Tool(name, (tool.description or "")[:MOST_DESCRIPTION], tool.input_schema).shown()
        found[name] = told, partial(at.call, tool.name)
    if len(found) > MOST_TOOLS:
        raise InvalidRequest(f"MCP: {len(found)} tools are allowed; at most {MOST_TOOLS} may be")
    return found


def _text(result: mcp_types.CallToolResult) -> str:
    texts = [_text_of(block) for block in result.content]
    if not texts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(texts)


def _text_of(block: mcp_types.ContentBlock) -> str:
    said = block.model_dump()
    said = said.get("resource", said)
    return str(said.get("text", f"[{block.type} {said.get('uri', '')}]".replace(" ]", "]")))


def _why(error: BaseException) -> str:
    while members := getattr(error, "exceptions", None):
        error = members[0]
    return (str(error) or type(error).__name__)[:MOST_WORDS]
