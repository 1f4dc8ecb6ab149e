"""What images cost: a tower against transformers' in float32, a second turn, and who waits.

    python bench/vision.py --rounds 5

The model is LLaVA's kind with random weights: a tower of CLIP-L/336's size, unless flags say
otherwise, and a language model. `tower` has the seconds of an image by transformers (torch, as many
threads) and by Squall with float weights and quantized, in alternating rounds, and the ratios.
`turns` has the time to the first token of a question about a new image, of another one about the
same, and of a text as long; and how many images the tower read for each. `gap` has the gaps between
tokens of running answers, in ms, before and while a new image arrives, with its time to the first
token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from squall import Model
from squall.engine.request import Piece, Request
from squall.engine.sampling import Sampling

# Letters alone: what is half of a character is told late.
LETTERS = Sampling(temperature=0, logit_bias=dict.fromkeys(range(67, 92), 100.0))
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
)


def config(given: argparse.Namespace) -> dict[str, Any]:
    """A config.json of LLaVA."""
    tower = {
        "model_type": "clip_vision_model", "hidden_size": given.tower_hidden,
        "intermediate_size": 4 * given.tower_hidden, "num_hidden_layers": given.tower_layers,
        "num_attention_heads": given.tower_hidden // 64, "image_size": given.image_size,
        "patch_size": 14,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": given.hidden,
        "intermediate_size": 4 * given.hidden, "num_hidden_layers": given.layers,
        "num_attention_heads": given.hidden // 64, "num_key_value_heads": given.hidden // 256,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": 258, "vision_config": tower, "text_config": text,
    }  # fmt: skip


def write(folder: Path, given: argparse.Namespace) -> Path:
    """The model as a folder: a tower in float32, a language model in float16."""
    made = config(given)
    rng, tensors = np.random.default_rng(1), {}

    def add(name: str, *shape: int, dtype: str = "f4") -> None:
        values = rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
        tensors[name] = (values if len(shape) > 1 else 1 + 0.1 * values).astype(dtype)

    tower, text = made["vision_config"], made["text_config"]
    wide, side = tower["hidden_size"], tower["image_size"] // tower["patch_size"]
    inner = tower["intermediate_size"]
    add("vision_tower.embeddings.class_embedding", wide)
    add("vision_tower.embeddings.patch_embedding.weight", wide, 3, 14, 14)
    add("vision_tower.embeddings.position_embedding.weight", side**2 + 1, wide)
    for norm in ("pre_layrnorm", "post_layernorm"):
        add(f"vision_tower.{norm}.weight", wide), add(f"vision_tower.{norm}.bias", wide)
    for layer in range(tower["num_hidden_layers"]):
        stem = f"vision_tower.encoder.layers.{layer}."
        sizes = {f"self_attn.{p}_proj": (wide, wide) for p in ("q", "k", "v", "out")}
        for name, shape in (sizes | {"mlp.fc1": (inner, wide), "mlp.fc2": (wide, inner)}).items():
            add(f"{stem}{name}.weight", *shape), add(f"{stem}{name}.bias", shape[0])
        for norm in ("layer_norm1", "layer_norm2"):
            add(f"{stem}{norm}.weight", wide), add(f"{stem}{norm}.bias", wide)
    hidden, width = text["hidden_size"], text["intermediate_size"]
    for name, shape in (("linear_1", (hidden, wide)), ("linear_2", (hidden, hidden))):
        add(f"multi_modal_projector.{name}.weight", *shape)
        add(f"multi_modal_projector.{name}.bias", shape[0])
    kv = text["num_key_value_heads"] * 64
    add("language_model.model.embed_tokens.weight", text["vocab_size"], hidden, dtype="f2")
    add("language_model.lm_head.weight", text["vocab_size"], hidden, dtype="f2")
    add("language_model.model.norm.weight", hidden)
    for layer in range(text["num_hidden_layers"]):
        stem = f"language_model.model.layers.{layer}."
        sizes = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden),
            "mlp.down_proj": (hidden, width),
        }  # fmt: skip
        for name, shape in sizes.items():
            add(f"{stem}{name}.weight", *shape, dtype="f2")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{stem}{norm}.weight", hidden)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(made))
    size = given.image_size
    crop = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(crop))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One of bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    library = Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<image>", special=True)])
    library.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    return Image.fromarray(noise).resize((640, 480))


def theirs(folder: Path, threads: int) -> Callable[[Image.Image], Any]:
    """The tower and the projector by transformers, in float32."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    made = json.loads((folder / "config.json").read_text())
    made["text_config"] |= {"num_hidden_layers": 1}
    kind = transformers.LlavaForConditionalGeneration
    model = kind(transformers.LlavaConfig(**made)).eval().float()
    size = made["vision_config"]["image_size"]
    pixels = torch.randn(1, 3, size, size)

    def run(_: Image.Image) -> None:
        with torch.no_grad():
            model.get_image_features(pixels, vision_feature_layer=-2)

    return run


