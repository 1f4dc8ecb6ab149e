"""Training the gates of AnyMoE, layer by layer with AdamW, while the model follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from squall import executors
from squall.adapters.anymoe import GATES, Experts, gate_names
from squall.batch import Batch
from squall.checkpoints import Checkpoint
from squall.checkpoints.base import ByteTensor
from squall.checkpoints.writing import Item, copy_of, make_folder, replacing, write_safetensors
from squall.errors import ContextLengthExceeded, InvalidRequest
from squall.executors import CPU, Executor, Floats, Limits, Placement, ThreadPool
from squall.files import read_json
from squall.program import Adapters, Attend, Index, MixtureOfExperts, Op, Program
from squall.weights import Progress, Stored, Term, WeightStore

Doubles = NDArray[np.float64]
Encode = Callable[[str], Sequence[int]]
Example = tuple[Sequence[int], int]
"""A prompt, and the expert that is for it."""

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_ZEROS = "zeros"  # routers, to which the gates are added


def open_experts(  # noqa: PLR0913
    experts: Experts,
    store: WeightStore,
    limits: Limits,
    *,
    context: int,
    encode: Encode,
    placement: Placement = CPU,
    pool: ThreadPool | None = None,
    progress: Progress | None = None,
    trained: Progress | None = None,
) -> Executor:
    """An executor of a model with its experts, whose gates are first trained or read.

    limits: for as many rows as the context has, since a prompt is one step.
    encode: the tokens of a user's message in the chat template.
    trained: called with (steps of the training done, all of them).
    """
    program, gates = experts.program(context), None
    opened = partial(executors.open, placement=placement, pool=pool)
    if experts.config.training:
        training = _Training(experts, program, read(experts, encode, context))
        gates = training.run(store, opened, progress, trained)
    store.checkpoints[GATES] = gates or experts.gates()
    return opened(program, store, limits, progress=progress)


def read(experts: Experts, encode: Encode, longest: int) -> list[Example]:
    """The examples of a file: {"rows": [{"prompt": "...", "expert": 1}, ...]}."""
    path, found = Path(experts.config.dataset_json).expanduser(), []
    rows = (read_json(path) or {}).get("rows")
    if not isinstance(rows, list) or not rows:
        raise InvalidRequest(f'AnyMoE: dataset_json {path} is no file with {{"rows": [...]}}')
    for number, row in enumerate(rows):
        where = f"AnyMoE: row {number} of {path.name}"
        match row:
            case {"prompt": str(prompt), "expert": int(expert), **others} if type(expert) is int:
                found.append((encode(prompt), expert))
            case _:
                raise InvalidRequest(f"{where} must have a prompt, text, and an expert, a number")
        if any(others.values()):
            raise InvalidRequest(f"{where} has more than a prompt and an expert, such as images")
        if not 0 <= expert < experts.count:
            raise InvalidRequest(f"{where} has expert {expert}; there are 0 to {experts.count - 1}")
        if not 0 < (tokens := len(found[-1][0])) <= longest:
            raise ContextLengthExceeded(f"{where} has {tokens} tokens; 1 to {longest} may be")
    return found


class _Training:
    """The gates of layers while they learn: [gates, experts, hidden + 1], the bias last.

    The model that they are in ends at the last of them. They come to it as an adapter of routers
    that are zero, so that no weight is laid out again.
    """

    def __init__(self, experts: Experts, program: Program, examples: Sequence[Example]) -> None:
        self.experts, self.config, self.examples = experts, experts.config, examples
        self.gates = beginning(len(experts.layers), experts.count, self.config.hidden_size)
        gated = [op for op in program.ops if isinstance(op, MixtureOfExperts) and op.shared]
        self._roles = [op.router.role for op in gated]
        first, _ = program.stages(gated[-1].x.name)
        ops, outputs = tuple(map(_trained, first.ops)), tuple(op.x for op in gated)
        self._program = replace(first, ops=ops, outputs=outputs, caches=())

    def run(
        self,
        store: WeightStore,
        opened: Callable[..., Executor],
        progress: Progress | None,
        trained: Progress | None,
    ) -> Checkpoint:
        """Trained gates, in the files that they are to be in."""
        config = self.config
        file = config.gate_model_id and Path(config.gate_model_id, "gate.safetensors").expanduser()
        csv = config.loss_csv_path and Path(config.loss_csv_path).expanduser()
        for path in (file, csv):
            if path:  # before the work, which could be in vain
                make_folder(path.parent)
        zeros = np.zeros((self.experts.count, config.hidden_size), np.float32)
        store.checkpoints[GATES] = _checkpoint({_ZEROS: zeros})
        lengths = sorted((len(ids) for ids, _ in self.examples), reverse=True)
        limits = Limits(rows={"tokens": sum(lengths[: config.batch_size])})
        executor = opened(self._program, store, limits, progress=progress)
        losses = self._losses(executor, trained)
        tensors = dict[str, Floats]()
        for layer, gate in zip(self.experts.layers, self.gates, strict=True):
            tensors |= zip(gate_names(layer), _floats(gate), strict=True)
        made = _checkpoint(tensors)
        if file:
            items = [Item(t.name, t.format, t.shape, copy_of(t)) for t in made.tensors.values()]
            write_safetensors(file, items, force=True)
        if csv:
            write_losses(csv, losses)
        return made

    def _losses(self, executor: Executor, trained: Progress | None) -> list[list[float]]:
        """Trains the gates; the losses of each step, a gate each."""
        size, count, losses = self.config.batch_size, len(self.examples), []
        random, moments = np.random.default_rng(0), np.zeros((2, *self.gates.shape))
        orders = [random.permutation(count) for _ in range(self.config.epochs)]
        steps = [order[at : at + size] for order in orders for at in range(0, count, size)]
        for step, chosen in enumerate(steps, start=1):
            batch = [self.examples[i] for i in chosen]
            given = self._given(executor, batch)
            found = [gradient(*of, batch) for of in zip(self.gates, given, strict=True)]
            losses.append([loss for loss, _ in found])
            change = np.stack([change for _, change in found])
            for moment, beta, power in zip(moments, BETAS, (1, 2), strict=True):
                moment += (1 - beta) * (change**power - moment)
            mean, square = (m / (1 - b**step) for m, b in zip(moments, BETAS, strict=True))
            self.gates -= self.config.lr * mean / (np.sqrt(square) + EPSILON)
            if trained is not None:
                trained(step, len(steps))
        return losses

    def _given(self, executor: Executor, batch: Sequence[Example]) -> list[Floats]:
        """What each gate is given, [rows, hidden], prompt after prompt."""
        lengths = np.array([len(ids) for ids, _ in batch], np.int32)
        starts = np.repeat(np.array(_starts(batch), np.int32), lengths)
        own = np.arange(len(starts), dtype=np.int32)
        step = Batch(
            tokens=np.concatenate([ids for ids, _ in batch]).astype(np.int32),
            positions=own - starts, spans=np.stack([starts, own + 1]), mixture=0 * own,
            prompts=lengths, bounds=np.cumsum([0, *lengths], dtype=np.int32), outputs=own[:0],
            block_tables=np.zeros((len(lengths), len(own)), np.int32),  # no row is kept
        )  # fmt: skip
        terms = {}
        # Nothing is given to the last gate's experts.
        for role, gate in zip(self._roles[:-1], self.gates, strict=False):
            weight, bias = _floats(gate)
            stored = Stored("f32", weight.reshape(-1).view(np.uint8), None)
            terms[role, 0] = Term(None, stored, weight.shape[1], bias=bias)
        inputs = step.inputs(self._program.indices, self._program.inputs)
        mixture = ((executor.adapter(terms), 1.0),)
        return list(executor.run(inputs, step, mixtures=[mixture]).values())


def _trained(op: Op) -> Op:
    """The op without a cache, and with a router that gates are added to."""
    if isinstance(op, Attend):
        return replace(op, cache=None)
    if not isinstance(op, MixtureOfExperts) or op.shared is None:
        return op
    router = replace(op.router, slices=(replace(op.router.slices[0], tensor=_ZEROS),))
    adapters = Adapters(op.x, Index("mixture"))
    return replace(op, router=router, router_bias=None, adapters=adapters)


def _starts(batch: Sequence[Example]) -> NDArray[np.intp]:
    return np.cumsum([0, *(len(ids) for ids, _ in batch[:-1])])


def gradient(gate: Doubles, x: Floats, batch: Sequence[Example]) -> tuple[float, Doubles]:
    """The mean loss of a batch, and its gradient. gate: [experts, hidden + 1], the bias last."""
    labels, starts = [expert for _, expert in batch], _starts(batch)
    with_one = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    scores = np.exp(_log_softmax(with_one @ gate.T))
    lengths = np.diff([*starts, len(x)])[:, None]
    log = _log_softmax(np.add.reduceat(scores, starts) / lengths)
    right = np.eye(len(gate))[labels]
    of_mean = (np.exp(log) - right) / len(batch)
    of_scores = np.repeat(of_mean / lengths, lengths[:, 0], axis=0)
    of_logits = scores * (of_scores - (scores * of_scores).sum(axis=1, keepdims=True))
    return -(log * right).sum() / len(batch), of_logits.T @ with_one


def _log_softmax(x: Doubles) -> Doubles:
    x = x - x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def beginning(layers: int, experts: int, hidden: int) -> Doubles:
    """Gates before their training, as torch begins a linear."""
    most = hidden**-0.5
    return np.random.default_rng(0).uniform(-most, most, (layers, experts, hidden + 1))


def _floats(gate: Doubles) -> tuple[Floats, Floats]:
    """Weight and bias."""
    found = gate.astype(np.float32)
    return np.ascontiguousarray(found[:, :-1]), found[:, -1].copy()


def _checkpoint(arrays: dict[str, Floats]) -> Checkpoint:
    tensors = {
        name: ByteTensor(name, "f32", array.shape, array.reshape(-1).view(np.uint8))
        for name, array in arrays.items()
    }
    return Checkpoint(Path(), {}, tensors, 0)


def write_losses(path: Path, losses: Sequence[Sequence[float]]) -> None:
    """Write them as CSV, a step a line; where matplotlib is installed, plot them beside it."""
    names = [f"Gating layer {i}" for i in range(len(losses[0]))]
    rows = [[str(step), *(f"{loss:.4f}" for loss in row)] for step, row in enumerate(losses)]
    with replacing(path, force=True) as file:
        file.write("".join(",".join(row) + "\n" for row in [["Step", *names], *rows]).encode())
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    axes = (figure := Figure()).subplots()
    axes.plot(losses, label=names)
    axes.set(xlabel="Step", ylabel="Loss")
    axes.legend()
    figure.savefig(path.with_suffix(".png"))
