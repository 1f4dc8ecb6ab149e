"""The commands of mistral.rs's README and pages, word by word but for the program's name.

What is a model of the hub there is a folder of that name here, with a tiny model.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import painter
import pytest
from fastapi.testclient import TestClient
from pictures import draw
from tiny_models import TEMPLATE, write_adapter, write_folder, write_gguf, write_xlora
from tiny_seers import write_seer
from typer.testing import CliRunner, Result

from squall import ChatCompletionRequest, Runner, TemplateError, Which
from squall.cli.serve import server
from squall.diffusion.model import ImageModel
from squall.server import run
from squall.server.app import create_app

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ZEPHYR, ORDER = "HuggingFaceH4/zephyr-7b-beta", "orderings/xlora-paper-ordering.json"
ZEPHYR_GGUF = "-m TheBloke/zephyr-7B-beta-GGUF -f zephyr-7b-beta.Q5_0.gguf"
PHI3, PHI_MOE = "microsoft/Phi-3.5-mini-instruct", "microsoft/Phi-3.5-MoE-instruct"
GGUF = "-m bartowski/Phi-3.5-mini-instruct-GGUF -f Phi-3.5-mini-instruct-Q4_K_M.gguf"
LLAMA = "lamm-mit/Cephalo-Llama-3.2-11B-Vision-Instruct-128k"
PHI3V, QWEN = "microsoft/Phi-3.5-vision-instruct", "Qwen/Qwen2-VL-2B-Instruct"
CHATS = [
    f"-i plain -m {PHI3} -a phi3",
    f"-i plain -m {PHI_MOE} -a phi3.5moe",
    "--token-source none -i plain -m microsoft/Phi-3-mini-128k-instruct -a phi3",
    "-i plain -m microsoft/Phi-3-mini-128k-instruct -a phi3",
    f"-i plain -m {PHI3}",
    f"-i plain -m {PHI3} -d f32",
    f"-i --isq Q4K plain -m {PHI3} -a phi3",
    f"-i plain -m {PHI3} -a phi3 --topology topologies/isq.yml",
    f"-i --isq HQQ8 plain -m {PHI_MOE} -o moqe",
    f"--isq Q4K -s 5 -i plain -m {PHI3} -w phi3.5-mini-instruct-q4k.uqff",
    f"-i vision-plain -m {LLAMA} -a vllama",
    f"-i vision-plain -m {PHI3V} -a phi3v -d f32",
    f"-i --isq Q4K vision-plain -m {LLAMA} -a vllama",
    f"-i vision-plain -m {QWEN} -a qwen2vl --max-edge 500",
    "-i toml -f toml-selectors/vision.toml",
    "-i toml -f toml-selectors/plain.toml",
    "-i toml -f toml-selectors/anymoe_lora.toml",
    "-i toml -f toml-selectors/lora.toml",
]
SERVERS = [
    "--port 1234 plain -m . -a mistral",
    f"gguf {GGUF} -t {PHI3}",
    f"gguf {GGUF}",
    "gguf -m path/to/files -f Phi-3.5-mini-instruct-Q4_K_M.gguf",
    "gguf -m path/to/files -f Phi-3.5-mini-instruct-Q4_K_M.gguf --topology topologies/devices.yml",
    "gguf -m path/to/files -f 'a file.gguf'",
    "--chat-template ../../../templates/own.json gguf -m . -f Phi-3.5-mini-instruct-Q4_K_M.gguf",
    f"--port 1234 plain -m {PHI_MOE} -a phi3.5moe",
    "--port 1234 toml -f toml-selectors/gguf.toml",
    "--port 1234 --log output.txt gguf -t HuggingFaceH4/zephyr-7b-beta "
    "-m TheBloke/zephyr-7B-beta-GGUF -f zephyr-7b-beta.Q5_0.gguf",
    f"--port 1234 --throughput --max-seqs 2 --no-kv-cache --prefix-cache-n 0 plain -m {PHI3}",
    f"--port 1234 --pa-ctxt-len 512 --pa-blk-size 32 --no-paged-attn -n 0 plain -m {PHI3}",
    f"--port 1234 --pa-gpu-mem 8 --pa-blk-size 8 plain -m {PHI3}",
    f"--port 1234 vision-plain -m {PHI3V} -a phi3v",
    f"--port 1234 vision-plain -e 300 -m {QWEN} -a qwen2vl",
    f"--port 1234 x-lora -o {ORDER} -x lamm-mit/x-lora",
    f"--port 1234 x-lora -o {ORDER} -x lamm-mit/x-lora -m {ZEPHYR} -a mistral "
    "--tgt-non-granular-index 2",
    f"--port 1234 lora -m {ZEPHYR} -o {ORDER} -a lamm-mit/x-lora --arch mistral",
    f"--port 1234 --isq Q8_0 lora -o {ORDER} -a lamm-mit/x-lora",
    f"--port 1234 x-lora-gguf -o {ORDER} -t {ZEPHYR} {ZEPHYR_GGUF} -x lamm-mit/x-lora",
    f"--port 1234 lora-gguf -o {ORDER} {ZEPHYR_GGUF} -a lamm-mit/x-lora",
]
FLUX = "black-forest-labs/FLUX.1-schnell"
PICTURES = [
    f"--port 1234 diffusion-plain -m {FLUX} -a flux",
    f"-i diffusion-plain -m {FLUX} -a flux",
    f"-i diffusion-plain -m {FLUX} -a flux-offloaded",
]
FILES = {
    "toml-selectors/gguf.toml": """
        [model]
        tok_model_id = "mistralai/Mistral-7B-Instruct-v0.1"
        quantized_model_id = "TheBloke/zephyr-7B-beta-GGUF"
        quantized_filename = "zephyr-7b-beta.Q5_0.gguf"
        """,
    "toml-selectors/plain.toml": f"""
        no_kv_cache = true
        [model]
        model_id = "{PHI3}"
        arch = "phi3"
        """,
    "toml-selectors/vision.toml": f"""
        [model]
        model_id = "{QWEN}"
        arch = "qwen2vl"
        max_edge = 500
        """,
    "toml-selectors/lora.toml": """
        [model]
        model_id = "HuggingFaceH4/zephyr-7b-beta"
        adapters_model_id = "lamm-mit/x-lora"
        order = "orderings/xlora-paper-ordering.json"
        """,
    ORDER: f'{{"base_model_id": "{ZEPHYR}", "order": ["adapter_1", "adapter_2"]}}',
    "examples/amoe.json": '{"rows": [{"prompt": "a", "expert": 0}, {"prompt": "b", "expert": 1}]}',
    "toml-selectors/anymoe_lora.toml": """
        [model]
        model_id = "HuggingFaceH4/zephyr-7b-beta"
        arch = "mistral"
        [anymoe]
        dataset_json = "examples/amoe.json"
        prefix = "model.layers"
        mlp = "mlp"
        model_ids = ["typeof/zephyr-7b-beta-lora"]
        layers = [0, 1]
        [anymoe.config]
        hidden_size = 64
        epochs = 2
        expert_type = { lora_adapter = { rank = 4, alpha = 16, target_modules = ["up_proj"] } }
        """,
    "topologies/isq.yml": "0-1:\n  isq: Q3K\n1-2:\n  isq: Q8_0\n",
    "topologies/devices.yml": "0-2:\n  device: cpu\n",
    "templates/own.json": f'{{"chat_template": {TEMPLATE.strip()!r}}}'.replace("'", '"'),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands name."""
    root = tmp_path_factory.mktemp("seed")
    phi3 = write_folder(root / PHI3, "Phi3ForCausalLM")
    (root / "microsoft/Phi-3-mini-128k-instruct").symlink_to(phi3)
    write_folder(root / PHI_MOE, "PhimoeForCausalLM", num_local_experts=4)
    for name, model in {"vllama": LLAMA, "phi3v": PHI3V, "qwen2vl": QWEN}.items():
        write_seer(root / model, name)
    draw("text", 80, 60).save(root / "picture.png")
    zephyr = write_folder(root / ZEPHYR, "MistralForCausalLM")
    (root / "here").symlink_to(zephyr)
    (root / "mistralai").mkdir()
    (root / "mistralai/Mistral-7B-Instruct-v0.1").symlink_to(zephyr)
    name = "Phi-3.5-mini-instruct-Q4_K_M.gguf"
    file = write_gguf(root / "bartowski/Phi-3.5-mini-instruct-GGUF" / name, phi3)
    (root / "path/to/files").mkdir(parents=True)
    for known in (name, "a file.gguf"):
        (root / "path/to/files" / known).symlink_to(file)
    write_gguf(root / "TheBloke/zephyr-7B-beta-GGUF/zephyr-7b-beta.Q5_0.gguf", zephyr)
    write_xlora(root / "lamm-mit/x-lora", zephyr, ["adapter_1", "adapter_2"], ZEPHYR)
    write_adapter(root / "typeof/zephyr-7b-beta-lora", zephyr, target_modules=["up_proj"])
    painter.write_model(root / FLUX)
    for path, text in FILES.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.fixture
