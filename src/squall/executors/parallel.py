"""One model on several ranks: processes that run a part of every layer each, in step.

The first rank leads: it tells the others what to run, over a connection to each of them that also
tells either side when the other has ended. What ranks compute together goes over torch.distributed.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from squall.batch import Mixture, Sequences
from squall.errors import EngineStopped, InvalidRequest
from squall.executors import Executor, Floats, Order, Phase
from squall.executors.sharding import shard
from squall.weights import Progress

if TYPE_CHECKING:
    from torch import Tensor

Arrays = Mapping[str, NDArray[np.generic]]
Message = tuple[Any, Arrays]
"""Plain data as JSON has it, and arrays."""

LOCAL = "127.0.0.1"
# How long the others may take until they are here.
JOIN_S = 300.0
_AT = ("positions", "bounds", "block_tables")


class Ranks:
    """The processes of this machine that run one model, this one among them.

    device: where its part runs. lost: which rank has ended, and why, as soon as one has.
    """

    def __init__(self, size: int, device: str, command: Sequence[str]) -> None:
        """Waits for the others, which `command` starts where torchrun has not."""
        cuda, env = re.fullmatch("cuda(:0)?", device) is not None, os.environ
        self.rank, self.size = int(env.get("RANK", 0)), size
        self.device = f"cuda:{env.get('LOCAL_RANK', 0)}" if cuda else device
        self.lost: str | None = None
        self._lost = threading.Event()
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self._lines: dict[int, Connection] = {}
        self._heard: dict[int, SimpleQueue[Message | None]] = {}
        if not cuda and device != "torch":
            raise InvalidRequest(
                f"tensor_parallel: ranks run on cuda, or on torch (on the CPU), not on {device}"
            )
        if not hasattr(socket, "AF_UNIX"):
            raise InvalidRequest("tensor_parallel: ranks need Linux or macOS")
        if env.get("WORLD_SIZE", str(size)) != str(size) or not ("RANK" in env or command):
            raise InvalidRequest(
                f"tensor_parallel is {size}, which needs as many processes: start them with "
                f"torchrun --nproc-per-node {size}, or use squall serve --tensor-parallel {size}"
            )
        import torch.distributed as dist

        with self.together():
            store = self._store(command)
            self._connect(store)
            for rank in self._lines:
                self._heard[rank] = SimpleQueue()
                threading.Thread(target=self._listen, args=(rank,), daemon=True).start()
            backend = "nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=size)

    # ---- what they compute together ----

    def sum(self, x: Tensor, *, exact: bool) -> Tensor:
        """Over all ranks; x may be overwritten. exact: in their order, whatever the shape."""
        import torch
        import torch.distributed as dist

        x = x.contiguous()
        if not x.numel():
            return x
        if not exact:
            dist.all_reduce(x)
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        return total.to(x.dtype)

    # ---- what they say to each other ----

    def agree(self, told: Any) -> Any:
        """What the first rank says."""
        if self.rank:
            return self.hear(0)[0]
        self.tell(told)
        return told

    def tell(self, told: Any, arrays: Arrays | None = None) -> None:
        """Say it to the others, or to the first rank."""
        given = arrays or {}
        shapes = [(name, array.dtype.str, array.shape) for name, array in given.items()]
        data = b"".join(array.tobytes() for array in given.values())
        with self.together():
            for line in self._lines.values():
                line.send_bytes(json.dumps([told, shapes]).encode() + b"\n" + data)

    def hear(self, rank: int) -> Message:
        """The next message of a rank."""
        if (message := self._heard[rank].get()) is None:
            raise EngineStopped(self.lost or "")
        return message

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in this block because a rank has ended fails with that reason."""
        try:
            if self.lost is not None:
                raise EngineStopped(self.lost)
            yield
        except (OSError, RuntimeError) as error:
            self._lost.wait(2.0)  # for the news
            raise error if self.lost is None else EngineStopped(self.lost) from error

    def _listen(self, rank: int) -> None:
        reason = None
        with suppress(OSError, EOFError):
            while True:
                told, arrays = _message(self._lines[rank].recv_bytes())
                reason = told.get("error") if isinstance(told, dict) else None
                self._heard[rank].put((told, arrays))
        if self.rank:
            os._exit(0)  # the first rank is gone, and whatever this one waits for
        self._lose(rank, reason or "its connection was closed")
        self._heard[rank].put(None)
        with suppress(Exception):  # end a sum that would wait for it forever
            import torch.distributed as dist

            cast(Any, dist.group.WORLD).abort()

    def _lose(self, rank: int, reason: str) -> str:
        with suppress(KeyError, subprocess.TimeoutExpired):
            if (status := self._started[rank].wait(1.0)) < 0:
                reason = signal.Signals(-status).name
        self.lost = f"rank {rank} of {self.size} has ended: {reason}"
        self._lost.set()
        return self.lost

    # ---- how they find each other ----

    def _store(self, command: Sequence[str]) -> Any:
        """What torch's processes find each other by; the others are started if none are there."""
        from torch._C._distributed_c10d import TCPStore
        from torch.distributed.rendezvous import rendezvous

        if "RANK" in os.environ:
            return next(rendezvous("env://"))[0]
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        listener = socket.create_server((LOCAL, 0))
        port = listener.getsockname()[1]
        # As torchrun does.
        env = os.environ | {"MASTER_ADDR": LOCAL, "MASTER_PORT": str(port)}
        env |= {"WORLD_SIZE": str(self.size), "TORCHELASTIC_RUN_ID": "squall"}
        for rank in range(1, self.size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._started[rank] = subprocess.Popen(
                [sys.executable, *command], env=env | own, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        return TCPStore(
            LOCAL, port, self.size, is_master=True, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip

    def _connect(self, store: Any) -> None:
        if self.rank:
            with suppress(ValueError):  # not in the main thread
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)  # it ends with the first rank
            line = socket.socket(socket.AF_UNIX)
            line.connect(store.get("squall").decode())
            self._lines[0] = Connection(line.detach())
            self._lines[0].send_bytes(str(self.rank).encode())
            return
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path := f"{folder}/ranks")
            listener.listen()
            listener.settimeout(0.5)
            store.set("squall", path)
            self._accept(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(int(JOIN_S / 0.5)):
            for rank, process in self._started.items():
                if (status := process.poll()) is not None:
                    raise EngineStopped(self._lose(rank, f"exit status {status}"))
            if len(self._lines) == self.size - 1:
                return
            with suppress(TimeoutError):
                line = Connection(listener.accept()[0].detach())
                self._lines[int(line.recv_bytes())] = line
        raise EngineStopped(f"not all of the {self.size} ranks came within {JOIN_S:.0f} s")


def _message(data: bytes) -> Message:
    head, _, rest = data.partition(b"\n")
    told, shapes = json.loads(head)
    arrays, at = {}, 0
    for name, dtype, shape in shapes:
        array = np.frombuffer(rest, dtype, math.prod(shape), at).reshape(shape)
        arrays[name], at = array, at + array.nbytes
    return told, arrays


def open_rank(order: Order, progress: Progress | None) -> Executor:
    """The first rank's executor, once all are ready; the others run what it says, and never return.

    order, progress: see `executors.open`.
    """
    from squall.gpu.executor import TorchExecutor

    ranks = order.placement.ranks
    assert ranks is not None
    try:
        if len(order.placement.stages) > 1:
            raise InvalidRequest("every rank has all layers: leave out the topology's devices")
        own = shard(order.program, order.store, ranks.rank, ranks.size)
        executor = TorchExecutor(replace(order, program=own))
        executor.load(order.store, progress)
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
        told, arrays = ranks.hear(0)
        at: Any = {name: arrays[f"at.{name}"] for name in _AT if f"at.{name}" in arrays}
        run: Any = partial(executor.run, arrays, Sequences(**at) if at else None)
        executor.profile(run) if told == "profile" else run()


class LeadingExecutor:
    """The first rank's: the others run what it runs; see `Executor`."""

    def __init__(self, own: Executor, ranks: Ranks) -> None:
        self._own, self._ranks, self._told = own, ranks, "run"
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
        self._ranks.tell(self._told, {**inputs, **at})
        with self._ranks.together():
            return self._own.run(inputs, sequences, mixtures, **how)

    step = Executor.step

    def profile(self, act: Callable[[], None]) -> list[Phase]:
        """See `Executor`; steps may look otherwise meanwhile, and so on all ranks."""
        self._told = "profile"
        try:
            return self._own.profile(act)
        finally:
            self._told = "run"

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise InvalidRequest(
            "a model on several ranks takes no adapters and keeps its number formats: open it "
            "again with others, or with adapters merged into its weights (--merge)"
        )

    adapter = requantize = _refuse
