"""Does a bundle, on this machine, compute what its golden cases say?

    python -m runtimes.verify BUNDLE [--json]

Digests first, then every case is replayed: pixels (bit for bit), token ids, image features, and the logits
of each step of the reference's greedy continuation, which is fed token by token. The expectation is the
Hugging Face model with the bundle's dequantized weights; the limits are those of the bundle's recipe.
Not covered: how much the recipe itself lost (that is in the bundle's report).
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtimes.bundle import Bundle, read_bundle
from runtimes.manifest import BundleError
from runtimes.preprocess import ImageSettings, normalize, preprocess, read_settings
from runtimes.prompt import ImagePart, Message, PromptEncoder
from runtimes.runner import EngineError, Runner, engine_name, open_runner
from runtimes.tensorfile import TensorFileError, read_header, read_tensor, write_tensors

F32 = npt.NDArray[np.float32]
CASES_JSON, CASES_DATA = "cases/cases.json", "cases/cases.safetensors"
# An error as large as the limit, spread evenly, is limit * the row's root mean square in each logit, and sqrt(2) of
# that in the difference of two: a tie may be almost three of those wide.
TIE_WIDTH = 4.0


@dataclass(frozen=True)
class Case:
    """One golden case: inputs, and what the reference makes of them.

    images: u8 [H, W, 3] each; tiles: u8 [N, S, S, 3] of all images before normalization; grids: (rows,
    cols) an image; ids: the prompt; features: f32 [N, L, hidden]; tokens: greedy continuation; logits:
    f32 [len(tokens), vocab], row i predicts tokens[i].
    """

    name: str
    turns: tuple[tuple[str, tuple[str | None, ...]], ...]  # (role, parts); None stands for the next image
    longest_edge: int
    grids: tuple[tuple[int, int], ...]
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    images: tuple[npt.NDArray[np.uint8], ...]
    tiles: npt.NDArray[np.uint8]
    features: F32
    logits: F32

    def messages(self) -> list[Message]:
        """The chat with the case's own grids in the places of its images."""
        grids = iter(self.grids)
        return [
            Message(role, tuple(ImagePart(*next(grids)) if part is None else part for part in parts))
            for role, parts in self.turns
        ]


@dataclass(frozen=True)
class Outputs:
    """What a runner made of a case; arrays as in `Case`."""

    pixels_equal: bool
    grids: tuple[tuple[int, int], ...]
    ids: tuple[int, ...]
    features: F32
    logits: F32


@dataclass(frozen=True)
class Fault:
    """One way in which outputs differ from a case by more than is allowed."""

    case: str
    what: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"case {self.case}: {self.what} is {self.found}, want {self.wanted}"


@dataclass(frozen=True)
class Parity:
    """The verdict over all cases: the worst errors and every fault."""

    cases: int
    features_error: float  # worst relative L2
    logits_error: float
    tokens: int
    tokens_equal: int
    ties: int  # unequal tokens that the limit on the logits lets change places
    faults: tuple[Fault, ...]

    @property
    def passed(self) -> bool:
        return not self.faults


