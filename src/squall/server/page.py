"""The web page at /ui: files that need no build and load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from squall.server.errors import ApiError
from squall.server.service import Service

PATH = "/ui"
INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:",
    "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    "require-trusted-types-for 'script'", "trusted-types 'none'",
))  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # browsers keep it, and ask whether it is still the same
}


@dataclass(frozen=True, slots=True)
class File:
    """One file of the page."""

    data: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> File:
        data = path.read_bytes()
        return cls(data, _TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')

    def response(self, request: Request) -> Response:
        headers = HEADERS | {"ETag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):  # a list, each maybe with W/
            return Response(status_code=304, headers=headers)
        return Response(self.data, headers=headers, media_type=self.media_type)


def read_files() -> dict[str, File]:
    """All files of the page, by name."""
    folder = Path(__file__).parent / "page"
    return {path.name: File.read(path) for path in folder.iterdir() if path.suffix in _TYPES}


def add_page(router: APIRouter, service: Service) -> None:
    if not service.options.ui:
        return
    files = read_files()

    @router.get(PATH, include_in_schema=False)
    async def index(request: Request) -> Response:
        if request.scope["raw_path"].endswith(b"/"):  # where the page's relative URLs mean others
            return RedirectResponse(f"..{PATH}")
        return files[INDEX].response(request)

    @router.get(PATH + "/{name}", include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        if name not in files or name == INDEX:
            raise ApiError(404, f"the page has no file {name!r:.200}", "not_found")
        return files[name].response(request)
