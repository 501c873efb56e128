"""Which tensor gets which format: shipped recipes and a user's own, as TOML."""

import fnmatch
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

SHIPPED = ("fp32", "int8", "int4", "int4-quick", "int4-all")
DEFAULT, UNCALIBRATED = "int4", "int4-quick"
ACTIVATIONS = ("dynamic", "static")
ROUNDINGS = ("nearest", "fitted", "gptq")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file and the field."""


@dataclass(frozen=True)
class Scheme:
    """How one tensor is stored.

    format: "float" (fp32 as it is), "block" (4 or 8 bits, a scale and zero point per block along the
        input width) or "column" (signed 8 bits, a scale per output channel, activations in u8).
    rounding: of blocks. "nearest" divides a block's range evenly, "fitted" chooses scale and zero point for the least
        squared error, "gptq" chooses the integers too, by the products' inputs, and needs calibration.
    activations: of columns. "dynamic" takes the range of u8 activations from what is there, tensor by tensor, "static"
        from calibration.
    """

    format: str
    bits: int = 32
    block: int = 0
    symmetric: bool = False
    reduced_range: bool = False
    rounding: str = "fitted"
    activations: str = "dynamic"

    def as_dict(self) -> dict[str, Any]:
        """The manifest's form: only the fields that say something about this format."""
        match self.format:
            case "block":
                return {
                    "scheme": "block",
                    "bits": self.bits,
                    "block": self.block,
                    "symmetric": self.symmetric,
                    "rounding": self.rounding,
                }
            case "column":
                return {
                    "scheme": "column",
                    "bits": 8,
                    "reduced_range": self.reduced_range,
                    "activations": self.activations,
                }
        return {"scheme": "float", "bits": 32}


FLOAT = Scheme("float")


@dataclass(frozen=True)
class Limits:
    """What a bundle may lose before its proof fails.

    activation_features, activation_logits: relative L2 of the shipped graph against its fp32-compute twin.
    loss_kl: mean KL divergence (nats a token) of next-token distributions from the full-precision reference.
    loss_exact: exact-match answers lost against the reference, as a part of the documents asked.
    """

    activation_features: float
    activation_logits: float
    loss_kl: float
    loss_exact: float


@dataclass(frozen=True)
class Recipe:
    """Rules in order; the first whose pattern matches a tensor's name decides, otherwise it stays float."""

    name: str
    description: str
    rules: tuple[tuple[str, Scheme], ...]
    limits: Limits
    factors: bool = False  # channels are evened out first, by factors from calibration folded into the tensors around

    @property
    def calibrated(self) -> bool:
        """Whether it needs documents."""
        return self.factors or any(s.rounding == "gptq" or s.activations == "static" for _, s in self.rules)

    def scheme(self, tensor: str) -> Scheme:
        """The scheme of a Hugging Face tensor name."""
        for pattern, scheme in self.rules:
            if fnmatch.fnmatchcase(tensor, pattern):
                return scheme
        return FLOAT


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or a TOML file by path.

    Raises:
        RecipeError: naming the file and what is wrong in it.
    """
    if name in SHIPPED:
        where, text = (
            f"recipe {name}",
            resources.files("quantize").joinpath("recipes", f"{name}.toml").read_text("utf-8"),
        )
    else:
        path = Path(name)
        if path.suffix != ".toml" or not path.is_file():
            raise RecipeError(f"recipe {name!r}: want one of {', '.join(SHIPPED)} or a .toml file")
        where = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise RecipeError(f"{where}: cannot be read as UTF-8 text: {exc}") from exc
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise RecipeError(f"{where}: not TOML: {exc}") from exc
    return parse_recipe(data, where)


def parse_recipe(data: dict[str, Any], where: str) -> Recipe:
    """Checks every key; unknown and missing ones are errors by name."""
    _keys({"factors": False} | data, {"name", "description", "factors", "rule", "limits"}, where)
    if not isinstance(data.get("factors", False), bool):
        raise RecipeError(f"{where}: factors is {data['factors']!r}, want true or false")
    limits = data["limits"]
    fields = set(Limits.__dataclass_fields__)
    _keys(limits, fields, f"{where}: limits")
    for key in fields:
        if not isinstance(limits[key], (int, float)) or isinstance(limits[key], bool) or limits[key] < 0:
            raise RecipeError(f"{where}: limits.{key} is {limits[key]!r}, want a number of 0 or more")
    if not isinstance(data["rule"], list):
        raise RecipeError(f"{where}: rule is {data['rule']!r}, want a list of tables")
    rules = []
    for i, rule in enumerate(data["rule"]):
        at = f"{where}: rule {i + 1}"
        if not isinstance(rule, dict) or not isinstance(rule.get("match"), str):
            raise RecipeError(f"{at}: match is missing, want a pattern over tensor names")
        rules.append((rule["match"], _scheme({k: v for k, v in rule.items() if k != "match"}, at)))
    return Recipe(
        str(data["name"]), str(data["description"]), tuple(rules), Limits(**limits), data.get("factors", False)
    )


def _scheme(rule: dict[str, Any], where: str) -> Scheme:
    match rule.get("format"):
        case "float":
            _keys(rule, {"format"}, where)
            return FLOAT
        case "block":
            _keys({"rounding": "fitted"} | rule, {"format", "bits", "block", "symmetric", "rounding"}, where)
            if type(rule["bits"]) is not int or rule["bits"] not in (4, 8):
                raise RecipeError(f"{where}: bits is {rule['bits']!r}, want 4 or 8")
            if type(rule["block"]) is not int or rule["block"] not in (16, 32, 64, 128, 256):
                raise RecipeError(f"{where}: block is {rule['block']!r}, want 16, 32, 64, 128 or 256")
            if not isinstance(rule["symmetric"], bool):
                raise RecipeError(f"{where}: symmetric is {rule['symmetric']!r}, want true or false")
            rounding = rule.get("rounding", "fitted")
            if rounding not in ROUNDINGS:
                raise RecipeError(f"{where}: rounding is {rounding!r}, want {' or '.join(ROUNDINGS)}")
            return Scheme("block", rule["bits"], rule["block"], rule["symmetric"], rounding=rounding)
        case "column":
            _keys({"activations": "dynamic"} | rule, {"format", "reduced_range", "activations"}, where)
            if not isinstance(rule["reduced_range"], bool):
                raise RecipeError(f"{where}: reduced_range is {rule['reduced_range']!r}, want true or false")
            activations = rule.get("activations", "dynamic")
            if activations not in ACTIVATIONS:
                raise RecipeError(f"{where}: activations is {activations!r}, want {' or '.join(ACTIVATIONS)}")
            return Scheme("column", 8, reduced_range=rule["reduced_range"], activations=activations)
    raise RecipeError(f"{where}: format is {rule.get('format')!r}, want float, block or column")


def _keys(found: Any, wanted: set[str], where: str) -> None:
    if not isinstance(found, dict):
        raise RecipeError(f"{where}: is {type(found).__name__}, want a table")
    if missing := sorted(wanted - set(found)):
        raise RecipeError(f"{where}: {', '.join(missing)} missing")
    if unknown := sorted(set(found) - wanted):
        raise RecipeError(f"{where}: unknown {', '.join(unknown)}, want {', '.join(sorted(wanted))}")
