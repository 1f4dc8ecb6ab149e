"""python two_ranks.py MODEL WEIGHTS OUT: logits of a model on two ranks, into an .npz file."""

from __future__ import annotations

import sys

import numpy as np

from squall import Model

TEXT = "The capital of France is Paris, and that of Italy is"
OPTIONS = {"device": "torch", "context": 64, "kv_dtype": "f32"}

if __name__ == "__main__":
    path, weights, out = sys.argv[1:]
    own = {"tensor_parallel": 2, "command": tuple(sys.orig_argv[1:]), "weights": weights}
    with Model.open(path, **own, **OPTIONS) as model:
        logits = model.logits(model.encode(TEXT))
        np.savez(out, logits=logits, kv_bytes=model.executor.kv_bytes)
