"""Training the gates of AnyMoE, layer by layer with AdamW, while the model follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall import executors
from squall.adapters.anymoe import GATES, AnyMoe, Experts, gate_names
from squall.checkpoints import Checkpoint
from squall.checkpoints.base import ByteTensor
from squall.checkpoints.writing import Item, copy_of, replacing, write_safetensors
from squall.errors import ContextLengthExceeded, InvalidRequest
from squall.executors import Executor, Floats, Limits, ThreadPool
from squall.files import read_json
from squall.program import Adapters, Attend, Index, MixtureOfExperts, Op, Program
from squall.weights import Progress, Stored, Term, WeightStore

Doubles = NDArray[np.float64]
Encode = Callable[[str], Sequence[int]]
Example = tuple[Sequence[int], int]
"""A prompt, and the expert that is for it."""

BETAS = (0.9, 0.999)
EPSILON = 1e-8
GATE_FILE = "gate.safetensors"
_ZEROS = "zeros"  # routers, to which the gates are added


def open_experts(  # noqa: PLR0913
    experts: Experts,
    store: WeightStore,
    limits: Limits,
    *,
    context: int,
    encode: Encode,
    pool: ThreadPool | None = None,
    progress: Progress | None = None,
    trained: Progress | None = None,
) -> Executor:
    """An executor of a model with its experts, whose gates are first trained or read.

    limits: for as many rows as the context has, since a prompt is one step.
    encode: the tokens of a user's message in the chat template.
    trained: called with (steps of the training done, all of them).
    """
    program, config, gates = experts.program(context), experts.config, None
    if config.training:
        examples = read(experts, encode, context)
        zeros = np.zeros((experts.count, config.hidden_size), np.float32)
        store.checkpoints[GATES] = _checkpoint({_ZEROS: zeros})
        rows = sum(sorted((len(ids) for ids, _ in examples), reverse=True)[: config.batch_size])
        forward = Forward(program, store, rows, pool, progress)
        gates = _written(experts, forward, examples, trained)
    store.checkpoints[GATES] = gates or experts.gates()
    return executors.open(program, store, limits, pool=pool, progress=progress)


def read(experts: Experts, encode: Encode, longest: int) -> list[Example]:
    """The examples of a file: {"rows": [{"prompt": "...", "expert": 1}, ...]}."""
    path = Path(experts.config.dataset_json).expanduser()
    rows = (read_json(path) or {}).get("rows")
    if not isinstance(rows, list) or not rows:
        raise InvalidRequest(f'AnyMoE: dataset_json {path} is no file with {{"rows": [...]}}')
    return [_example(f"AnyMoE: row {i} of {path.name}", row, experts.count, encode, longest)
            for i, row in enumerate(rows)]  # fmt: skip


def _example(where: str, row: Any, experts: int, encode: Encode, longest: int) -> Example:
    match row:
        case {"prompt": str(prompt), "expert": int(expert), **others} if type(expert) is int:
            ids = encode(prompt)
        case _:
            raise InvalidRequest(f"{where} must have a prompt, text, and an expert, a number")
    if any(others.values()):
        raise InvalidRequest(f"{where} has more than a prompt and an expert; images are unknown")
    if not 0 <= expert < experts:
        raise InvalidRequest(f"{where} has expert {expert}; there are 0 to {experts - 1}")
    if not 0 < len(ids) <= longest:
        raise ContextLengthExceeded(f"{where} has {len(ids)} tokens; 1 to {longest} may be")
    return ids, expert


class Forward:
    """What each gate is given, of a model that follows the gates as they are.

    They come as an adapter of routers that are zero, so that no weight is laid out again.
    """

    def __init__(
        self, program: Program, store: WeightStore, rows: int,
        pool: ThreadPool | None = None, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        gated = [op for op in program.ops if isinstance(op, MixtureOfExperts) and op.shared]
        self._names = [(op.x.name, op.router.role) for op in gated]
        first, _ = program.cut(gated[-1].x.name)
        ops, outputs = tuple(map(_trained, first.ops)), tuple(op.x for op in gated)
        program = replace(first, ops=ops, outputs=outputs, caches=())
        limits = Limits(rows={"tokens": rows})
        self._executor = executors.open(program, store, limits, pool=pool, progress=progress)

    def __call__(self, gates: Doubles, batch: Sequence[Example]) -> list[Floats]:
        """[rows, hidden] each, prompt after prompt. gates: [gates, experts, hidden + 1]."""
        lengths = [len(ids) for ids, _ in batch]
        starts, own = np.repeat(_starts(batch), lengths), np.arange(sum(lengths))
        indices = {
            "tokens": np.concatenate([ids for ids, _ in batch]), "rotary": own - starts,
            "spans": np.stack([starts, own + 1]), "shared": starts, "mixture": 0 * own,
        }  # fmt: skip
        terms = {}
        # Nothing is given to the last gate's experts.
        for (_, role), gate in zip(self._names[:-1], gates.astype(np.float32), strict=False):
            weight = np.ascontiguousarray(gate[:, :-1])
            stored = Stored("f32", weight.reshape(-1).view(np.uint8), None)
            terms[role, 0] = Term(None, stored, weight.shape[1], bias=gate[:, -1].copy())
        inputs = {name: index.astype(np.int32) for name, index in indices.items()}
        mixture = ((self._executor.adapter(terms), 1.0),)
        found = self._executor.run(inputs, mixtures=[mixture])
        return [found[name] for name, _ in self._names]


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
    """The first row of each prompt."""
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


def train(
    config: AnyMoe,
    gates: Doubles,
    examples: Sequence[Example],
    forward: Callable[[Doubles, Sequence[Example]], Sequence[Floats]],
    progress: Progress | None = None,
) -> list[list[float]]:
    """Change the gates; the losses of each step, a gate each."""
    random, losses, moments = np.random.default_rng(0), [], np.zeros((2, *gates.shape))
    orders = [random.permutation(len(examples)) for _ in range(config.epochs)]
    size = config.batch_size
    steps = [order[at : at + size] for order in orders for at in range(0, len(examples), size)]
    for step, chosen in enumerate(steps, start=1):
        batch = [examples[i] for i in chosen]
        found = [gradient(*of, batch) for of in zip(gates, forward(gates, batch), strict=True)]
        losses.append([loss for loss, _ in found])
        change = np.stack([change for _, change in found])
        for moment, beta, power in zip(moments, BETAS, (1, 2), strict=True):
            moment += (1 - beta) * (change**power - moment)
        mean, square = (m / (1 - b**step) for m, b in zip(moments, BETAS, strict=True))
        gates -= config.lr * mean / (np.sqrt(square) + EPSILON)
        if progress is not None:
            progress(step, len(steps))
    return losses


def beginning(layers: int, experts: int, hidden: int) -> Doubles:
    """Gates before their training, as torch begins a linear."""
    most = hidden**-0.5
    return np.random.default_rng(0).uniform(-most, most, (layers, experts, hidden + 1))


def _written(
    experts: Experts, forward: Forward, examples: Sequence[Example], progress: Progress | None
) -> Checkpoint:
    """Trained gates, in the files that they are to be in."""
    config, tensors = experts.config, dict[str, Floats]()
    folder, csv = (
        None if path is None else Path(path).expanduser()
        for path in (config.gate_model_id, config.loss_csv_path)
    )
    try:  # before the work, which could be in vain
        for needed in filter(None, (folder, csv and csv.parent)):
            needed.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"AnyMoE: cannot make {error.filename}: {error.strerror}") from None
    gates = beginning(len(experts.layers), experts.count, config.hidden_size)
    losses = train(config, gates, examples, forward, progress)
    for layer, gate in zip(experts.layers, gates.astype(np.float32), strict=True):
        weight, bias = gate_names(layer)
        tensors |= {weight: np.ascontiguousarray(gate[:, :-1]), bias: gate[:, -1].copy()}
    checkpoint = _checkpoint(tensors)
    if folder is not None:
        items = [Item(t.name, t.format, t.shape, copy_of(t)) for t in checkpoint.tensors.values()]
        write_safetensors(folder / GATE_FILE, items, force=True)
    if csv is not None:
        write_losses(csv, losses)
    return checkpoint


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
