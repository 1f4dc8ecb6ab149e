"""Adapters that are weighed for each token: python xlora.py MODEL XLORA [ORDERING]."""

import sys

from squall import ChatCompletionRequest, Runner, Which

model, xlora, *ordering = sys.argv[1:]
with Runner(Which.XLora(xlora, *ordering, model_id=model)) as runner:
    request = ChatCompletionRequest(messages="Say hello.", max_tokens=32, temperature=0.1)
    print(runner.send_chat_completion_request(request).choices[0].message.content)
