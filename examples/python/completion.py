"""Go on with a text, several times."""

from squall import CompletionRequest, Runner

with Runner() as runner:
    request = CompletionRequest(
        prompt="The three primary colours are", n=2, max_tokens=16, temperature=0.7, seed=1
    )
    for choice in runner.send_completion_request(request).choices:
        print(f"{choice.index}: {choice.text!r}")
