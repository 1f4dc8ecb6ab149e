"""Answers that a regex, a yacc grammar or a choice describes: python grammars.py [URL]."""

import sys

import openai

GRAMMARS: dict[str, object] = {
    "regex": "(yes|no), [a-z ]{1,30}\\.",
    "yacc": "%start sum\n%%\nsum : sum '+' NUMBER | NUMBER ;\nNUMBER : /[0-9]/ ;\n",
    "choice": ["rain", "sun"],
}
url, *_ = [*sys.argv[1:], "http://127.0.0.1:8080/v1"]
client = openai.OpenAI(base_url=url, api_key="any")
for kind, grammar in GRAMMARS.items():
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Answer!"}],
        max_tokens=24,
        temperature=0,
        extra_body={"grammar": {"type": kind, "value": grammar}},
    )
    print(f"{kind}: {answer.choices[0].message.content}")
