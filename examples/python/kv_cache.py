"""How large the KV cache is: here 4096 tokens of all answers together, in blocks of 32."""

from squall import ChatCompletionRequest, Runner

with Runner(pa_ctxt_len=4096, pa_blk_size=32, max_seqs=8) as runner:
    request = ChatCompletionRequest(messages="Say hello.", max_tokens=16, temperature=0.1)
    print(runner.send_chat_completion_request(request).choices[0].message.content)
    executor = runner.model.executor
    print(executor.blocks, "blocks of", executor.block_size, "tokens")
