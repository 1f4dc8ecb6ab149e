"""`squall doctor`: what Squall found on this machine."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator

import typer

from squall import __version__
from squall.cli.options import Json
from squall.errors import SquallError
from squall.machine import processor

PACKAGES = ("numpy", "tokenizers", "jinja2", "typer", "rich", "prompt_toolkit", "pillow", "httpx")


def doctor(as_json: Json = False) -> None:
    """Show instruction sets, threads, memory and its bandwidth, GPUs or why none, and versions."""
    lines = dict(_findings())
    if as_json:
        typer.echo(json.dumps(lines))
        return
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:{width}}  {value}")


def _findings() -> Iterator[tuple[str, str]]:
    import importlib.metadata

    yield "squall", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield "processor", processor()
    yield from _native()
    yield from _devices()
    yield "default model", _embedded()
    for name in PACKAGES:
        yield name, importlib.metadata.version(name)


def _native() -> Iterator[tuple[str, str]]:
    from squall import _native
    from squall.executors.native import default_isa

    threads, reason = _native.default_threads()
    yield "instructions", f"{default_isa()} (this machine has {', '.join(_native.isas())})"
    yield "threads", f"{threads} ({reason})"
    yield "bandwidth", f"{_native.read_bandwidth(threads) / 1e9:.1f} GB/s, reading"


def _devices() -> Iterator[tuple[str, str]]:
    """PyTorch is only loaded where there is a GPU's driver."""
    from squall.executors.devices import available, has_driver, lack

    found = {device.name: device for device in available()}
    yield "free memory", _gib(found.pop("cpu").free)
    yield "PyTorch", _pytorch() if found.pop("torch", None) else f"none: {lack('torch')}"
    for name, gpu in found.items():
        yield name, f"{_gib(gpu.free)} free of {_gib(gpu.total)}, {gpu.description}"
    if not found:
        yield "GPUs", f"none: {lack('cuda:0') if has_driver() else 'there is no driver of one'}"


def _pytorch() -> str:
    import importlib.metadata

    if (torch := sys.modules.get("torch")) is None:
        return importlib.metadata.version("torch")
    return f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _embedded() -> str:
    from squall import embedded

    try:
        return str(embedded.find())
    except SquallError as error:
        return f"none: {error}"
