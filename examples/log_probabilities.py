"""How likely a text is, and what the model expected instead."""

from squall import CompletionRequest, Runner

with Runner() as runner:
    response = runner.send_completion_request(
        CompletionRequest(prompt="Rain falls from the sky.", max_tokens=0, echo=True, logprobs=1)
    )
found = response.choices[0].logprobs
for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
    if top is not None:
        print(f"{token!r:12} {logprob:8.3f}   likeliest: {max(top, key=top.get)!r}")
