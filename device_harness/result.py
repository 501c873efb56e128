"""What came back from a device, checked before anything of it is believed.

A folder is a result if it holds outputs.safetensors, result.json and result.json.sha256, if the digests match, and if
result.json has the nonce that the run was given: an earlier run's has another. Then the arrays are judged by
`runtimes.verify.compare`, as the host's are. Not covered: cutting images into tiles and turning a chat into ids, which
the runner is given; a device that echoes the golden cases.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from device_harness.device import Device, DeviceError, one_line, pull
from runtimes.manifest import BundleError, load_json
from runtimes.preprocess import ImageSettings, normalize
from runtimes.tensorfile import TensorFileError, read_header, read_tensor
from runtimes.verify import Case, Fault, Outputs, Parity, compare

SCHEMA = 1
OUTPUTS, RESULT, DIGEST = "outputs.safetensors", "result.json", "result.json.sha256"
MOST_RESULT = 1 << 24  # bytes of result.json
HEADER_ROOM = 1 << 20  # bytes of outputs.safetensors besides its data
MOST_PHASES, MOST_SAMPLES, MOST_FEATURES = 20, 1_000_000, 100
MOST_NUMBER = 1e12
NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")

T = TypeVar("T", int, str, bool, dict[str, Any], list[Any])


@dataclass(frozen=True)
class PhaseFound:
    """One phase: every sample, ms; CPU seconds; peak of resident memory, MiB, where the system counts it."""

    samples_ms: tuple[float, ...]
    cpu_s: float
    peak_rss_mib: float | None


@dataclass(frozen=True)
class Machine:
    """The device, as the runner sees it."""

    architecture: str
    system: str
    cores: int | None
    cpu_features: tuple[str, ...]
    model: str


@dataclass(frozen=True)
class CaseFound:
    """What was made of a golden case, besides the arrays."""

    name: str
    pixels_sha256: str | None
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """result.json, checked."""

    runner_version: str
    runner_source: str | None
    engine_version: str
    execution: str
    threads: int
    session: Mapping[str, str]
    machine: Machine
    cases: tuple[CaseFound, ...]
    phases: Mapping[str, PhaseFound]


def fetch(device: Device, folder: str, into: Path, cases: Sequence[Case]) -> None:
    """Gets the three files of a result into a folder here, none larger than it can be.

    Raises:
        DeviceError: if one is missing, too large, or does not come.
    """
    most = HEADER_ROOM + sum(case.features.nbytes + case.logits.nbytes for case in cases)
    for name, size in ((DIGEST, 65), (RESULT, MOST_RESULT), (OUTPUTS, most)):
        try:
            pull(device, f"{folder}/{name}", into / name, most_bytes=size)
        except DeviceError as exc:
            if exc.reason != "failed":
                raise
            raise DeviceError(
                "failed", f"{device.name}: the run left no {name}, so it was not completed: {exc}"
            ) from exc


def read_result(folder: Path, *, nonce: str, payload_digest: str, execution: str, cases: Sequence[Case]) -> Result:
    """Reads and checks a result that was fetched.

    Raises:
        DeviceError: "bad result", naming the field, what was found and what was wanted.
    """
    digest = (folder / DIGEST).read_bytes()
    found = hashlib.sha256((folder / RESULT).read_bytes()).hexdigest()
    if digest != f"{found}\n".encode():
        raise DeviceError("bad result", f"{RESULT} has SHA-256 {found}, {DIGEST} says {one_line(repr(digest), 80)}")
    try:
        content = load_json(folder / RESULT)
    except BundleError as exc:
        raise DeviceError("bad result", one_line(str(exc))) from exc
    at = _At(content, RESULT)
    at.equal("schema", SCHEMA)
    at.equal("nonce", nonce)
    at.equal("complete", True)
    at.equal("payload_digest", payload_digest)
    at.equal("execution", execution)
    _check_outputs(folder / OUTPUTS, at.inner("outputs"))
    phases = _phases(at.inner("phases"))
    if execution != "native" and phases:
        raise DeviceError("bad result", f"{RESULT}: an emulated run states times: phases {', '.join(phases)}")
    runner, engine = at.inner("runner"), at.inner("engine")
    engine.equal("name", "onnxruntime")
    return Result(
        runner_version=runner.text("version"),
        runner_source=runner.text_or_none("source_sha256"),
        engine_version=engine.text("version"),
        execution=execution,
        threads=at.whole("threads"),
        session={one_line(key, 80): one_line(str(value), 80) for key, value in at.table("session", 100).items()},
        machine=_machine(at.inner("machine")),
        cases=_cases(at, cases),
        phases=phases,
    )


class _At:
    """An object of result.json, whose fields are checked as they are taken."""

    def __init__(self, content: dict[str, Any], where: str) -> None:
        self._content, self.where = content, where

    def fail(self, key: str, wanted: str) -> DeviceError:
        value = one_line(repr(self._content.get(key, "missing")), 80)
        return DeviceError("bad result", f"{self.where}: {key} is {value}, want {wanted}")

    def equal(self, key: str, wanted: object) -> None:
        value = self._content.get(key)
        if type(value) is not type(wanted) or value != wanted:
            raise self.fail(key, repr(wanted))

    def _take(self, key: str, kind: type[T], wanted: str) -> T:
        value = self._content.get(key)
        if type(value) is not kind:
            raise self.fail(key, wanted)
        return value

    def absent(self, key: str) -> bool:
        return self._content.get(key) is None

    def names(self, most: int) -> list[str]:
        if len(self._content) > most:
            raise DeviceError("bad result", f"{self.where}: has {len(self._content)} fields, want at most {most}")
        return list(self._content)

    def inner(self, key: str) -> "_At":
        return _At(self._take(key, dict, "an object"), f"{self.where}: {key}")

    def table(self, key: str, most: int) -> dict[str, Any]:
        if len(found := self._take(key, dict, "an object")) > most:
            raise self.fail(key, f"at most {most} fields")
        return found

    def items(self, key: str, most: int) -> list[Any]:
        if len(found := self._take(key, list, "a list")) > most:
            raise self.fail(key, f"a list of at most {most:,}")
        return found

    def text(self, key: str) -> str:
        return one_line(self._take(key, str, "a text"), 200)

    def text_or_none(self, key: str) -> str | None:
        return None if self._content.get(key) is None else self.text(key)

    def whole(self, key: str) -> int:
        value = self._take(key, int, "a whole number")
        if not 0 <= value <= MOST_NUMBER:
            raise self.fail(key, "a whole number, not negative")
        return value

    def number(self, key: str) -> float:
        value = self._content.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST_NUMBER:
            raise self.fail(key, "a number, not negative")
        return float(value)


def _check_outputs(path: Path, at: _At) -> None:
    at.equal("path", OUTPUTS)
    at.equal("size", path.stat().st_size)
    with path.open("rb") as file:
        at.equal("sha256", hashlib.file_digest(file, "sha256").hexdigest())


def _machine(at: _At) -> Machine:
    features = at.items("cpu_features", MOST_FEATURES)
    if not all(isinstance(feature, str) for feature in features):
        raise at.fail("cpu_features", "a list of texts")
    return Machine(
        architecture=at.text("architecture"),
        system=at.text_or_none("system") or "",
        cores=None if at.absent("cores") else at.whole("cores") or None,
        cpu_features=tuple(one_line(feature, 40) for feature in features),
        model=at.text_or_none("model") or "",
    )


def _phases(at: _At) -> dict[str, PhaseFound]:
    found = {}
    for name in at.names(MOST_PHASES):
        if not NAME.fullmatch(name):
            raise DeviceError("bad result", f"{at.where}: {one_line(repr(name), 60)} is no name of a phase")
        phase = at.inner(name)
        samples = phase.items("samples_ms", MOST_SAMPLES)
        for sample in samples:
            if isinstance(sample, bool) or not isinstance(sample, (int, float)) or not 0 < sample <= MOST_NUMBER:
                raise DeviceError("bad result", f"{phase.where}: a sample is {sample!r:.40}, want a number above 0")
        if not samples:
            raise phase.fail("samples_ms", "a sample or more")
        peak = None if phase.absent("peak_rss_mib") else phase.number("peak_rss_mib")
        found[name] = PhaseFound(tuple(map(float, samples)), phase.number("cpu_s"), peak)
    return found


def _cases(at: _At, cases: Sequence[Case]) -> tuple[CaseFound, ...]:
    found: list[CaseFound] = []
    for row in at.items("cases", len(cases)):
        if not isinstance(row, dict):
            raise at.fail("cases", "a list of objects")
        inner = _At(row, f"{at.where}: cases[{len(found)}]")
        tokens = inner.items("tokens", 1 << 16)
        if not all(type(token) is int for token in tokens):
            raise inner.fail("tokens", "whole numbers")
        found.append(CaseFound(inner.text("name"), inner.text_or_none("pixels_sha256"), tuple(tokens)))
    if [case.name for case in found] != [case.name for case in cases]:
        raise DeviceError("bad result", f"{at.where}: cases are not the bundle's, in its order")
    return tuple(found)


def read_outputs(path: Path, cases: Sequence[Case]) -> dict[str, npt.NDArray[np.float32]]:
    """The arrays of a result, by name: those of the cases, each of its case's shape, and no other.

    Raises:
        DeviceError: if the file is another.
    """
    wanted = {
        f"{c.name}.{part}": a.shape for c in cases for part, a in (("features", c.features), ("logits", c.logits))
    }
    try:
        header = read_header(path)
        if header.keys() != wanted.keys():
            odd = one_line(", ".join(sorted(header.keys() ^ wanted.keys())), 200)
            raise DeviceError("bad result", f"{OUTPUTS}: missing, or not asked for: {odd}")
        for name, shape in wanted.items():
            if (header[name].dtype, header[name].shape) != ("F32", shape):
                found = f"{header[name].dtype} {list(header[name].shape)}"
                raise DeviceError("bad result", f"{OUTPUTS}: {name} is {found}, want F32 {list(shape)}")
        return {name: read_tensor(path, header[name]) for name in wanted}
    except TensorFileError as exc:
        raise DeviceError("bad result", one_line(str(exc))) from exc


def judge(
    result: Result,
    arrays: Mapping[str, npt.NDArray[np.float32]],
    cases: Sequence[Case],
    settings: ImageSettings,
    limits: Mapping[str, float],
    image_token: int,
) -> Parity:
    """The verdict by the rules that judge the host, and on the tokens that the device chose by itself."""
    pairs, extra = [], []
    for case, found in zip(cases, result.cases, strict=True):
        features, logits = arrays[f"{case.name}.features"], arrays[f"{case.name}.logits"]
        pairs.append(
            (
                case,
                Outputs(found.pixels_sha256 == pixels_digest(case, settings), case.grids, case.ids, features, logits),
            )
        )
        extra += list(_chosen(case, found.tokens, logits, image_token))
    parity = compare(pairs, features_limit=limits["features_limit"], logits_limit=limits["logits_limit"])
    return replace(parity, faults=(*parity.faults, *extra))


def pixels_digest(case: Case, settings: ImageSettings) -> str | None:
    """SHA-256 of a case's pixels, f32 little-endian in C order; None without an image."""
    if not len(case.tiles):
        return None
    return hashlib.sha256(normalize(case.tiles, settings).astype("<f4", copy=False).tobytes()).hexdigest()


def _chosen(case: Case, tokens: Sequence[int], logits: npt.NDArray[np.float32], image_token: int) -> list[Fault]:
    """What a device says that it chose must be what its logits choose, as far as it was fed what the case feeds."""
    if len(tokens) != len(case.tokens):
        return [Fault(case.name, "generated text", f"{len(tokens)} tokens", f"{len(case.tokens)}")]
    for i, token in enumerate(tokens):
        row = logits[i].copy()
        row[image_token] = -np.inf
        if token != (best := int(np.argmax(row))):
            return [Fault(case.name, f"generated token {i}", str(token), f"{best}, by its own logits")]
        if token != case.tokens[i]:
            break
    return []