def relative_error(found: F32, wanted: F32) -> float:
    """|found - wanted| / |wanted| in L2; infinite where something is not finite or shapes differ."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    if not wanted.size:
        return 0.0
    difference = np.linalg.norm((found.astype(np.float64) - wanted).ravel())
    return float(difference / max(float(np.linalg.norm(wanted.astype(np.float64).ravel())), 1e-30))


def write_cases(folder: Path, cases: Sequence[Case]) -> list[str]:
    """Writes cases/cases.json and cases/cases.safetensors under `folder`; returns their paths in it."""
    (folder / CASES_JSON).parent.mkdir(exist_ok=True)
    arrays: dict[str, npt.NDArray[Any]] = {}
    rows = []
    for case in cases:
        for i, image in enumerate(case.images):
            arrays[f"{case.name}.image.{i}"] = image
        arrays[f"{case.name}.tiles"] = case.tiles
        arrays[f"{case.name}.features"] = case.features
        arrays[f"{case.name}.logits"] = case.logits
        rows.append(
            {
                "name": case.name,
                "turns": [{"role": role, "parts": list(parts)} for role, parts in case.turns],
                "longest_edge": case.longest_edge,
                "grids": [list(g) for g in case.grids],
                "ids": list(case.ids),
                "tokens": list(case.tokens),
                "images": len(case.images),
            }
        )
    text = json.dumps({"cases": rows}, indent=1, ensure_ascii=False) + "\n"
    (folder / CASES_JSON).write_text(text, encoding="utf-8")
    write_tensors(folder / CASES_DATA, arrays)
    return [CASES_JSON, CASES_DATA]


def read_cases(folder: Path) -> list[Case]:
    """Reads a bundle's golden cases. Raises BundleError naming the file and what is wrong in it."""
    path = folder / CASES_JSON
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["cases"]
        header = read_header(folder / CASES_DATA)

        def array(name: str) -> npt.NDArray[Any]:
            return read_tensor(folder / CASES_DATA, header[name])

        cases = [
            Case(
                name=row["name"],
                turns=tuple((t["role"], tuple(t["parts"])) for t in row["turns"]),
                longest_edge=int(row["longest_edge"]),
                grids=tuple((int(r), int(c)) for r, c in row["grids"]),
                ids=tuple(int(i) for i in row["ids"]),
                tokens=tuple(int(i) for i in row["tokens"]),
                images=tuple(array(f"{row['name']}.image.{i}") for i in range(int(row["images"]))),
                tiles=array(f"{row['name']}.tiles"),
                features=array(f"{row['name']}.features"),
                logits=array(f"{row['name']}.logits"),
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, TensorFileError) as exc:
        raise BundleError(f"{path}: golden cases cannot be read: {exc!r}") from exc
    if not cases:
        raise BundleError(f"{path}: holds no case")
    return cases


def replay(
    runner: Runner, encoder: PromptEncoder, settings: ImageSettings, cases: Iterable[Case]
) -> Iterator[tuple[Case, Outputs]]:
    """Runs every case as an application would: pictures to pixels, chat to ids, then token by token."""
    for case in cases:
        case_settings = ImageSettings(**{**asdict(settings), "longest_edge": case.longest_edge})
        tiles = [preprocess(Image.fromarray(image), case_settings) for image in case.images]
        pixels = np.concatenate([t.pixels for t in tiles]) if tiles else None
        features = runner.encode_image(pixels) if pixels is not None else np.zeros_like(case.features)
        wanted = normalize(case.tiles, case_settings) if len(case.tiles) else None
        equal = (pixels is None and wanted is None) or (
            pixels is not None and wanted is not None and np.array_equal(pixels, wanted)
        )
        ids = tuple(encoder.encode(case.messages()))
        logits = step_logits(runner, case.ids, features, case.tokens)
        yield case, Outputs(equal, tuple((t.rows, t.cols) for t in tiles), ids, features, logits)


def step_logits(runner: Runner, ids: Sequence[int], features: F32, tokens: Sequence[int]) -> F32:
    """Logits f32 [len(tokens), vocab]: the prompt in one go, then a continuation token by token."""
    cache = runner.new_cache()
    flat = features.reshape(-1, features.shape[-1]) if len(features) else None
    rows = [runner.extend(cache, list(ids), flat)[-1]]
    rows += [runner.extend(cache, [token])[-1] for token in tokens[:-1]]
    return np.stack(rows)


def compare(pairs: Iterable[tuple[Case, Outputs]], *, features_limit: float, logits_limit: float) -> Parity:
    """Judges outputs: pixels, grids and ids exactly; features and logits by relative L2; tokens exactly, or, as ties,
    where the reference's logits of the two differ by at most `TIE_WIDTH` * limit * the row's root mean square."""
    faults: list[Fault] = []
    worst_features = worst_logits = 0.0
    cases = tokens = tokens_equal = ties = 0
    for case, out in pairs:
        cases += 1
        if not out.pixels_equal:
            faults.append(Fault(case.name, "pixels", "different from the reference", "equal bit for bit"))
        if out.grids != case.grids:
            faults.append(Fault(case.name, "tile grid", str(out.grids), str(case.grids)))
        if out.ids != case.ids:
            at = next((i for i, (a, b) in enumerate(zip(out.ids, case.ids, strict=False)) if a != b), "the end")
            faults.append(Fault(case.name, "prompt", f"{len(out.ids)} ids, different at {at}", f"{len(case.ids)} ids"))
        features = relative_error(out.features, case.features)
        logits = relative_error(out.logits, case.logits)
        worst_features, worst_logits = max(worst_features, features), max(worst_logits, logits)
        if not features <= features_limit:
            faults.append(
                Fault(case.name, "relative error of image features", f"{features:.3g}", f"<= {features_limit:g}")
            )
        if not logits <= logits_limit:
            faults.append(Fault(case.name, "relative error of logits", f"{logits:.3g}", f"<= {logits_limit:g}"))
        for i, token in enumerate(case.tokens):
            tokens += 1
            best = int(np.argmax(out.logits[i]))
            if best == token:
                tokens_equal += 1
                continue
            row = case.logits[i].astype(np.float64)
            width = TIE_WIDTH * logits_limit * float(np.sqrt((row * row).mean()))
            if abs(row[token] - row[best]) <= width and logits <= logits_limit:
                ties += 1
            else:
                faults.append(Fault(case.name, f"greedy token {i}", str(best), str(token)))
    return Parity(cases, worst_features, worst_logits, tokens, tokens_equal, ties, tuple(faults))


def bundle_limits(bundle: Bundle) -> Mapping[str, float]:
    """Limits of `compare` from the bundle's report: what the shipped graph may differ from the reference."""
    path = bundle.folder / "report.json"
    try:
        limits = json.loads(path.read_text(encoding="utf-8"))["verify_limits"]
        return {"features_limit": float(limits["features"]), "logits_limit": float(limits["logits"])}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise BundleError(f"{path}: has no verify_limits: {exc!r}") from exc


def verify(bundle: Bundle) -> Parity:
    """Replays the bundle's golden cases with the engine of its target on this machine and judges them."""
    if not bundle.has_evidence():
        raise BundleError(f"{bundle.folder}: its evidence was left out, golden cases among it: pull it without --only")
    runner = open_runner(bundle)
    encoder = PromptEncoder.from_folder(bundle.folder)
    settings = read_settings(bundle.folder / "preprocessor_config.json")
    return compare(replay(runner, encoder, settings, read_cases(bundle.folder)), **bundle_limits(bundle))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m runtimes.verify", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    args = parser.parse_args()
    began = time.monotonic()
    try:
        bundle = read_bundle(args.bundle)
        print(f"digests of {len(bundle.manifest.files)} files match", file=sys.stderr)
        parity = verify(bundle)
    except (BundleError, EngineError, ValueError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        if args.json:
            print(json.dumps({"passed": False, "error": str(exc)}))
        return 1
    for fault in parity.faults:
        print(f"FAULT {fault}")
    print(
        f"{'passed' if parity.passed else 'FAILED'} by {engine_name(bundle)}: {parity.cases} cases, worst relative "
        f"error of features {parity.features_error:.2e}, of logits {parity.logits_error:.2e}, {parity.tokens_equal} of "
        f"{parity.tokens} greedy tokens equal ({parity.ties} ties), {time.monotonic() - began:.1f} s"
    )
    if args.json:
        summary = {"passed": parity.passed, "engine": engine_name(bundle)}
        print(json.dumps(summary | {"payload_digest": bundle.manifest.payload_digest, **asdict(parity)}))
    return 0 if parity.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
