"""Mixtures of experts: which experts a row has, and its sum of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from squall import program as p
from squall.gpu import linear, matrices
from squall.gpu.adapters import Added, TorchMixture
from squall.gpu.matrices import Weight
from squall.gpu.rows import total

if TYPE_CHECKING:
    from squall.gpu.ops import Run


def route(
    op: p.MixtureOfExperts, logits: Tensor, groups: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Each row's experts, best first, int32 [rows, top_k]; and their shares.

    groups: rows that have one expert together. Nothing waits for the device.
    """
    if op.shared is not None:
        scores = torch.softmax(logits, 1)
        for rows in groups:
            scores[rows] = total(scores[rows].T)[:, 0]
        chosen = _ranked(scores, op.top_k)
        return chosen.int(), torch.ones_like(chosen, dtype=torch.float32)
    chosen = _ranked(logits, op.top_k)
    if op.jitter is None:
        shares = torch.softmax(logits, 1).gather(1, chosen)
    else:
        shares = _near(logits, chosen, op.jitter)
    return chosen.int(), shares / total(shares) if op.normalize else shares


def _ranked(scores: Tensor, top_k: int) -> Tensor:
    """The best first, and among equals the lower index."""
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :top_k]


def _near(logits: Tensor, chosen: Tensor, jitter: float) -> Tensor:
    """Of each chosen one its part of a softmax over those near it and not chosen before it."""
    shares, left = [], logits
    for one in chosen.unbind(1):
        best = logits.gather(1, one[:, None])
        far = (best - logits) / torch.maximum(logits.abs(), best) > 2 * jitter
        near = torch.softmax(left.masked_fill(far, -torch.inf), 1)
        shares.append(near.gather(1, one[:, None]))
        left = left.scatter(1, one[:, None], -torch.inf)
    return torch.cat(shares, 1)


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of an op, and what adapters add to them."""

    inner: linear.Product
    down: linear.Product
    op: p.MixtureOfExperts
    added: Added

    def adapted(self, run: Run, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The sums of the rows that have adapters, expert by expert: the host asks which."""
        outs = x.new_zeros((*chosen.shape, self.down.weight.rows), dtype=torch.float32)
        scalings = self.added.scalings(run)
        asked = chosen.cpu().numpy()
        for start, stop, number in run.segments(self.op.adapters):
            for expert in np.unique(asked[start:stop]).tolist():
                found = np.stack(np.nonzero(asked[start:stop] == expert))
                rows, places = torch.as_tensor(found).to(x.device) + x.new_tensor(
                    [[start], [0]], dtype=torch.int64
                )
                own = None if scalings is None else scalings[rows]
                outs[rows, places] = self._expert(expert, x[rows], run.mixtures[number], own)
        summed = torch.zeros_like(outs[:, 0])
        for place in range(self.op.top_k):
            summed = summed + outs[:, place] * shares[:, place, None]
        return summed

    def _expert(
        self, expert: int, x: Tensor, mixture: TorchMixture, scalings: Tensor | None
    ) -> Tensor:
        """One expert's products of rows that have one mixture of adapters."""
        exact = self.added.exact

        def product(x: Tensor, matrix: p.Matrix, weight: Weight, bias: Tensor | None) -> Tensor:
            own = linear.Product(matrices.one(weight, expert))
            y = linear.linear(x, own, exact=exact, dtype=torch.float32)
            self.added.add_to(y, x, (matrix.role, expert), mixture, scalings)
            return y if bias is None else y + bias.view(weight.experts, -1)[expert]

        op, inner, down = self.op, self.inner, self.down
        y = product(x, op.up, inner.weight, inner.bias)
        if op.gate is None or inner.gate is None:
            y = linear.activated(y, op.activation, exact=exact)
        else:
            gate = product(x, op.gate, inner.gate, inner.gate_bias)
            y = linear.activated(gate, op.activation, exact=exact) * y
        return product(y.to(x.dtype), op.down, down.weight, down.bias)
