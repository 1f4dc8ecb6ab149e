"""How much memory this process may still take, and what context fits in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from squall.engine.fields import check_fields, real, whole
from squall.errors import InvalidRequest, OutOfMemory
from squall.spec import Decoder

DEFAULT_CONTEXT = 8192
SMALLEST_CONTEXT = 256
# What an answer is taken to need with its prompt, where nobody says how large the KV cache is.
USUAL_TOKENS = 2048
MOST_BLOCK = 1024
KV_BITS = {"f16": 16.0, "f32": 32.0, "q8_0": 9.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSize:
    """How much the KV cache holds, for all requests together; what is not used takes no memory.

    Of several the first counts. By default 2048 tokens for each of the requests that run at a
    time, or one whole context if that is more, within half of the free memory.
    """

    fraction: float | None = real("Of the memory that the weights leave.", above=True, most=1)
    tokens: int | None = whole("Tokens in all.", least=1)
    bytes: int | None = whole("Bytes in all.", least=1)
    block_size: int = whole(
        "Tokens allocated and cached together, a multiple of 16.", default=16, most=MOST_BLOCK
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.block_size % 16 or not self.block_size:
            raise InvalidRequest(
                f"block_size is {self.block_size}; it must be a multiple of 16, "
                f"at most {MOST_BLOCK}"
            )


def token_bytes(decoder: Decoder, kv_dtype: str) -> int:
    """Bytes of KV cache that one token takes."""
    attentions = (layer.attention for layer in decoder.layers)
    values = sum(2 * a.kv_heads * a.head_dim for a in attentions if not a.recalls)
    return round(KV_BITS[kv_dtype] * values / 8)


def choose_context(
    wanted: int | None, *, trained: int, bytes_per_token: int, weight_bytes: int
) -> int:
    """`wanted` if it fits; by default as much as is useful, within half of the free memory."""
    free = _room(bytes_per_token, weight_bytes)
    room = 2 * trained if free is None else free
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
    wanted: KvSize, *, context: int, max_seqs: int, bytes_per_token: int, weight_bytes: int
) -> int:
    """Tokens the KV cache has room for: what is wanted, if it fits."""
    room = _room(bytes_per_token, weight_bytes)
    if wanted.fraction is not None and room is not None:
        tokens = int(wanted.fraction * room)
    elif wanted.tokens is not None:
        tokens = wanted.tokens
    elif wanted.bytes is not None:
        tokens = wanted.bytes // bytes_per_token
    else:
        usual = max_seqs * min(context, USUAL_TOKENS)
        return max(context, usual if room is None else min(usual, room // 2))
    if tokens < 1:
        raise OutOfMemory(
            f"the KV cache would have room for no token, which takes {bytes_per_token} bytes; "
            "give it more memory"
        )
    if room is not None and tokens > room:
        raise OutOfMemory(
            f"a KV cache of {tokens} tokens needs {tokens * bytes_per_token / 2**20:.0f} MiB, and "
            f"after the weights there is memory for {room} tokens; ask for fewer"
        )
    return tokens


def _room(bytes_per_token: int, weight_bytes: int) -> int | None:
    """Tokens of KV cache that fit beside the weights; None where nobody knows."""
    free = available_bytes()
    return None if free is None else max(free - weight_bytes, 0) // bytes_per_token


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
