"""One model on several ranks: processes that run a part of every layer each, in step.

The first rank leads: it tells the others what to run, over a connection to each of them that also
tells either side when the other has ended. What ranks compute together goes over torch.distributed.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from squall.batch import Batch, Mixture, Sequences
from squall.errors import EngineStopped, InvalidRequest
from squall.executors import Executor, Floats, Limits, Placement
from squall.executors.sharding import shard
from squall.program import Program
from squall.weights import WeightStore

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store

Arrays = dict[str, NDArray[np.generic]]
Message = tuple[Any, Arrays]
"""Plain data as JSON has it, and arrays beside it."""

LOCAL = "127.0.0.1"
# How long the others may take until they are here.
JOIN_S = 300.0
_SIZE = struct.Struct("<I")
_AT = ("positions", "bounds", "block_tables")


def follows() -> bool:
    """Whether this process is one of several, and not the first."""
    return int(os.environ.get("RANK", 0)) > 0


class Ranks:
    """This process among those that run one model.

    device: where its part runs. lost: which rank has ended, and why, as soon as one has.
    """

    def __init__(self, rank: int, size: int, device: str) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.lost: str | None = None
        self._lost = threading.Event()
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self._lines: dict[int, socket.socket] = {}
        self._heard: dict[int, SimpleQueue[Message | None]] = {}

    @classmethod
    def join(cls, size: int, device: str, command: Sequence[str]) -> Ranks:
        """Wait for the others, which `command` starts where torchrun has not.

        Raises InvalidRequest where there are not as many processes, or devices.
        """
        try:
            import torch.distributed as dist
        except ImportError:
            raise InvalidRequest(
                "tensor_parallel needs PyTorch: pip install squall[torch]"
            ) from None
        kind, env = device.partition(":")[0], os.environ
        rank, local = (int(env.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        _check(size, device, command, local)
        ranks = cls(rank, size, f"cuda:{local}" if kind == "cuda" else device)
        try:
            store = ranks._store(command)
            ranks._connect(store)
            backend = "nccl" if kind == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        except (OSError, RuntimeError) as error:
            raise ranks._end(error) from error
        return ranks

    # ---- what they compute together ----

    def sum(self, x: Tensor, *, exact: bool) -> Tensor:
        """Over all ranks; x may be overwritten. exact: in their order, whatever the shape."""
        import torch
        import torch.distributed as dist

        x = x.contiguous()
        if not exact:
            dist.all_reduce(x)
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    # ---- what they say to each other ----

    def agree(self, told: Any) -> Any:
        """What the first rank says."""
        if self.rank:
            return self.hear(0)[0]
        self.tell(told)
        return told

    def tell(self, told: Any, arrays: Mapping[str, NDArray[np.generic]] | None = None) -> None:
        """Send to the others, or to the first rank."""
        arrays = arrays or {}
        shapes = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
        head = json.dumps([told, shapes]).encode()
        data = b"".join([_SIZE.pack(len(head)), head, *(a.tobytes() for a in arrays.values())])
        with self.together():
            for line in self._lines.values():
                line.sendall(data)

    def hear(self, rank: int) -> Message:
        """The next message of a rank."""
        if (message := self._heard[rank].get()) is None:
            raise EngineStopped(self.lost or "")
        return message

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in this block since a rank has ended fails with that reason."""
        try:
            if self.lost is not None:
                raise EngineStopped(self.lost)
            yield
        except (OSError, RuntimeError) as error:
            raise self._end(error) from error

    def _end(self, error: Exception) -> Exception:
        """Why an error was, once there was time for the news that a rank has ended."""
        self._lost.wait(2.0)
        return error if self.lost is None else EngineStopped(self.lost)

    def _listen(self, rank: int) -> None:
        reason = None
        with suppress(OSError, EOFError), self._lines[rank].makefile("rb") as stream:
            while True:
                told, arrays = _received(stream)
                reason = told.get("error") if isinstance(told, dict) else None
                self._heard[rank].put((told, arrays))
        if self.rank:
            os._exit(0)  # the first rank is gone, and whatever this one waits for
        self.lost = f"rank {rank} of {self.size} has ended ({reason or self._status(rank)})"
        self._lost.set()
        self._heard[rank].put(None)
        with suppress(Exception):  # end a sum that would wait for it forever
            import torch.distributed as dist

            cast(Any, dist.group.WORLD).abort()

    def _status(self, rank: int) -> str:
        with suppress(KeyError, subprocess.TimeoutExpired):
            status = self._started[rank].wait(1.0)
            return f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        return "its connection was closed"

    # ---- how they find each other ----

    def _store(self, command: Sequence[str]) -> Store:
        """Where they find each other; the others are started if they are not there."""
        from torch._C._distributed_c10d import TCPStore
        from torch.distributed.rendezvous import rendezvous

        if "RANK" in os.environ:
            return cast("Store", next(rendezvous("env://"))[0])
        listener = socket.create_server((LOCAL, 0))
        store = TCPStore(
            LOCAL, listener.getsockname()[1], self.size, is_master=True, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
        if loopback is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        shared = {"WORLD_SIZE": self.size, "MASTER_ADDR": LOCAL, "MASTER_PORT": store.port}
        for rank in range(1, self.size):
            own = {name: str(value) for name, value in shared.items()}
            own |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            self._started[rank] = subprocess.Popen(
                [sys.executable, *command], env=os.environ | own, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        return store

    def _connect(self, store: Store) -> None:
        if self.rank:
            with suppress(ValueError):  # not in the main thread
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)  # it ends with the first rank
            host, port, token = store.get("squall").decode().split()
            self._lines[0] = socket.create_connection((host, int(port)), JOIN_S)
            self._lines[0].sendall(f"{token}{self.rank:8}".encode())
        else:
            token, host = secrets.token_hex(), os.environ.get("MASTER_ADDR", LOCAL)
            with socket.create_server((host, 0)) as listener:
                store.set("squall", f"{host} {listener.getsockname()[1]} {token}")
                self._accept(listener, token.encode())
        for rank, line in self._lines.items():
            line.settimeout(None)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._heard[rank] = SimpleQueue()
            threading.Thread(target=self._listen, args=(rank,), daemon=True).start()

    def _accept(self, listener: socket.socket, token: bytes) -> None:
        """Connections of all others, which know the token."""
        listener.settimeout(0.5)
        for _ in range(int(JOIN_S / 0.5)):
            if len(self._lines) == self.size - 1:
                return
            for rank, process in self._started.items():
                if process.poll() is not None:
                    raise EngineStopped(f"rank {rank} has ended ({self._status(rank)})")
            with suppress(TimeoutError):
                line, _ = listener.accept()
                line.settimeout(5.0)
                said = line.recv(len(token) + 8, socket.MSG_WAITALL)
                if secrets.compare_digest(said[: len(token)], token):
                    self._lines[int(said[len(token) :])] = line
        raise EngineStopped(f"{self.size - 1 - len(self._lines)} ranks did not come")


def _check(size: int, device: str, command: Sequence[str], local: int) -> None:
    """Raises InvalidRequest for what cannot be."""
    import torch.distributed as dist
    from torch import cuda

    kind, world = device.partition(":")[0], os.environ.get("WORLD_SIZE")
    started = "RANK" in os.environ and world is not None
    if started and int(world or 0) != size:
        raise InvalidRequest(f"tensor_parallel is {size}, and there are {world} processes")
    if not started and not command:
        raise InvalidRequest(
            f"tensor_parallel={size} needs as many processes: run this with torchrun "
            f"--nproc-per-node {size}, or squall serve --tensor-parallel {size}"
        )
    if kind not in ("cuda", "torch"):
        raise InvalidRequest(
            f"tensor_parallel: ranks run on cuda, or on torch (PyTorch on the CPU), not on {device}"
        )
    here = local + 1 if started else size
    if kind == "cuda" and here > cuda.device_count():
        raise InvalidRequest(
            f"tensor_parallel: {here} ranks need a GPU each, and here are {cuda.device_count()}"
        )
    if dist.is_initialized():
        raise InvalidRequest("tensor_parallel: a process takes part in one model, and has one open")


def _received(stream: BinaryIO) -> Message:
    told, shapes = json.loads(_exactly(stream, *_SIZE.unpack(_exactly(stream, _SIZE.size))))
    arrays: Arrays = {}
    for name, kind, shape in shapes:
        dtype = np.dtype(kind)
        data = _exactly(stream, int(np.prod(shape)) * dtype.itemsize)
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return told, arrays


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def open_rank(
    program: Program, store: WeightStore, limits: Limits, *, placement: Placement, **given: Any
) -> Executor:
    """The first rank's executor, once all are ready; the others run what it says, and never return.

    given: see `executors.open`.
    """
    from squall.gpu.executor import TorchExecutor

    ranks = placement.ranks
    assert ranks is not None
    try:
        own = shard(program, store, ranks.rank, ranks.size)
        executor: Executor = TorchExecutor(own, store, limits, placement=placement, **given)
        if ranks.rank:
            _follow(executor, ranks)
    except Exception as error:
        if ranks.rank == 0:
            raise
        with suppress(Exception):
            ranks.tell({"error": f"{type(error).__name__}: {error}"})
        os._exit(1)
    for rank in range(1, ranks.size):
        if ranks.hear(rank)[0] != "ready":
            ranks.hear(rank)  # it says why, and ends
    return cast(Executor, LeadingExecutor(executor, ranks))


def _follow(executor: Executor, ranks: Ranks) -> NoReturn:
    ranks.tell("ready")
    while True:
        _, arrays = ranks.hear(0)
        at = {name: arrays.pop(f"at.{name}") for name in _AT if f"at.{name}" in arrays}
        executor.run(arrays, Sequences(**cast(Any, at)) if at else None)


class LeadingExecutor:
    """The first rank's: the others run what it runs; see `Executor`."""

    def __init__(self, own: Executor, ranks: Ranks) -> None:
        self._own, self._ranks = own, ranks
        self.placement = replace(own.placement, ranks=None)

    def __getattr__(self, name: str) -> object:
        return getattr(self._own, name)

    @property
    def lost(self) -> str | None:
        """Which rank has ended, so that nothing can be computed any more."""
        return self._ranks.lost

    def run(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        sequences: Sequences | None = None,
        mixtures: Sequence[Mixture] = (),
        **how: bool,
    ) -> dict[str, Floats]:
        """See `Executor`."""
        at = {f"at.{name}": getattr(sequences, name) for name in _AT} if sequences else {}
        self._ranks.tell("run", {**inputs, **at})
        with self._ranks.together():
            return self._own.run(inputs, sequences, mixtures, **how)

    def step(self, batch: Batch) -> Floats:
        """See `Executor`."""
        program = self._own.program
        return self.run(batch.inputs(program.indices, program.inputs), batch)["logits"]

    def adapter(self, _: object) -> NoReturn:
        """Raises InvalidRequest."""
        raise InvalidRequest(
            "a model on several ranks takes no adapters: merge them into its weights, with --merge "
            "or squall adapters merge"
        )

    def requantize(self, *_: object, **__: object) -> NoReturn:
        """Raises InvalidRequest."""
        raise InvalidRequest(
            "a model on several ranks keeps its number formats; open it again with others"
        )
