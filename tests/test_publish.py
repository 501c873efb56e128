"""A hub gets a bundle in one commit that devices can pull, or nothing, whatever the hub and the line do meanwhile."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import runtimes.publish
from runtimes.keys import new_key
from runtimes.manifest import MANIFEST, SIGNATURE, BundleError
from runtimes.publish import Published, Release, check_release, publish
from runtimes.pull import Options, pull, read_offer
from runtimes.source import open_source
from tests.fake_hub import NAME, TOKEN, FakeHub, fake_hub
from tests.served import DATA, FILES, Answer, Asked, make_served

pytest.importorskip("nacl")
constants = pytest.importorskip("huggingface_hub.constants")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client to itself
TARGET = f"hf://{NAME}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub, to which the client uploads by Git LFS and without waiting between attempts."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with fake_hub() as running:
        yield running


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A proven bundle, version 1."""
    return make_served(tmp_path / "bundle").folder


def send(
    folder: Path, hub: FakeHub, target: str = TARGET, *, key: Path | None = None, private: bool = False
) -> Published:
    return publish(folder, target, key=key, private=private, hub=hub.url, token=TOKEN)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_published_is_what_is_pulled(hub: FakeHub, bundle: Path, tmp_path: Path) -> None:
    public = new_key(tmp_path / "key")
    done = send(bundle, hub, key=tmp_path / "key", private=True)
    assert done == Published(TARGET, 1, signed=True, was_there=False)
    assert hub.private is True
    assert len(hub.commits) == 2  # the repository's own, and one
    assert set(hub.files()) == {*tree(bundle), SIGNATURE, ".gitattributes"}
    assert hub.large == {DATA}
    source = open_source(f"{TARGET}@main", hub=hub.url, token=TOKEN, timeout_s=2)
    pull(tmp_path / "here", read_offer(source, pause_s=0.001, key=public), Options(pause_s=0.001))
    assert tree(tmp_path / "here") == tree(bundle) | {SIGNATURE: hub.files()[SIGNATURE]}


def test_a_folder_and_a_branch_of_a_repository(hub: FakeHub, bundle: Path) -> None:
    hub.created = True
    for branch in ("main", "next"):
        hub.commit({"README.md": b"mine"}, branch)
    send(bundle, hub, TARGET + "/phones/small@next")
    assert hub.files("main") == {"README.md": b"mine"}
    expected = {f"phones/small/{name}": content for name, content in tree(bundle).items()}
    assert hub.files("next") == expected | {"README.md": b"mine"}


def test_the_same_again_changes_nothing(hub: FakeHub, bundle: Path) -> None:
    send(bundle, hub)
    before = dict(hub.branches)
    assert send(bundle, hub).was_there
    assert hub.branches == before


def test_a_newer_version_replaces_and_files_it_has_no_more_go(hub: FakeHub, bundle: Path, tmp_path: Path) -> None:
    send(bundle, hub)
    assert hub.storage is not None
    assert [a.method for a in hub.storage.asked] == ["PUT"]
    fewer = {name: content for name, content in FILES.items() if name != "empty.txt"}
    newer = make_served(tmp_path / "newer", version=2, files=fewer | {"config.json": b'{"a": 1}'}).folder
    send(newer, hub)
    assert {n: c for n, c in hub.files().items() if n != ".gitattributes"} == tree(newer)
    assert len(hub.storage.asked) == 1  # the large file was there


@pytest.mark.parametrize("version", [1, 2])
def test_what_does_not_grow_is_refused(hub: FakeHub, bundle: Path, tmp_path: Path, version: int) -> None:
    send(make_served(tmp_path / "standing", version=2).folder, hub)
    before = dict(hub.branches)
    other = make_served(tmp_path / "other", version=version, files=FILES | {"config.json": b'{"a": 1}'}).folder
    with pytest.raises(BundleError, match=f"has version 2 already, and this is another of version {version}"):
        send(other, hub)
    assert hub.branches == before


