"""A hub on this machine: repositories, branches, commits of one parent, large files in a storage of their own.

It speaks what huggingface_hub does to create a repository, upload by the Git LFS protocol and commit, and what
`runtimes.source` reads. Not covered: the Xet transport, whose server is not public.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.served import Answer, Asked, Server, serving

NAME = "me/it"
TOKEN = "hf_secret"  # of nobody


@dataclass
class FakeHub:
    """One repository.

    before: is asked first; an answer of its own is what is sent.
    """

    created: bool = False
    private: bool | None = None
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    large: set[str] = field(default_factory=set)
    before: Callable[[Asked], Answer | None] = lambda _: None
    server: Server | None = None
    storage: Server | None = None  # of large files, elsewhere: it is to see no token

    @property
    def url(self) -> str:
        assert self.server is not None
        return self.server.url

    def place(self, digest: str) -> str:
        """The address of a large file."""
        assert self.storage is not None
        return f"{self.storage.url}/storage/{digest}"

    @property
    def asked(self) -> list[Asked]:
        """The requests that came."""
        assert self.server is not None
        return self.server.asked

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        return self.commits[self.branches[branch]] if branch in self.branches else {}

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Puts files there as its own commit."""
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()  # a name
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def answer(self, asked: Asked) -> Answer:
        """What it says."""
        if (said := self.before(asked)) is not None:
            return said
        path = unquote(urlsplit(asked.path).path)
        if asked.headers.get("authorization") != f"Bearer {TOKEN}":
            return Answer(401, b"{}")
        if path == "/api/repos/create":
            wanted = json.loads(asked.body)
            if (wanted["organization"], wanted["name"]) != tuple(NAME.split("/")):
                return Answer(403, b"{}")
            if self.created:
                return replace(_json({"error": "exists", "url": f"{self.url}/{NAME}"}), status=409)
            self.created, self.private = True, wanted.get("visibility") == "private"
            self.commit({".gitattributes": b"*_data filter=lfs\n"})
            return _json({"url": f"{self.url}/{NAME}"})
        if not self.created:
            return Answer(404, b"{}")
        return self._repository(asked, path)

    def _repository(self, asked: Asked, path: str) -> Answer:
        api, resolve = f"/api/models/{NAME}/", f"/{NAME}/resolve/"
        if path == f"/{NAME}.git/info/lfs/objects/batch":
            return _json({"transfer": "basic", "objects": [self._action(o) for o in json.loads(asked.body)["objects"]]})
        if path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            files = self.commits.get(self.branches.get(revision, revision), {})
            if name not in files:
                return Answer(404)
            if name in self.large:
                return Answer(302, headers={"Location": self.place(_digest(files[name]))})
            return Answer(200, files[name])
        if not path.startswith(api):
            return Answer(404)
        action, _, branch = path.removeprefix(api).partition("/")
        if action == "revision":
            name = self.branches.get(branch, branch)
            return _json({"sha": name}) if name in self.commits else Answer(404)
        if branch not in self.branches:
            return Answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        if action == "preupload":
            return _json({"files": [self._mode(f["path"]) for f in json.loads(asked.body)["files"]]})
        if action == "commit":
            return self._commit([json.loads(line) for line in asked.body.splitlines()], branch)
        return Answer(404)

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(("_data", ".safetensors")) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.stored:
            return wanted
        return wanted | {"actions": {"upload": {"href": self.place(wanted["oid"])}}}

    def stores(self, asked: Asked) -> Answer:
        """What its storage says."""
        if (said := self.before(asked)) is not None:
            return said
        digest = asked.path.rpartition("/")[2]
        if "authorization" in asked.headers:
            return Answer(400, b"a token was sent to the storage")
        if asked.method == "PUT":
            if _digest(asked.body) != digest:
                return Answer(400)
            self.stored[digest] = asked.body
            return Answer(200)
        return Answer(200, self.stored[digest]) if digest in self.stored else Answer(404)

    def _commit(self, lines: list[dict[str, Any]], branch: str) -> Answer:
        files = dict(self.files(branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") not in (None, self.branches[branch]):
                    return Answer(412, b'{"error": "A commit has happened since"}')
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    return Answer(400, b'{"error": "was never uploaded"}')
                files[value["path"]] = self.stored[value["oid"]]
                self.large.add(value["path"])
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    return Answer(404, b'{"error": "no such file"}')
            else:
                return Answer(400)
        name = self.commit(files, branch)
        return _json({"commitOid": name, "commitUrl": f"{self.url}/{NAME}/commit/{name}", "success": True})


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub without a repository, on a free port of 127.0.0.1."""
    hub = FakeHub()
    with serving(hub.answer) as hub.server, serving(hub.stores) as hub.storage:
        yield hub


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(content: object) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
