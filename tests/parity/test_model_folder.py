"""`Model.open` on a folder as transformers saves it: tokenizer, chat, defaults, other commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from config_cases import CONFIG_CASES
from typer.testing import CliRunner

from squall import Model
from squall.cli.app import app
from squall.errors import SquallError

CASE = next(case for case in CONFIG_CASES if case.name == "llama-3")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The folder, and what transformers makes of it: model and tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    library = Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>",
        chat_template="{% for m in messages %}{{ bos_token + m.content }}{% endfor %}",
    )  # fmt: skip
    case = replace(CASE, config=CASE.config | {"vocab_size": 300, "eos_token_id": 1})
    folder, model = tmp_path_factory.mktemp("model"), tiny.build(case)
    model.save_pretrained(folder, max_shard_size="150KB")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    return folder, model, tokenizer


def test_text_in_and_out(saved: tuple[Path, Any, Any]) -> None:
    import torch

    folder, wanted, tokenizer = saved
    with Model.open(folder, context=128, threads=1, kv_dtype="f32") as model:
        ids = model.encode("Déjà vu, again", add_bos=False)
        assert ids == tokenizer.encode("Déjà vu, again", add_special_tokens=False)
        assert model.decode(ids) == "Déjà vu, again"
        chat = model.encode_chat([{"role": "user", "content": "Hi"}])
        assert chat == [0, *tokenizer.encode("Hi", add_special_tokens=False)]
        made = model.generate(ids, max_tokens=12)
        text = made.read()
        with torch.no_grad():
            out = wanted.generate(
                torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=1
            )
        new = out[0][len(ids) :].tolist()
        assert made.ids == [token for token in new if token != 1]
        assert text == tokenizer.decode(made.ids)


def test_inspect(saved: tuple[Path, Any, Any]) -> None:
    folder, wanted, _ = saved
    shown = CliRunner().invoke(app, ["inspect", "--json", str(folder)])
    report = json.loads(shown.stdout)
    assert (report["kind"], report["runs"], report["obstacle"]) == ("folder", True, None)
    assert report["parameters"] == sum(weight.numel() for weight in wanted.parameters())
    assert "LlamaForCausalLM" in CliRunner().invoke(app, ["inspect", str(folder)]).stdout


def test_a_folder_without_a_tokenizer(saved: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, _, _ = saved
    for file in folder.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(SquallError, match=r"tokenizer\.json"):
        Model.open(tmp_path)
