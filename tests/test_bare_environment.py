"""Running a bundle needs NumPy, Pillow, tokenizers and ONNX Runtime, and nothing else that is installed here."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from runtimes.bundle import read_bundle

ROOT = Path(__file__).parent.parent
NEEDED = ("numpy", "onnxruntime", "pillow", "tokenizers")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment's interpreter: the four packages alone, without what they name as dependencies."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in NEEDED]
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet", "--no-deps", "--no-compile"]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no package index to install from: {done.stderr.strip().splitlines()[-1]}")
    return interpreter


def bare(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), *arguments], capture_output=True, cwd=ROOT, env={}, encoding="utf-8", check=False
    )


def test_a_bare_environment_answers_a_question_about_an_image(python: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    question = [str(tiny_bundle), "--image", str(tmp_path / "red.png"), "--max-new-tokens", "4", "--json", "What?"]
    done = bare(python, "-X", "utf8", "-m", "runtimes.ask", *question)
    said = done.stderr.splitlines()  # what the image takes, and what it took; no warning
    assert (done.returncode, len(said)) == (0, 2), done.stderr
    assert "image tokens; prompt of" in said[0]
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] == 4


def test_a_bare_environment_executes_a_core_ml_bundle(python: Path, tiny_ios_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    question = [str(tiny_ios_bundle), "--image", str(tmp_path / "red.png"), "--max-new-tokens", "4", "--json", "What?"]
    done = bare(python, "-X", "utf8", "-m", "runtimes.ask", *question)
    said = done.stderr.splitlines()  # what the image takes, and what it took; no warning
    assert (done.returncode, len(said)) == (0, 2), done.stderr
    assert "image tokens; prompt of" in said[0]
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] == 4


@pytest.mark.parametrize("extra", ["pdf", "video"])
def test_a_bare_environment_names_the_extra_that_is_missing(
    extra: str, python: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"%PDF-1.7")
    done = bare(python, "-m", "runtimes.ask", str(tiny_bundle), f"--{extra}", str(tmp_path / "file"), "What?")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"pip install '.[{extra}]'" in done.stderr


def test_a_bare_environment_serves_nothing_and_says_what_is_missing(python: Path, tiny_bundle: Path) -> None:
    done = bare(python, "-m", "runtimes.serve", str(tiny_bundle), "--port", "0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "pip install '.[serve]'" in done.stderr


def test_a_bare_environment_pulls_and_publishes(python: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    for command in (
        ("publish", str(tiny_bundle), str(tmp_path / "out")),
        ("pull", str(tmp_path / "out"), str(tmp_path / "here")),
    ):
        done = bare(python, "-m", f"runtimes.{command[0]}", *command[1:])
        assert done.returncode == 0, done.stderr
    assert read_bundle(tmp_path / "here").manifest == read_bundle(tiny_bundle).manifest
    done = bare(python, "-m", "runtimes.pull", str(tmp_path / "out"), str(tmp_path / "there"), "--key", "some.pem")
    assert done.returncode == 2
    assert "pip install '.[sign]'" in done.stderr
    assert not (tmp_path / "there").exists()


def test_every_module_of_runtimes_is_imported_where_nothing_else_is_installed(python: Path) -> None:
    names = [f"runtimes.{path.stem}" for path in (ROOT / "runtimes").glob("*.py") if path.stem != "__init__"]
    code = f"""
import importlib, importlib.metadata, json, sysconfig
for name in {names!r}:
    importlib.import_module(name)
installed = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])  # not the checkout's own egg-info
print(json.dumps(sorted(d.name.lower() for d in installed)))
"""
    done = bare(python, "-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == sorted(NEEDED)
