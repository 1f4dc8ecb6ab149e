"""The tiny models of tests/parity, for adapters."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "parity"))
