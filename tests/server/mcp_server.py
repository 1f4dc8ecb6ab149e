"""A server of tools, made with the official package: python mcp_server.py [PORT]."""

from __future__ import annotations

import asyncio
import os
import sys

from mcp.server.mcpserver import Image, MCPServer

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


@server.tool()
def where() -> str:
    """Who answers."""
    return f"{os.environ.get('PLACE')}, {os.path.basename(os.getcwd())}"


@server.tool()
def fail() -> str:
    """Cannot be done."""
    raise ValueError("this never works")


@server.tool()
async def hang() -> str:
    """Takes long."""
    await asyncio.sleep(600)
    return ""


@server.tool()
def crash() -> str:
    """Ends the server."""
    sys.stderr.write("out of luck\n")
    sys.stderr.flush()
    os._exit(3)


@server.tool()
def much() -> str:
    """More than anyone reads."""
    return "x" * 1_000_000


@server.tool()
def picture() -> Image:
    """A picture."""
    return Image(data=b"no picture", format="png")


if __name__ == "__main__":
    if sys.argv[1:]:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
