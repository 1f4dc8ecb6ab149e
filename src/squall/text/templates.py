"""Chat templates by name, for models whose files have none."""

from __future__ import annotations

_CHATML = """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

# Formats without a place for a system message have it in the first message of the user.
_SYSTEM = """\
{% if messages and messages[0].role == 'system' %}
{% set system, turns = messages[0].content, messages[1:] %}
{% else %}
{% set system, turns = '', messages %}
{% endif %}
"""

_LLAMA2 = """\
{% for message in turns %}
{% if message.role == 'user' %}
{{- bos_token + '[INST] ' }}
{%- if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}
{{- message.content.strip() + ' [/INST]' }}
{%- else %}
{{- ' ' + message.content.strip() + ' ' + eos_token }}
{%- endif %}
{% endfor %}
"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content.strip() + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_MISTRAL = """\
{{- bos_token }}
{%- for message in turns %}
{%- if message.role == 'user' %}
{{- '[INST] ' + (system + '\\n\\n' if loop.first and system else '') }}
{{- message.content + ' [/INST]' }}
{%- else %}
{{- ' ' + message.content.strip() + eos_token }}
{%- endif %}
{%- endfor %}
"""

_GEMMA = """\
{{- bos_token }}
{%- for message in turns %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{{- system.strip() + '\\n\\n' if loop.first and system else '' }}
{{- message.content.strip() + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

_PHI3 = """\
{% for message in messages %}
<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

_ZEPHYR = """\
{% for message in messages %}
<|{{ message.role }}|>
{{ message.content + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

_VICUNA = """\
{{- system or 'A chat between a curious user and an artificial intelligence assistant. '
    + 'The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' }}
{%- for message in turns %}
{%- if message.role == 'user' %}
{{- ' USER: ' + message.content }}
{%- else %}
{{- ' ASSISTANT: ' + message.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}
"""

_ALPACA = """\
{{- system or 'Below is an instruction that describes a task. '
    + 'Write a response that appropriately completes the request.' }}
{%- for message in turns %}
{{- '\\n\\n### ' + ('Instruction' if message.role == 'user' else 'Response') + ':\\n' }}
{{- message.content + ('' if message.role == 'user' else eos_token) }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}
"""

TEMPLATES = {
    "alpaca": _SYSTEM + _ALPACA,
    "chatml": _CHATML,
    "gemma": _SYSTEM + _GEMMA,
    "llama2": _SYSTEM + _LLAMA2,
    "llama3": _LLAMA3,
    "mistral": _SYSTEM + _MISTRAL,
    "phi3": _PHI3,
    "vicuna": _SYSTEM + _VICUNA,
    "zephyr": _ZEPHYR,
}
