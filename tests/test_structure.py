"""The shape of the project: who imports whom, what needs which package, how entries and `make` behave.

Imports are read from the source, so those inside functions count. Not covered: imports by a computed name.
"""

import ast
import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# folder -> the folders of ours that it may import
IMPORTS: dict[str, set[str]] = {
    "quantize": set(),
    "runtimes": set(),
    "router_client": set(),
    "export": {"quantize", "runtimes"},
    "device_harness": {"runtimes"},
    "demo": {"export", "runtimes"},
    "benchmarks": {"demo", "device_harness", "export", "quantize", "router_client", "runtimes"},
}
# only when a route to a cloud model is asked for
EXCEPTIONS = {"runtimes/local_leg.py": {"router_client"}, "runtimes/route.py": {"router_client"}}

# folder -> all that it may import from outside of the standard library: a device has nothing else
PACKAGES: dict[str, set[str]] = {
    "quantize": {"numpy"},
    "runtimes": {"numpy", "onnxruntime", "PIL", "tokenizers"},
    "router_client": {"PIL", "httpx2"},
}

# for one file alone: what only some systems or uses have, imported where it is used
FILE_PACKAGES = {
    "runtimes/api.py": {"starlette", "uvicorn"},
    "runtimes/coreml.py": {"coremltools"},
    "runtimes/keys.py": {"nacl"},
    "runtimes/pdf.py": {"pypdfium2"},
    "runtimes/publish.py": {"huggingface_hub"},
    "runtimes/serve.py": {"starlette", "uvicorn"},
    "runtimes/video.py": {"av"},
}

# Names of what is made on a machine and is no part of the project, as patterns.
BUILT = [".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split())]
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|farm|root|home/[\w.-]+|Users/[\w.-]+)/|\b[A-Z]:\\+Users\\")


def project_files(top: Path = ROOT) -> Iterator[Path]:
    for folder, inner, names in os.walk(top):
        inner[:] = [name for name in inner if not any(fnmatch.fnmatch(name, pattern) for pattern in BUILT)]
        yield from (Path(folder) / name for name in names)


def test_results_that_name_one_bundle_are_of_one_bundle() -> None:
    """The demo checkpoint's bundle of a target and recipe has one digest in all that was measured."""
    found: dict[tuple[str, str], set[str]] = {}

    def look(value: object) -> None:
        if isinstance(value, dict):
            if value.get("model") == "checkpoint" and "payload_digest" in value and "recipe" in value:
                named = (str(value.get("target", "onnx")), str(value["recipe"]))
                found.setdefault(named, set()).add(str(value["payload_digest"]))
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    for path in (ROOT / "benchmarks" / "results").glob("*.json*"):
        text = path.read_text("utf-8")
        look([json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text))
    assert ("onnx", "int4") in found
    assert {named: len(digests) for named, digests in found.items()} == dict.fromkeys(found, 1)