def tower(folder: Path, given: argparse.Namespace) -> None:
    """Seconds of an image, in alternating rounds."""
    kinds: dict[str, Callable[[Image.Image], Any]] = {}
    models = []
    for name, isq in (("floats", None), ("q8_0", "Q8_0")):
        model = Model.open(folder, context=1024, isq=isq)
        models.append(model)
        sight = model.sight
        assert sight is not None
        kinds[name] = lambda image, sight=sight: sight.rows(sight.process(image))
    kinds["transformers"] = theirs(folder, models[0].executor.threads)
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(given.rounds + 1):
        for name, run in kinds.items():
            start = time.perf_counter()
            run(picture(number))
            if number:
                found[name].append(time.perf_counter() - start)
    for model in models:
        model.close()
    told: dict[str, Any] = {"case": "tower"}
    told |= {f"{name}_s": round(median(seconds), 3) for name, seconds in found.items()}
    for name in ("floats", "q8_0"):
        pairs = zip(found["transformers"], found[name], strict=True)
        told[f"{name}_ratio"] = round(median(a / b for a, b in pairs), 2)
    print(json.dumps(told), flush=True)


def asked(model: Model, text: str, *images: Image.Image, tokens: int = 1) -> Request:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return model.request(model.chat_prompt(chat), LETTERS, tokens)


def first_token(model: Model, ask: Callable[[], Request]) -> float:
    """Seconds until an answer begins, the tower's among them."""
    times: list[float] = []
    start = time.perf_counter()

    def sink(_: Piece) -> None:
        times.append(time.perf_counter() - start)

    model.engine.submit(ask(), sink)
    while not times:
        time.sleep(0.001)
    return times[0]


def turns(model: Model, rounds: int) -> None:
    sight = model.sight
    assert sight is not None
    found: dict[str, list[float]] = {"new": [], "again": [], "text": []}
    read = dict.fromkeys(found, 0)
    for number in range(rounds + 1):
        image, length = picture(100 + number), 40
        question = chr(65 + number % 26) * length
        asks = {
            "new": (question, image),
            "again": (f"{question} {question}", image),
            # As many tokens as the second question has that are not cached.
            "text": (f"{number} {question[:-3]} {question}",),
        }
        for name, parts in asks.items():
            before = sight.encoded
            seconds = first_token(model, partial(asked, model, *parts))
            if number:
                found[name].append(seconds)
                read[name] += sight.encoded - before
    told: dict[str, Any] = {"case": "turns", "read": read}
    told |= {f"{name}_ms": round(1000 * median(each), 1) for name, each in found.items()}
    print(json.dumps(told), flush=True)


def gap(model: Model, streams: int, images: int) -> None:
    """Gaps in running answers while images arrive, one after the other."""
    times: list[list[float]] = [[] for _ in range(streams)]

    def listener(number: int) -> Callable[[Piece], None]:
        def sink(piece: Piece) -> None:
            times[number] += [time.perf_counter()] * len(piece.ids)

        return sink

    replies = []
    for number in range(streams):
        one = Request(ids=[40 + number, *range(10, 42)], sampling=LETTERS, ignore_eos=True)
        replies.append(model.engine.submit(one, listener(number)))
    while not all(len(each) > 3 for each in times):
        time.sleep(0.01)
    begun = time.perf_counter()
    # A small model would be done before an image comes.
    while time.perf_counter() - begun < 1 and max(map(len, times)) < model.context // 4:
        time.sleep(0.001)
    calm, firsts = time.perf_counter(), list[float]()

    def arrive() -> None:
        for number in range(images):
            image = picture(1000 + number)
            firsts.append(first_token(model, partial(asked, model, "What?", image)))

    thread = Thread(target=arrive)
    thread.start()
    thread.join()
    end = time.perf_counter()
    for reply in replies:
        reply.cancel()

    def gaps(start: float, stop: float) -> dict[str, float]:
        pairs = [pair for each in times for pair in pairwise(each)]
        found = sorted(1000 * (b - a) for a, b in pairs if b > start and a < stop)
        p99 = found[min(int(len(found) * 0.99), len(found) - 1)]
        return {
            "median": round(median(found), 1),
            "p99": round(p99, 1),
            "most": round(found[-1], 1),
        }

    told = {"case": "gap", "streams": streams, "calm_ms": gaps(begun, calm)}
    told |= {"image_ms": gaps(calm, end), "first_token_ms": [round(1000 * s) for s in firsts]}
    print(json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--tower-hidden", type=int, default=1024)
    parser.add_argument("--tower-layers", type=int, default=24)
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--isq", default="Q4K", help="of the model of `turns` and `gap`")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name), given)
        tower(folder, given)
        with Model.open(folder, context=2048, isq=given.isq) as model:
            turns(model, given.rounds)
            gap(model, given.streams, given.images)


if __name__ == "__main__":
    main()
