"""What many tests stand on: a tiny random checkpoint and its bundle, the carried checkpoint and its bundle."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from benchmarks.export_cost import RANDOM
from runtimes.native.build import Built

ROOT = Path(__file__).resolve().parent.parent


# How long drawing an example takes is the machine's affair, and no property of what is tested.
settings.register_profile("shared machine", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("shared machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-size", action="store_true", help="run the tests on checkpoints of a published size too")
    parser.addoption("--devices", action="store_true", help="run the tests on fake devices and under emulation too")
    parser.addoption(
        "--clients", action="store_true", help="run the tests of clients too: headless Chromium, Kotlin, Swift"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    apart = {
        "full_size": ("--full-size", "minutes and gigabytes: make test-full-size"),
        "client": ("--clients", "headless Chromium or another client's tools: make test-clients"),
        "device": ("--devices", "a fake device or an emulator: make test-devices"),
    }
    for marker, (option, reason) in apart.items():
        if not config.getoption(option):
            for item in items:
                if marker in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of a few hundred kilobytes; do not write into it."""
    from tests.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    """Its proven int4 bundle; do not write into it."""
    from export.android import export_android

    return export_android(str(tiny_checkpoint), tiny_checkpoint.parent / "bundle", LOOSE).bundle


@pytest.fixture(scope="session")
def tiny_ios_bundle(tiny_checkpoint: Path) -> Path:
    """Its proven int4 bundle for Core ML, context 256 and chunks of 16; do not write into it."""
    pytest.importorskip("coremltools")
    from export.ios import export_ios

    out = tiny_checkpoint.parent / "ios"
    return export_ios(str(tiny_checkpoint), out, LOOSE, context=256, chunk=16).bundle


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The checkpoint that the repository carries."""
    return ROOT / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents to calibrate on, for the carried checkpoint or the tiny one."""
    from demo.documents import write_documents

    folder = tmp_path_factory.mktemp("calibration") / "documents"
    for _ in write_documents("calibration", 96, "mixed", folder):
        pass
    return folder


@pytest.fixture(scope="session")
def demo_bundle(demo_checkpoint: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its proven int4 bundle, the loss measured on a few documents; do not write into it."""
    from demo.documents import write_documents
    from export.android import export_android

    folder = tmp_path_factory.mktemp("demo")
    for _ in write_documents("test", 24, "clean", folder / "documents"):
        pass
    return export_android(
        str(demo_checkpoint),
        folder / "bundle",
        data=folder / "documents",
        calibration=calibration,
        work=calibration.parent / "work",
    ).bundle


@pytest.fixture(scope="session")
def demo_ios_bundle(demo_checkpoint: Path, calibration: Path, demo_bundle: Path) -> Path:
    """Its proven int4 bundle for Core ML, on the same documents; do not write into it."""
    pytest.importorskip("coremltools")
    from export.ios import export_ios

    folder = demo_bundle.parent
    return export_ios(
        str(demo_checkpoint),
        folder / "ios",
        data=folder / "documents",
        calibration=calibration,
        work=calibration.parent / "work",
    ).bundle


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The runner for this machine."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler on this machine")
    from runtimes.native.build import build
    from runtimes.native.packages import BuildError

    try:
        return build(out=tmp_path_factory.mktemp("native"))
    except BuildError as exc:
        pytest.skip(f"the native runner cannot be built here: {exc}")


# Random weights amplify quantization noise as no trained model does: the tiny bundles use the shipped int4
# rules under their own limits. What is wrong in kind (export error) keeps its limit of 1e-4.
LOOSE = str(RANDOM)
