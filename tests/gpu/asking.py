"""Products as tests ask for them: weights, and by name what follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from squall.gpu.linear import Product
from squall.gpu.matrices import Weight


class Products:
    """The functions of `squall.gpu.linear`, or of Triton's kernels."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def linear(
        self, x: Tensor, w: Weight, *, exact: bool, residual: Tensor | None = None,
        dtype: torch.dtype | None = None, **what: Any,
    ) -> Tensor:  # fmt: skip
        product = Product(w, **what)
        found: Tensor = self._module.linear(x, product, residual=residual, exact=exact, dtype=dtype)
        return found

    def gated(
        self, x: Tensor, gate: Weight, up: Weight, *, exact: bool, up_bias: Tensor | None = None,
        **what: Any,
    ) -> Tensor:  # fmt: skip
        return self.linear(x, up, exact=exact, bias=up_bias, gate=gate, **what)

    def experts(  # noqa: PLR0913
        self, x: Tensor, chosen: Tensor, shares: Tensor, *, up: Weight, down: Weight, exact: bool,
        up_bias: Tensor | None = None, down_bias: Tensor | None = None, **what: Any,
    ) -> Tensor:  # fmt: skip
        inner, outer = Product(up, up_bias, **what), Product(down, down_bias)
        found: Tensor = self._module.experts(x, chosen, shares, inner, outer, exact=exact)
        return found
