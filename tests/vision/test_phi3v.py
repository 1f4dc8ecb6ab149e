"""Phi 3 Vision: CLIP's states, the HD transform and Phi 3 of transformers, put together here.

transformers has no class of it. What happens between the two is written down in the simplest way,
pixel by pixel and line by line, from what the makers' code says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import draw
from PIL import Image
from safetensors.torch import save_file
from seeing import TEXT, Seen, Seer, build, check_answers, check_rows, same_pixels, unfold, unmoved
from tiny_seers import FIRST, TEMPLATES, write_tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

from squall import Model, recipes
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.vision.phi3v import Phi3V

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
SECTIONS: dict[str, Any] = {
    "img_processor": {
        "name": "clip_vision_model", "model_name": "openai/clip-vit-large-patch14-336",
        "image_dim_out": 128, "num_img_tokens": 144,
    },
    "embd_layer": {
        "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
        "use_hd_transform": True, "with_learnable_separator": True,
    },
}  # fmt: skip
CLIP: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip


def whole_crops(image: Image.Image, num_crops: int) -> Image.Image:
    """The picture in a whole number of crops."""
    if image.width < image.height:
        turned = whole_crops(image.transpose(Image.Transpose.TRANSPOSE), num_crops)
        return turned.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    wide = max(n for n in range(1, num_crops + 1) if n * np.ceil(n / ratio) <= num_crops)
    resized = image.resize((336 * wide, int(336 * wide / ratio)), Image.Resampling.BILINEAR)
    missing = -resized.height % 336
    page = np.full((resized.height + missing, resized.width, 3), 255, np.uint8)
    page[missing // 2 : missing // 2 + resized.height] = np.asarray(resized)
    return Image.fromarray(page)


def tiles(image: Image.Image, num_crops: int) -> torch.Tensor:
    """[1 + crops, 3, 336, 336]: the whole first; and all in one."""
    bytes_ = torch.from_numpy(np.asarray(whole_crops(image, num_crops)).copy())
    pixels = bytes_.permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    whole = torch.nn.functional.interpolate(pixels[None], size=(336, 336), mode="bicubic")
    rows = [row.split(336, dim=2) for row in pixels.split(336, dim=1)]
    return torch.stack([whole[0], *(tile for row in rows for tile in row)])


def prepare(images: Sequence[Image.Image], num_crops: int, **_: Any) -> dict[str, torch.Tensor]:
    made = [tiles(image, num_crops) for image in images]
    sizes = [whole_crops(image, num_crops).size for image in images]
    return {
        "pixel_values": torch.cat(made),
        "crops": torch.tensor([[height // 336, width // 336] for width, height in sizes]),
    }


class Oracle(torch.nn.Module):
    """The model, with the makers' names of its tensors."""

    config_class = dict

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.clip = CLIPVisionModel(CLIPVisionConfig(**config["clip"]))
        self.text = Phi3ForCausalLM(Phi3Config(**config["text"]))
        wide, hidden = 4 * config["clip"]["hidden_size"], config["text"]["hidden_size"]
        self.image = config.get("image", 80)
        self.between = torch.nn.Parameter(torch.empty(wide))
        self.line = torch.nn.Parameter(torch.empty(wide))
        self.projection = torch.nn.Sequential(
            torch.nn.Linear(wide, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden)
        )

    def lines(self, grid: torch.Tensor) -> list[torch.Tensor]:
        """Squares of 2 x 2 patches, [lines, columns, channels], and what ends each line."""
        made = []
        for pair in grid.split(2):
            made += [square.flatten() for square in pair.split(2, dim=1)]
            made.append(self.line)
        return made

    def get_image_features(self, pixel_values: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
        states = self.clip(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        grids, rows = list(states.reshape(len(states), 24, 24, -1)), []
        for lines, columns in crops.tolist():
            whole, *parts = (grids.pop(0) for _ in range(1 + lines * columns))
            strips = [
                torch.cat(parts[i * columns : (i + 1) * columns], dim=1) for i in range(lines)
            ]
            rows += [*self.lines(torch.cat(strips)), self.between, *self.lines(whole)]
        return self.projection(torch.stack(rows))

    def forward(self, input_ids: torch.Tensor, **pixels: torch.Tensor) -> Any:
        embeds = self.text.model.embed_tokens(input_ids)
        if pixels:
            embeds[input_ids == self.image] = self.get_image_features(**pixels)
        return self.text(inputs_embeds=embeds)

    def save_pretrained(self, path: Path) -> None:
        names = {
            "clip.": "model.vision_embed_tokens.img_processor.vision_model.", "text.": "",
            "projection.": "model.vision_embed_tokens.img_projection.",
        }  # fmt: skip
        tensors = {
            "model.vision_embed_tokens.glb_GN": self.between[None, None].detach().clone(),
            "model.vision_embed_tokens.sub_GN": self.line[None, None, None].detach().clone(),
        }
        for name, tensor in self.state_dict().items():
            for prefix, theirs in names.items():
                if name.startswith(prefix):
                    inner = name.removeprefix(prefix).removeprefix("vision_model.")
                    tensors[theirs + inner] = tensor.clone()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        config = self.text.config.to_dict() | SECTIONS
        config |= {"architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v"}
        (path / "config.json").write_text(json.dumps(config))


CASE = Seer(
    "phi3v", Oracle,
    {"clip": CLIP | {"layer_norm_eps": 1e-5}, "text": TEXT | {"model_type": "phi3"}},
    Phi3V.of, partial(prepare, num_crops=2),
    {"num_crops": 2, "image_mean": MEAN, "image_std": STD, "num_img_tokens": 144},
    {"<|image|>": 80, "<s>": 1}, context=2048,
)  # fmt: skip


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(CASE, tmp_path_factory.mktemp("phi3v"))


@pytest.mark.parametrize(
    ("lines", "columns", "size"),
    [
        (1, 1, (50, 50)),
        (1, 2, (90, 45)),
        (2, 3, (600, 400)),
        (3, 2, (333, 500)),
        (1, 4, (80, 20)),
        (4, 1, (1, 4)),
    ],
)
def test_rows(seen: Seen, lines: int, columns: int, size: tuple[int, int]) -> None:
    most = lines * columns
    case = replace(CASE, pil=partial(prepare, num_crops=most))
    of = replace(seen, case=case, family=Phi3V.of({}, {"num_crops": most}))
    image = draw("text", *size)
    assert case.pixels([image])["crops"].tolist() == [[lines, columns]]
    check_rows(of, [image])
    rows = of.family.process(image).rows
    assert rows == (lines * columns + 1) * 144 + 1 + (lines + 1) * 12


def test_answers(seen: Seen) -> None:
    first, second = draw("gradient", 60, 40), draw("noise", 30, 80)
    check_answers(seen, [[1, 5, 6, 7]])
    check_answers(seen, [[1, 5, first, 6, second, 7]], cut=100)
    check_answers(seen, [[1, first, 6], [7, second, 8]], drawn=8)


def test_every_field_matters(seen: Seen) -> None:
    assert not unmoved(seen, draw("noise", 40, 40))


@pytest.mark.parametrize("num_crops", [1, 4])
def test_pixels(num_crops: int) -> None:
    family = Phi3V.of({}, {"num_crops": num_crops})
    same_pixels(family.process, lambda image: unfold(tiles(image, num_crops).numpy(), 14))


def test_many_crops() -> None:
    """As many as the makers' processor takes by default; of a picture that is one line high too."""
    family = Phi3V.of({}, {"num_crops": 16})
    assert family.process(draw("noise", 640, 480)).rows == (12 + 1) * 144 + 1 + (3 + 1) * 12
    assert family.process(Image.new("RGB", (20000, 1))).rows == (16 + 1) * 144 + 1 + 2 * 12


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("embd_layer", "hd_transform_order", "glb_sub"),
        ("embd_layer", "use_hd_transform", False),
        ("img_processor", "name", "siglip"),
        ("img_processor", "type_feature", "cls_patch"),
    ],
)
def test_what_is_not_known(seen: Seen, section: str, key: str, value: Any) -> None:
    config = dict(seen.checkpoint.metadata)
    config[section] = config[section] | {key: value}
    with pytest.raises(UnsupportedModel, match=rf"{section}\.{key} is {value!r}; only"):
        recipes.load(replace(seen.checkpoint, metadata=config))


