"""Where a checkpoint is found: folders, and a hub's API spoken by a server on the loopback interface."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from export.checkpoint import resolve
from export.spec import CheckpointError, read_spec
from export.weights import open_weights
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[1]
NAME = "org/tiny-model"


@dataclass
class Hub:
    """What a hub knows of one model: commits, and which of them a revision stands for."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None  # status and error code of every answer
    gated: bool = False  # the listing is open, files are not
    break_after: int | None = None  # bytes of a large file after which the connection drops
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def push(self, files: dict[str, bytes], revision: str = "main") -> str:
        """Adds a commit and moves a revision to it."""
        sha = hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()
        self.commits[sha] = files
        self.refs[revision] = sha
        return sha

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer(ThreadingHTTPServer):
    """Speaks for one `Hub`."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        hub.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The part of a hub's API that downloads use: models, trees, files, and large files on another path."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server.hub, self.path.split("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if hub.refusal:
            self.refuse(*hub.refusal)
        elif match := re.fullmatch(rf"/api/models/{NAME}(?:/revision/(.+))?", path):
            self.model(hub.commit(match[1] or "main"))
        elif match := re.fullmatch(rf"/api/models/{NAME}/tree/([^/]+)", path):
            self.json([entry(name, data) for name, data in hub.commits[match[1]].items()])
        elif match := re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", path):
            self.file(hub.commit(match[1]), match[2])
        elif match := re.fullmatch(r"/cdn/([^/]+)/(.+)", path):
            self.data(hub.commits[match[1]][match[2]], match[1], hub.break_after)
        else:
            self.refuse(404, "RepoNotFound")

    def model(self, sha: str | None) -> None:
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in self.server.hub.commits[sha]]
        return self.json({"_id": "1", "id": NAME, "modelId": NAME, "sha": sha, "siblings": siblings})

    def file(self, sha: str | None, name: str) -> None:
        hub = self.server.hub
        if hub.gated:
            return self.refuse(403, "GatedRepo")
        if sha is None or name not in hub.commits[sha]:
            return self.refuse(404, "EntryNotFound")
        data = hub.commits[sha][name]
        if not name.endswith(".safetensors"):
            return self.data(data, sha)
        self.send_response(302)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Location", f"{hub.url}/cdn/{sha}/{name}")
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def json(self, content: object) -> None:
        self.data(json.dumps(content).encode(), "")

    def data(self, data: bytes, sha: str, break_after: int | None = None) -> None:
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if sha:
            self.send_header("X-Repo-Commit", sha)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[start:] if break_after is None else data[start : start + break_after])
        self.close_connection = break_after is not None


def entry(name: str, data: bytes) -> dict[str, object]:
    """A file in a listing, as the hub's API describes it."""
    found: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith(".safetensors"):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    with HubServer(hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make_checkpoint(tmp_path_factory.mktemp("hub") / "tiny", max_shard_size=400_000)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum(name.endswith(".safetensors") for name in found) > 1
    return found | {
        "README.md": b"---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n",
        "pytorch_model.bin": b"not wanted",
        "onnx/model.onnx": b"not wanted",
        "onnx/model-00001.safetensors": b"not wanted",
    }


@dataclass(frozen=True)
class Answer:
    found: dict[str, str]
    error: str


def ask(home: Path, endpoint: str, model: str, call: str = "resolve(sys.argv[1])", **environment: str) -> Answer:
    """What `resolve` says in a process of its own: the client reads its environment once."""
    code = (
        "import dataclasses, json, sys\n"
        "from export.checkpoint import ADAPTER_FILES, resolve\n"
        "from export.spec import CheckpointError\n"
        "try:\n"
        f"    print(json.dumps(dataclasses.asdict({call}), default=str))\n"
        "except CheckpointError as exc:\n"
        "    sys.exit(f'refused: {exc}')\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    clean |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-c", code, model],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        assert "refused: " in done.stderr, done.stderr
        return Answer({}, done.stderr.split("refused: ")[1])
    return Answer(json.loads(done.stdout), "")


NOWHERE = "http://127.0.0.1:9"  # nothing listens there


def test_a_hub_id_fetches_only_what_is_needed_and_names_the_commit(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    sha = hub.push(files)
    answer = ask(tmp_path, hub.url, NAME)
    assert answer.found["name"] == NAME
    assert answer.found["revision"] == sha
    assert answer.found["license"] == "apache-2.0"
    folder = Path(answer.found["folder"])
    fetched = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert fetched == {name for name in files if "/" not in name and name != "pytorch_model.bin"}
    assert not [request for request in hub.requests if "onnx" in request or ".bin" in request]
    spec = read_spec(folder)
    weights = open_weights(folder, spec)
    assert weights["model.text_model.norm.weight"].shape == (spec.text.hidden,)


def test_of_an_adapter_its_config_and_tensors_are_fetched(hub: Hub, tmp_path: Path) -> None:
    wanted = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"tensors", "README.md": b"# Card\n"}
    others = {"model.safetensors": b"x", "optimizer.pt": b"x", "checkpoint-5/adapter_config.json": b"x"}
    sha = hub.push(wanted | others)
    answer = ask(tmp_path, hub.url, NAME, 'resolve(sys.argv[1], ADAPTER_FILES, "an adapter")')
    folder = Path(answer.found["folder"])
    fetched = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert (answer.found["name"], answer.found["revision"]) == (NAME, sha)
    assert fetched == wanted


def test_a_revision_that_moved_is_fetched_again_and_the_old_commit_stays(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    old = hub.push(files)
    assert ask(tmp_path, hub.url, NAME).found["revision"] == old
    new = hub.push(files | {"README.md": b"---\nlicense: mit\n---\n"})
    moved = ask(tmp_path, hub.url, f"{NAME}@main")
    assert (moved.found["revision"], moved.found["license"]) == (new, "mit")
    hub.requests.clear()
    kept = ask(tmp_path, hub.url, f"{NAME}@{old}")
    assert (kept.found["revision"], kept.found["license"]) == (old, "apache-2.0")
    assert not [request for request in hub.requests if "resolve" in request], "the old commit is in the cache"


def test_a_tag_resolves_to_its_own_commit(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    tagged = hub.push(files, "v1.0")
    hub.push(files | {"README.md": b"newer"})
    assert ask(tmp_path, hub.url, f"{NAME}@v1.0").found["revision"] == tagged


def test_without_a_connection_the_cache_is_used(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    sha = hub.push(files)
    ask(tmp_path, hub.url, NAME)
    hub.requests.clear()
    assert ask(tmp_path, NOWHERE, NAME).found["revision"] == sha
    assert ask(tmp_path, hub.url, NAME, HF_HUB_OFFLINE="1").found["revision"] == sha
    assert not hub.requests


def test_with_no_hub_and_no_cache_the_error_names_make_demo(hub: Hub, tmp_path: Path) -> None:
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        error = ask(tmp_path, NOWHERE, NAME, **environment).error
        assert f"{NAME}: there is no such folder" in error
        assert "cannot be reached" in error
        assert "make demo" in error


def test_a_cache_with_only_a_part_of_the_model_is_refused_without_a_connection(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.push(files)
    folder = Path(ask(tmp_path, hub.url, NAME).found["folder"])
    next(iter(folder.glob("model-*.safetensors"))).unlink()
    assert "only a part of it is in the cache" in ask(tmp_path, NOWHERE, NAME).error


def test_a_model_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    error = ask(tmp_path, hub.url, "org/other").error
    assert "org/other" in error
    assert "has no such model" in error


def test_a_401_asks_for_a_login(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.push(files)
    hub.refusal = (401, "")
    assert "hf auth login" in ask(tmp_path, hub.url, NAME).error


def test_a_hub_that_fails_is_told_from_one_that_is_away(hub: Hub, tmp_path: Path) -> None:
    hub.refusal = (501, "")
    error = ask(tmp_path, hub.url, NAME).error
    assert f"{hub.url} answers 501" in error
    assert "make demo" in error


def test_a_gated_model_asks_to_accept_its_terms(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.push(files)
    hub.gated = True
    assert "accept its terms" in ask(tmp_path, hub.url, NAME).error


def test_an_unknown_revision_is_named(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.push(files)
    assert "has no revision v9" in ask(tmp_path, hub.url, f"{NAME}@v9").error


def test_a_download_that_breaks_off_is_named_and_made_whole_by_the_next_call(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.push(files)
    hub.break_after = 150_000
    error = ask(tmp_path, hub.url, NAME).error
    assert f"{NAME}: cannot be fetched" in error
    assert "closed connection" in error
    assert "only a part of it is in the cache" in ask(tmp_path, NOWHERE, NAME).error
    hub.break_after = None
    folder = Path(ask(tmp_path, hub.url, NAME).found["folder"])
    assert all((folder / name).read_bytes() == data for name, data in files.items() if name.startswith("model"))


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.push(files)
    home = tmp_path / "a-file"
    home.write_text("")
    assert f"cannot be stored in {home}" in ask(home, hub.url, NAME).error


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "my-model")
    (folder / "README.md").write_text('---\nlicense: other\nlicense_name: "my-terms"\n---\n')
    found = resolve(str(folder))
    assert (found.folder, found.name, found.revision, found.license) == (folder, "my-model", None, "my-terms")


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        ("# No front matter\nlicense: mit\n", None),
        ("---\nlicense: apache-2.0 # the usual\n---\n", "apache-2.0"),
        ("---\nbase_model: x\nlicense: 'mit'\ntags:\n- license: gpl\n---\n", "mit"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", "mit"),
    ],
)
def test_the_licence_is_read_from_the_front_matter_only(tmp_path: Path, card: str, wanted: str | None) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert resolve(str(tmp_path)).license == wanted


def test_a_card_that_is_no_text_gives_no_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert resolve(str(tmp_path)).license is None


@pytest.mark.parametrize(
    "model", ["nothing-here", "./no/such", "a/b/c", "org/name@", "org/name@../x", "org/na--me", ""]
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_by_name(model: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no hub id|neither a folder nor a hub id"):
        resolve(model)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(tmp_path / "model.safetensors"))
