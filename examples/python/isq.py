"""Quantize a model while it is read, and again later: python isq.py MODEL [--experts-only]."""

import sys

from squall import ChatCompletionRequest, IsqOrganization, Runner, Which

model, *flags = sys.argv[1:]
kind = IsqOrganization.MoQE if flags else IsqOrganization.Default
with Runner(Which.Plain(model, organization=kind), in_situ_quant="Q4K") as runner:
    request = ChatCompletionRequest(messages="Say hello.", max_tokens=32, temperature=0.1)
    print(runner.send_chat_completion_request(request).choices[0].message.content)
    print(runner.model.weight_formats)
    runner.send_re_isq("Q8_0")
    print(runner.model.weight_formats)
