"""A model that says what a script has it say, so that what is around it can be known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall import Model
from squall.batch import Batch

# What ends prompts: the template's last words, with reasoning that is switched off.
ASSISTANT = r"<\|im_start\|>assistant\n(<think>\n\n</think>\n\n)?"


class Scripted:
    """An executor that computes nothing: after a prompt come the tokens of its answer.

    script: texts that a prompt may hold, and what is answered then; the first that is found counts.
    marker: a regex of what ends a prompt.
    """

    def __init__(self, model: Model, script: Mapping[str, str], marker: str) -> None:
        self.executor = model.engine.executor
        self.prompts: list[str] = []  # of all answers that have begun
        self._tokenizer = model.tokenizer
        self._script = script
        self._marker = re.compile(marker.encode())
        self._slots = np.full(self.executor.blocks * self.executor.block_size, -1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    def step(self, batch: Batch) -> NDArray[np.float32]:
        size = self.executor.block_size
        logits = np.zeros((len(batch.outputs), self.executor.vocab), np.float32)
        sequences = np.searchsorted(batch.bounds, np.arange(len(batch.tokens)), side="right") - 1
        slots = [
            batch.block_tables[sequence][position // size] * size + position % size
            for sequence, position in zip(sequences, batch.positions, strict=True)
        ]
        self._slots[slots] = batch.tokens
        for i, row in enumerate(batch.outputs):
            seen = np.arange(batch.positions[row] + 1)
            blocks = batch.block_tables[sequences[row]][seen // size]
            ids = self._slots[blocks * size + seen % size]
            logits[i, self._next(ids.tolist())] = 100
        return logits

    def _next(self, ids: list[int]) -> int:
        """The token that follows these."""
        tokenizer = self._tokenizer
        text = b"".join(map(tokenizer.token_bytes, ids))
        *_, end = self._marker.finditer(text)
        prompt, said = text[: end.end()], text[end.end() :]
        if not said:
            self.prompts.append(prompt.decode())
        found = (answer for needle, answer in self._script.items() if needle.encode() in prompt)
        answer = next(found, "").encode()
        if not answer.startswith(said) or answer == said:
            assert tokenizer.eos is not None
            return tokenizer.eos
        at = 0
        for token in tokenizer.encode(answer.decode(), add_bos=False, specials=True):
            if at == len(said):
                return token
            at += len(tokenizer.token_bytes(token))
        # Other tokens were drawn for the same text.
        rest = answer[len(said) :].decode(errors="ignore")
        return tokenizer.encode(rest, add_bos=False, specials=True)[0]


@contextmanager
def scripted(
    model: Model, script: Mapping[str, str], *, marker: str = ASSISTANT
) -> Iterator[Scripted]:
    """Have `model` answer by a script until the end of the block."""
    engine = model.engine
    found = Scripted(model, script, marker)
    engine.change_model(lambda: None)  # what the prefix cache has was never seen here
    engine.executor = found  # type: ignore[assignment]
    try:
        yield found
    finally:
        engine.executor = found.executor
        engine.change_model(lambda: None)
