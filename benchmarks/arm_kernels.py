"""What ARM's kernels make of 4-bit weights with explicit zero points and without, on one checkpoint, emulated.

    python -m benchmarks.arm_kernels --model demo/checkpoint --data DOCUMENTS --calibration DOCUMENTS [--out FILE.jsonl]

Like is compared with like: one export by a symmetric recipe has every zero point in the middle, and its copy differs by
the input `zero_points` alone, which ONNX Runtime then takes to be the middle. `int4` is the decoder of the shipped
recipe. The tower is in fp32 throughout, so that all that differs is the decoder. Each runs on the CPUs named, in the
native runner under qemu-user, and on this machine; a row has the logits' error against the fp32-compute twin over the
same bytes, along the twin's answers, and the exact answers lost and gained against it. `make test-devices` fetches what
it takes. Not covered: speed and memory, of which emulation says nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.disagreement import Answering
from export.android import export_android
from export.documents import DataError, Document, read_data
from export.prove import ANSWER_TOKENS, ProofError, greedy, kl_divergence
from export.spec import CheckpointError
from quantize.int4 import unpack
from quantize.recipe import RecipeError
from runtimes.bundle import Bundle, read_bundle, read_manifest, write_manifest
from runtimes.manifest import BundleError
from runtimes.native.build import FOLDER, Built, build
from runtimes.native.packages import BuildError, fetch_emulator
from runtimes.ort import OrtRunner
from runtimes.preprocess import ImageError, cut, load_image, to_rgb
from runtimes.runner import EngineError, InputError, graph_paths
from runtimes.tensorfile import read_header, read_tensor
from runtimes.verify import CASES_DATA, CASES_JSON, Case, relative_error, step_logits, write_cases

HOST = "host"
SESSIONS: tuple[dict[str, str], ...] = ({}, {"mlas.disable_kleidiai": "1"})
CPUS = {HOST: SESSIONS[:1], "max": SESSIONS, "cortex-a76": SESSIONS, "cortex-a53": SESSIONS[:1]}  # a53: no KleidiAI
VARIANTS = ("int4", "symmetric-32", "symmetric-32-no-zeros", "symmetric-128", "symmetric-128-no-zeros")
BEYOND = 2  # tokens after the twin's end token that a runner may need for an answer of its own
ERRORS = (BuildError, BundleError, CheckpointError, DataError, RecipeError, ProofError, EngineError, InputError)

DECODER_RULE = 'match = "model.text_model.layers.*_proj.weight"\nformat = "block"\nbits = 4\n'
LIMITS = "[limits]\nactivation_features = 0.15\nactivation_logits = 0.2\nloss_kl = 1.0\nloss_exact = 1.0\n"


@dataclass(frozen=True)
class Expected:
    """The fp32-compute twin's answer to a document, and its logits along it."""

    document: Document
    tokens: tuple[int, ...]  # with a few beyond the end token
    logits: Any  # f32 [tokens, vocab]


def recipe_text(variant: str) -> str:
    """The recipe of a variant as TOML: the decoder's projections as named, head and embedding in 8 bits, fp32 tower."""
    wide = [
        f'[[rule]]\nmatch = "{name}"\nformat = "block"\nbits = 8\nblock = 128\nsymmetric = false\n'
        for name in ("lm_head.weight", "model.text_model.embed_tokens.weight")
    ]
    if variant == "int4":
        factors, rest = "factors = true\n", 'block = 128\nsymmetric = false\nrounding = "gptq"\n'
    else:
        factors, rest = "", f"block = {variant.split('-')[1]}\nsymmetric = true\n"
    head = f'name = "{variant}"\ndescription = "a comparison"\n{factors}\n'
    return "\n".join([head, f"[[rule]]\n{DECODER_RULE}{rest}", *wide, LIMITS])


