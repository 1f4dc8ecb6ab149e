"""Images from the web: only from where the rules say, whatever names and servers answer."""

from __future__ import annotations

import gzip
import http.server
import io
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from typing import Any

import httpcore
import numpy as np
import pytest
from PIL import Image

from squall.errors import InvalidRequest
from squall.vision.fetching import is_public
from squall.vision.images import Media, read

PIXELS = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)


def image_file() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the path says."""

    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.seen.append({"path": self.path} | {k.lower(): v for k, v in self.headers.items()})
        name, _, argument = self.path[1:].partition("/")
        with self.connection:
            getattr(self, f"at_{name}")(argument)
            self.wfile.flush()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def at_image(self, _: str) -> None:
        self._send(200, image_file(), Content_Length=str(len(image_file())), Set_Cookie="a=b")

    def at_status(self, argument: str) -> None:
        self._send(int(argument), image_file())

    def at_to(self, argument: str) -> None:
        self._send(302, b"", Location=argument, Set_Cookie="a=b")

    def at_round(self, argument: str) -> None:
        left = int(argument)
        self._send(307, b"", Location=f"/round/{left - 1}" if left else "/image")

    def at_gzip(self, _: str) -> None:
        self._send(200, gzip.compress(bytes(10**6)), Content_Encoding="gzip")

    def at_long(self, _: str) -> None:
        self._send(200, image_file(), Content_Length="999999")

    def at_endless(self, _: str) -> None:
        self._send(200, image_file())
        self._until_gone(bytes(2**16), 0)

    def at_slow(self, _: str) -> None:
        self._send(200, image_file()[:9])
        self._until_gone(b"x", 0.02)

    def at_slowheader(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nA: ")
        self._until_gone(b"x", 0.02)

    def at_silent(self, _: str) -> None:
        time.sleep(1.5)

    def at_nonsense(self, _: str) -> None:
        self.wfile.write(b"\x16\x03\x01 what is this")

    def at_page(self, _: str) -> None:
        self._send(200, b"<!doctype html><html></html>")

    def _until_gone(self, data: bytes, pause_s: float) -> None:
        try:
            for _ in range(2000):
                self.wfile.write(data)
                time.sleep(pause_s)
        except OSError:
            pass


@contextmanager
def serving(address: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[Any]:
    """A server; `seen` is what was asked of it."""

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

        def handle_error(self, *_: Any) -> None:
            pass

    class Seeing(Handler):
        seen: list[dict[str, str]] = []  # noqa: RUF012

    with Server((address, 0), Seeing) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=partial(server.serve_forever, 0.01))
        thread.start()
        server.seen = Seeing.seen  # type: ignore[attr-defined]
        server.port = server.server_address[1]  # type: ignore[attr-defined]
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def local() -> Iterator[Any]:
    with serving() as found:
        yield found


@pytest.fixture
def media(local: Any) -> Media:
    return Media(hosts=(f"127.0.0.1:{local.port}",), seconds=5)


def fetched(path: str, local: Any, media: Media, host: str = "127.0.0.1") -> Image.Image:
    return read(f"http://{host}:{local.port}/{path}", media)


def answers(
    monkeypatch: pytest.MonkeyPatch, *addresses: str, seen: list[Any] | None = None
) -> None:
    """A server of names that says these, one after the other, and the last for ever."""
    left = list(addresses)
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        with suppress(ValueError):
            ip_address(host)
            return real(host, port, *args, **kwargs)
        if seen is not None:
            seen.append(host)
        return real(left.pop(0) if len(left) > 1 else left[0], port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_an_image(local: Any, media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert np.array_equal(fetched("image", local, media), PIXELS)
    asked = local.seen[-1]
    assert asked["host"] == f"127.0.0.1:{local.port}"
    assert asked["accept-encoding"] == "identity"
    assert {"cookie", "authorization", "referer"}.isdisjoint(asked)


def test_redirects_are_followed(local: Any, media: Media) -> None:
    assert np.array_equal(fetched("round/2", local, media), PIXELS)
    assert "cookie" not in local.seen[-1]
    place = f"http://127.0.0.1:{local.port}/image"
    assert np.array_equal(fetched(f"to/{place}", local, media), PIXELS)
    with pytest.raises(InvalidRequest, match="redirected more than 3 times"):
        fetched("round/3", local, media)


@pytest.mark.parametrize(
    "place",
    [
        "http://127.0.0.1/a.png", "http://127.0.0.1:1/a.png", "http://169.254.169.254/latest",
        "http://[::1]/a.png", "http://localhost/a.png", "file:///etc/passwd", "//10.0.0.1/a.png",
        "ftp://127.0.0.1/a", "data:image/png;base64,AAAA", "http://a@127.0.0.1:{}/image",
        "http://[", "http://example.org/a.png",
    ],
)  # fmt: skip
def test_redirects_are_checked_again(local: Any, media: Media, place: str) -> None:
    with pytest.raises(InvalidRequest):
        fetched("to/" + place.format(local.port), local, media)
    assert local.seen[-1]["path"].startswith("/to/")


def test_public_hosts_may_not_lead_here(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all hosts are allowed."""
    everywhere = Media(hosts=("*", f"*:{local.port}", f".evil.org:{local.port}"))
    before = len(local.seen)
    for address in ("127.0.0.1", "0.0.0.0", "::1", "::ffff:127.0.0.1", "10.1.2.3"):
        with monkeypatch.context() as patch:
            answers(patch, address)
            for host in ("a.evil.org", "evil.org", "localhost", "localhost."):
                with pytest.raises(InvalidRequest, match="no public address"):
                    fetched("image", local, everywhere, host)
    for host in (
        "127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:7f00:1]",
        "[::127.0.0.1]", "0", "①②⑦.0.0.1", "169.254.169.254", "[fe80::1]", "[64:ff9b::7f00:1]",
    ):  # fmt: skip
        with pytest.raises(InvalidRequest):
            fetched("image", local, everywhere, host)
    assert len(local.seen) == before


