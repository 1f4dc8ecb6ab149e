"""Images from the web, as far as a server's rules allow.

A name is resolved once, the address that was checked is dialled, and redirects are followed by
hand, so that nothing leads to what is not public.
"""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any

import httpcore
import httpx

from squall.errors import InvalidRequest
from squall.files import quote

if TYPE_CHECKING:
    from squall.vision.images import Clock, Media

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = (
    ("User-Agent", "squall"), ("Accept", "image/png, image/jpeg, image/webp, image/gif, image/bmp"),
    ("Accept-Encoding", "identity"), ("Connection", "close"),
)  # fmt: skip
_NAT64, _UNICAST = IPv6Network("64:ff9b::/96"), IPv6Network("2000::/3")
_HTTPCORE = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)


def fetch(url: str, media: Media, clock: Clock) -> bytes:
    """What is at a URL. Raises InvalidRequest."""
    for _ in range(media.redirects + 1):
        found = _get(url, media, clock)
        if isinstance(found, bytes):
            return found
        url = found
    raise InvalidRequest(f"an image's URL is redirected more than {media.redirects} times")


def _get(given: str, media: Media, clock: Clock) -> bytes | str:
    """The body, or where to look instead. Raises InvalidRequest."""
    what, data, limits = quote(given), bytearray(), {"timeout": {"write": clock.left_s()}}
    try:
        url = httpx.URL(given)
        if url.scheme not in _PORTS or not url.host or url.userinfo:
            raise httpx.InvalidURL("")
        headers = [("Host", url.netloc.decode("ascii")), *_HEADERS]
        target = httpcore.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        )
        with (
            httpcore.ConnectionPool(network_backend=_Dialler(url, media, clock)) as pool,
            pool.stream("GET", target, headers=headers, extensions=limits) as response,
        ):
            told = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in told:
                return str(url.join(told[b"location"]))
            coding = told.get(b"content-encoding", "identity")
            if response.status != 200 or coding != "identity":
                raise InvalidRequest(f"{what} answered {response.status} ({coding:.99}), not 200")
            for part in response.iter_stream():
                data += part
                if len(data) > media.file_bytes:
                    raise InvalidRequest(f"{what} sent more than {media.file_bytes} bytes")
            return bytes(data)
    except InvalidRequest:
        raise
    except httpx.InvalidURL:
        rule = "an http or https URL with a host, and without a user name"
        raise InvalidRequest(f"an image's URL is {what}; it must be {rule}") from None
    except (OSError, ValueError, *_HTTPCORE):
        clock.left_s()
        raise InvalidRequest(f"no image can be had from {what}") from None


class _Dialler(httpcore.NetworkBackend):
    """Connects to a URL's host, if that is allowed, at the address that was checked."""

    def __init__(self, url: httpx.URL, media: Media, clock: Clock) -> None:
        self._clock = clock
        host = url.raw_host.decode("ascii").lower().rstrip(".")
        port = url.port or _PORTS[url.scheme]
        shown = f"[{host}]" if ":" in host else host
        names = {shown, "*", *(host[i:] for i, letter in enumerate(host) if letter == ".")}
        fitting = {f"{name}:{port}" for name in names} | (
            names if port in _PORTS.values() else set()
        )
        found = fitting & {*media.hosts}
        if not found:
            allowed = ", ".join(media.hosts) or "none"
            raise InvalidRequest(f"images from {quote(shown)} are not allowed; hosts: {allowed}")
        self._named = not found.isdisjoint({shown, f"{shown}:{port}"})

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> Any:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for address in (str(entry[4][0]) for entry in found):
            # No server of names can say where these are.
            meant = self._named and host in ("localhost", address)
            if not (meant or is_public(ip_address(address))):
                raise InvalidRequest(f"{quote(host)} has no public address, and is not allowed")
        dial = httpcore.SyncBackend().connect_tcp
        return _Stream(dial(str(found[0][4][0]), port, self._clock.left_s()), self._clock)


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address, and one that it stands for, is of the public internet."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _UNICAST:
            return False
    return address.is_global and not address.is_multicast


class _Stream:
    """A connection that ends in time, however slowly it moves."""

    def __init__(self, stream: httpcore.NetworkStream, clock: Clock) -> None:
        self._stream, self._clock = stream, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        return self._stream.read(max_bytes, self._clock.left_s())

    def start_tls(self, *args: Any, **kwargs: Any) -> _Stream:
        kwargs["timeout"] = self._clock.left_s()
        return _Stream(self._stream.start_tls(*args, **kwargs), self._clock)
