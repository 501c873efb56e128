"""`make demo`: the whole way on the checkpoint that the repository carries.

Exports it for Android and for iOS, proves both bundles on documents of the test split, verifies them as a device
would, and asks each a question about a sample image. The bundles stay under --out.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

from demo.documents import write_documents
from export.android import export_android
from export.bundling import Exported
from runtimes.ask import ask
from runtimes.bundle import read_bundle
from runtimes.runner import engine_name
from runtimes.verify import verify

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
SAMPLE = HERE / "samples" / "form.png"
QUESTION = "What is the total?"
DOCUMENTS = 400
EMULATED = 100  # of them for the iOS bundle, whose programs are executed operation by operation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for demo-android and demo-ios")
    parser.add_argument("--calibration", type=Path, required=True, help="documents by which INT4 is rounded")
    parser.add_argument("--recipe", default="int4", help="default: %(default)s")
    args = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    documents = args.out / "demo-documents"
    if not documents.exists():
        say(f"drawing {DOCUMENTS} test documents")
        for _ in write_documents("test", DOCUMENTS, "clean", documents):
            pass
    work = args.out / "calibrated"
    android = args.out / "demo-android"
    say("Android: ONNX")
    done = [
        export_android(
            str(CHECKPOINT), android, args.recipe, data=documents, calibration=args.calibration, work=work, progress=say
        )
    ]
    if importlib.util.find_spec("coremltools"):
        done.append(_ios(args.out / "demo-ios", args.recipe, documents, args.calibration, work, say))
    else:
        say("iOS is left out: coremltools has no build for this machine (macOS and Linux on x86-64 have one)")
    answers = []
    for exported in done:
        bundle = read_bundle(exported.bundle)
        say(f"{exported.bundle.name}: verifying the finished bundle, by {engine_name(bundle)}")
        parity = verify(bundle)
        if not parity.passed:
            print("\n".join(f"FAULT {fault}" for fault in parity.faults), file=sys.stderr)
            return 1
        say(f"{exported.bundle.name}: asking about {SAMPLE.relative_to(HERE.parent)}")
        answer = ask(exported.bundle, QUESTION, [SAMPLE]).answer
        answers.append(f"A: {answer.text}  ({exported.bundle.name}, by {engine_name(bundle)})")
    for exported in done:
        print((exported.bundle / "report.md").read_text(encoding="utf-8"))
    print(f"Q: {QUESTION}")
    print("\n".join(answers))
    print(f"\ncheckpoint  {CHECKPOINT}")
    for exported in done:
        report = exported.bundle / "report.md"
        print(f"bundle      {exported.bundle}  ({exported.payload_bytes / 1e6:.2f} MB, proof passed: {report})")
    print(f"picture     {SAMPLE}")
    print(f"\nAsk more: make ask BUNDLE={android} IMAGE={SAMPLE} QUESTION='Read line 2.'")
    print(
        "This model reads only such synthetic documents. Yours: make export-android MODEL=... OUT=... (or export-ios)"
    )
    return 0


def _ios(
    out: Path, recipe: str, documents: Path, calibration: Path, work: Path, say: Callable[[str], None]
) -> Exported:
    from export.ios import export_ios  # needs coremltools, which some machines cannot have

    say("iOS: Core ML")
    return export_ios(
        str(CHECKPOINT), out, recipe, data=documents, limit=EMULATED, calibration=calibration, work=work, progress=say
    )


if __name__ == "__main__":
    raise SystemExit(main())
