"""The native runner for AArch64, cross-built and emulated: each kind of kernel on the carried checkpoint's bundle.

`make test-devices` fetches what that takes. Emulated runs say nothing of time and memory.
"""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runtimes.bundle import read_bundle
from runtimes.native.build import FOLDER, Built, build
from runtimes.native.packages import BuildError, emulator
from runtimes.ort import OrtRunner
from runtimes.tensorfile import read_header, read_tensor
from runtimes.verify import F32, bundle_limits, read_cases, relative_error, step_logits

pytestmark = pytest.mark.device


@dataclass(frozen=True)
class Kernels:
    """What a CPU's kernels may differ by, relative L2 of logits on the case without a picture: of the decoder alone.

    golden: from the golden cases, which are the reference with the bundle's own weights. least: no less, or the
        kernels are others than those named. x86: from this machine's, which computes in int8 where it can.
    """

    cpu: str
    session: str | None
    golden: float
    least: float
    x86: float
    reason: str


INT8 = "dotprod: activations in int8 as on x86, which is 6.1e-3 from the golden case; 5.0e-3 was seen"
FLOAT = "no dotprod: int8 has no kernel, blocks are dequantized and summed in fp32; 3.2e-7 was seen"
PATHS = [
    Kernels("max", None, 0.01, 1e-4, 0.012, INT8),
    Kernels("max", "mlas.disable_kleidiai=1", 0.01, 1e-4, 0.012, INT8),
    Kernels("cortex-a76", None, 0.01, 1e-4, 0.012, INT8),
    Kernels("cortex-a76", "mlas.disable_kleidiai=1", 0.01, 1e-4, 0.012, INT8),
    Kernels("cortex-a53", None, 1e-5, 0, 0.012, FLOAT),
]
FEATURES = {"max": {"asimddp", "i8mm"}, "cortex-a76": {"asimddp"}, "cortex-a53": set()}


@pytest.fixture(scope="session")
def qemu() -> Path:
    """qemu-user for AArch64."""
    found = emulator(FOLDER / "cache")
    if found is None:
        pytest.skip("qemu-aarch64 10 or later is not here: make test-devices")
    return found


@pytest.fixture(scope="session")
def arm64(qemu: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The runner for AArch64."""
    try:
        return build("linux-arm64", tmp_path_factory.mktemp("arm64"), fetch=False)
    except BuildError as exc:
        pytest.skip(f"the native runner cannot be built for AArch64 here: {exc}")


@pytest.fixture(scope="session")
def x86_text(demo_bundle: Path) -> F32:
    """This machine's logits of the case without a picture."""
    case = read_cases(demo_bundle)[0]
    return step_logits(OrtRunner(read_bundle(demo_bundle)), case.ids, case.features, case.tokens)


def emulated(arm64: Built, qemu: Path, cpu: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*arm64.emulated(qemu, cpu), *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, check=False)


@pytest.mark.parametrize("kernels", PATHS, ids=lambda k: f"{k.cpu}-{k.session or 'default'}")
def test_each_kind_of_kernel_stays_within_its_tolerance(
    arm64: Built, qemu: Path, demo_bundle: Path, x86_text: F32, tmp_path: Path, kernels: Kernels
) -> None:
    session = ["--session", kernels.session] if kernels.session else []
    out = tmp_path / "out"
    done = emulated(
        arm64, qemu, kernels.cpu, demo_bundle, "--out", out, "--execution", "qemu-user", "--measure", *session
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((out / "result.json").read_text("utf-8"))
    assert result["machine"]["architecture"] == "aarch64"
    assert set(result["machine"]["cpu_features"]) & {"asimddp", "i8mm"} == FEATURES[kernels.cpu]
    assert (result["execution"], result["phases"]) == ("qemu-user", {})
    header = read_header(out / "outputs.safetensors")
    arrays = {name: read_tensor(out / "outputs.safetensors", info) for name, info in header.items()}
    cases, limits = read_cases(demo_bundle), bundle_limits(read_bundle(demo_bundle))
    for case in cases:
        assert relative_error(arrays[f"{case.name}.features"], case.features) <= limits["features_limit"]
        assert relative_error(arrays[f"{case.name}.logits"], case.logits) <= limits["logits_limit"]
    assert cases[0].name == "text"
    text = arrays["text.logits"]
    assert kernels.least <= relative_error(text, cases[0].logits) <= kernels.golden, kernels.reason
    assert relative_error(text, x86_text) <= kernels.x86, kernels.reason


@pytest.mark.parametrize("cpu", FEATURES)
def test_the_self_test_passes_on_each_cpu(arm64: Built, qemu: Path, demo_bundle: Path, cpu: str) -> None:
    done = emulated(arm64, qemu, cpu, demo_bundle, "--self-test")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert found["tokens"] == found["tokens_equal"] + found["ties"] == 32


def test_a_truncated_file_is_refused_there_too(arm64: Built, qemu: Path, demo_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(demo_bundle, tmp_path / "bundle")
    path = next((folder / "onnx").glob("decoder*_data"))
    path.write_bytes(path.read_bytes()[:-1])
    done = emulated(arm64, qemu, "cortex-a53", folder, "--self-test")
    assert done.returncode == 2
    assert "is truncated" in done.stderr
