"""Number formats layer by layer: python topology.py MODEL [TOPOLOGY]."""

import sys
from pathlib import Path

from squall import ChatCompletionRequest, Runner, Which

model, topology, *_ = [*sys.argv[1:], str(Path(__file__).parents[1] / "topology.yaml")]
with Runner(Which.Plain(model, topology=topology), in_situ_quant="Q4K") as runner:  # the others
    request = ChatCompletionRequest(messages="Say hello.", max_tokens=32, temperature=0.1)
    print(runner.send_chat_completion_request(request).choices[0].message.content)
    print(runner.model.weight_formats)
