"""What a recipe left of the weights, as an ordinary checkpoint for `from_pretrained`.

    python -m export.dequantized MODEL [--lora ADAPTER] --recipe int4 --out FOLDER

Every quantized matrix is replaced by the fp32 values that its integers stand for; everything else is
as it was. Existing pipelines can evaluate it, and the proof compares the bundle with it.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from export.calibrate import calibrate_on, calibration_documents
from export.checkpoint import ADAPTER_FILES, resolve
from export.documents import DataError
from export.lora import adapter_digest, open_merged
from export.smolvlm import matrices
from export.spec import CheckpointError, ModelSpec, read_spec, tensor_shapes
from export.weights import WeightSource
from quantize.int4 import F32, ColumnTensor, QTensor, as_floats
from quantize.recipe import DEFAULT, Recipe, RecipeError, load_recipe
from runtimes.bundle import stage_bundle
from runtimes.manifest import BundleError
from runtimes.tensorfile import stream_tensors

SHARD_BYTES = 1 << 30


class Dequantized:
    """A checkpoint's tensors after a recipe: quantized and dequantized as they are asked for.

    Args:
        keep: hold the integers, so that a matrix asked for again is not quantized again.
    """

    def __init__(self, spec: ModelSpec, weights: WeightSource, recipe: Recipe, *, keep: bool = False) -> None:
        self._weights, self._recipe, self._matrices = weights, recipe, frozenset(matrices(spec))
        self._keep = keep
        self._kept: dict[str, QTensor | ColumnTensor] = {}

    def in_integers(self, name: str) -> bool:
        """Whether the recipe quantizes the tensor."""
        return name in self._matrices and self._recipe.scheme(name).format != "float"

    def __getitem__(self, name: str) -> F32:
        if not self.in_integers(name):
            return self._weights[name]
        integers = self._kept.get(name) or self._weights.quantized(name, self._recipe.scheme(name))
        if self._keep:
            self._kept[name] = integers
        return as_floats(integers)


def write_dequantized(
    folder: Path, recipe: Recipe, out: Path, adapter: Path | None = None, calibrated: WeightSource | None = None
) -> Iterator[str]:
    """Writes the checkpoint of `folder` after `recipe` to `out`, shard by shard; yields each shard's name.

    Args:
        adapter: folder of a LoRA adapter that is merged into it first.
        calibrated: what calibration made of its weights, for a recipe that is calibrated.

    Raises:
        CheckpointError, BundleError: bad input; `out` exists or cannot be written (nothing is left of it).
    """
    spec = read_spec(folder)
    weights = calibrated or open_merged(folder, spec, adapter)
    source = Dequantized(spec, weights, recipe)
    with stage_bundle(out) as stage:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("model") and path.suffix != ".safetensors":
                shutil.copyfile(path, stage / path.name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = "float32"
        (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        places: dict[str, str] = {}
        for number, names in enumerate(_shards(spec), 1):
            name = f"model-{number:05d}.safetensors"
            shapes = {tensor: ("F32", weights.shape(tensor)) for tensor in names}
            stream_tensors(stage / name, shapes, lambda tensor: [source[tensor]])
            places |= dict.fromkeys(names, name)
            yield name
        total = sum(4 * int(np.prod(shape)) for shape in tensor_shapes(spec).values())
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": places}
        (stage / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _shards(spec: ModelSpec) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in tensor_shapes(spec).items():
        need = 4 * int(np.prod(shape))
        if names and size + need > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += need
    yield names


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m export.dequantized", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    parser.add_argument("--lora", metavar="ADAPTER", help="a PEFT LoRA adapter to merge in: a folder or a hub id")
    parser.add_argument("--recipe", default=DEFAULT, help="a shipped recipe or a .toml file (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--calibration", type=Path, help="documents.jsonl by which a calibrated recipe rounds")
    parser.add_argument("--work", type=Path, help="where calibration keeps what is done (default: beside OUT)")
    args = parser.parse_args()
    try:
        recipe = load_recipe(args.recipe)
        calibrating = calibration_documents(recipe, args.calibration)
        adapter = resolve(args.lora, ADAPTER_FILES, "an adapter").folder if args.lora is not None else None
        folder, calibrated = resolve(args.model).folder, None
        if recipe.calibrated:
            spec = read_spec(folder)
            calibrated, _ = calibrate_on(
                calibrating,
                folder,
                spec,
                open_merged(folder, spec, adapter),
                recipe,
                args.work or args.out.with_name(args.out.name + ".calibration"),
                lambda text: print(text, file=sys.stderr),
                adapter=adapter_digest(adapter) if adapter else "",
            )
        for shard in write_dequantized(folder, recipe, args.out, adapter, calibrated):
            print(f"wrote {shard}", file=sys.stderr)
    except (CheckpointError, RecipeError, BundleError, DataError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(f"checkpoint after recipe {args.recipe} in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
