"""Where templates come from, and the templates that Squall has by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from squall.errors import TemplateError
from squall.text.chat import NAMED, ChatTemplate

TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in NAMED.glob("*.jinja")}

SYSTEM = {"role": "system", "content": "S"}
HI = {"role": "user", "content": "A"}
TURNS = [HI, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]

# Each as its makers describe it: the system message first, or none.
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"
        "B<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST] B </s><s>[INST] C [/INST]",
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nC<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] S\n\nA [/INST] B</s>[INST] C [/INST]",
    "gemma": (
        "<s><start_of_turn>user\nS\n\nA<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n"
        "<start_of_turn>user\nC<end_of_turn>\n<start_of_turn>model\n"
    ),
    "phi3": (
        "<|system|>\nS<|end|>\n<|user|>\nA<|end|>\n<|assistant|>\nB<|end|>\n<|user|>\nC<|end|>\n"
        "<|assistant|>\n"
    ),
    "vicuna": "S USER: A ASSISTANT: B</s> USER: C ASSISTANT:",
    "zephyr": (
        "<|system|>\nS</s>\n<|user|>\nA</s>\n<|assistant|>\nB</s>\n<|user|>\nC</s>\n<|assistant|>\n"
    ),
    "alpaca": (
        "S\n\n### Instruction:\nA\n\n### Response:\nB</s>\n\n### Instruction:\nC\n\n### Response:\n"
    ),
}


def text(template: ChatTemplate, messages: list[dict[str, str]], **options: Any) -> str:
    return "".join(piece.text for piece in template.render(messages, **options))


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_write_the_published_format(name: str) -> None:
    template = ChatTemplate(None, bos="<s>", eos="</s>").replaced(name)
    assert text(template, [SYSTEM, *TURNS]) == EXPECTED[name]


@pytest.mark.parametrize("name", ["vicuna", "alpaca"])
def test_formats_with_a_usual_system_message_say_it(name: str) -> None:
    rendered = text(ChatTemplate(TEMPLATES[name], eos="</s>"), [HI])
    assert ". The assistant gives" in rendered or ". Write a response" in rendered
    assert "\n " not in rendered


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_sources_in_their_order(tmp_path: Path) -> None:
    assert not ChatTemplate.from_folder(tmp_path).sources
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplate.from_folder(tmp_path).render([HI])
    found = []
    for name in ("tokenizer_config", "chat_template", "processor_config"):
        write(tmp_path, **{name: {"chat_template": name}})
        found.append(text(ChatTemplate.from_folder(tmp_path), [HI]))
    (tmp_path / "chat_template.jinja").write_text("file")
    found.append(text(ChatTemplate.from_folder(tmp_path), [HI]))
    assert found == ["tokenizer_config", "chat_template", "processor_config", "file"]


def test_several_by_name(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write(tmp_path, tokenizer_config={"chat_template": named})
    template = ChatTemplate.from_folder(tmp_path)
    assert (text(template, [HI]), text(template, [HI], tools=[{}])) == ("D", "T")
    (tmp_path / "chat_template.jinja").write_text("d")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    template = ChatTemplate.from_folder(tmp_path)
    assert (text(template, [HI]), text(template, [HI], tools=[{}])) == ("d", "t")


def test_tokens_are_texts_or_objects(tmp_path: Path) -> None:
    write(
        tmp_path,
        tokenizer_config={
            "chat_template": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}",
            "bos_token": {"content": "<b>", "__type": "AddedToken"},
            "eos_token": "<e>",
        },
        special_tokens_map={"unk_token": "<u>", "eos_token": "old"},
    )
    assert text(ChatTemplate.from_folder(tmp_path), [HI]) == "<b>|<e>|<u>"


def test_replacements(tmp_path: Path) -> None:
    own = ChatTemplate("own", bos="<s>", eos="</s>")
    (tmp_path / "t.jinja").write_text("{{ bos_token }}file")
    write(tmp_path, t={"chat_template": "{{ bos_token }}json", "bos_token": "<b>"})
    assert text(own.replaced(str(tmp_path / "t.jinja")), [HI]) == "<s>file"
    assert text(own.replaced(str(tmp_path / "t.json")), [HI]) == "<b>json"
    assert text(own.replaced("{{ eos_token }}literal"), [HI]) == "</s>literal"
    with pytest.raises(TemplateError, match="chatml"):
        own.replaced("nothing")
    write(tmp_path, none={})
    with pytest.raises(TemplateError, match="no chat_template"):
        own.replaced(str(tmp_path / "none.json"))
