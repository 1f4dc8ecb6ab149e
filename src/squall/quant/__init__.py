"""Number formats of weights: block layouts, conversions, and what becomes what."""

from __future__ import annotations

from squall.quant.format import Format
from squall.quant.formats import FORMATS, GGML_FORMATS, UNSUPPORTED, by_ggml_id
from squall.quant.isq import FormatTotal, Plan
from squall.quant.topology import Topology

__all__ = [
    "FORMATS",
    "GGML_FORMATS",
    "UNSUPPORTED",
    "Format",
    "FormatTotal",
    "Plan",
    "Topology",
    "by_ggml_id",
]
