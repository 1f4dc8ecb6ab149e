"""Images in chats: the prompts of transformers, and placeholders only where an image is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from squall.errors import InvalidRequest, TemplateError
from squall.text.chat import ChatPrompt, ChatTemplate
from squall.text.hf_tokenizer import HfTokenizer
from squall.text.images import Placeholder
from squall.text.tools import Tool

Messages = list[dict[str, Any]]
FOLDER = Path(__file__).parent / "vision_templates"
# By template: what stands for an image, and what of it is one token.
PLACEHOLDERS = {
    "llava": "<image>", "idefics2": "<image>", "gemma3": "<start_of_image>", "pixtral": "[IMG]",
    "qwen2-vl": "<|vision_start|><|image_pad|><|vision_end|>", "mllama": "<|image|>",
    "phi-3-vision": "<|image_{}|>",
}  # fmt: skip
TOKENS = "<image> <start_of_image> [IMG] <|vision_start|> <|image_pad|> <|vision_end|> <|image|>"
IMAGE = {"type": "image"}
OLD = "cat.png"


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def picture(source: object = OLD) -> dict[str, Any]:
    return {"type": "image", "image": source}


ANSWER = {"role": "assistant", "content": "A cat."}
CONVERSATIONS: dict[str, Messages] = {
    "image first": [user(picture(), text("What is this?"))],
    "image last": [user(text(" What is this? "), picture())],
    "between": [user(text("Is this:"), picture("a"), text("like"), picture("b"), text("?"))],
    "image alone": [user(picture())],
    "second turn": [user(text("Hi")), ANSWER, user(picture(), text("And this?"))],
    "both turns": [user(picture("a"), text("x")), ANSWER, user(text("y"), picture("b"))],
    "no image": [user(text("Hi")), ANSWER, user(text("Bye"))],
}


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Library(models.WordLevel({"a": 0}, unk_token="a")),
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True) for name in TOKENS.split()])
    folder = tmp_path_factory.mktemp("tokenizer")
    library.save(str(folder / "tokenizer.json"))
    return HfTokenizer.from_folder(folder)


def template(name: str) -> ChatTemplate:
    return ChatTemplate((FOLDER / f"{name}.jinja").read_text(), bos="<s>", eos="</s>")


def prompt(name: str, messages: Messages, tokenizer: HfTokenizer, **options: Any) -> ChatPrompt:
    placeholder = Placeholder(PLACEHOLDERS[name])
    return template(name).prompt(messages, tokenizer, placeholder=placeholder, **options)


def as_shown(messages: Messages, name: str) -> Messages:
    """As transformers' users write it: images without their source, all contents as parts."""
    shown, count = copy.deepcopy(messages), 0
    for message in shown:
        if isinstance(message["content"], str):
            keeps = name in ("pixtral",)
            message["content"] = message["content"] if keeps else [text(message["content"])]
            continue
        message["content"] = [IMAGE if "image" in part else part for part in message["content"]]
    for message in shown if name == "phi-3-vision" else ():
        said = ""
        for part in message["content"]:
            count += part is IMAGE
            said += f"<|image_{count}|>\n" if part is IMAGE else part["text"]
        message["content"] = said
    return shown


@pytest.mark.parametrize("name", PLACEHOLDERS)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_prompt_of_transformers(
    name: str, conversation: str, oracle: Any, tokenizer: HfTokenizer
) -> None:
    messages = CONVERSATIONS[conversation]
    source = (FOLDER / f"{name}.jinja").read_text()
    wanted = oracle.apply_chat_template(
        as_shown(messages, name), chat_template=source, tokenize=False, add_generation_prompt=True
    )
    found = prompt(name, messages, tokenizer)
    assert found.text == wanted
    parts = [part for message in messages for part in message["content"] if "image" in part]
    assert [part["source"] for part in found.images] == [part["image"] for part in parts]


@pytest.mark.parametrize("name", PLACEHOLDERS)
def test_placeholders_in_a_text_say_where_images_go(name: str, tokenizer: HfTokenizer) -> None:
    placeholder = Placeholder(PLACEHOLDERS[name])
    first, second = placeholder.of(1), placeholder.of(2)
    said = f"First {first}, then {second}!"
    found = prompt(name, [user(picture("a"), picture("b"), text(said))], tokenizer)
    assert said in found.text
    assert placeholder.count(found.pieces) == 2
    assert [part["source"] for part in found.images] == ["a", "b"]
    words = "".join(piece.text for piece in found.pieces if piece.content)
    assert (first in words, "First" in words, "then" in words) == (False, True, True)
    alone = prompt(name, [user(picture(), text(first))], tokenizer)
    assert placeholder.count(alone.pieces) == 1