def modules(folder: str) -> list[Path]:
    return sorted(p for p in project_files(ROOT / folder) if p.suffix == ".py")


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, top-level name) of every import statement; a relative import is one of `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, package if node.level else (node.module or "").partition(".")[0]


def forbidden(path: Path, folder: str, source: str) -> list[str]:
    """Every import of `source` that the two tables do not allow, as `file:line imports name`."""
    where = path.relative_to(ROOT).as_posix()
    allowed = {folder} | IMPORTS[folder] | EXCEPTIONS.get(where, set())
    found = []
    for line, name in imported(source, folder):
        ours = name in IMPORTS or name == "tests"
        outside = not ours and name not in sys.stdlib_module_names
        packages = PACKAGES.get(folder, {name}) | FILE_PACKAGES.get(where, set())
        if (ours and name not in allowed) or (outside and name not in packages):
            found.append(f"{where}:{line} imports {name}")
    return found


def entries() -> list[str]:
    """Dotted names of the modules with a main() of their own."""
    names = []
    for path in (p for folder in IMPORTS for p in modules(folder)):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body):
            names.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return names


@pytest.mark.parametrize("folder", IMPORTS)
def test_a_folder_imports_only_what_the_table_allows(folder: str) -> None:
    paths = modules(folder)
    assert paths, f"{folder}/ has no module"
    assert [fault for p in paths for fault in forbidden(p, folder, p.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("runtimes/new.py", "import torch"),
        ("runtimes/new.py", "import coremltools"),
        ("runtimes/coreml.py", "import torch"),
        ("runtimes/new.py", "def f():\n    from export.spec import ModelSpec"),
        ("runtimes/new.py", "import router_client.policy"),
        ("runtimes/ask.py", "from router_client import policy"),
        ("quantize/new.py", "import onnx_ir as ir"),
        ("quantize/new.py", "import runtimes"),
        ("router_client/new.py", "import numpy"),
        ("export/new.py", "from demo import documents"),
        ("demo/new.py", "import quantize.int4"),
        ("export/new.py", "from tests.checkpoints import make_checkpoint"),
    ],
)
def test_the_tables_refuse_a_forbidden_import(where: str, source: str) -> None:
    assert forbidden(ROOT / where, where.partition("/")[0], source)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("runtimes/route.py", "from router_client import policy"),
        ("runtimes/new.py", "from . import bundle\nimport numpy, json"),
        ("runtimes/coreml.py", "def f():\n    import coremltools"),
        ("export/new.py", "import torch\nfrom quantize.int4 import pack"),
    ],
)
def test_the_tables_accept_an_allowed_import(where: str, source: str) -> None:
    assert forbidden(ROOT / where, where.partition("/")[0], source) == []


@pytest.mark.parametrize("folder", IMPORTS)
def test_a_top_level_name_resolves_to_this_checkout(folder: str) -> None:
    spec = importlib.util.find_spec(folder)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / folder / "__init__.py"


def test_every_top_level_package_is_in_the_table() -> None:
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} == set(IMPORTS)


def test_every_package_is_installed() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    files = [
        file for folder in IMPORTS for file in (ROOT / folder).rglob("__init__.py") if "node_modules" not in file.parts
    ]
    assert set(declared) == {".".join(file.parent.relative_to(ROOT).parts) for file in files}


@pytest.mark.parametrize("folder", IMPORTS)
def test_every_public_function_but_main_has_a_docstring(folder: str) -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in modules(folder)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name != "main" and not node.name.startswith("_")
        if ast.get_docstring(node) is None
    ]
    assert bare == []


def test_there_is_no_drawer_for_everything() -> None:
    names = {"core", "common", "util", "utils", "helpers", "misc"}
    found = [p for p in project_files() if names & {*p.relative_to(ROOT).parts[:-1], p.stem}]
    assert found == []


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[object, str]]:
    """Of every entry, run as `python -m` runs it: exit code and output of --help. One process: torch loads once."""
    script = """
import contextlib, io, json, runpy, sys, traceback
results = {}
for module in sys.argv[1:]:
    out, code = io.StringIO(), "no exit"
    sys.argv = [module, "--help"]
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as exc:
            code = exc.code
        except BaseException:  # whatever it is, it belongs to this entry's test, and the next entry still runs
            code = traceback.format_exc()
    results[module] = code, out.getvalue()
json.dump(results, sys.stdout)
"""
    command = [sys.executable, "-W", "ignore", "-c", script, *entries()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    results: dict[str, tuple[object, str]] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("module", entries())
def test_an_entry_explains_itself(module: str, helps: dict[str, tuple[object, str]]) -> None:
    code, out = helps[module]
    assert code in (0, None), code
    assert out.startswith("usage:")
    assert "--help" in out


def test_no_file_names_a_path_of_a_machine() -> None:
    found = []
    for path in project_files():
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            if match := MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number} {match.group()}")
    assert found == []


@pytest.mark.parametrize("path", ["work/main/x", "home/ann/x", "root/x", "Users/ann/x"])
def test_the_search_for_machine_paths_finds_one(path: str) -> None:
    assert MACHINE_PATH.search(f'open("/{path}")')
    assert not MACHINE_PATH.search(f"https://host.example/{path}")


def test_no_lock_file_names_an_index() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in constraints
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in constraints.splitlines())
    for folder in ("runtimes/web", "tests/kotlin"):
        lock = json.loads((ROOT / folder / "package-lock.json").read_text(encoding="utf-8"))
        assert [name for name, package in lock["packages"].items() if "resolved" in package] == []


def make(*arguments: str, python: Path) -> subprocess.CompletedProcess[str]:
    """Runs make with `python` in place of .venv's, and .venv taken as it is."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    outer = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}  # of the make that runs the tests
    environment = {key: value for key, value in os.environ.items() if key not in outer}
    old = ["--old-file=.venv/.setup-done", "--old-file=build/calibration"]  # taken as they are, also where absent
    command = ["make", "--no-print-directory", *old, f"PY={python}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """A program that prints its arguments as JSON."""
    path = tmp_path / "echo"
    path.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_make_hands_over_a_question_word_for_word(echo: Path) -> None:
    question = """ What's the "total"? $HOME $$ `id` $(shell id) \\n #1 ; & é """.strip()
    done = make("ask", "BUNDLE=a b", "IMAGE=it's.png", f"QUESTION={question}", python=echo)
    assert json.loads(done.stdout) == ["-m", "runtimes.ask", "--image=it's.png", "--", "a b", question]


def test_make_hands_over_a_route_and_what_confidence_is_given(echo: Path) -> None:
    asked = ["BUNDLE=b", "IMAGE=i", "QUESTION=q", "ROUTE=prefer_on_device", "ROUTER_CONFIG=r's $x.toml"]
    done = make("ask", *asked, python=echo)
    want = ["--image=i", "--route=prefer_on_device", "--router-config=r's $x.toml", "--", "b", "q"]
    assert json.loads(done.stdout) == ["-m", "runtimes.ask", *want]
    done = make("confidence", "BUNDLE=b b", "DATA=d $x", "TEST_DATA=t's", "OUT=o", python=echo)
    want = ["--data=d $x", "--test-data=t's", "--out=o", "--", "b b"]
    assert json.loads(done.stdout) == ["-m", "benchmarks.confidence", *want]


def test_make_uses_the_default_recipe_and_hands_over_a_named_one(echo: Path) -> None:
    want = ["-m", "export.android", "--model=m@main", "--out=o o"]
    drawn = ["--calibration=build/calibration", "--work=build/calibrated"]
    done = make("export-android", "MODEL=m@main", "OUT=o o", python=echo)
    assert json.loads(done.stdout) == [*want, "--recipe=int4", *drawn]
    done = make("export-android", "MODEL=m@main", "OUT=o o", "RECIPE=int8", "DATA=d.jsonl", python=echo)
    assert json.loads(done.stdout) == [*want, "--recipe=int8", *drawn, "--data=d.jsonl"]
    given = ["LORA=an adapter", "CALIBRATION=c's.jsonl", "DATA=d.jsonl"]
    done = make("export-android", "MODEL=m@main", "OUT=o o", *given, python=echo)
    handed = ["--calibration=c's.jsonl", "--work=build/calibrated", "--lora=an adapter", "--data=d.jsonl"]
    assert json.loads(done.stdout) == [*want, "--recipe=int4", *handed]


def test_make_hands_over_what_quality_is_given_and_nothing_else(echo: Path) -> None:
    done = make("quality", "BUNDLE=b b", "DATA=d's.json", python=echo)
    assert json.loads(done.stdout) == ["-m", "benchmarks.quality", "--data=d's.json", "--", "b b"]
    given = ["MODEL=m", "IMAGES=i", "OUT=o", "ENDPOINT=https://h/v1", "ENDPOINT_MODEL=n $x", "KEY_ENV=K"]
    done = make("quality", "BUNDLE=b", "DATA=d", *given, python=echo)
    want = ["--model=m", "--images=i", "--out=o", "--endpoint=https://h/v1", "--endpoint-model=n $x", "--key-env=K"]
    assert json.loads(done.stdout)[3:] == [*want, "--", "b"]


def test_make_hands_over_what_search_is_given_and_nothing_else(echo: Path) -> None:
    needed = ["MODEL=m m", "DATA=d", "MAX_SIZE=60%", "MAX_LOSS=0.01", "OUT=o's.toml"]
    want = ["--data=d", "--max-size=60%", "--max-loss=0.01", "--out=o's.toml"]
    done = make("search", *needed, python=echo)
    assert json.loads(done.stdout) == ["-m", "benchmarks.search", *want, "--", "m m"]
    given = ["CALIBRATION=c c", "GROUPED=layer", "LIMIT=9", "WORK=w", "PLOT=p $x.svg"]
    done = make("search", *needed, *given, python=echo)
    want += ["--calibration=c c", "--groups=layer", "--limit=9", "--work=w", "--plot=p $x.svg"]
    assert json.loads(done.stdout) == ["-m", "benchmarks.search", *want, "--", "m m"]


def test_make_measures_compares_and_reports_in_one_folder(echo: Path, tmp_path: Path) -> None:
    out = tmp_path / "a report"
    done = make("report", "BUNDLE=b $x", "DATA=d's", "PROFILE=p p", "BASE=HEAD^", f"OUT={out}", python=echo)
    run, budget, paired, report = map(json.loads, done.stdout.splitlines())
    assert run == ["-m", "benchmarks.run", "--profile=p p", f"--out={out}/runs.jsonl", "--", "b $x"]
    want = ["--profile=p p", "--data=d's", f"--out={out}/curve.jsonl", "--", "b $x"]
    assert budget == ["-m", "benchmarks.budget", *want]
    assert paired == ["-m", "benchmarks.paired", "--base=HEAD^", f"--out={out}"]
    assert report[:4] == ["-m", "benchmarks.report", f"--budget={out}/curve.jsonl", f"--out={out}"]
    assert report[-4:] == [f"--baseline={out}/base.jsonl", "--", f"{out}/runs.jsonl", f"{out}/new.jsonl"]
    assert (
        len(make("report", "BUNDLE=b", f"OUT={out}", python=echo).stdout.splitlines()) == 3
    )  # nothing to compare with


def test_make_hands_over_a_device_and_what_runs_on_it(echo: Path) -> None:
    done = make("run-device", "BUNDLE=b b", "DEVICE=adb:0A $x", python=echo)
    assert json.loads(done.stdout) == ["-m", "device_harness.run", "--device=adb:0A $x", "--", "b b"]
    given = ["PROFILE=p", "RUNNER=r r", "EMULATOR=qemu -L 'a b'", "OUT=o"]
    done = make("run-device", "BUNDLE=b", "DEVICE=local", *given, python=echo)
    want = ["--device=local", "--profile=p", "--runner=r r", "--emulator=qemu -L 'a b'", "--out=o", "--", "b"]
    assert json.loads(done.stdout) == ["-m", "device_harness.run", *want]


def test_make_hands_over_where_to_listen(echo: Path) -> None:
    assert json.loads(make("serve", "BUNDLE=b b", python=echo).stdout) == ["-m", "runtimes.serve", "--", "b b"]
    done = make("serve", "BUNDLE=b", "ADDRESS=::", "PORT=0", "KEY_ENV=K", python=echo)
    assert json.loads(done.stdout)[2:] == ["--host=::", "--port=0", "--key-env=K", "--", "b"]


@pytest.mark.parametrize(
    "action", ["ask", "serve", "verify", "export-android", "quality", "confidence", "search", "run-device"]
)
def test_make_says_what_is_missing(action: str, echo: Path) -> None:
    done = make(action, python=echo)
    assert done.returncode != 0
    assert re.search(r"\b(MODEL|BUNDLE|IMAGE|DATA|DEVICE): is missing", done.stderr)


def test_make_lists_every_action(echo: Path) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    listed = re.findall(r"^  make (\S+)", make(python=echo).stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony.group(1).split())
