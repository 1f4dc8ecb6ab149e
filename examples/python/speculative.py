"""A small model guesses what a large one says: python speculative.py MODEL DRAFT."""

import sys

from squall import ChatCompletionRequest, Runner, Which

model, draft = sys.argv[1:]
with Runner(Which.Plain(model), which_draft=Which.Plain(draft), speculative_gamma=8) as runner:
    request = ChatCompletionRequest(messages="Say hello.", max_tokens=32, temperature=0)
    print(runner.send_chat_completion_request(request).choices[0].message.content)
