"""Change the logits before each token: here, no token with the letter e."""

import numpy as np
from numpy.typing import NDArray

from squall import CompletionRequest, Runner

with Runner() as runner:
    tokenizer = runner.model.tokenizer
    forbidden = [i for i in range(tokenizer.vocab_size) if b"e" in tokenizer.token_bytes(i)]

    def without_e(logits: NDArray[np.float32], ids: NDArray[np.int32]) -> None:  # noqa: ARG001
        logits[forbidden] = -np.inf

    response = runner.send_completion_request(
        CompletionRequest(
            prompt="My dog is", max_tokens=24, temperature=0, logits_processors=[without_e]
        )
    )
print(response.choices[0].text)