def test_names_that_change_their_address(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is what is dialled: the name is asked for once."""
    dialled, seen = [], []
    real = socket.socket.connect

    class Recording(socket.socket):
        def connect(self, place: Any) -> None:
            dialled.append(place)
            real(self, ("127.0.0.1", local.port))

    monkeypatch.setattr(socket, "socket", Recording)
    answers(monkeypatch, "93.184.215.14", "127.0.0.1", seen=seen)
    media = Media(hosts=(f"rebind.org:{local.port}",))
    assert np.array_equal(fetched("image", local, media, "rebind.org"), PIXELS)
    assert local.seen[-1]["host"] == f"rebind.org:{local.port}"
    assert [place[0] for place in dialled] == ["93.184.215.14"]
    assert seen == ["rebind.org"]


def test_one_private_address_of_several_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, 0, 0, "", (a, 80)) for a in ("93.184.215.14", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(InvalidRequest, match="no public address"):
        read("http://example.org/", Media(hosts=("example.org",)))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True), ("8.8.8.8", True), ("2606:2800:21f::1", True),
        ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True), ("2002:808:808::1", True),
        *((address, False) for address in (
            "0.0.0.0", "127.0.0.1", "127.255.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1",
            "169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1",
            "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "fe80::1",
            "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
            "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001::1",
            "2002:a00:1::1", "2001:db8::1", "::ffff:169.254.169.254", "100::1",
        )),
    ],
)  # fmt: skip
def test_addresses(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) is public


@pytest.mark.parametrize(
    ("hosts", "url", "allowed"),
    [
        (("example.org",), "http://example.org/a", True),
        (("example.org",), "https://EXAMPLE.org./a", True),
        (("example.org",), "http://example.org:443/a", True),
        (("example.org",), "http://a.example.org/a", False),
        (("example.org",), "http://example.org:8080/a", False),
        (("example.org",), "http://example.org.evil.com/a", False),
        (("example.org",), "http://evil.com/example.org", False),
        (("example.org",), "http://evil.com#example.org", False),
        (("example.org",), "http://evil.com\\@example.org/", False),
        (("example.org",), "http://example.org@evil.com/", False),
        (("example.org",), "http://notexample.org/", False),
        (("example.org:8080",), "http://example.org:8080/a", True),
        (("example.org:8080",), "http://example.org/a", False),
        ((".example.org",), "http://a.b.example.org/a", True),
        ((".example.org",), "http://example.org/a", False),
        ((".example.org:81",), "http://a.example.org:81/a", True),
        (("*",), "https://anything.net/a", True),
        (("*",), "https://anything.net:22/a", False),
        (("*:8443",), "https://anything.net:8443/a", True),
        ((), "https://anything.net/a", False),
        (("xn--bcher-kva.example",), "http://bücher.example/a", True),
    ],
)
def test_hosts(
    monkeypatch: pytest.MonkeyPatch, hosts: tuple[str, ...], url: str, allowed: bool
) -> None:
    asked: list[Any] = []

    def resolve(host: Any, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(InvalidRequest, match="no image can be had" if allowed else None):
        read(url, Media(hosts=hosts))
    assert bool(asked) is allowed


def test_machines_here_that_are_named() -> None:
    with serving() as server:
        for host, entry in (("localhost", "localhost"), ("127.0.0.1", "127.0.0.1")):
            media = Media(hosts=(f"{entry}:{server.port}",))
            assert np.array_equal(fetched("image", server, media, host), PIXELS)
        with pytest.raises(InvalidRequest, match="not allowed; hosts: localhost:1"):
            fetched("image", server, Media(hosts=("localhost:1",)), "localhost")


def test_addresses_of_six() -> None:
    try:
        with serving("::1") as server:
            media = Media(hosts=(f"[::1]:{server.port}",))
            assert np.array_equal(fetched("image", server, media, "[::1]"), PIXELS)
    except OSError:
        pytest.skip("this machine has no IPv6")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("status/404", "answered 404"), ("status/500", "answered 500"), ("status/204", "204"),
        ("gzip", "gzip"), ("nonsense", "no image can be had"), ("long", "no image can be had"),
        ("page", "a web page"), ("to/", "redirected more than"),
    ],
)  # fmt: skip
def test_other_answers(local: Any, media: Media, path: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        fetched(path, local, media)


def test_endless_bodies(local: Any, media: Media) -> None:
    with pytest.raises(InvalidRequest, match="sent more than 1000000 bytes"):
        fetched("endless", local, replace(media, file_bytes=10**6))


@pytest.mark.serial
@pytest.mark.parametrize("path", ["slow", "slowheader", "silent"])
def test_slow_servers(local: Any, media: Media, path: str) -> None:
    """However they spread what they say."""
    start_s = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"longer than 0\.3 s"):
        fetched(path, local, replace(media, seconds=0.3))
    assert time.monotonic() - start_s < 1.2


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InvalidRequest, match="no image can be had from"):
        read(f"http://127.0.0.1:{port}/", Media(hosts=(f"127.0.0.1:{port}",)))


@pytest.mark.parametrize(
    "url",
    [
        "http://", "https:///a.png", "http://u:p@127.0.0.1/", "http://u@127.0.0.1/", "http://[::1",
        "http://a b/", "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://\x00/", "http:a",
        "http://" + "a" * 300 + ".org/", "http://127.0.0.1/" + "a" * 10_000,
        "http://127.0.0.1/\r\nX: y",
    ],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(url, Media(hosts=("*",)))
    assert len(str(caught.value)) < 400


def test_tls_names_the_host(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate is checked for the URL's host, though an address is dialled."""
    certificate = made_certificate(tmp_path, "localhost")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    names: list[Any] = []
    tls.sni_callback = lambda _, name, __: names.append(name)
    with serving(tls=tls) as server:
        media = Media(hosts=(f"localhost:{server.port}", f"127.0.0.1:{server.port}"))
        url = f"https://localhost:{server.port}/image"
        with pytest.raises(InvalidRequest, match="no image can be had"):
            read(url, media)
        trusting = ssl.create_default_context(cafile=certificate)
        monkeypatch.setattr(httpcore, "ConnectionPool", partial(httpcore.ConnectionPool, trusting))
        assert np.array_equal(read(url, media), PIXELS)
        assert names[-1] == "localhost"
        with pytest.raises(InvalidRequest, match="no image can be had"):
            read(f"https://127.0.0.1:{server.port}/image", media)


def made_certificate(folder: Any, name: str) -> Any:
    """One that this host has signed itself."""
    import subprocess

    key, certificate = folder / "key.pem", folder / "both.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
            "-keyout", key, "-out", certificate,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    certificate.write_bytes(certificate.read_bytes() + key.read_bytes())
    return certificate
