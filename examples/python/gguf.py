"""Open a GGUF file: python gguf.py FOLDER FILE."""

import sys

from squall import ChatCompletionRequest, Runner, Which

folder, file = sys.argv[1:]
with Runner(Which.GGUF(quantized_model_id=folder, quantized_filename=file)) as runner:
    request = ChatCompletionRequest(messages="Say hello.", max_tokens=32, temperature=0.1)
    print(runner.send_chat_completion_request(request).choices[0].message.content)
