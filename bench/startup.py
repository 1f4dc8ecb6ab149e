"""Start-up times: seconds of `import squall`, and from process start to the first token.

Each is the median of several fresh processes, with the files in the page cache. The first token is
the first byte that `squall run Hi` writes to its standard output.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable


def import_s() -> float:
    """Seconds of a bare `import squall` with its public names, interpreter start not counted."""
    code = "import time; t = time.perf_counter(); import squall; squall.Model; "
    code += "print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def first_token_s() -> float:
    """Seconds from process start to the first byte of the answer."""
    command = [sys.executable, "-m", "squall", "run", "Hi", "--max-tokens", "8"]
    start_s = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        elapsed_s = time.perf_counter() - start_s
        process.stdout.read()
    return elapsed_s


def median(measure: Callable[[], float], rounds: int) -> float:
    """Median of `rounds` measurements after one that is not counted."""
    return statistics.median([measure() for _ in range(rounds + 1)][1:])


def main() -> None:
    """Print both times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"import squall   {median(import_s, rounds):.3f} s")
    print(f"first token     {median(first_token_s, rounds):.3f} s")


if __name__ == "__main__":
    main()