def test_an_unsigned_bundle_does_not_replace_a_signed_one(hub: FakeHub, bundle: Path, tmp_path: Path) -> None:
    new_key(tmp_path / "key")
    send(bundle, hub, key=tmp_path / "key")
    before = dict(hub.branches)
    with pytest.raises(BundleError, match="is signed, and this is not"):
        send(make_served(tmp_path / "newer", version=2).folder, hub)
    assert hub.branches == before


def at(part: str, answer: Answer) -> Callable[[Asked], Answer | None]:
    """A hub that answers so wherever a path has this part."""
    return lambda asked: answer if part in asked.path else None


@pytest.mark.parametrize(
    ("part", "answer", "said"),
    [
        ("/api/repos/create", Answer(401, b"{}"), "answers 401 .log in"),
        ("/commit/", Answer(403, b"{}"), "answers 403 .log in"),
        ("/preupload/", Answer(403, b"{}"), "answers 403 .log in"),
        ("/commit/", Answer(500, b"{}"), "answers 500"),
        ("/commit/", Answer(200, b"", {"Content-Length": "50"}, cut=True), "cannot be written to"),
        ("/lfs/objects/batch", Answer(200, b'{"objects": [{"oid": "x", "size": 1}]}'), "cannot be written to"),
        ("/lfs/objects/batch", Answer(200, b"<html>"), "cannot be written to"),
        ("/preupload/", Answer(200, b'{"files": []}'), "cannot be written to"),
        ("/storage/", Answer(403, b"expired"), "answers 403 .log in"),
        ("/storage/", Answer(200, b"", {"Content-Length": "9"}, cut=True), "was never uploaded|cannot be written to"),
        ("/revision/", Answer(200, b'{"sha": "../../x"}'), "."),
    ],
)
def test_a_hub_that_fails_midway_has_nothing_new(
    hub: FakeHub, bundle: Path, part: str, answer: Answer, said: str
) -> None:
    hub.created = True
    hub.commit({"README.md": b"mine"})
    hub.before = at(part, answer)
    with pytest.raises(BundleError, match=said) as caught:
        send(bundle, hub)
    assert TOKEN not in str(caught.value)
    assert hub.files() == {"README.md": b"mine"}
    hub.before = lambda _: None
    assert not send(bundle, hub).was_there  # and the next time it works
    assert set(tree(bundle)) < set(hub.files())


def test_a_commit_that_came_between_is_not_lost(hub: FakeHub, bundle: Path) -> None:
    hub.created = True
    hub.commit({"README.md": b"mine"})

    def between(asked: Asked) -> None:
        if "/preupload/" in asked.path:
            hub.commit({"README.md": b"theirs"})

    hub.before = between
    with pytest.raises(BundleError, match="answers 412; nothing was published"):
        send(bundle, hub)
    assert hub.files() == {"README.md": b"theirs"}


def test_a_hub_that_is_not_there(bundle: Path) -> None:
    with fake_hub() as running:
        url = running.url
    with pytest.raises(BundleError, match="nothing was published"):
        publish(bundle, TARGET, hub=url, token=TOKEN)


@pytest.mark.parametrize("name", ["config.json", DATA])
def test_a_file_that_changes_after_the_check_is_not_published(
    hub: FakeHub, bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def check(folder: Path, key: Path | None = None) -> Release:
        release = check_release(folder, key)
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        return release

    monkeypatch.setattr(runtimes.publish, "check_release", check)
    monkeypatch.setattr(runtimes.publish, "IN_MEMORY", 1000)  # the data is given as a file, and hashed on its way
    with pytest.raises(BundleError, match=f"{name}: has changed; nothing was published"):
        send(bundle, hub)
    assert set(hub.files()) == {".gitattributes"}


def test_the_command_publishes_to_the_hub_of_the_environment(
    hub: FakeHub, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("sys.argv", ["publish", str(bundle), TARGET, "--json"])
    assert runtimes.publish.main() == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1]) == {
        "ok": True,
        "target": TARGET,
        "version": 1,
        "signed": False,
        "was_there": False,
    }
    assert "uploading" in said.err
    assert TOKEN not in said.out + said.err
    assert hub.files()[MANIFEST] == (bundle / MANIFEST).read_bytes()
