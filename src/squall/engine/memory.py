"""How much memory this process may still take, and what context fits in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from squall.errors import InvalidRequest, OutOfMemory
from squall.spec import Decoder

DEFAULT_CONTEXT = 8192
SMALLEST_CONTEXT = 256
KV_BITS = {"f16": 16.0, "f32": 32.0, "q8_0": 9.0}


def token_bytes(decoder: Decoder, kv_dtype: str) -> int:
    """Bytes of KV cache that one token takes."""
    attentions = (layer.attention for layer in decoder.layers)
    values = sum(2 * a.kv_heads * a.head_dim for a in attentions)
    return round(KV_BITS[kv_dtype] * values / 8)


def choose_context(
    wanted: int | None, *, trained: int, bytes_per_token: int, weight_bytes: int
) -> int:
    """`wanted` if it fits; by default as much as is useful, within half of the free memory."""
    room = _room(bytes_per_token, weight_bytes, unknown=2 * trained)
    if wanted is None:
        context = min(trained, DEFAULT_CONTEXT, max(room // 2, SMALLEST_CONTEXT))
    else:
        context = wanted
    if not 1 <= context <= trained:
        raise InvalidRequest(
            f"context is {context}; the model was trained for 1 to {trained} tokens"
        )
    if context > room:
        raise OutOfMemory(
            f"a context of {context} tokens needs {context * bytes_per_token / 2**20:.0f} MiB of "
            f"KV cache, and after the weights there is memory for {room} tokens; "
            "ask for a shorter context"
        )
    return context


def choose_kv_tokens(
    wanted: int | None, *, context: int, bytes_per_token: int, weight_bytes: int
) -> int:
    """Tokens the KV cache has room for: `wanted` if it fits, by default one context."""
    if wanted is None:
        return context
    if wanted < 1:
        raise InvalidRequest(f"kv_tokens is {wanted}; it must be at least 1")
    room = _room(bytes_per_token, weight_bytes, unknown=wanted)
    if wanted > room:
        raise OutOfMemory(
            f"a KV cache of {wanted} tokens needs {wanted * bytes_per_token / 2**20:.0f} MiB, and "
            f"after the weights there is memory for {room} tokens; ask for fewer kv_tokens"
        )
    return wanted


def _room(bytes_per_token: int, weight_bytes: int, *, unknown: int) -> int:
    """Tokens of KV cache that fit beside the weights; `unknown` where nobody knows."""
    free = available_bytes()
    return unknown if free is None else max(free - weight_bytes, 0) // bytes_per_token


def available_bytes() -> int | None:
    """What the machine and this process's control groups leave; None where neither can be asked."""
    limits = [*_machine(), *_control_groups()]
    return min(limits, default=None)


def _machine() -> Iterator[int]:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _control_groups() -> Iterator[int]:
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used = "memory.usage_in_bytes"
        else:
            continue
        leaf = Path(root, path.lstrip("/"))
        # A limit may sit at any level; in a container the root is the container's own group.
        for folder in (leaf, *leaf.parents):
            most, taken = _read(folder / limit).strip(), _read(folder / used).strip()
            if most.isdigit() and taken.isdigit():
                yield max(int(most) - int(taken), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
