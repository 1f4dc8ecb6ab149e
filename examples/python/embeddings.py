"""How alike texts are, and which answers a question best: python embeddings.py MODEL."""

import sys

import squall

TEXTS = ["Rain falls from the sky.", "It is raining.", "The stock market fell."]
with squall.Embedder.open(sys.argv[1]) as model:
    vectors = model.embed(TEXTS).vectors
    print(vectors @ vectors.T)  # of length 1, so these are cosines
    print(model.rerank("What is the weather like?", TEXTS).scores)
