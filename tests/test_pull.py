"""A bundle that is pulled is the one that was published, whatever the source, the line and the disk do meanwhile."""

import base64
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtimes.bundle import read_bundle
from runtimes.keys import PRIVATE, new_key, sign, verify_signature, write_public
from runtimes.manifest import MANIFEST, SIGNATURE, BundleError, FileEntry, payload_digest
from runtimes.publish import publish
from runtimes.pull import Options, Pulled, pull, read_offer
from runtimes.source import open_source
from tests.conftest import ROOT
from tests.served import DATA, FILES, Answer, Asked, Serve, folder_answer, make_served, serving

pytest.importorskip("nacl")
QUICK = Options(pause_s=0.001)


def fetch(source: str, dest: Path, options: Options = QUICK, **asked: Any) -> Pulled:
    """Offer and pull, as the command does."""
    offer = read_offer(open_source(source, timeout_s=0.5), pause_s=0.001, **asked)
    return pull(dest, offer, options)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A bundle to be served."""
    return make_served(tmp_path / "served").folder


@pytest.mark.parametrize("way", ["folder", "web"])
def test_what_is_pulled_is_what_was_there(served: Path, tmp_path: Path, way: str) -> None:
    with serving(served) as server:
        done = fetch(str(served) if way == "folder" else server.url, tmp_path / "here")
    assert tree(tmp_path / "here") == tree(served)
    assert done.fetched == sum(e.size for e in read_bundle(tmp_path / "here").manifest.files)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    again = fetch(str(served), tmp_path / "here")
    assert again.was_there
    assert again.fetched == 0


def broken_off(answer: Answer, **how: bool) -> Answer:
    """The first 50,000 bytes of an answer that promises all."""
    promised = {"Content-Length": str(len(answer.content))}
    return replace(answer, content=answer.content[:50_000], headers=answer.headers | promised, **how)


def passing(served: Path, fault: str) -> Serve:
    """A server that does a wrong thing with the data file at first, and then the right one."""
    count = 0

    def serve(asked: Asked) -> Answer:
        nonlocal count
        answer = folder_answer(served, asked)
        count += asked.path.endswith(DATA)
        if not asked.path.endswith(DATA):
            return answer
        match fault, count:
            case ("cuts", 1 | 2 | 3) | ("ignores ranges" | "sends another range", 1):
                return broken_off(answer, cut=True)
            case "stalls", 1:
                return broken_off(answer, stall=True)
            case "is busy", 1 | 2:
                return Answer(503)
            case "ignores ranges", _:
                return folder_answer(served, asked, ranges=False)
            case "sends another range", 2:
                return Answer(206, b"x" * 100, {"Content-Range": f"bytes 7-106/{len(FILES[DATA])}"} | etag(answer))
        return answer

    return serve


def lasting(served: Path, fault: str) -> Serve:
    """A server that does a wrong thing with the data file whenever it is asked."""

    def serve(asked: Asked) -> Answer:
        answer = folder_answer(served, asked)
        if not asked.path.endswith(DATA):
            return answer
        match fault:
            case "corrupts a byte":
                return replace(answer, content=answer.content[:-1] + bytes([answer.content[-1] ^ 1]))
            case "says another length":
                return Answer(200, answer.content + b"x")
            case "has it no more":
                return Answer(404)
            case "encodes":
                return replace(answer, headers=answer.headers | {"Content-Encoding": "gzip"})
            case "redirects to a file":
                return Answer(302, headers={"Location": "file:///etc/hostname"})
            case "redirects in a circle":
                return Answer(302, headers={"Location": asked.path})
        raise AssertionError(fault)

    return serve


def etag(answer: Answer) -> dict[str, str]:
    return {"ETag": answer.headers["ETag"]}


@pytest.mark.parametrize("fault", ["cuts", "stalls", "is busy", "ignores ranges", "sends another range"])
def test_a_fault_that_passes_costs_nothing(served: Path, tmp_path: Path, fault: str) -> None:
    with serving(passing(served, fault)) as server:
        fetch(server.url, tmp_path / "here")
    assert tree(tmp_path / "here") == tree(served)


FATAL = {
    "corrupts a byte": r"SHA-256 is \w+, the manifest says \w+: dropped; its manifest is still the same",
    "says another length": r"the server has 262145 bytes of it, the manifest says 262,144",
    "has it no more": r"is not there \(the server answers 404\)",
    "encodes": r"sent encoded",
    "redirects to a file": r"redirects: its address",
    "redirects in a circle": r"redirects more than 5 times",
}


@pytest.mark.parametrize("fault", FATAL)
def test_a_fault_that_stays_is_named_and_leaves_no_bundle(served: Path, tmp_path: Path, fault: str) -> None:
    with serving(lasting(served, fault)) as server, pytest.raises(BundleError, match=FATAL[fault]):
        fetch(server.url, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    fetch(str(served), tmp_path / "here")  # what was right of it is not in the way
    assert tree(tmp_path / "here") == tree(served)


def test_a_pull_that_was_cut_goes_on_from_there(served: Path, tmp_path: Path) -> None:
    def half(asked: Asked) -> Answer:
        answer = folder_answer(served, asked)
        if asked.path.endswith(DATA):
            if "range" in asked.headers:
                return Answer(503)
            length = {"Content-Length": str(len(answer.content))}
            return replace(answer, content=answer.content[:100_000], headers=answer.headers | length, cut=True)
        return answer

    with serving(half) as server:
        with pytest.raises(BundleError, match="100,000 of 262,144 bytes are here: the same command goes on from them"):
            fetch(server.url, tmp_path / "here")
        server.serve = lambda asked: folder_answer(served, asked)
        server.asked.clear()
        fetch(server.url, tmp_path / "here")
        (asked,) = [a for a in server.asked if a.path.endswith(DATA)]
    assert asked.headers["range"] == "bytes=100000-"
    assert tree(tmp_path / "here") == tree(served)


def test_another_version_that_appears_midway_is_not_mixed_in(served: Path, tmp_path: Path) -> None:
    other = make_served(tmp_path / "other", version=2, files=FILES | {DATA: bytes(262_144)}).folder
    begun = threading.Event()

    def serve(asked: Asked) -> Answer:
        if asked.path.endswith(DATA):
            begun.set()
        return folder_answer(other if begun.is_set() else served, asked)

    with serving(serve) as server, pytest.raises(BundleError, match="it holds another version now, so pull again"):
        fetch(server.url, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_files_that_are_here_are_copied_and_never_linked(served: Path, tmp_path: Path) -> None:
    newer = make_served(tmp_path / "newer", version=2, files=FILES | {"config.json": b'{"new": 1}'}).folder
    with serving(newer) as server:
        done = fetch(server.url, tmp_path / "here", replace(QUICK, reuse=[served]))
        assert not any(path.endswith(DATA) for path in server.paths())
    assert done.reused >= len(FILES[DATA])
    assert tree(tmp_path / "here") == tree(newer)
    assert {p.stat().st_nlink for p in (tmp_path / "here").rglob("*") if p.is_file()} == {1}


def test_a_file_that_is_here_but_damaged_is_fetched(served: Path, tmp_path: Path) -> None:
    shutil.copytree(served, tmp_path / "old")
    (tmp_path / "old" / DATA).write_bytes(bytes(len(FILES[DATA])))
    fetch(str(served), tmp_path / "here", replace(QUICK, reuse=[tmp_path / "old"]))
    assert tree(tmp_path / "here") == tree(served)


def test_without_evidence_a_bundle_reads_and_is_not_published(served: Path, tmp_path: Path) -> None:
    fetch(str(served), tmp_path / "here", replace(QUICK, payload_only=True))
    assert not (tmp_path / "here" / "cases").exists()
    assert not read_bundle(tmp_path / "here").has_evidence()
    with pytest.raises(BundleError, match="its evidence is not there"):
        publish(tmp_path / "here", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_another_bundle_is_never_overwritten(served: Path, tmp_path: Path) -> None:
    other = make_served(tmp_path / "other", version=2).folder
    before = tree(other)
    with pytest.raises(BundleError, match="exists already and is not this bundle"):
        fetch(str(served), other)
    assert tree(other) == before


# ---- signatures and versions


def test_a_signed_bundle_is_taken_by_its_key_alone(served: Path, tmp_path: Path) -> None:
    key, other = new_key(tmp_path / "key"), new_key(tmp_path / "other")
    publish(served, str(tmp_path / "signed"), key=tmp_path / "key")
    fetch(str(tmp_path / "signed"), tmp_path / "here", key=key)
    assert (tmp_path / "here" / SIGNATURE).read_bytes() == (tmp_path / "signed" / SIGNATURE).read_bytes()
    with pytest.raises(BundleError, match="another key signed it, or it was changed since"):
        fetch(str(tmp_path / "signed"), tmp_path / "there", key=other)
    (tmp_path / "signed" / SIGNATURE).unlink()
    with pytest.raises(BundleError, match="is not signed"):
        fetch(str(tmp_path / "signed"), tmp_path / "there", key=key)
    assert not (tmp_path / "there").exists()


def test_a_manifest_changed_after_the_signature_is_refused(served: Path, tmp_path: Path) -> None:
    key = new_key(tmp_path / "key")
    publish(served, str(tmp_path / "signed"), key=tmp_path / "key")
    path = tmp_path / "signed" / MANIFEST
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    assert json.loads(path.read_text())["version"] == 9
    with pytest.raises(BundleError, match="another key signed it, or it was changed since"):
        fetch(str(tmp_path / "signed"), tmp_path / "here", key=key)


def test_keys_are_those_of_rfc_8032(tmp_path: Path) -> None:
    """Test 1 of its section 7.1: the empty message."""
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    text = base64.b64encode(PRIVATE[1] + seed).decode()
    (tmp_path / "key").write_text(f"-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n")
    (tmp_path / "key").chmod(0o600)
    wanted = (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b"
    )
    assert sign(b"", tmp_path / "key").hex() == wanted
    verify_signature(b"", bytes.fromhex(wanted), write_public(tmp_path / "key"), "it")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(BundleError, match="others may read this private key"):
        sign(b"", tmp_path / "key")


def test_a_version_below_the_pinned_one_is_refused(served: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="version is 1, want 2 or later: it was superseded"):
        fetch(str(served), tmp_path / "here", least_version=2)


def test_a_pending_bundle_is_neither_pulled_nor_published(tmp_path: Path) -> None:
    pending = make_served(tmp_path / "pending", proven=False).folder
    with pytest.raises(BundleError, match="proof is pending"):
        fetch(str(pending), tmp_path / "here")
    with pytest.raises(BundleError, match="proof is pending"):
        publish(pending, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_bundle_whose_report_is_of_other_bytes_is_not_published(served: Path, tmp_path: Path) -> None:
    report = {"payload_digest": "0" * 64}
    (served / "report.json").write_text(json.dumps(report))
    manifest = json.loads((served / MANIFEST).read_text())
    for entry in manifest["files"]:
        if entry["path"] == "report.json":
            content = (served / "report.json").read_bytes()
            entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (served / MANIFEST).write_text(json.dumps(manifest))
    read_bundle(served)
    with pytest.raises(BundleError, match="proves the payload '0000"):
        publish(served, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- a hub


def hub_answer(served: Path, asked: Asked, storage: str) -> Answer:
    """As a hub answers: a revision is a commit, large files lie elsewhere behind a redirect."""
    if asked.path == "/api/models/me/it/revision/v1":
        return Answer(200, json.dumps({"sha": "a" * 40}).encode())
    base = f"/me/it/resolve/{'a' * 40}/"
    if not asked.path.startswith(base):
        return Answer(404)
    inner = replace(asked, path="/" + asked.path.removeprefix(base))
    if asked.path.endswith("_data"):
        return Answer(302, headers={"Location": f"{storage}{inner.path}?signature=secret"})
    return folder_answer(served, inner)


def test_a_hub_gets_the_token_and_its_storage_does_not(served: Path, tmp_path: Path) -> None:
    with serving(served) as storage, serving(lambda asked: hub_answer(served, asked, storage.url)) as hub:
        source = open_source("hf://me/it@v1", hub=hub.url, token="hf_secret", timeout_s=1)
        pull(tmp_path / "here", read_offer(source, pause_s=0.001), QUICK)
        assert {a.headers.get("authorization") for a in hub.asked} == {"Bearer hf_secret"}
        assert {a.headers.get("authorization") for a in storage.asked} == {None}
        assert storage.asked
    assert tree(tmp_path / "here") == tree(served)


@pytest.mark.parametrize("name", ["hf://x", "hf://a/../b", "hf://a/b@../c", "http://example.org/x", "ftp://x/y"])
def test_addresses_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(BundleError):
        open_source(name)


def test_an_address_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(BundleError, match="ends up in logs"):
        open_source("https://me:secret@example.org/x")


# ---- hostile manifests


def test_no_manifest_leads_outside_the_folder(served: Path, tmp_path: Path) -> None:
    """Seeded faults in a manifest: a whole bundle or a BundleError, and nothing outside of what was named."""
    text = (served / MANIFEST).read_text()
    rng = random.Random(5)
    evil = [
        "../x",
        "/etc/x",
        "a/../../x",
        "C:\\x",
        "\u0000",
        "x" * 5000,
        "con",
        MANIFEST,
        SIGNATURE,
        "config.json/x",
        "",
    ]
    (tmp_path / "room").mkdir()
    outcomes = set()
    for round_ in range(150):
        content = json.loads(text)
        for _ in range(rng.randint(1, 3)):
            entry = rng.choice(content["files"])
            match rng.randrange(6):
                case 0:
                    entry["path"] = rng.choice(evil)
                case 1:
                    entry["size"] = rng.choice([-1, 0, 2**63, 1e300, "7", None, entry["size"] + 1])
                case 2:
                    entry["sha256"] = rng.choice(["", "0" * 64, "g" * 64, 7])
                case 3:
                    entry["role"] = rng.choice(["evidence", "payload", "root", None])
                case 4:
                    del content[rng.choice(list(content))]
                    break
                case 5:
                    content["files"].append(dict(entry, path=entry["path"].upper()))
        if rng.random() < 0.7 and isinstance(content.get("files"), list):  # consistent, so that it gets further
            with contextlib.suppress(TypeError, ValueError):
                content["payload_digest"] = payload_digest(FileEntry(**e) for e in content["files"])
        mutated = json.dumps(content)
        if rng.random() < 0.2:
            at = rng.randrange(len(mutated))
            mutated = mutated[:at] + rng.choice('{}[],"0\x7f') + mutated[at + 1 :]

        def serve(asked: Asked, now: str = mutated) -> Answer:
            return Answer(200, now.encode()) if asked.path == f"/{MANIFEST}" else folder_answer(served, asked)

        dest = tmp_path / "room" / f"here{round_}"
        with serving(serve) as server:
            try:
                fetch(server.url, dest)
                outcomes.add("pulled")
                read_bundle(dest)
            except BundleError:
                outcomes.add("refused")
                assert not dest.exists()
        assert {p.name for p in tmp_path.iterdir()} == {"served", "room"}
        for path in (tmp_path / "room").iterdir():
            assert path.name.startswith((f"here{round_}", f".here{round_}.pull-"))
            shutil.rmtree(path)
    assert "refused" in outcomes


# ---- processes that die, and several at once

PULL = """
import os, sys
from pathlib import Path
from runtimes.pull import Options, pull, read_offer
from runtimes.source import open_source
while (line := sys.stdin.readline()):
    url, dest = line.split()
    child = os.fork()
    if not child:
        try:
            pull(Path(dest), read_offer(open_source(url), pause_s=0.001), Options(pause_s=0.001))
            os._exit(0)
        except BaseException as exc:
            print(repr(exc), file=sys.stderr)
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_at_a_hundred_moments_nothing_is_half_written_and_the_next_goes_on(served: Path, tmp_path: Path) -> None:
    """SIGKILL at random points of one pull after another: the place is empty or whole, and it ends whole."""
    rng = random.Random(7)

    def slowly(asked: Asked) -> Answer:
        time.sleep(0.002)
        return folder_answer(served, asked)

    kills = places = 0
    with (
        serving(slowly) as server,
        subprocess.Popen(  # our own words
            [sys.executable, "-c", PULL], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as parent,
    ):
        assert parent.stdin is not None
        assert parent.stdout is not None
        dest = tmp_path / "here"
        while kills < 100:
            parent.stdin.write(f"{server.url} {dest}\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            time.sleep(rng.uniform(0, 0.05))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            code = int(parent.stdout.readline())
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            if dest.exists():
                assert tree(dest) == tree(served)
                places += 1
                shutil.rmtree(dest)
        parent.stdin.close()
    assert places > 0
    fetch(str(served), dest)
    assert tree(dest) == tree(served)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_two_pulls_at_once_make_one_bundle(served: Path, tmp_path: Path) -> None:
    def slowly(asked: Asked) -> Answer:
        time.sleep(0.02)
        return folder_answer(served, asked)

    found: list[Pulled | BaseException] = []

    def one(url: str) -> None:
        try:
            found.append(fetch(url, tmp_path / "here"))
        except BaseException as exc:  # noqa: BLE001  # shown below
            found.append(exc)

    with serving(slowly) as server:
        threads = [threading.Thread(target=one, args=(server.url,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len([p for p in server.paths() if p.endswith(DATA)]) == 1
    assert sorted(isinstance(f, Pulled) and f.was_there for f in found) == [False, True]
    assert tree(tmp_path / "here") == tree(served)


def test_a_full_disk_is_said_before_anything_is_fetched(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("runtimes.pull.shutil.disk_usage", lambda _: usage._replace(free=100_000))
    with serving(served) as server:
        with pytest.raises(BundleError, match=r"of disk are needed there, 100\.0 kB are free"):
            fetch(server.url, tmp_path / "here")
        assert not any(path.endswith(DATA) for path in server.paths())
    assert not (tmp_path / "here").exists()


def test_a_disk_that_fills_up_midway_loses_nothing(served: Path, tmp_path: Path) -> None:
    """A real one: a small tmpfs, where this machine lets us mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        offer = read_offer(open_source(str(served)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("runtimes.pull._Filling._want_room", lambda *_: None)  # or it would have been said before
            with pytest.raises(BundleError, match="no space left on the disk; nothing was changed there"):
                pull(disk / "here", offer, QUICK)
        assert not (disk / "here").exists()
        subprocess.run([*mount[:4], "size=20m,remount", "none", str(disk)], check=True)
        pull(disk / "here", offer, QUICK)
        assert tree(disk / "here") == tree(served)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_command_says_what_it_takes_and_fetches_nothing_when_told_so(served: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "runtimes.pull", str(served), str(tmp_path / "here"), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"version 1, onnx, not signed: 7 files, [0-9.]+ kB of disk; memory to expect 10.0 MB", done.stderr)
    assert not (tmp_path / "here").exists()
    done = subprocess.run([*command[:-1], "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["ok"] is True
    assert tree(tmp_path / "here") == tree(served)