def test_bad_files(seen: Seen) -> None:
    with pytest.raises(InvalidCheckpoint, match="num_crops is 0"):
        Phi3V.of({}, {"num_crops": 0})
    tensors = dict(seen.checkpoint.tensors)
    del tensors["model.vision_embed_tokens.sub_GN"]
    with pytest.raises(InvalidCheckpoint, match="sub_GN"):
        recipes.load(replace(seen.checkpoint, tensors=tensors))
    del tensors[
        "model.vision_embed_tokens.img_processor.vision_model.embeddings.patch_embedding.weight"
    ]
    with pytest.raises(InvalidCheckpoint, match="patch_embedding"):
        recipes.load(replace(seen.checkpoint, tensors=tensors))


def test_a_chat(tmp_path: Path) -> None:
    """With the makers' template: images by number, and a text's first token after each."""
    image = FIRST + 7
    config = dict(CASE.config) | {"image": image}
    config["text"] = config["text"] | {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    seen = build(replace(CASE, name="chat", config=config), tmp_path)
    write_tokenizer(tmp_path)
    template = (TEMPLATES / "phi-3-vision.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(template)
    first, second = draw("text", 70, 40), draw("gradient", 30, 30)
    parts: list[Any] = [{"type": "image", "image": first}, {"type": "image", "image": second}]
    with Model.open(tmp_path, weights="f32", kv_dtype="f32", threads=2) as model:
        chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}]}]
        ids = model.encode_chat(chat)
        generation = model.generate(chat, temperature=0, max_tokens=6, ignore_eos=True)
        generation.read()
        shown = model.decode(ids)
    rows = [Phi3V.of({}, CASE.processor).process(picture).rows for picture in (first, second)]
    starts = "".join("<|image|>" * count + "<s>\n" for count in rows)
    assert shown == f"<|user|>\n{starts}Which?<|end|>\n<|assistant|>\n"
    pixels = seen.case.pixels([first, second])
    with torch.no_grad():
        for drawn in generation.ids:
            logits = seen.model(torch.tensor([ids]), **pixels).logits[0, -1]
            assert int(logits.argmax()) == drawn
            ids = [*ids, drawn]
