"""llama.cpp's side of `quantize.py model`, run by the Python of its own environment.

Its argument is a JSON object: source, a GGUF file of floats; out; type, such as "Q4_K_S"; threads.
Every matrix becomes that type but the embeddings, which stay float16. Prints the seconds and the
largest resident memory in bytes, of pages of its own, as a JSON object on its last line.
"""

import ctypes
import json
import sys
import threading
import time

import llama_cpp as c


def anonymous():
    """Resident bytes that are not a file's."""
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main():
    """Quantize one file."""
    job = json.loads(sys.argv[1])
    params = c.llama_model_quantize_default_params()
    params.nthread = job["threads"]
    params.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{job['type']}")
    params.token_embedding_type = 1
    params.pure = True
    done, peak = threading.Event(), [0]

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start_s = time.perf_counter()
    failed = c.llama_model_quantize(
        job["source"].encode(), job["out"].encode(), ctypes.byref(params)
    )
    elapsed_s = time.perf_counter() - start_s
    done.set()
    watcher.join()
    if failed:
        raise SystemExit(f"llama_model_quantize failed: {failed}")
    print(json.dumps({"seconds": elapsed_s, "peak_bytes": peak[0]}))


if __name__ == "__main__":
    main()
