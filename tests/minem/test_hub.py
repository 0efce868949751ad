"""The hub, played by a server on this machine: what is downloaded, with which token, and the sentences of its refusals.

    python -m pytest tests/minem/test_hub.py

huggingface_hub itself talks to the server, in a child process, since it reads HF_ENDPOINT when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import minem
from minem.errors import UserError
from minem.hub import download

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROW = {
    "question_stem": "What do plants need?",
    "choices": {"text": ["light", "soup"], "label": ["A", "B"]},
    "answerKey": "A",
}
REFUSALS = {  # path of the repository -> (status, error code, error message), as the hub sends them
    "meta-llama/Llama-3.2-3B-Instruct": (403, "GatedRepo", "Access to this model is restricted."),
    "allenai/ai2_arc": (401, "GatedRepo", "Access to this dataset is restricted."),
    "nobody/nothing": (401, "RepoNotFound", "Repository not found"),
    "someone/disabled": (403, "", "Access to this resource is disabled."),
    "someone/token": (401, "", "Invalid credentials in Authorization header"),
    "someone/broken": (418, "", "Out of order"),
}
# A child evaluates lines of Python and prints the result or the sentence of each.
CHILD = """
import json, sys
from minem.data.tasks import load_task
from minem.errors import UserError

def resolve(name):
    from minem.model.weights import resolve  # imported late: most children need no torch
    return resolve(name)

for line in sys.stdin:
    try:
        answer = repr(eval(line))
    except UserError as error:
        answer = f"UserError: {error}"
    print("ANSWER " + json.dumps(answer), flush=True)
"""


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub's API for one dataset with more files than a task needs."""

    files: dict[str, bytes]
    seen: list[tuple[str, str, str | None]]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.seen.append((self.command, path, self.headers.get("Authorization")))
        refusal = next((answer for name, answer in REFUSALS.items() if name in path), None)
        prefix = f"datasets/allenai/openbookqa/resolve/{COMMIT}/"
        if refusal:
            status, code, message = refusal
            self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message})
        elif path == f"api/datasets/allenai/openbookqa/tree/{COMMIT}":
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            self.answer(200, json.dumps(listing).encode())
        elif path == "api/datasets/allenai/openbookqa/revision/main":
            self.answer(200, json.dumps({"id": "allenai/openbookqa", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith("api/datasets/allenai/openbookqa/revision/"):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif path.startswith(prefix):
            content = self.files[path.removeprefix(prefix)]
            etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.answer(200, content, etag)
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    names = ["train", "validation", "test"]
    Hub.files = {}
    for split in names:  # contents that differ: the client fetches one content once
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "id": split}]), folder / "rows.parquet")
        Hub.files[f"main/{split}-00000-of-00001.parquet"] = (folder / "rows.parquet").read_bytes()
    Hub.files |= {f"additional/{split}-00000-of-00001.parquet": b"not needed" for split in names}
    Hub.files |= {"README.md": b"not needed"}
    Hub.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def ask(endpoint: str, cache: Path, *lines: str, **environment: str) -> list[str]:
    """The answers of a child process with this hub and this cache to each line."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input="\n".join(lines) + "\n",
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "PYTHONPATH": str(Path(minem.__file__).parents[1]),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]


def test_only_the_files_needed_are_fetched_with_the_token_and_then_read_offline(hub: str, tmp_path: Path) -> None:
    Hub.seen.clear()
    show = "(lambda t: (t.train[0].id, len(t.test), t.note, t.rows_sha256))(load_task({!r}))"
    online, unknown = ask(hub, tmp_path, show.format("openbookqa"), show.format("openbookqa@v9"), HF_TOKEN="hf_secret")
    assert online.startswith(f"('train', 1, 'allenai/openbookqa at {COMMIT[:12]}', ")
    assert unknown == (
        "UserError: dataset 'allenai/openbookqa' has no revision 'v9'; see its branches and tags on the hub"
    )
    fetched = {path.partition(COMMIT + "/")[2] for method, path, _ in Hub.seen if method == "GET" and "resolve" in path}
    assert fetched == {f"main/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")}
    assert {token for _, _, token in Hub.seen} == {"Bearer hf_secret"}
    Hub.seen.clear()
    offline = ask(
        hub, tmp_path, show.format("openbookqa"), show.format(f"openbookqa@{COMMIT}"), "load_task('gsm8k')",
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert offline[:2] == [online, online]
    assert offline[2].startswith("UserError: dataset 'openai/gsm8k' is not in the local cache and the hub cannot be")
    assert Hub.seen == []
    # The cache also serves when the hub is unreachable.
    unreachable = "http://127.0.0.1:9"
    assert ask(unreachable, tmp_path, show.format("openbookqa")) == [online]


def test_refusals_say_what_to_do(hub: str, tmp_path: Path) -> None:
    asked = {
        "resolve('meta-llama/Llama-3.2-3B-Instruct')": "model 'meta-llama/Llama-3.2-3B-Instruct' is gated: accept its "
        "terms at https://huggingface.co/meta-llama/Llama-3.2-3B-Instruct, then set HF_TOKEN",
        "load_task('arc-easy')": "dataset 'allenai/ai2_arc' is gated: accept its terms at "
        "https://huggingface.co/datasets/allenai/ai2_arc, then set HF_TOKEN",
        "resolve('nobody/nothing')": "model 'nobody/nothing' does not exist on the hub, or is private and HF_TOKEN",
        "resolve('someone/token')": "model 'someone/token': the hub does not know your token; set HF_TOKEN to a valid",
        "resolve('someone/disabled')": "model 'someone/disabled' could not be downloaded (403 Client Error",
        "resolve('someone/broken')": "model 'someone/broken' could not be downloaded (Client error '418 ",
        "resolve('not--valid/id.git')": "model 'not--valid/id.git' is not a valid hub id, which looks like owner/name",
    }
    answers = ask(hub, tmp_path, *asked)
    assert len(answers) == len(asked)
    for answer, expected in zip(answers, asked.values(), strict=True):
        assert answer.startswith(f"UserError: {expected}")
        assert "\n" not in answer
        assert len(answer) < 500
    assert "Access to this resource is disabled." in answers[4]  # the message of the hub


@pytest.mark.parametrize(
    "error", [TimeoutError(), RuntimeError("proxy says no\nand more"), OSError(28, "No space left on device")]
)
def test_any_other_error_of_the_client_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"^model 'some/model' could not be downloaded \([^\n]+\); try again") as caught:
        download("some/model", "model", ["*"])
    assert "\n" not in str(caught.value)
