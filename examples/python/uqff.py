"""Quantize once, and open that from then on: python uqff.py MODEL FILE.uqff."""

import sys
from pathlib import Path

from squall import ChatCompletionRequest, Runner, Which

model, file = sys.argv[1:]
request = ChatCompletionRequest(messages="Say hello.", max_tokens=32, temperature=0)
if not Path(file).exists():
    Runner(Which.Plain(model, write_uqff=file), in_situ_quant="Q4K").close()
with Runner(Which.Plain(str(Path(file).parent), from_uqff=Path(file).name)) as runner:
    print(runner.send_chat_completion_request(request).choices[0].message.content)
