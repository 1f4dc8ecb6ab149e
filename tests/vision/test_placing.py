"""Where images stand in prompts: the ids of transformers' processors."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import transformers
from PIL import Image
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from squall.errors import InvalidRequest, UnsupportedModel
from squall.text.chat import ChatTemplate
from squall.text.hf_tokenizer import HfTokenizer
from squall.text.images import Placeholder
from squall.text.tokenizer import Piece
from squall.vision.family import Processed
from squall.vision.placing import Placed, Run, place

TEMPLATES = Path(__file__).parents[1] / "text/vision_templates"
SPECIALS = """
<s> </s> <image> <fake_token_around_image> <end_of_utterance> <global-img> <start_of_image>
<image_soft_token> <end_of_image> [IMG] [IMG_BREAK] [IMG_END] [INST] [/INST] <|image|>
<|vision_start|> <|image_pad|> <|video_pad|> <|vision_end|> <|im_start|> <|im_end|>
<|python_tag|> <|eot_id|> <start_of_turn> <end_of_turn>
"""
ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
SIZES = [(50, 30), (20, 90), (30, 30)]
PICTURES = [Image.new("RGB", size, "red") for size in SIZES]


@dataclass(frozen=True)
class Kind:
    """What places an image. mutual: see `Family`, as the rest."""

    placeholder: str
    token: str
    template: str
    processor: str
    images: str
    mutual: bool = False
    small: Any = ()  # settings of the image processor
    more: Any = ()  # of the processor

    def process(self, image: Image.Image) -> Processed:
        raise NotImplementedError


PAD = "<|image_pad|>"
LLAVA = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
PATCHES = {"patch_size": 14, "vision_feature_select_strategy": "default"}
TILES = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
KINDS = {
    "llava": Kind(
        "<image>", "<image>", "llava", "LlavaProcessor", "LlavaImageProcessorPil",
        small=LLAVA, more={**PATCHES, "num_additional_image_tokens": 1},
    ),
    "llava_next": Kind(
        "<image>", "<image>", "llava", "LlavaNextProcessor", "LlavaNextImageProcessorPil",
        small={**LLAVA, "image_grid_pinpoints": [[28, 56], [56, 28]]},
        more={**PATCHES, "num_additional_image_tokens": 1},
    ),
    "idefics2": Kind(
        "<image>", "<image>", "idefics2", "Idefics2Processor", "Idefics2ImageProcessorPil",
        small={"size": {"shortest_edge": 14, "longest_edge": 28}, "do_image_splitting": False},
        more={"image_seq_len": 5},
    ),
    "idefics3": Kind(
        "<image>", "<image>", "idefics2", "Idefics3Processor", "Idefics3ImageProcessorPil",
        small=TILES, more={"image_seq_len": 4},
    ),
    "qwen2_vl": Kind(
        PAD, PAD, "qwen2-vl", "Qwen2VLProcessor", "Qwen2VLImageProcessorPil",
        small={"min_pixels": 3136, "max_pixels": 9408},
    ),
    "gemma3": Kind(
        "<start_of_image>", "<image_soft_token>", "gemma3", "Gemma3Processor",
        "Gemma3ImageProcessorPil", mutual=True, small={"size": {"height": 28, "width": 28}},
        more={"image_seq_length": 6},
    ),
    "pixtral": Kind(
        "[IMG]", "[IMG]", "pixtral", "PixtralProcessor", "PixtralImageProcessorPil",
        small={"size": {"longest_edge": 64}, "patch_size": {"height": 16, "width": 16}},
        more={"patch_size": 16},
    ),
    "mllama": Kind(
        "<|image|>", "<|image|>", "mllama", "MllamaProcessor", "MllamaImageProcessorPil",
        small={"size": {"height": 28, "width": 28}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    words = pre_tokenizers.Split(Regex(r"\s?\w+|\s+"), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS.split() + ROWS])
    made = tmp_path_factory.mktemp("tokenizer")
    library.save(str(made / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> HfTokenizer:
    return HfTokenizer.from_folder(folder)


def oracle(kind: Kind, folder: Path) -> Any:
    tokens = {
        "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        "image_token": kind.token if kind.mutual else kind.placeholder,
        "image_boundary_token": "<fake_token_around_image>", "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
    }  # fmt: skip
    library = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>",
        extra_special_tokens=tokens,
    )  # fmt: skip
    images = getattr(transformers, kind.images)(**dict(kind.small))
    given: dict[str, Any] = {"image_processor": images, "tokenizer": library, **dict(kind.more)}
    if kind.processor == "Qwen2VLProcessor":
        given["video_processor"] = None
    made = _class(kind.processor, name=kind.template)
    made.check_argument_for_proper_class = lambda *_: None
    source = (TEMPLATES / f"{kind.template}.jinja").read_text()
    return made(**given, chat_template=source)


def _class(processor: str, name: str) -> Any:
    """A class of transformers, from its file where it asks for torchvision that it does not use."""
    if name != "pixtral":
        return getattr(transformers, processor)
    module = f"transformers.models.{name}.processing_{name}"
    path = Path(transformers.__file__).parent.joinpath("models", name, f"processing_{name}.py")
    spec = importlib.util.spec_from_file_location(f"{module}_alone", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    pil = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    known = {f"transformers.models.{name}.image_processing_{name}": pil, spec.name: loaded}
    with patch.dict(sys.modules, known):
        spec.loader.exec_module(loaded)
    return getattr(loaded, processor)


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def image(number: int) -> dict[str, Any]:
    return {"type": "image", "image": PICTURES[number]}


CHATS = {
    "one": [[image(0), text("What is this?")]],
    "after a word": [[text("See"), image(1), text("this")]],
    "side by side": [[image(0), image(1), text("Same?")]],
    "turns": [[image(0), text("a")], "b", [text("c "), image(2), image(1)]],
    "none": [[text("Hello")]],
}


def messages(turns: list[Any]) -> list[dict[str, Any]]:
    return [
        {"role": ("user", "assistant")[n % 2], "content": content}
        for n, content in enumerate(turns)
    ]


def processed(name: str, processor: Any, pictures: list[Image.Image]) -> list[Processed]:
    """What stands for images, by the oracle's word."""
    kind = KINDS[name]
    if name == "mllama":
        texts = [kind.token] * len(pictures)
    elif name == "idefics2":
        fake = "<fake_token_around_image>"
        texts = [fake + kind.token * 5 + fake] * len(pictures)
    else:
        images = [pictures] if name == "idefics3" else pictures
        given: Any = {"return_tensors": "pt"} if name != "pixtral" else {}
        if name == "idefics3":
            given["return_row_col_info"] = True
        inputs = processor.image_processor(images, **given) if pictures else {}
        texts = [processor.replace_image_token(inputs, n) for n in range(len(pictures))]
    seam = "<fake_token_around_image>" if name == "idefics2" else ""
    return [Processed({}, said, said.count(kind.token), seam=seam) for said in texts]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("chat", CHATS)
