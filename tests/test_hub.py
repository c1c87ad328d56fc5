"""Hub ids: fetched from a stand-in for the hub on this machine, and one clear line when it cannot be reached."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("huggingface_hub")

CONFIGS = Path(__file__).parent.parent / "costmodel" / "model_configs"
REPOSITORY, COMMIT = "Someone/Qwen2.5-VL-Small-Pictures", "0" * 40
FILES = {
    "config.json": (CONFIGS / "qwen2.5-vl-7b.json").read_bytes(),
    "preprocessor_config.json": json.dumps({"min_pixels": 3136, "max_pixels": 100352}).encode(),
    "model.safetensors": b"weights that nobody asked for",
}
PROGRAM = """
import sys
from costmodel import load_model
try:
    model = load_model(sys.argv[1])
    print(model.name, model.family, model.media.image(1920, 1080).visual_tokens)
except Exception as error:
    print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """One repository."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, *, with_body):
        self.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if self.path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            tree = [{"type": "file", "path": file, "oid": "0", "size": len(data)} for file, data in FILES.items()]
            self._send(json.dumps(tree).encode(), "application/json", with_body=with_body)
        elif self.path.startswith(f"/api/models/{REPOSITORY}"):
            listing = {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": file} for file in FILES]}
            self._send(json.dumps(listing).encode(), "application/json", with_body=with_body)
        elif self.path.startswith(f"/{REPOSITORY}/resolve/") and name in FILES:
            self._send(FILES[name], "application/octet-stream", with_body=with_body)
        else:
            self.send_error(404)

    def _send(self, body, kind, *, with_body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def load(name, endpoint, home):
    """Load a model in a process of its own: the hub's address is read when it is imported."""
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PATH": "", "PYTHONPATH": str(CONFIGS.parents[1])}
    command = [sys.executable, "-c", PROGRAM, name]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60).stdout


def test_a_hub_id_loads_with_its_processor_file(hub, tmp_path):
    printed = load(REPOSITORY, hub, tmp_path)
    assert printed.split()[:2] == [REPOSITORY, "qwen2_5_vl"], printed
    assert int(printed.split()[2]) <= 100352 / 28**2
    assert not any("safetensors" in path for path in Hub.asked)


def test_an_unknown_hub_id_is_one_line(hub, tmp_path):
    printed = load("Someone/Nothing", hub, tmp_path)
    assert printed.startswith("ValueError cannot fetch 'Someone/Nothing' from the hub")
    assert printed.count("\n") == 1


def test_a_hub_that_does_not_answer_is_one_line(tmp_path):
    printed = load(REPOSITORY, "http://127.0.0.1:9", tmp_path)
    assert printed.startswith("ValueError cannot fetch")
    assert printed.count("\n") == 1
