"""llama.cpp's side of `peers.py`, run by the Python of its own environment.

Its argument is a JSON object: model, threads, plans, each [prompt, answer, batch], and warm_up:
plans with a prompt of at most so many tokens run twice, and the second time counts. Prints a JSON
object on its last line: load_s (until the first token is computed), memory in bytes after the first
plan, and of each plan the tokens per second of prompt and answer. Every plan has a context of its
own.
"""

import ctypes
import json
import sys
import time

import llama_cpp as c

UBATCH = 512


def decode(context, tokens):
    """One step; tokens are (id, position, sequence, wants logits)."""
    batch = c.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, (token, position, sequence, logits) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    if c.llama_decode(context, batch) != 0:
        raise SystemExit("llama_decode failed")
    c.llama_synchronize(context)
    c.llama_batch_free(batch)


def open_context(model, threads, plan):
    """A context for all sequences of a plan, with llama.cpp's own defaults for the rest."""
    prompt, answer, many = plan
    params = c.llama_context_default_params()
    params.n_ctx = many * (prompt + answer + 64)
    params.n_batch, params.n_ubatch, params.n_seq_max = max(UBATCH, prompt), UBATCH, many
    params.n_threads = params.n_threads_batch = threads
    return c.llama_init_from_model(model, params)


def measure(context, vocab, plan, runs):
    """Tokens per second of prompt and of answer."""
    prompt, answer, many = plan
    sequences = range(many)
    for _ in range(runs):
        c.llama_memory_clear(c.llama_get_memory(context), True)
        start_s = time.perf_counter()
        for s in sequences:
            decode(context, [((i + 1000) % vocab, i, s, i == prompt - 1) for i in range(prompt)])
        middle_s = time.perf_counter()
        for i in range(prompt, prompt + answer):
            decode(context, [((i + 1000) % vocab, i, s, True) for s in sequences])
        end_s = time.perf_counter()
    return many * prompt / (middle_s - start_s), many * answer / (end_s - middle_s)


def memory():
    """Resident bytes of this process: of its own, and of files."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


@c.llama_log_callback
def quiet(level, text, data):
    """Takes the log, and drops it."""


def main():
    """Load, measure, print."""
    job = json.loads(sys.argv[1])
    c.llama_log_set(quiet, ctypes.c_void_p())
    c.llama_backend_init()
    start_s = time.perf_counter()
    model = c.llama_model_load_from_file(job["model"].encode(), c.llama_model_default_params())
    if model is None:
        raise SystemExit(f"llama.cpp cannot load {job['model']}")
    vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    result = {"system": c.llama_print_system_info().decode(), "rates": []}
    for plan in job["plans"]:
        context = open_context(model, job["threads"], plan)
        if not result["rates"]:
            decode(context, [(1000 % vocab, 0, 0, True)])
            result["load_s"] = time.perf_counter() - start_s
        runs = 2 if plan[0] <= job["warm_up"] else 1
        result["rates"].append(measure(context, vocab, plan, runs))
        result.setdefault("memory", memory())
        c.llama_free(context)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
