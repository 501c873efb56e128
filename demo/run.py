"""`make demo`: the whole way on the checkpoint that the repository carries.

Exports it, proves the bundle on documents of the test split, verifies it as a device would, and asks a
question about a sample image. The bundle stays under --out.
"""

import argparse
import sys
import time
from pathlib import Path

from demo.documents import write_documents
from export.android import export_android
from runtimes.ask import ask
from runtimes.bundle import read_bundle
from runtimes.verify import verify

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
SAMPLE = HERE / "samples" / "form.png"
QUESTION = "What is the total?"
DOCUMENTS = 400


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder; must not exist")
    parser.add_argument("--recipe", default="int4", help="default: %(default)s")
    args = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    documents = args.out.parent / f"{args.out.name}-documents"
    if not documents.exists():
        say(f"drawing {DOCUMENTS} test documents")
        for _ in write_documents("test", DOCUMENTS, "clean", documents):
            pass
    done = export_android(str(CHECKPOINT), args.out, args.recipe, data=documents, progress=say)
    say("verifying the finished bundle")
    parity = verify(read_bundle(args.out))
    if not parity.passed:
        print("\n".join(f"FAULT {fault}" for fault in parity.faults), file=sys.stderr)
        return 1
    say(f"asking about {SAMPLE.relative_to(Path.cwd()) if SAMPLE.is_relative_to(Path.cwd()) else SAMPLE}")
    answer = ask(args.out, QUESTION, [SAMPLE]).answer
    print((args.out / "report.md").read_text(encoding="utf-8"))
    print(f"Q: {QUESTION}\nA: {answer.text}\n")
    print(f"checkpoint  {CHECKPOINT}")
    print(f"bundle      {args.out}  ({done.payload_bytes / 1e6:.2f} MB, proof passed)")
    print(f"report      {args.out / 'report.md'}")
    print(f"picture     {SAMPLE}")
    print(f"\nAsk it more: make ask BUNDLE={args.out} IMAGE={SAMPLE} QUESTION='Read line 2.'")
    print("This model reads only such synthetic documents. Yours: make export-android MODEL=... OUT=...")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