def test_the_ids_of_transformers(
    name: str, chat: str, folder: Path, tokenizer: HfTokenizer
) -> None:
    kind = KINDS[name]
    processor = oracle(kind, folder)
    listed = messages(CHATS[chat])
    shown = [
        m if not isinstance(m["content"], str) or name == "pixtral"
        else {**m, "content": [text(m["content"])]}
        for m in listed
    ]  # fmt: skip
    prompt = processor.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
    parts = [part for m in listed for part in m["content"] if isinstance(part, dict)]
    pictures = [part["image"] for part in parts if "image" in part]
    wanted = processor(
        images=[pictures] if pictures else None, text=[prompt], add_special_tokens=False
    )["input_ids"][0]
    template = ChatTemplate(processor.chat_template, bos="<s>", eos="</s>")
    pieces = template.prompt(listed, tokenizer, placeholder=Placeholder(kind.placeholder)).pieces
    seen = processed(name, processor, pictures)
    placed = place(pieces, seen, kind, tokenizer)
    assert list(placed.ids) == list(wanted)
    token = tokenizer.encode(kind.token, specials=True)[0]
    rows = [(run.image, run.offset + n) for run in placed.runs for n in range(run.stop - run.start)]
    assert rows == [(n, row) for n, one in enumerate(seen) for row in range(one.rows)]
    at = [i for run in placed.runs for i in range(run.start, run.stop)]
    assert at == [i for i, id_ in enumerate(placed.ids) if id_ == token]


def test_runs_of_an_image_and_of_neighbours(tokenizer: HfTokenizer) -> None:
    line = Processed({}, "[IMG][IMG][IMG_BREAK][IMG][IMG_END]", 3)
    pieces = [Piece("[IMG]"), Piece("[IMG]", content=True), Piece("[IMG]")]
    placed = place(pieces, [line, Processed({}, "[IMG]", 1)], KINDS["pixtral"], tokenizer)
    runs = (Run(0, 0, 2, 0), Run(0, 3, 4, 2), Run(1, 10, 11, 0))
    assert placed == Placed(placed.ids, placed.token, runs)
    side = place(
        [Piece("[IMG][IMG]")], [Processed({}, "[IMG]", 1)] * 2, KINDS["pixtral"], tokenizer
    )
    assert side.runs == (Run(0, 0, 1, 0), Run(1, 1, 2, 0))


def test_counts_that_differ(tokenizer: HfTokenizer) -> None:
    kind, one = KINDS["pixtral"], Processed({}, "[IMG]", 1)
    with pytest.raises(InvalidRequest, match="1 placeholders for 2 images"):
        place([Piece("[IMG]")], [one, one], kind, tokenizer)
    with pytest.raises(InvalidRequest, match=r"1 tokens .IMG. and images with 2 rows"):
        place([Piece("[IMG]")], [Processed({}, "[IMG]", 2)], kind, tokenizer)
    unknown = Kind("<pic>", "<pic>", "", "", "")
    with pytest.raises(UnsupportedModel, match="no token <pic>"):
        place([], [], unknown, tokenizer)


def test_a_token_of_images_is_special_where_only_config_json_says_so(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.decoder = decoders.ByteLevel()
    library.add_tokens(["<image>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"image_token_index": 2}')
    found = HfTokenizer.from_folder(tmp_path)
    assert found.encode("a <image>", specials=True) == [0, 2]
    assert 2 not in found.encode("a <image>")
