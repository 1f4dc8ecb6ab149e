"""`squall quantize`, and the commands of its page, run on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from squall import Model
from squall.cli.app import app
from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound, SquallError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/uqff.md").read_text()
COMMANDS = [
    line for text in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in text.splitlines()
]
CONFIG = {
    "vocab_size": 300, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "MODEL"
    torch.manual_seed(3)
    made = LlamaForCausalLM(LlamaConfig(**CONFIG))  # type: ignore[arg-type]
    made.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {"<s>": 0, "</s>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    library = Tokenizer(models.BPE(names, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ bos_token + m.content }}{% endfor %}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def invoke(*arguments: str | Path) -> Any:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def logits(path: Path, **options: Any) -> Any:
    with Model.open(path, context=64, threads=1, **options) as opened:
        assert opened.decode(opened.encode("Déjà vu")).endswith("Déjà vu")
        return opened.logits(opened.encode("One prompt, to compare", add_bos=False))


def test_the_page(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command of docs/uqff.md runs, in its order."""
    assert len(COMMANDS) == 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(model)
    for line in COMMANDS:
        arguments = shlex.split(line)[1:]
        if arguments[0] == "run":
            arguments += ["--context", "64", "--max-tokens", "4", "--raw", "Hello"]
        assert invoke(*arguments).exit_code == 0
    made = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.[gu][gq]*")}
    files = {"model-q4.gguf", "model-q4k.gguf", "model-q8_0.gguf"}
    assert made == {"quantized/model.uqff", *files}
    wanted = logits(model, isq="q4k")
    np.testing.assert_array_equal(logits(tmp_path / "quantized"), wanted)
    np.testing.assert_array_equal(logits(model, isq="q4k", write_uqff=tmp_path / "x.uqff"), wanted)
    found = logits(tmp_path / "quantized", from_uqff="model.uqff")
    np.testing.assert_array_equal(found, wanted)
    # Permuted rows sum up in another order, and activations of int8 jump.
    assert np.abs(logits(tmp_path / "model-q4.gguf") - wanted).max() < 0.05 * np.abs(wanted).max()


def test_report(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("1: {isq: HQQ4}\n")
    out = tmp_path / "m.uqff"
    done = invoke(
        "quantize", model, "--isq", "Q8_0", "--topology", tmp_path / "t.yaml", "-o", out, "--json"
    )
    matrices = json.loads(done.stdout)["matrices"]
    assert [item["format"] for item in matrices] == ["q8_0"] * 8 + ["hqq4"] * 7
    assert all(0.001 < item["rmse"] < 0.01 for item in matrices[:8])
    assert all(0.03 < item["rmse"] < 0.15 for item in matrices[8:])
    with pytest.raises(InvalidRequest, match="--force"):
        invoke("quantize", model, "--isq", "Q8_0", "-o", out)
    shown = invoke("quantize", model, "--isq", "Q8_0", "-o", out, "--force").stdout
    assert "8.50 bits a quantized weight" in shown


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-o", "m.bin", "--isq", "Q4K"], "must end in"),
        (["-o", "m.uqff"], "what to quantize to"),
        (["-o", "m.uqff", "--isq", "Q9"], "unknown quantization"),
        (["-o", "m.uqff", "--isq", "Q4K,q4k"], "twice"),
        (["-o", "m.uqff", "--isq", "Q4K", "--imatrix", "none.dat"], "none.dat"),
    ],
)
def test_wrong_arguments(
    model: Path, arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SquallError, match=problem):
        invoke("quantize", model, *arguments)
    assert list(tmp_path.iterdir()) == []


def old_imatrix(entries: dict[str, np.ndarray]) -> bytes:
    data = len(entries).to_bytes(4, "little")
    for name, values in entries.items():
        data += len(name).to_bytes(4, "little") + name.encode()
        data += (2).to_bytes(4, "little") + values.size.to_bytes(4, "little")
        data += (values * 2).astype("<f4").tobytes()
    return data


def gguf_imatrix(path: Path, entries: dict[str, np.ndarray]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    for name, values in entries.items():
        writer.add_tensor(f"{name}.in_sum2", (values * 4).astype(np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_imatrix(model: Path, rng: np.random.Generator, tmp_path: Path) -> None:
    """Both kinds of file say the same, and it changes what was named, nothing else."""
    entries = {"blk.0.ffn_up.weight": rng.uniform(0, 9, 256)}
    (tmp_path / "old.dat").write_bytes(old_imatrix(entries))
    gguf_imatrix(tmp_path / "new.gguf", entries)
    for number, imatrix in enumerate((None, "old.dat", "new.gguf")):
        extra = [] if imatrix is None else ["--imatrix", tmp_path / imatrix]
        out = tmp_path / str(number) / "m.uqff"
        invoke("quantize", model, "--isq", "Q4K", "-o", out, *extra)
    from safetensors.numpy import load_file

    plain, old, new = (load_file(tmp_path / f"{i}/m.uqff") for i in range(3))
    assert {k for k in old if (old[k] != plain[k]).any()} == {"6"}
    np.testing.assert_array_equal(new["6"], old["6"])


@pytest.mark.parametrize("at", [0, 4, 8, 30, 50])
def test_broken_imatrix(at: int, model: Path, tmp_path: Path) -> None:
    data = old_imatrix({"blk.0.ffn_up.weight": np.ones(256)})
    for broken in (data[:at], data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :]):
        (tmp_path / "x.dat").write_bytes(broken)
        try:
            invoke(
                "quantize", model, "--isq", "Q4K", "-o", tmp_path / "m.uqff", "--force",
                "--imatrix", tmp_path / "x.dat",
            )  # fmt: skip
        except InvalidCheckpoint:
            continue
        # A name, a count of calls or a finite number: it may be any.
        assert len(broken) == len(data)


def test_what_is_quantized_already_is_warned_of(model: Path, tmp_path: Path) -> None:
    """And only that: not the folder of floats."""
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    done = invoke("quantize", "-m", model, "--isq", "Q8_0", "-o", first)
    assert "warning" not in done.stderr
    done = invoke("quantize", "-f", first, "--isq", "Q4_K_M", "-o", second)
    assert f"warning: {first} is quantized already (q8_0)" in done.stderr
    assert second.is_file()
    with pytest.raises(InvalidRequest, match="give one of them"):
        invoke("quantize", model, "-f", first, "--isq", "Q4K", "-o", second)


def test_folders_with_several_uqff_files(model: Path, tmp_path: Path) -> None:
    invoke("quantize", model, "--isq", "Q4K,Q8_0", "-o", tmp_path / "m.uqff")
    with pytest.raises(ModelNotFound, match="2 UQFF files"):
        Model.open(tmp_path)
    with pytest.raises(ModelNotFound, match="no UQFF file"):
        Model.open(tmp_path, from_uqff="other.uqff")
    assert logits(tmp_path, from_uqff="m-q8_0.uqff").shape[1] == 300
    shown = json.loads(invoke("inspect", "--json", tmp_path / "m-q8_0.uqff").stdout)
    assert (shown["kind"], shown["runs"]) == ("uqff", True)
    with pytest.raises(InvalidRequest, match="needs isq or a topology"):
        Model.open(model, write_uqff=tmp_path / "z.uqff")
