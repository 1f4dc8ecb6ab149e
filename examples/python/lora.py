"""An adapter in mistral.rs's words: python lora.py MODEL ADAPTERS ORDERING."""

import sys

from squall import ChatCompletionRequest, Runner, Which

model, adapters, ordering = sys.argv[1:]
with Runner(Which.Lora(adapters, ordering, model_id=model)) as runner:
    names = [info.name for info in runner.model.adapters.list()]
    runner.activate_adapters(names[-1:])  # for requests that name none
    for chosen in (None, names[:1], []):
        request = ChatCompletionRequest(
            messages="Say hello.", adapters=chosen, max_tokens=16, temperature=0
        )
        answer = runner.send_chat_completion_request(request).choices[0].message.content
        print(f"{names[-1:] if chosen is None else chosen}: {answer}")
