"""How likely a text is, and what the model expected instead."""

from operator import itemgetter

from squall import CompletionRequest, Runner

with Runner() as runner:
    response = runner.send_completion_request(
        CompletionRequest(prompt="Rain falls from the sky.", max_tokens=0, echo=True, logprobs=1)
    )
found = response.choices[0].logprobs
assert found is not None  # as they were asked for
for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
    if top is not None:
        likeliest, _ = max(top.items(), key=itemgetter(1))
        print(f"{token!r:12} {logprob:8.3f}   likeliest: {likeliest!r}")