@pytest.mark.parametrize("name", PLACEHOLDERS)
def test_without_images_placeholders_are_words(name: str, tokenizer: HfTokenizer) -> None:
    first = Placeholder(PLACEHOLDERS[name]).of(1)
    said = f"What does {first} mean? {TOKENS}"
    for content in (said, [text(said)]):
        found = prompt(name, [{"role": "user", "content": content}], tokenizer)
        assert said in "".join(piece.text for piece in found.pieces if piece.content)
        ids = tokenizer.encode_pieces(found.pieces)
        assert not any(map(tokenizer.is_special, ids))
    # Nor in a message without, of a conversation with some.
    messages = [user(picture(), text("x")), ANSWER, {"role": "user", "content": said}]
    found = prompt(name, messages, tokenizer)
    assert Placeholder(PLACEHOLDERS[name]).count(found.pieces) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_count_of_placeholders(count: int, tokenizer: HfTokenizer) -> None:
    message = user(picture("a"), picture("b"), text("<image> " * count))
    with pytest.raises(InvalidRequest, match=f"images: 2, and placeholders <image> .*: {count};"):
        prompt("llava", [message], tokenizer)


def test_numbers_go_from_1_on(tokenizer: HfTokenizer) -> None:
    def named(*numbers: int) -> dict[str, Any]:
        names = [f"<|image_{number}|>" for number in numbers]
        return user(*map(picture, names), text(" ".join(names)))

    assert len(prompt("phi-3-vision", [named(1, 2), named(3)], tokenizer).images) == 3
    mixed = [named(1), user(picture(), text("and?"))]
    assert "<|image_2|>\nand?" in prompt("phi-3-vision", mixed, tokenizer).text
    for wrong in ([named(2, 1)], [named(2)], [named(1), named(1)], [named(0)]):
        with pytest.raises(InvalidRequest, match="it must have <"):
            prompt("phi-3-vision", wrong, tokenizer)


@pytest.mark.parametrize(
    ("part", "source", "detail"),
    [
        ({"type": "image_url", "image_url": {"url": "u", "detail": "low"}}, "u", "low"),
        ({"type": "image_url", "image_url": "u"}, "u", None),
        ({"type": "input_image", "image_url": "u", "detail": "high"}, "u", "high"),
        ({"type": "image", "source": b"u", "detail": None}, b"u", None),
        ({"type": "image", "path": "u"}, "u", None),
        ({"type": "image", "url": "u"}, "u", None),
        ({"type": "image", "base64": "u"}, "u", None),
    ],
)
def test_forms_of_images(
    part: dict[str, Any], source: object, detail: str | None, tokenizer: HfTokenizer
) -> None:
    (found,) = prompt("llava", [user(part, text("x"))], tokenizer).images
    assert (found["source"], found["detail"]) == (source, detail)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image"}, "neither a URL nor data"),
        ({"type": "image_url", "image_url": {}}, "neither a URL nor data"),
        ({"type": "image", "image": "x", "detail": "most"}, "whose detail is 'most'"),
        ({"type": "video", "video": "x"}, "it must be a whole 'text'"),
        ({"type": "text"}, "it must be a whole 'text'"),
        ("x", "it must be a whole 'text'"),
    ],
)
def test_parts_that_are_wrong(part: Any, message: str, tokenizer: HfTokenizer) -> None:
    with pytest.raises(InvalidRequest, match=message):
        prompt("llava", [user(part)], tokenizer)


def test_models_without_eyes(tokenizer: HfTokenizer) -> None:
    said = [user(text("a"), text("b"))]
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert ChatTemplate(source).prompt(said, tokenizer).text == "ab"
    with pytest.raises(InvalidRequest, match="reads no images"):
        ChatTemplate(source).prompt([user(picture())], tokenizer)


def test_a_template_that_shows_an_image_too_few(tokenizer: HfTokenizer) -> None:
    source = "{% for part in messages[0].content %}{{ part.text or '<image>' }}{% endfor %}"
    messages = [user(picture(), text("x")), user(picture(), text("y"))]
    with pytest.raises(TemplateError, match="makes 1 placeholders <image> of 2 images"):
        ChatTemplate(source).prompt(messages, tokenizer, placeholder=Placeholder("<image>"))


def test_templates_that_show_parts_as_data_get_texts(tokenizer: HfTokenizer) -> None:
    placeholder = Placeholder("<image>")
    for shown in ("m.content", "m.content | tojson", "m.content | string"):
        source = f"<image> {{% for m in messages %}}{{{{ {shown} }}}}{{% endfor %}}"
        with pytest.raises(TemplateError, match="makes 2 placeholders <image> of 1 images"):
            ChatTemplate(source).prompt([user(picture())], tokenizer, placeholder=placeholder)
    # Words of the template's own are no data.
    words = (
        "This type of question, its 'type'."
        "{% for p in messages[0].content %}{{ p.text or '<image>' }}{% endfor %}"
    )
    found = ChatTemplate(words).prompt(
        [user(picture(), text("x"))], tokenizer, placeholder=placeholder
    )
    assert found.text.endswith("'type'.<image>x")


@pytest.mark.parametrize("name", ["gemma3", "qwen2-vl", "phi-3-vision"])
def test_tools_beside_images(name: str, tokenizer: HfTokenizer) -> None:
    tools = [Tool("find")]
    found = prompt(name, [user(picture(), text("Find it."))], tokenizer, tools=tools)
    assert '"find"' in found.text
    assert len(found.images) == 1
