"""Who made a bundle: Ed25519 keys, and the signature beside a manifest.

    python -m runtimes.keys new FILE        FILE, the private key, and FILE.pub, the public one
    python -m runtimes.keys public FILE     writes FILE.pub again

`runtimes.publish --sign FILE` signs, `runtimes.pull --key FILE.pub` checks. The signature covers manifest.json byte by
byte, and through the digests in it every file. Keys are PEM as openssl reads and writes them. Not covered: a private
key that someone has copied. Such a key is replaced on every device that pins it.
"""

import argparse
import base64
import binascii
import os
import secrets
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.manifest import SIGNATURE, BundleError

if TYPE_CHECKING:
    import nacl.signing

SIGNATURE_BYTES = 64
MAX_KEY_BYTES = 4096
# What stands before the 32 bytes of a key in DER (RFC 8410): PrivateKeyInfo and SubjectPublicKeyInfo of Ed25519.
PRIVATE = ("PRIVATE KEY", bytes.fromhex("302e020100300506032b657004220420"))
PUBLIC = ("PUBLIC KEY", bytes.fromhex("302a300506032b6570032100"))


def new_key(path: Path) -> Path:
    """Makes a key: `path`, for its owner alone, and `path`.pub, whose path is returned.

    Raises:
        BundleError: if either exists or cannot be written; a key is never overwritten.
    """
    _need_nacl()
    import nacl.signing

    public = path.with_name(f"{path.name}.pub")
    for existing in (path, public):
        if os.path.lexists(existing):
            raise BundleError(f"{existing}: exists already, and a key is never overwritten")
    _write_new(path, _pem(PRIVATE, bytes(nacl.signing.SigningKey.generate())), 0o600)
    return write_public(path)


def write_public(path: Path) -> Path:
    """Writes the public key of the private key `path` beside it; returns its path. Raises BundleError."""
    public = path.with_name(f"{path.name}.pub")
    _write_new(public, _pem(PUBLIC, bytes(_read_private(path).verify_key)), 0o644)
    return public


def sign(manifest: bytes, key: Path) -> bytes:
    """The signature of a manifest's bytes by a private key.

    Raises:
        BundleError: if the key cannot be read, is no private Ed25519 key, or others may read it.
    """
    return bytes(_read_private(key).sign(manifest).signature)


def verify_signature(manifest: bytes, signature: bytes | None, key: Path, where: str) -> None:
    """Checks that the owner of a public key signed a manifest.

    Args:
        signature: the content of manifest.json.sig; None where there is none.
        key: the public key's file.
        where: names the bundle in errors.

    Raises:
        BundleError: if it is not signed, or not by that key, or the key cannot be read.
    """
    _need_nacl()
    import nacl.signing
    from nacl.exceptions import CryptoError

    public = nacl.signing.VerifyKey(_read_pem(key, PUBLIC))
    if signature is None:
        raise BundleError(f"{where}: is not signed (it has no {SIGNATURE}), and {key} asks for a signature")
    if len(signature) != SIGNATURE_BYTES:
        raise BundleError(f"{where}: {SIGNATURE} has {len(signature)} bytes, want {SIGNATURE_BYTES}")
    try:
        public.verify(manifest, signature)
    except CryptoError as exc:
        raise BundleError(
            f"{where}: {SIGNATURE} does not fit manifest.json and {key}: another key signed it, or it was changed since"
        ) from exc


def _need_nacl() -> None:
    """Raises BundleError, with the remedy, where PyNaCl is missing: only who signs or checks needs it."""
    try:
        import nacl.signing  # noqa: F401
    except ImportError as exc:
        raise BundleError("signatures need PyNaCl: pip install '.[sign]'") from exc


def _read_private(path: Path) -> "nacl.signing.SigningKey":
    _need_nacl()
    import nacl.signing

    seed = _read_pem(path, PRIVATE)
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BundleError(f"{path}: others may read this private key, want mode 0600 (and a new key if they did)")
    return nacl.signing.SigningKey(seed)


def _pem(kind: tuple[str, bytes], key: bytes) -> str:
    name, prefix = kind
    return f"-----BEGIN {name}-----\n{base64.b64encode(prefix + key).decode()}\n-----END {name}-----\n"


def _read_pem(path: Path, kind: tuple[str, bytes]) -> bytes:
    """The 32 bytes of a key; nothing of its content is ever in an error."""
    name, prefix = kind
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_KEY_BYTES).decode("ascii", "replace").split()
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read: {exc.strerror}") from exc
    text = " ".join(lines)
    begin, end = f"-----BEGIN {name}----- ", f" -----END {name}-----"
    try:
        if not (text.startswith(begin) and text.endswith(end)):
            raise ValueError
        key = base64.b64decode(text[len(begin) : -len(end)], validate=True)
        if len(key) != len(prefix) + 32 or not key.startswith(prefix):
            raise ValueError
    except (ValueError, binascii.Error):
        raise BundleError(f"{path}: is no Ed25519 {name.lower()} in PEM") from None
    return key[len(prefix) :]


def _write_new(path: Path, text: str, mode: int) -> None:
    """Writes a file that does not exist yet: whole, or not at all."""
    half = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        try:
            descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            os.link(half, path)  # fails where something is at `path`
        finally:
            half.unlink(missing_ok=True)
    except FileExistsError as exc:
        raise BundleError(f"{path}: exists already, and a key is never overwritten") from exc
    except OSError as exc:
        raise BundleError(f"{path}: cannot be written: {exc.strerror}") from exc


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m runtimes.keys", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("new", "make a private key, FILE, and FILE.pub"),
        ("public", "write FILE.pub of a private key"),
    ):
        commands.add_parser(name, help=text).add_argument("file", type=Path, metavar="FILE")
    args = parser.parse_args()
    try:
        public = new_key(args.file) if args.command == "new" else write_public(args.file)
    except BundleError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(f"{args.file}: the private key, for `runtimes.publish --sign`: keep it to yourself, and keep a copy")
    print(f"{public}: the public key, for `runtimes.pull --key` on every device")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
