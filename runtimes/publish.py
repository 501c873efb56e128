"""Puts a proven bundle where devices pull it from: a folder, or a Hugging Face hub.

    python -m runtimes.publish BUNDLE TARGET [--sign PRIVATE_KEY]

TARGET is a new folder (to be served by any web server), or hf://org/name[/folder][@branch], which gets one commit.
The bundle itself is only read. Not covered: replaying the golden cases, which `runtimes.verify` does.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from runtimes.bundle import Bundle, read_bundle, stage_bundle
from runtimes.keys import SIGNATURE_BYTES, sign
from runtimes.manifest import MANIFEST, SIGNATURE, BundleError, FileEntry, parse_json, parse_manifest
from runtimes.source import (
    HUB,
    HUB_ID,
    MAX_MANIFEST_BYTES,
    Interrupted,
    Missing,
    check_token,
    check_url,
    hub_commit,
    open_source,
    read_all,
)

CHUNK = 1 << 20
IN_MEMORY = 10 << 20  # bytes; a hub takes no larger file within a commit, so all that one holds is checked bytes


@dataclass(frozen=True)
class Published:
    """Where a bundle is now."""

    target: str
    version: int
    signed: bool
    was_there: bool  # with the same manifest and signature


@dataclass(frozen=True)
class Release:
    """What is published: a checked bundle, its manifest as it lies, and a signature if there is one."""

    bundle: Bundle
    text: bytes
    signature: bytes | None

    @property
    def beside(self) -> dict[str, bytes]:
        """The files that the manifest does not list."""
        return {MANIFEST: self.text} | ({SIGNATURE: self.signature} if self.signature is not None else {})


def publish(
    folder: Path,
    target: str,
    *,
    key: Path | None = None,
    private: bool = False,
    hub: str = HUB,
    token: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Published:
    """Publishes the bundle in `folder`.

    Args:
        target: a new folder, or hf://org/name[/folder][@branch].
        key: the private key that signs it; None: a signature that it has already goes with it.
        private: a hub's repository that does not exist yet is made for its owner alone.
        hub, token: the hub's address; a token for it, None for the one of `hf auth login`.

    Raises:
        BundleError: if the bundle is not whole or not proven, its evidence is of other bytes, a folder exists, a hub
            has this version or a later one, or cannot be written. Then nothing is published.
    """
    release = check_release(folder, key)
    if target.startswith("hf://"):
        return _to_hub(release, target, private, hub, token, progress)
    if "://" in target:
        raise BundleError(f"{target}: want a new folder, or hf://org/name")
    _to_folder(release, Path(target), progress)
    return Published(target, release.bundle.manifest.version, release.signature is not None, was_there=False)


def check_release(folder: Path, key: Path | None = None) -> Release:
    """A bundle that is to be published: read, checked with its evidence, its manifest signed. Raises BundleError."""
    bundle = read_bundle(folder)
    report = bundle.manifest.proof.report
    if not bundle.has_evidence() or report is None:
        raise BundleError(f"{folder}: its evidence is not there, and is published with it")
    proven = bundle.json(report).get("payload_digest")
    if proven != bundle.manifest.payload_digest:
        raise BundleError(
            f"{folder / report}: proves the payload {proven!r:.70}, the bundle's is {bundle.manifest.payload_digest}"
        )
    text = (folder / MANIFEST).read_bytes()
    where = str(folder / MANIFEST)
    if parse_manifest(parse_json(text, where), where) != bundle.manifest:
        raise BundleError(f"{where}: was replaced meanwhile")
    signature = None
    if key is not None:
        signature = sign(text, key)
    elif (folder / SIGNATURE).exists():
        signature = (folder / SIGNATURE).read_bytes()
        if len(signature) != SIGNATURE_BYTES:
            raise BundleError(f"{folder / SIGNATURE}: has {len(signature)} bytes, want {SIGNATURE_BYTES}")
    return Release(bundle, text, signature)


def _to_folder(release: Release, out: Path, progress: Callable[[str], None]) -> None:
    """A copy, checked while it is made, that appears with one rename."""
    with stage_bundle(out) as stage:
        for entry in release.bundle.manifest.files:
            progress(f"copying {entry.path}")
            (stage / entry.path).parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            source = release.bundle.folder / entry.path
            with source.open("rb") as file, (stage / entry.path).open("xb") as copy:
                while content := file.read(CHUNK):
                    digest.update(content)
                    copy.write(content)
            if digest.hexdigest() != entry.sha256:
                raise BundleError(f"{source}: has changed while it was copied")
        for name, content in release.beside.items():
            (stage / name).write_bytes(content)


@dataclass(frozen=True)
class Standing:
    """What a hub has under a name now."""

    commit: str | None  # of the branch; None: it has none yet
    text: bytes | None  # manifest.json
    signature: bytes | None


def _to_hub(
    release: Release, target: str, private: bool, hub: str, token: str | None, progress: Callable[[str], None]
) -> Published:
    """One commit: the bundle's files added, those of the version before that it has no more removed."""
    match = HUB_ID.fullmatch(target)
    if not match or ".." in target:
        raise BundleError(f"{target}: want hf://org/name, with /folder and @branch as needed")
    check_token(token)
    check_url(hub, "the hub (HF_ENDPOINT)")
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
        from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError, of the client's own library
            HfHubHTTPError,
            HFValidationError,
            HTTPError,
        )
    except ImportError as exc:
        raise BundleError("publishing to a hub needs huggingface_hub: pip install '.[export]'") from exc
    manifest = release.bundle.manifest
    done = Published(target, manifest.version, release.signature is not None, was_there=False)
    below = match["folder"].removeprefix("/") + "/" if match["folder"] else ""
    api = HfApi(endpoint=hub.rstrip("/"), token=token)
    try:
        progress(f"looking at {match['name']} on {hub}")
        api.create_repo(match["name"], exist_ok=True, private=private or None)
        standing = _standing(match["name"], match["folder"], match["revision"] or "main", hub, token)
        if (standing.text, standing.signature) == (release.text, release.signature):
            return replace(done, was_there=True)
        gone = _superseded(release, standing, target)
        files = [CommitOperationAdd(below + e.path, _content(release, e)) for e in manifest.files]
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *files,
            *(CommitOperationAdd(below + path, content) for path, content in release.beside.items()),
            *(CommitOperationDelete(below + path) for path in gone),
        ]
        progress(f"uploading {len(operations) - len(gone)} files")
        api.preupload_lfs_files(match["name"], files, revision=match["revision"], free_memory=False)
        for entry, sent in zip(manifest.files, files, strict=True):
            if sent.upload_info.sha256.hex() != entry.sha256:
                raise BundleError(f"{release.bundle.folder / entry.path}: has changed; nothing was published")
        api.create_commit(
            match["name"],
            operations,
            commit_message=f"Version {manifest.version} of {manifest.model.name}, recipe {manifest.recipe.name}",
            revision=match["revision"],
            parent_commit=standing.commit,
        )
    except Interrupted as exc:
        raise BundleError(f"{target}: {hub} cannot be reached: {exc}; nothing was published") from exc
    except BundleError:
        raise
    except HFValidationError as exc:
        raise BundleError(f"{target}: is no hub id: {exc}") from exc
    except (HTTPError, OSError, RuntimeError, ValueError, LookupError, TypeError) as exc:
        # The last four: an answer that the client did not expect, or what the storage of large files refused.
        cause = exc.__cause__ if isinstance(exc.__cause__, HfHubHTTPError) else exc
        if isinstance(cause, HfHubHTTPError):  # its own text may have a signed address
            status = cause.response.status_code
            login = " (log in: hf auth login, or HF_TOKEN)" if status in (401, 403) else ""
            raise BundleError(f"{target}: {hub} answers {status}{login}; nothing was published") from exc
        raise BundleError(f"{target}: cannot be written to {hub}: {exc!r:.300}; nothing was published") from exc
    return done


