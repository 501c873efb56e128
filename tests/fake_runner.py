"""A program that keeps the native runner's contract by way of `runtimes.ort`, or breaks it in one named way."""

import argparse
import hashlib
import json
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def make_runner(folder: Path, fault: str = "", **settings: Any) -> Path:
    """The program as a file that runs by itself; `fault` is a name that this module looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "smolport-run"
    lines = [f"#!{sys.executable} -Bu", "import sys", f"sys.path.insert(0, {str(ROOT)!r})"]
    lines += ["from tests.fake_runner import main", f"sys.exit(main({fault!r}, {settings!r}))"]
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    program.chmod(0o755)
    return program


def digests(folder: Path) -> dict[str, Any]:
    """What --digests prints."""
    files = []
    for path in sorted(folder.rglob("*")):
        if stat.S_ISREG(path.lstat().st_mode):
            data = path.read_bytes()
            row = {"path": path.relative_to(folder).as_posix(), "size": len(data)}
            files.append(row | {"sha256": hashlib.sha256(data).hexdigest()})
    return {"files": files}


def main(fault: str, settings: dict[str, Any]) -> int:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", nargs="?")
    for name in ("--digests", "--out", "--nonce"):
        parser.add_argument(name)
    parser.add_argument("--execution", default="native")
    parser.add_argument("--session", action="append", default=[])
    parser.add_argument("--measure", action="store_true")
    for name in ("--threads", "--tiles", "--prefill", "--decode-at", "--decode-tokens", "--repeats"):
        parser.add_argument(name, type=int, default=1)
    args = parser.parse_args()
    if args.digests:
        if fault == "library missing" and not (Path(sys.argv[0]).parent / "libfake.so.1").exists():
            print("error while loading shared libraries: libfake.so.1", file=sys.stderr)
            return 127
        outside = {"files": [{"path": "../x", "size": 1, "sha256": "0" * 64}]}
        print(json.dumps(outside if fault == "path" else digests(Path(args.digests))))
        return 0
    say("phase verify")
    if fault == "no result":
        return 0
    if fault == "refuses":
        print("error: it cannot be used", file=sys.stderr)
        return 2
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "full":
        print("error: outputs.safetensors: No space left on device", file=sys.stderr)
        return 1
    if fault == "chatter":
        while True:
            print("x" * 4000, file=sys.stderr)
    if fault == "sleeps":
        Path(settings["seen"]).touch()
        time.sleep(120)
    out = Path(args.out)
    out.mkdir()
    if fault == "stale":
        for path in Path(settings["earlier"]).iterdir():
            shutil.copy(path, out)
        return 0
    write(args, fault, out, settings)
    return 0


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def write(args: argparse.Namespace, fault: str, out: Path, settings: dict[str, Any]) -> None:
    """Replays the bundle and writes a result."""
    import numpy as np

    from runtimes.bundle import read_bundle
    from runtimes.ort import OrtRunner
    from runtimes.preprocess import normalize, read_settings
    from runtimes.tensorfile import write_tensors
    from runtimes.verify import read_cases, step_logits

    bundle = read_bundle(Path(args.bundle), check_digests=fault != "unchecked")
    say("phase load")
    runner = OrtRunner(bundle, threads=1)
    images = read_settings(bundle.path("preprocessor_config.json"))
    arrays: dict[str, Any] = {}
    rows = []
    say("phase cases")
    for case in read_cases(bundle.folder):
        pixels = normalize(case.tiles, images) if len(case.tiles) else None
        features = runner.encode_image(pixels) if pixels is not None else np.zeros_like(case.features)
        logits = step_logits(runner, case.ids, features, case.tokens)
        chosen = logits.copy()
        chosen[:, bundle.manifest.text.image_token_id] = -np.inf
        digest = hashlib.sha256(pixels.tobytes()).hexdigest() if pixels is not None else None
        if fault == "nan":
            logits[-1, 3] = np.nan
        if fault == "wrong features":
            features = features * 1.5
        if fault == "shape":
            logits = logits[:-1]
        row = {"name": case.name, "pixels_sha256": "0" * 64 if fault == "pixels" and digest else digest}
        tokens = [int(i) for i in chosen.argmax(axis=1)]
        rows.append(row | {"tokens": tokens[::-1] if fault == "tokens" else tokens, "tiles": len(case.tiles)})
        arrays |= {f"{case.name}.features": features, f"{case.name}.logits": logits}
    if fault == "extra array":
        arrays["../../etc/passwd"] = np.zeros(3, np.float32)
    path = out / "outputs.safetensors"
    write_tensors(path, arrays)
    size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    if fault in ("huge", "huge and said"):
        os.truncate(path, 1 << 36)
        size = 1 << 36 if fault == "huge and said" else size
    if fault == "truncated":
        os.truncate(path, size - 100)
    if fault == "truncated and said":
        os.truncate(path, size - 100)
        size, sha256 = size - 100, hashlib.sha256(path.read_bytes()).hexdigest()
    phase = {"samples_ms": [1.5, 1, 2.5], "cpu_s": 0.25, "peak_rss_mib": 50.5}
    names = ["verify", "load", *(["image", "prefill", "decode"] if args.measure else [])]
    phases = dict.fromkeys(names, phase) if args.execution == "native" or fault == "times" else {}
    machine = {"architecture": os.uname().machine, "system": "Linux 6", "cores": 2, "cpu_features": ["avx2"]}
    result = {
        "schema": 1,
        "nonce": args.nonce,
        "runner": {"version": "fake", "source_sha256": None},
        "engine": {"name": "onnxruntime", "version": "1.32.0", "api": 21},
        "payload_digest": bundle.manifest.payload_digest,
        "execution": args.execution,
        "threads": args.threads,
        "session": dict(pair.split("=", 1) for pair in args.session),
        "machine": machine | {"model": "\x1b[2JA processor"},
        "outputs": {"path": "outputs.safetensors", "size": size, "sha256": sha256},
        "cases": rows,
        "phases": phases,
        "complete": True,
    }
    result |= settings.get("changed", {})
    text = json.dumps(result).encode()
    (out / "result.json").write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    (out / "result.json.sha256").write_text(("0" * 64 if fault == "digest" else digest) + "\n")
    say("phase write")
    if fault == "flips":
        (out / "result.json").write_bytes(text.replace(b'"threads"', b'"threadz"'))
