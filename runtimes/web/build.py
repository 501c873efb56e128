"""Puts a page that runs a bundle into a folder that any web server can serve: page, engine, bundle.

    python -m runtimes.web.build BUNDLE --out FOLDER
    python -m runtimes.web.serve FOLDER

Files are copied as they are; the only one that is made is site.json, which lists the others by size and SHA-256. The
engine comes from npm, at the versions and digests of package-lock.json here. Nothing in the folder names another host.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from runtimes.bundle import file_digest, read_bundle, stage_bundle
from runtimes.manifest import MANIFEST, SIGNATURE, BundleError
from runtimes.preprocess import ImageError, load_image

HERE = Path(__file__).resolve().parent
PAGE = HERE / "page"
PACKAGES = HERE / "node_modules"
LOCK = HERE / "package-lock.json"
# The build of ONNX Runtime without WebGPU: half the bytes of the one that transformers.js takes by itself.
ENGINE = {
    "@huggingface/transformers": ("dist/transformers.min.js", "LICENSE"),
    "onnxruntime-web": ("dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm"),
}
# What a page loads of a bundle. Anything else could be a script or a page of its own on the site that serves it.
PAYLOAD = re.compile(r"\w+\.json|onnx/\w+\.onnx(_data(_\d+)?)?", re.ASCII)
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}  # what every browser shows
QUESTION = "What does this picture show?"
# No answer from a registry is a missing need; anything else that npm says is a fault of the lock file.
UNREACHABLE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "ERR_SOCKET_TIMEOUT")


class SiteError(ValueError):
    """A page that cannot be put together; the message names what is wrong."""


class NoPackages(SiteError):
    """npm is not installed, or no registry answers it."""


@dataclass(frozen=True)
class Site:
    """A finished folder, and what a browser loads of it."""

    folder: Path
    page_bytes: int  # HTML, styles and scripts
    engine_bytes: int  # transformers.js and ONNX Runtime
    bundle_bytes: int


def install_packages() -> Path:
    """The locked npm packages in node_modules here; installed by `npm ci` if they are missing or older than the lock.

    Raises:
        NoPackages: if npm is missing or no registry answers.
        SiteError: if npm refuses for another reason.
    """
    done = PACKAGES / ".package-lock.json"
    if done.exists() and done.stat().st_mtime >= LOCK.stat().st_mtime:
        return PACKAGES
    npm = shutil.which("npm")
    if npm is None:
        raise NoPackages("npm is not installed: transformers.js and ONNX Runtime cannot be fetched")
    patience = ["--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000"]
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", *patience]
    ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=600, check=False)  # noqa: S603 - npm
    if reason := next((code for code in UNREACHABLE if ran.returncode != 0 and code in ran.stderr), None):
        raise NoPackages(f"no package registry answers npm ({reason})")
    if ran.returncode != 0:
        raise SiteError(f"npm ci in {HERE} failed: {ran.stderr.strip()[-2000:]}")
    return PACKAGES


def build_site(
    bundle: Path, out: Path, *, picture: Path | None = None, question: str = QUESTION, packages: Path | None = None
) -> Site:
    """Writes the page for `bundle` to the new folder `out`.

    Args:
        bundle: an ONNX bundle, proven; its evidence is not copied.
        out: must not exist; appears when it is whole.
        picture: an example for visitors to try, or None.
        question: the example question.
        packages: node_modules with the locked versions; None: `install_packages`.

    Raises:
        BundleError: if the bundle cannot be used, or `out` cannot be written.
        SiteError: if the bundle is not for ONNX, or the engine or the example cannot be used.
    """
    checked = read_bundle(bundle)
    if checked.manifest.target != "onnx":
        raise SiteError(f"{bundle / MANIFEST}: target is {checked.manifest.target}, a browser runs onnx")
    payload = {entry.path: entry.sha256 for entry in checked.manifest.files if entry.role == "payload"}
    if extra := next((path for path in payload if not PAYLOAD.fullmatch(path)), None):
        raise SiteError(f"{bundle / MANIFEST}: lists {extra}, which a page has no use for")
    if not question.strip():
        raise SiteError("the example question is empty")
    packages = packages or install_packages()
    _check_versions(packages)
    if picture is not None:
        _check_picture(picture)
    with stage_bundle(out) as stage:
        for path in sorted(PAGE.iterdir()):
            shutil.copyfile(path, stage / path.name)
        (stage / "vendor").mkdir()
        for package, files in ENGINE.items():
            for file in files:
                shutil.copyfile(packages / package / file, stage / "vendor" / Path(file).name)
        for name in (*payload, MANIFEST, *([SIGNATURE] if (bundle / SIGNATURE).is_file() else [])):
            target = stage / "bundle" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / name, target)
            if name in payload and file_digest(target) != payload[name]:
                raise SiteError(f"{bundle / name}: has changed while it was copied")
        example: dict[str, str] = {"question": question}
        if picture is not None:
            example["picture"] = f"example{picture.suffix.lower()}"
            shutil.copyfile(picture, stage / example["picture"])
        paths = sorted(path for path in stage.rglob("*") if path.is_file())
        # Two are not listed: the service worker, which the browser keeps by itself, and a text that is not loaded.
        listed = [
            {"path": path.relative_to(stage).as_posix(), "size": path.stat().st_size, "sha256": file_digest(path)}
            for path in paths
            if path.name not in ("sw.js", "LICENSE", SIGNATURE)
        ]
        site = json.dumps({"schema": 1, "example": example, "files": listed}, indent=1)
        (stage / "site.json").write_text(site + "\n", encoding="utf-8")

    def size(folder: str) -> int:
        return sum(p.stat().st_size for p in (out / folder).rglob("*") if p.is_file())

    engine, model = size("vendor"), size("bundle")
    return Site(out, sum((out / path.name).stat().st_size for path in PAGE.iterdir()), engine, model)


def _check_versions(packages: Path) -> None:
    locked = json.loads(LOCK.read_text(encoding="utf-8"))["packages"]
    for name in ENGINE:
        path = packages / name / "package.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["version"]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise SiteError(f"{path}: cannot read the version: {exc!r}") from exc
        if found != (wanted := locked[f"node_modules/{name}"]["version"]):
            raise SiteError(f"{path}: version is {found}, {LOCK.name} says {wanted}")


def _check_picture(picture: Path) -> None:
    if picture.suffix.lower() not in PICTURES:
        raise SiteError(f"{picture}: the name ends in {picture.suffix!r}, want one of {', '.join(sorted(PICTURES))}")
    try:
        load_image(picture)
    except ImageError as exc:
        raise SiteError(str(exc)) from exc


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m runtimes.web.build", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of an ONNX bundle")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must not exist")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="an example that visitors can try")
    parser.add_argument("--question", default=QUESTION, metavar="TEXT", help="the example question")
    args = parser.parse_args()
    try:
        site = build_site(args.bundle, args.out, picture=args.picture, question=args.question)
    except (BundleError, SiteError) as exc:
        print(f"error: {' '.join(str(exc).split())}", file=sys.stderr)
        return 2
    print(
        f"{site.folder}: page {site.page_bytes / 1e6:.2f} MB, engine {site.engine_bytes / 1e6:.2f} MB, bundle "
        f"{site.bundle_bytes / 1e6:.2f} MB\nTry it: {Path(sys.executable).name} -m runtimes.web.serve {site.folder}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
