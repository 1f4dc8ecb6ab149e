"""Where the hub's token is from: python token_source.py MODEL [SOURCE].

SOURCE is env:NAME, path:FILE, literal:TOKEN, none, or cache, where `hf auth login` leaves it.
"""

import sys

from squall import ChatCompletionRequest, Runner, Which

model, source, *_ = [*sys.argv[1:], "cache"]
with Runner(Which.Plain(model), token_source=source) as runner:
    request = ChatCompletionRequest(messages="Say hello.", max_tokens=32, temperature=0.1)
    print(runner.send_chat_completion_request(request).choices[0].message.content)
