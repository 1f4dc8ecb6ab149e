"""What every request passes first: its id, who may ask, and afterwards the log."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from squall.server.errors import ApiError, to_api
from squall.server.limits import ClientGone
from squall.server.log import MOST_BODY
from squall.server.page import PATH as PAGE
from squall.server.pictures import FOLDER

if TYPE_CHECKING:
    from squall.server.residence import AnyStanding
    from squall.server.served import Served
    from squall.server.service import Service

# Who only asks whether the server is there needs no key, nor do files that are the same for all.
OPEN_PATHS = frozenset({"/", "/health", "/docs", PAGE})
_OPEN_BELOW = (FOLDER, f"{PAGE}/")
# What changes the models, or which there are, for everybody.
_CHANGES = re.compile(
    r"/re_isq|/activate_adapters|/v1/adapters(/.*)?|/v1/(un)?load_lora_adapter"
    r"|/v1/models/.*/(un)?load|/api/(pull|delete)"
)
GONE = 499  # what the log says of a client that went away
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_MOST_PATH = 200
IGNORED = "X-Squall-Ignored"  # the header that names the fields that were without effect
_MOST_NAMES, _MOST_NAME = 16, 64
_STRANGE = re.compile(r"[^A-Za-z0-9_.-]")


class Gate:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        # HEAD is GET without the body, and /path/ is /path.
        path = scope["path"].rstrip("/") or "/"
        scope = {**scope, "method": "GET" if method == "HEAD" else method, "path": path}
        visit = Visit(self._service, scope, method)
        self._service.active += 1
        try:
            await self._answer(visit, scope, receive, send)
        finally:
            self._service.active -= 1
            visit.close()

    async def _answer(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(visit, scope["path"], Headers(scope=scope))
            await self._app(scope, receive, visit.sender(send))
        except ClientGone:
            visit.status = GONE
        except Exception as error:
            if visit.started:
                raise
            await to_api(error).response(scope["path"])(scope, receive, visit.sender(send))

    def _check(self, visit: Visit, path: str, headers: Headers) -> None:
        options = self._service.options
        host = _host(headers.get("host", ""))
        if options.hosts is not None and host not in options.hosts:
            raise ApiError(
                403, f"the server is not known as {host[:100]!r}; allow that with --allow-host",
                "host_not_allowed",
            )  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and not self._may_come_from(origin, headers):
            raise ApiError(
                403, f"pages of {origin[:100]!r} may not use this server; allow that with --cors",
                "origin_not_allowed",
            )  # fmt: skip
        is_open = path in OPEN_PATHS or path.startswith(_OPEN_BELOW) or visit.method == "OPTIONS"
        keys = options.api_keys
        if (admin := options.admin_key) is not None:
            changes = visit.method not in ("GET", "HEAD") and _CHANGES.fullmatch(path)
            keys = (admin,) if changes else (*keys, admin) if keys else ()
        if keys and not is_open:
            visit.tenant = _tenant(keys, headers)

    def _may_come_from(self, origin: str, headers: Headers) -> bool:
        origins = self._service.options.origins
        own = origin.partition("://")[2] == headers.get("host")
        return own or "*" in origins or origin in origins


def _tenant(keys: tuple[str, ...], headers: Headers) -> str:
    """Which of the keys was given, as a name that does not tell the key."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")
    found = ""
    for key in keys:
        # No early end: the time must not tell which key is nearly right.
        if hmac.compare_digest(key.encode(), given.strip().encode()):
            found = hashlib.sha256(key.encode()).hexdigest()
    if not found:
        raise ApiError(
            401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key",
            "authentication_error", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip
    return found


class Visit:
    """One request on its way. `notes` go into its line of the access log.

    using: the model that stays loaded until the request is over.
    """

    def __init__(self, service: Service, scope: Scope, method: str) -> None:
        self._service = service
        self._served: Served | None = None
        self.using: AnyStanding | None = None
        self.method = method
        self.ignored = ""
        self._since_s = time.perf_counter()
        self._scope = scope
        given = Headers(scope=scope).get("x-request-id", "")
        self.id = given if _ID.fullmatch(given) else secrets.token_hex(16)
        self.tenant = ""
        self.status = 0
        self.started = False
        self.notes: dict[str, object] = {}
        self._held = 0
        self._body = bytearray() if service.log.keeps_bodies else None
        scope.setdefault("state", {})["visit"] = self

    def sender(self, send: Send) -> Send:
        """`send`, and remember what went out."""

        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.started = True
                self.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = self.id
                if self.ignored:
                    headers[IGNORED] = self.ignored
            elif self.method == "HEAD":
                message = {**message, "body": b""}
            elif self._body is not None and len(self._body) <= MOST_BODY:
                self._body += message.get("body", b"")
            await send(message)

        return wrapped

    def enter(self, served: Served) -> None:
        """The request is one for text; raises QueueFull if those before it take all places."""
        if self._served is None:
            served.check_room()
            served.entering.add(self)
            self._served = served

    def entered(self) -> None:
        """From now on the engine counts it, or it is over. May be called from any thread."""
        if self._served is not None:
            self._served.entering.discard(self)

    def leave(self) -> None:
        """It needs its model no more, which may be unloaded."""
        if self.using is not None:
            self._service.residence.leave(self.using, self)
            self.using = None

    def hold(self, size: int) -> None:
        """So many bytes of the body are needed until the request is over."""
        self._held += size
        self._service.bodies.hold(size)

    def ignore(self, names: list[str]) -> None:
        """Tell the client, and the log, of fields that are without effect."""
        if names:
            told = [_STRANGE.sub("?", name[:_MOST_NAME]) for name in names[:_MOST_NAMES]]
            self.ignored = ", ".join(told + ["..."] * (len(names) > _MOST_NAMES))
            self.notes["ignored"] = self.ignored

    def close(self) -> None:
        """The request is over: log and count it."""
        self.entered()
        self.leave()
        self._service.bodies.hold(-self._held)
        service, route = self._service, self._scope.get("route")
        # Paths that clients make up are not counted one by one.
        path = getattr(route, "path", "other")
        service.metrics.responses.labels(path, str(self.status)).inc()
        service.log.access(
            id=self.id,
            client=(self._scope.get("client") or ("",))[0],
            method=self.method,
            path=self._scope["path"][:_MOST_PATH],
            status=self.status,
            seconds=round(time.perf_counter() - self._since_s, 4),
            **self.notes,
        )
        if self._body is not None:
            service.log.body("error" if self.status >= 400 else "response", self.id, self._body)


def _host(value: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{value}").hostname or ""
    except ValueError:
        return ""