def answers(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """In the folder; what is served is asked one question, without a port of this machine."""
    monkeypatch.chdir(models)
    ports: list[int] = []
    found: list[dict[str, Any]] = []

    def listen(_: str, port: int) -> socket.socket:
        ports.append(port)
        return socket.socket()

    def serve_on(model: Any, options: Any, listener: socket.socket, **_: Any) -> int:
        listener.close()
        with TestClient(create_app(model, options), base_url="http://127.0.0.1") as client:
            assert client.get("/health").text == "OK"
            body = {"messages": "Hi", "max_tokens": 3, "temperature": 0}
            answer = client.post("/v1/chat/completions", json=body).json()
        found.append(answer | {"port": ports[-1]})
        return 0

    monkeypatch.setattr(run, "listen", listen)
    monkeypatch.setattr(run, "serve_on", serve_on)
    handler = signal.getsignal(signal.SIGTERM)
    yield found
    signal.signal(signal.SIGTERM, handler)


def invoke(command: str) -> Result:
    sees = "vision" in command
    said = "\\image picture.png What is shown here?\nAnd where?\n" if sees else "Hi\n"
    return CliRunner().invoke(server, shlex.split(command), input=f"{said}\\exit\n")


@pytest.mark.parametrize("command", CHATS)
@pytest.mark.usefixtures("answers")
def test_chats(command: str) -> None:
    done = invoke(command)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "answer tokens" in done.stderr
    assert ("[image 1: picture.png, 80 x 60, " in done.stderr) == ("vision" in command)
    if "-w" in command:
        made = Path("phi3.5-mini-instruct-q4k.uqff")
        assert made.is_file()
        reopened = invoke(f"-s 5 -i plain -m {PHI3} -f {made}")
        assert reopened.exit_code == 0, (reopened.output, reopened.exception)
        assert reopened.stdout == done.stdout


@pytest.mark.parametrize("command", SERVERS)
def test_servers(
    command: str, answers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "-m . " in command:
        monkeypatch.chdir("path/to/files" if "gguf" in command else "here")
    done = invoke(command)
    assert done.exit_code == 0, (done.output, done.exception)
    (answer,) = answers
    assert answer["usage"]["completion_tokens"] in (1, 2, 3)
    assert answer["port"] == (1234 if "--port 1234" in command else 8080)
    if "--log" in command:
        assert "Hi" in Path("output.txt").read_text()


@pytest.mark.parametrize("command", PICTURES)
@pytest.mark.usefixtures("answers")
def test_pictures(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: Path
) -> None:
    monkeypatch.setattr(ImageModel, "open_with", painter.opened)
    seen: list[Any] = []

    def serve_on(model: Any, options: Any, listener: socket.socket, **_: Any) -> int:
        listener.close()
        with TestClient(create_app(model, options), base_url="http://127.0.0.1") as client:
            body = {"prompt": "a cat", "height": 32, "width": 64, "response_format": "B64Json"}
            seen.append(client.post("/v1/images/generations", json=body).json())
        return 0

    monkeypatch.setattr(run, "serve_on", serve_on)
    if "-i" in command:
        (tmp_path / "black-forest-labs").symlink_to(models / "black-forest-labs")
        monkeypatch.chdir(tmp_path)
    said = "\\size 64x32\na cat\n\\help\n\\exit\n"
    done = CliRunner().invoke(server, shlex.split(command), input=said)
    assert done.exit_code == 0, (done.output, done.exception)
    if "-i" in command:
        saved = tmp_path / done.stdout.strip()
        assert saved.read_bytes().startswith(b"\x89PNG")
        assert "\\exit" in done.stderr
    else:
        ((picture,),) = (answer["data"] for answer in seen)
        assert picture["b64_json"]


def test_a_file_with_tokenizer_and_template_of_another_model(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = shutil.copytree(models / ZEPHYR, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    file = write_gguf(tmp_path / "bare.gguf", bare)
    whole = models / "TheBloke/zephyr-7B-beta-GGUF/zephyr-7b-beta.Q5_0.gguf"

    def answer(file: Path, lender: object = None) -> Any:
        asked = ChatCompletionRequest("Hi", "m", True, max_tokens=5, temperature=0)
        which = Which.GGUF(str(file.parent), file.name, None if lender is None else str(lender))
        with Runner(which) as runner:
            return runner.send_chat_completion_request(asked).choices

    with pytest.raises(TemplateError):
        answer(file)
    assert answer(file, models / ZEPHYR) == answer(whole, models / ZEPHYR)
    (bare / "tokenizer.json").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert answer(whole, bare) == answer(whole, "not/here") == answer(whole)
    assert "the model's own tokenizer is used: not/here" in caplog.text


def test_help_names_the_kinds() -> None:
    text = invoke("--help").stdout
    assert all(word in text for word in ("plain", "gguf", "ggml", "toml", "lora", "vision-plain"))
    assert "diffusion-plain" in text
