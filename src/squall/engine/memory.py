"""What context and KV cache fit into the memory of the devices that have a model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from squall.engine.fields import check_fields, real, whole
from squall.errors import InvalidRequest, OutOfMemory
from squall.executors.memory import Load

DEFAULT_CONTEXT = 8192
SMALLEST_CONTEXT = 256
# What an answer is taken to need with its prompt, where nobody says how large the KV cache is.
USUAL_TOKENS = 2048
MOST_BLOCK = 1024


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
        if self.block_size == 8:  # mistral.rs's smallest; 16 are no worse for anybody
            object.__setattr__(self, "block_size", 16)
        if self.block_size % 16 or not self.block_size:
            raise InvalidRequest(
                f"block_size is {self.block_size}; it must be a multiple of 16, "
                f"at most {MOST_BLOCK}"
            )


def choose_context(wanted: int | None, *, trained: int, loads: Sequence[Load]) -> int:
    """`wanted` if it fits; by default as much as is useful, within half of the free memory.

    loads: of every device that has layers.
    """
    free, where = _tightest(loads)
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
            f"a context of {context} tokens needs {_mib(context, loads)} MiB of KV cache, and "
            f"after the weights there is memory{where} for {room} tokens; ask for a shorter context"
        )
    return context


def choose_kv_tokens(wanted: KvSize, *, context: int, max_seqs: int, loads: Sequence[Load]) -> int:
    """Tokens the KV cache has room for: what is wanted, if it fits."""
    (room, where), each = _tightest(loads), sum(load.kv for load in loads)
    if wanted.fraction is not None and room is not None:
        tokens = int(wanted.fraction * room)
    elif wanted.tokens is not None:
        tokens = wanted.tokens
    elif wanted.bytes is not None:
        tokens = wanted.bytes // each
    else:
        usual = max_seqs * min(context, USUAL_TOKENS)
        return max(context, usual if room is None else min(usual, room // 2))
    if tokens < 1:
        raise OutOfMemory(
            f"the KV cache would have room for no token, which takes {each} bytes; "
            "give it more memory"
        )
    if room is not None and tokens > room:
        raise OutOfMemory(
            f"a KV cache of {tokens} tokens needs {_mib(tokens, loads)} MiB, and after the weights "
            f"there is memory{where} for {room} tokens; ask for fewer"
        )
    return tokens


def _mib(tokens: int, loads: Sequence[Load]) -> str:
    return f"{tokens * sum(load.kv for load in loads) / 2**20:.0f}"


def _tightest(loads: Sequence[Load]) -> tuple[int | None, str]:
    """Tokens that fit beside the weights, and of which device's memory it is said."""
    known = [load for load in loads if load.room is not None]
    load = min(known, key=lambda load: load.room or 0, default=None)
    return (None, "") if load is None else (load.room, f" of {load.device}" * (len(loads) > 1))
