"""A server of tools in raw JSON-RPC, for what the official package would never do: python
mcp_odd.py [WAY]."""

from __future__ import annotations

import json
import sys
import time
from itertools import count
from typing import Any

WAY = sys.argv[-1]
TOOL = {"name": "do", "inputSchema": {"type": "object"}}
DEEP: dict[str, Any] = {"type": "object"}
for _ in range(50):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
PAGES = count()
CONTENT = [
    {"type": "text", "text": ""},
    {"type": "resource", "resource": {"uri": "file:///a.txt", "text": "in the file"}},
    {"type": "resource", "resource": {"uri": "file:///a.bin", "blob": "AAAA"}},
    {"type": "resource_link", "uri": "file:///b.txt", "name": "b"},
]


def result(method: str, params: dict[str, Any]) -> dict[str, Any]:
    if method == "initialize":
        about = {"name": "odd", "version": "1"}
        version = params["protocolVersion"]
        return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about}
    if method == "tools/list":
        if WAY == "pages":
            return {"tools": [], "nextCursor": str(next(PAGES))}
        if WAY == "silent":
            time.sleep(600)
        return {"tools": [TOOL | {"inputSchema": DEEP} if WAY == "deep" else TOOL]}
    if method == "tools/call" and WAY == "kinds":
        return {"content": CONTENT}
    if method == "tools/call" and WAY != "error":
        return {"content": [{"type": "text", "text": "done"}]}
    raise LookupError


if WAY == "noise":
    sys.stdout.buffer.write(b"Starting the server \xff...\n")
    sys.stdout.buffer.flush()
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    try:
        told = {"result": result(asked["method"], asked.get("params", {}))}
    except LookupError:
        told = {"error": {"code": -32000, "message": "not today"}}
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], **told}), flush=True)  # noqa: T201
