"""An export in tools of transformers: pipelines, its server, Auto classes; this package cannot be imported there."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from openai import OpenAI

from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from tests.end_to_end import encoded
from tests.exported_models import export_to, steered_model, task_sound

pytestmark = pytest.mark.slow

_AS_WHERE_IT_IS_NOT_INSTALLED = "import sys; sys.modules['mowe_ray'] = None; "
_PIPELINE = """
import json
import torch
from transformers import AutoModelForMultimodalLM, pipeline
folder, clip = sys.argv[1:]
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
answer = pipeline("any-to-any", model=folder, trust_remote_code=True)
turn = {"role": "user", "content": [{"type": "audio", "path": clip}, {"type": "text", "text": "What is it?"}]}
options = {"max_new_tokens": 8, "return_full_text": False}
one, again = answer(text=[turn], **options), answer(text=[[turn], [turn]], **options)
inputs = answer.processor.apply_chat_template([turn], tokenize=True, return_dict=True, add_generation_prompt=True)
tokens = model.eval().generate(**inputs, max_new_tokens=8)
print(json.dumps({
    "pipeline": one[0]["generated_text"],
    "batch": [found[0]["generated_text"] for found in again],
    "generate": answer.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0],
    "module": type(model).__module__,
}))
"""
_SERVER = "from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = export_to(tmp_path_factory.mktemp("export"), steered_model(2))
    (folder / "clip.wav").write_bytes(encoded(task_sound(1, 0, 2), "WAV", subtype="FLOAT"))
    return folder


@pytest.fixture(scope="module")
def wanted(export: Path) -> str:
    model, processor = MoweForConditionalGeneration.from_pretrained(export), MoweProcessor.from_pretrained(export)
    inputs = processor(["What is it?"], [[task_sound(1, 0, 2)]])
    with torch.inference_mode():
        tokens = model.eval().generate(**inputs, max_new_tokens=8)
    return str(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])


def environment(folder: Path) -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    return {"PATH": os.environ["PATH"], "HOME": str(folder), **quiet}


def test_pipelines_and_auto_classes_answer_alike(export: Path, wanted: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AS_WHERE_IT_IS_NOT_INSTALLED + _PIPELINE, export, export / "clip.wav"],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["module"].startswith("transformers_modules.")
    assert [found["pipeline"], *found["batch"], found["generate"]] == [wanted] * 4
    assert "is not supported" not in done.stderr


@contextmanager
def transformers_serve(export: Path, folder: Path) -> Iterator[str]:
    """Run `transformers serve` with an export; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(export), "--trust-remote-code", "--device", "cpu", "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", _AS_WHERE_IT_IS_NOT_INSTALLED + _SERVER, *arguments],
            cwd=folder, env=environment(folder), stdout=log, stderr=log,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, (folder / "server.log").read_text()
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


def test_the_server_of_transformers_answers(export: Path, wanted: str, tmp_path: Path) -> None:
    data = base64.b64encode((export / "clip.wav").read_bytes()).decode()
    content = [
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        {"type": "text", "text": "What is it?"},
    ]
    with transformers_serve(export, tmp_path) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
        asked = {"model": str(export), "messages": [{"role": "user", "content": content}], "max_tokens": 8}
        whole = client.chat.completions.create(**asked)
        streamed = "".join(
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
        )
    assert whole.choices[0].message.content == wanted
    assert streamed == wanted
