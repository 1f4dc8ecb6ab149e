"""Answers that a regex, a yacc grammar or a Lark grammar describes."""

from squall import ChatCompletionRequest, Runner

GRAMMARS = {
    "regex": "(yes|no), [a-z ]{1,30}\\.",
    "yacc": "%start sum\n%%\nsum : sum '+' NUMBER | NUMBER ;\nNUMBER : /[0-9]/ ;\n",
    "lark": 'start: CITY ", " CITY\nCITY: /[A-Z][a-z]{2,9}/',
}
with Runner() as runner:
    for kind, grammar in GRAMMARS.items():
        request = ChatCompletionRequest(
            messages="Answer!", grammar=grammar, grammar_type=kind, max_tokens=24, temperature=0
        )
        answer = runner.send_chat_completion_request(request).choices[0].message.content
        print(f"{kind}: {answer}")