def _content(release: Release, entry: FileEntry) -> str | bytes:
    """What a hub's client is given: a path of a large file, a small one's bytes. Raises BundleError if it changed."""
    path = release.bundle.folder / entry.path
    if entry.size > IN_MEMORY:
        return str(path)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise BundleError(f"{path}: has changed; nothing was published")
    return content


def _standing(name: str, folder: str, branch: str, hub: str, token: str | None) -> Standing:
    """Reads it. Raises as `Source.open`."""
    try:
        commit = hub_commit(hub, name, branch, token)
    except Missing:
        return Standing(None, None, None)
    source = open_source(f"hf://{name}{folder}@{commit}", hub=hub, token=token)

    def content(path: str, most: int) -> bytes | None:
        try:
            with source.open(path) as piece:
                return read_all(piece.stream, most, f"{source.name}: {path}")
        except Missing:
            return None

    return Standing(commit, content(MANIFEST, MAX_MANIFEST_BYTES), content(SIGNATURE, SIGNATURE_BYTES))


def _superseded(release: Release, standing: Standing, target: str) -> list[str]:
    """The files of the standing version that the new one has no more. Raises BundleError if it is not a newer one."""
    if standing.text is None:
        return []
    old, new = parse_manifest(parse_json(standing.text, target), target), release.bundle.manifest
    if standing.text != release.text and old.version >= new.version:
        raise BundleError(
            f"{target}: has version {old.version} already, and this is another of version {new.version}: devices "
            "refuse what does not grow (export it with a higher --version)"
        )
    if standing.signature is not None and release.signature is None:
        raise BundleError(f"{target}: is signed, and this is not: devices that pin the key would refuse it (--sign)")
    return sorted({entry.path for entry in old.files} - {entry.path for entry in new.files})


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m runtimes.publish",
        description=__doc__.splitlines()[0],
        epilog="HF_ENDPOINT is another hub's address, HF_TOKEN a token for it.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("target", metavar="TARGET", help="a new folder, or hf://org/name[/folder][@branch]")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="the private key (python -m runtimes.keys new KEY)")
    parser.add_argument("--private", action="store_true", help="if the hub's repository is made now, for you alone")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    args = parser.parse_args()
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    hub, token = os.environ.get("HF_ENDPOINT") or HUB, os.environ.get("HF_TOKEN") or None
    try:
        done = publish(
            args.bundle, args.target, key=args.sign, private=args.private, hub=hub, token=token, progress=progress
        )
    except BundleError as exc:
        print(f"error: {exc}", file=sys.stderr)
        if args.json:
            print(json.dumps({"ok": False, "error": str(exc)}))
        return 2
    what = "is there already" if done.was_there else "published"
    print(f"{done.target}: version {done.version} {what}, {'signed' if done.signed else 'not signed'}")
    if args.json:
        print(json.dumps({"ok": True, **asdict(done)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
