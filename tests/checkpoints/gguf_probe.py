"""Opens each file named; prints its error, seconds and memory growth as JSON lines.

Run on its own, so that what it measures is the reader's and nobody else's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from squall.checkpoints import open_gguf


def peak_bytes() -> int:
    # Not ru_maxrss: that starts at the resident size of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) * 1024


def main() -> None:
    baseline = peak_bytes()
    for path in sys.argv[1:]:
        start = time.perf_counter()
        try:
            open_gguf(path)
            error = ""
        except Exception as raised:
            error = type(raised).__name__
        seconds = time.perf_counter() - start
        result = {"error": error, "seconds": seconds, "bytes": peak_bytes() - baseline}
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
