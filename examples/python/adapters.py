"""One model with several LoRA adapters: python adapters.py MODEL ADAPTER..."""

import sys
from pathlib import Path

import squall

folder, *paths = sys.argv[1:]
with squall.Model.open(folder, adapters={Path(path).name: path for path in paths}) as model:
    # Answers are made together, each with an adapter of its own; the first has none.
    names: list[list[str]] = [[], *([info.name] for info in model.adapters.list())]
    answers = [model.generate("Hello!", adapters=name, max_tokens=16, seed=1) for name in names]
    for name, answer in zip(names, answers, strict=True):
        print(f"{name}: {answer.read()}")
