"""A mixture of experts made of a model and adapters: python anymoe.py MODEL GATES ADAPTER...

The first time gates are trained, by examples/anymoe.json, and written to the folder GATES.
"""

import json
import sys
from pathlib import Path

from squall import AnyMoeConfig, AnyMoeExpertType, ChatCompletionRequest, Runner, Which

model, gates, *adapters = sys.argv[1:]
found = json.loads(Path(adapters[0], "adapter_config.json").read_text())
changed = [
    name for name in found["target_modules"] if name in ("gate_proj", "up_proj", "down_proj")
]
experts = AnyMoeConfig(
    hidden_size=json.loads(Path(model, "config.json").read_text())["hidden_size"],
    dataset_json=str(Path(__file__).parents[1] / "anymoe.json"),
    prefix="model.layers",
    mlp="mlp",
    model_ids=adapters,
    expert_type=AnyMoeExpertType.LoraAdapter(found["r"], found["lora_alpha"], changed),
    epochs=5,
    gate_model_id=gates,
    training=not Path(gates, "gate.safetensors").exists(),
)
with Runner(Which.Plain(model), anymoe_config=experts) as runner:
    request = ChatCompletionRequest(messages="What is 9 * 8?", max_tokens=32, temperature=0)
    print(runner.send_chat_completion_request(request).choices[0].message.content)