def remove_zero_points(path: Path) -> int:
    """Takes the input `zero_points` from every 4-bit product of a graph; returns how many.

    Raises:
        ValueError: if a zero point is not in the middle: without the input it would be another matrix.
    """
    model = onnx.load(str(path), load_external_data=False)
    stored = {i.name: i for i in model.graph.initializer}
    loaded = {i.name: i for i in onnx.load(str(path)).graph.initializer}
    removed = 0
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "MatMulNBits" or attributes["bits"] != 4:
            continue
        name = node.input[3]
        blocks = -(-attributes["K"] // attributes["block_size"])
        zeros = unpack(onnx.numpy_helper.to_array(loaded[name]), 4)[:, :blocks]
        if not (zeros == 8).all():
            raise ValueError(f"{path}: {name} holds {np.unique(zeros).tolist()}, want 8 alone")
        del node.input[3:]
        model.graph.initializer.remove(stored.pop(name))
        removed += 1
    onnx.save(model, str(path))
    return removed


def fp32_twin(path: Path) -> bytes:
    """The graph with all products of blocks computed in fp32 (accuracy_level 1), over the same bytes."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    content: bytes = model.SerializeToString()
    return content


def expected(bundle: Bundle, documents: Sequence[Document]) -> list[Expected]:
    """The twin's answers; they become the bundle's golden cases, which the native runner then replays."""
    one = Answering(bundle)
    name = "decoder_model_merged"
    one.runner = OrtRunner(bundle, graphs={name: fp32_twin(graph_paths(bundle)[name])})
    found, cases = [], []
    for number, document in enumerate(documents):
        ids, features = one.prompt(document)
        answer = greedy(one.runner, ids, features, ANSWER_TOKENS)
        tokens = (*answer, *[one.runner.settings.eos_ids[0]] * BEYOND)
        logits = step_logits(one.runner, ids, features, tokens)
        side = one.settings.tile_size
        arrays: list[Any] = []
        grids: tuple[tuple[int, int], ...] = ()
        if document.image:
            tiles, rows, cols = cut(to_rgb(load_image(document.image)), one.settings)
            arrays, grids = [np.asarray(tile) for tile in tiles], ((rows, cols),)
        shape = (len(arrays), one.runner.settings.seq_len, one.runner.settings.hidden)
        case = Case(
            name=f"document-{number}",
            turns=(),
            longest_edge=one.settings.longest_edge,
            grids=grids,
            ids=tuple(ids),
            tokens=tokens,
            images=(),
            tiles=np.array(arrays, np.uint8).reshape(-1, side, side, 3),
            features=features.reshape(shape),
            logits=logits,
        )
        cases.append(case)
        found.append(Expected(document, tokens, logits))
    for path in (CASES_JSON, CASES_DATA):
        (bundle.folder / path).unlink()
    write_cases(bundle.folder, cases)
    _seal(bundle.folder)
    return found


def _seal(folder: Path) -> None:
    """Makes the digests right again after a change, the report's too: this bundle is measured, never shipped."""
    manifest = write_manifest(folder, read_manifest(folder))
    report = json.loads((folder / "report.json").read_text("utf-8"))
    (folder / "report.json").write_text(json.dumps(report | {"payload_digest": manifest.payload_digest}), "utf-8")
    write_manifest(folder, manifest)


def run_native(command: Sequence[str], bundle: Path, out: Path, session: dict[str, str], cpu: str) -> dict[str, Any]:
    """One run of the native runner: its result.json. Raises EngineError if it fails."""
    words = [*command, str(bundle), "--out", str(out), "--threads", "2"]
    words += ["--execution", "native" if cpu == HOST else "qemu-user"]
    for key, value in session.items():
        words += ["--session", f"{key}={value}"]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if done.returncode:
        raise EngineError(f"{cpu}: the native runner failed with {done.returncode}: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads((out / "result.json").read_text("utf-8"))
    return found


def judge(bundle: Bundle, wanted: Sequence[Expected], out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Errors and answers of a run against the twin's."""
    encoder = Answering(bundle)
    ends = set(bundle.manifest.text.eos_ids)

    def text(tokens: Sequence[int]) -> str:
        end = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
        return encoder.text(tokens[:end])

    header = read_header(out / "outputs.safetensors")
    errors, divergences, equal, right, pairs = [], [], 0, [0, 0], []
    for row, one in zip(result["cases"], wanted, strict=True):
        logits = read_tensor(out / "outputs.safetensors", header[f"{row['name']}.logits"])
        kept = len(one.tokens) - BEYOND
        errors.append(relative_error(logits[:kept], one.logits[:kept]))
        divergences += kl_divergence(one.logits[:kept], logits[:kept])
        texts = text(one.tokens), text(row["tokens"])
        exact = [t in one.document.answers for t in texts]
        pairs.append(exact)
        equal += texts[0] == texts[1]
        right = [r + e for r, e in zip(right, exact, strict=True)]
    return {
        "documents": len(wanted),
        "logits_error": {"median": float(np.median(errors)), "worst": float(max(errors))},
        "kl_mean": float(np.mean(divergences)),
        "answers_equal": equal / len(wanted),
        "exact": right[1] / len(wanted),
        "twin_exact": right[0] / len(wanted),
        "lost": sum(a and not b for a, b in pairs),
        "gained": sum(b and not a for a, b in pairs),
    }


def measure(
    model: str,
    documents: Sequence[Document],
    calibration: Path | None,
    variants: Sequence[str],
    cpus: Sequence[str],
    work: Path,
) -> Iterator[dict[str, Any]]:
    """A row for each variant, CPU and session setting. Raises ERRORS."""
    programs: dict[str, tuple[Built, list[str]]] = {}
    for cpu in cpus:
        built = build(HOST) if cpu == HOST else build("linux-arm64")
        command = [str(built.program)] if cpu == HOST else built.emulated(fetch_emulator(FOLDER / "cache"), cpu)
        programs[cpu] = built, command
    with tempfile.TemporaryDirectory(prefix="arm-kernels-") as scratch:
        for variant in variants:
            recipe = Path(scratch) / f"{variant}.toml"
            recipe.write_text(recipe_text(variant), "utf-8")
            folder = Path(scratch) / variant
            given = calibration if variant == "int4" else None
            export_android(model, folder, str(recipe), calibration=given, work=work)
            if variant.endswith("no-zeros"):
                remove_zero_points(graph_paths(read_bundle(folder))["decoder_model_merged"])
                _seal(folder)
            wanted = expected(read_bundle(folder), documents)
            bundle = read_bundle(folder)
            for cpu, (_, command) in programs.items():
                for i, session in enumerate(CPUS[cpu]):
                    out = Path(scratch) / f"{variant}-{cpu}-{i}"
                    result = run_native(command, folder, out, session, cpu)
                    yield {
                        "model": bundle.manifest.model.name,
                        "variant": variant,
                        "zero_points": "none" if variant.endswith("no-zeros") else "explicit",
                        "payload_digest": bundle.manifest.payload_digest,
                        "cpu": cpu,
                        "cpu_features": result["machine"]["cpu_features"],
                        "execution": result["execution"],
                        "engine": result["engine"],
                        "session": result["session"],
                        **judge(bundle, wanted, out, result),
                    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| variant | CPU | session | logits, median | worst | mean KL | lost / gained |", "|" + "---|" * 7]
    for row in rows:
        session = ", ".join(f"{k}={v}" for k, v in row["session"].items())
        error = row["logits_error"]
        cells = [row["variant"], row["cpu"], session, f"{error['median']:.2e}", f"{error['worst']:.2e}"]
        lines.append(f"| {' | '.join(cells)} | {row['kl_mean']:.1e} | {row['lost']} / {row['gained']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint folder or a hub id")
    parser.add_argument("--data", type=Path, required=True, help="documents.jsonl, or the folder that holds it")
    parser.add_argument("--calibration", type=Path, help="documents.jsonl for the variant int4")
    parser.add_argument("--limit", type=int, default=40, help="use at most this many documents (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--cpus", nargs="+", choices=CPUS, default=list(CPUS), metavar="CPU")
    parser.add_argument("--work", type=Path, default=Path("build/calibrated"), help="where calibration is kept")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    args = parser.parse_args()
    rows = []
    try:
        documents = read_data(args.data, args.limit)
        for row in measure(args.model, documents, args.calibration, args.variants, args.cpus, args.work):
            rows.append({"data": args.data.name} | row)
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
    except (*ERRORS, ImageError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
