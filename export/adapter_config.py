"""What a LoRA adapter's adapter_config.json asks for: which modules it adapts, with which rank and scaling.

The rules are PEFT's: a module is adapted if `target_modules` selects it and `exclude_modules` does not; the first key
of `rank_pattern` (`alpha_pattern`) that matches the end of its name gives its rank (alpha), else `r` (`lora_alpha`);
its scaling is alpha / rank, with `use_rslora` alpha / sqrt(rank). Whatever would make the merged weights something
else than W + scaling * B A is refused by name.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.spec import CheckpointError, Table, read_json

CONFIG = "adapter_config.json"
LINEAR, EMBEDDING, CONVOLUTION = "linear", "embedding", "convolution"
MATCH_SECONDS = 10  # a pattern that takes longer on all names of a model is refused
MAX_PATTERNS = 4096
MAX_RANK = 1 << 15
PLAIN = re.compile(r"[\w.-]+", re.ASCII)  # as a pattern it takes no time: a dot matches one character

NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")
READ = ("rank_pattern", "alpha_pattern", "use_rslora", "exclude_modules", "bias", "init_lora_weights")
# What says nothing about the merged weights. fan_in_fan_out is for Conv1D layers, which this model has none of: PEFT
# takes it back for others. Dropout acts in training, the settings of ways to initialize before it, megatron_core and
# qalora_group_size beside keys that are refused.
HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)
# Ways to initialize that leave the model's own weights as they are; the others change them when an adapter is loaded.
INITIALIZED = (True, False, "gaussian", "eva", "orthogonal")

# Runs in a process of its own, which can be ended: a pattern of a stranger may take for ever.
MATCHER = """
import json, re, sys
tests, names = json.load(sys.stdin)
json.dump([[bool(getattr(re, how)(pattern, name)) for name in names] for how, pattern in tests], sys.stdout)
"""


@dataclass(frozen=True)
class Module:
    """A module that an adapter can be on: its name in the model, and its kind."""

    name: str
    kind: str


@dataclass(frozen=True)
class Adapted:
    """What an adapter does to a module: B has `rank` columns, and B A is multiplied by `scaling`."""

    module: Module
    rank: int
    scaling: float


def read_adapter_config(folder: Path, modules: Sequence[Module]) -> list[Adapted]:
    """Those of a model's modules that the adapter in `folder` is on, in the order given.

    Raises:
        CheckpointError: naming file and field, for what is missing, impossible or not supported.
    """
    path = folder / CONFIG
    config = read_json(path)
    _check(config, f"{path}: ")
    selected = _selected(config, modules, f"{path}: ")
    names = [module.name for module in selected]
    ranks = _by_pattern(config, "rank_pattern", names, f"{path}: ")
    alphas = _by_pattern(config, "alpha_pattern", names, f"{path}: ")
    adapted = []
    for module in selected:
        rank: int = ranks.get(module.name) or config["r"]
        alpha: float = alphas[module.name] if module.name in alphas else config["lora_alpha"]
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        adapted.append(Adapted(module, rank, alpha / divisor))
    return adapted


def _check(config: Table, where: str) -> None:
    """Every key: known and well-formed, harmless, or off."""
    missing = [key for key in NEEDED if key not in config]
    if missing:
        raise CheckpointError(f"{where}lacks {', '.join(missing)}")
    if config["peft_type"] != "LORA":
        raise CheckpointError(f"{where}peft_type is {config['peft_type']!r:.80}, only LORA is supported")
    _number(config["r"], f"{where}r", rank=True)
    _number(config["lora_alpha"], f"{where}lora_alpha")
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{where}bias is {config['bias']!r:.80}, only 'none' is supported: biases stay as they are"
        )
    if not isinstance(config.get("use_rslora", False), bool):
        raise CheckpointError(f"{where}use_rslora is {config['use_rslora']!r:.80}, want true or false")
    start = config.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in INITIALIZED):
        raise CheckpointError(
            f"{where}init_lora_weights is {start!r:.80}, want one of {', '.join(map(str, INITIALIZED))}: others change "
            "the model's own weights; PEFT converts such an adapter (path_initial_model_for_weight_conversion)"
        )
    for key, value in config.items():
        off = value is None or value is False or value in ([], {}, "")
        if key not in (*NEEDED, *READ, *HARMLESS) and not off:
            raise CheckpointError(f"{where}{key:.80} is {value!r:.80}, want it absent or off: it is not supported")


def _selected(config: Table, modules: Sequence[Module], where: str) -> list[Module]:
    targets = config["target_modules"]
    if isinstance(targets, str) and targets.lower() == "all-linear":  # PEFT leaves the head out
        chosen = {m.name for m in modules if m.kind == LINEAR and m.name != "lm_head"}
    else:
        chosen = _listed(targets, modules, f"{where}target_modules")
    if config.get("exclude_modules"):
        chosen -= _listed(config["exclude_modules"], modules, f"{where}exclude_modules")
    if not chosen:
        raise CheckpointError(f"{where}target_modules is {targets!r:.120}, which names no module of the model")
    return [module for module in modules if module.name in chosen]


def _listed(wanted: Any, modules: Sequence[Module], where: str) -> set[str]:
    """Names of the modules that a list names in full or by their ends, or that a pattern matches."""
    names = [module.name for module in modules]
    if isinstance(wanted, str):
        return set(_first_match([wanted], names, where))
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise CheckpointError(f"{where} is {wanted!r:.120}, want a pattern or a list of names")
    ends = set(wanted)
    return {name for name in names if any(".".join(name.split(".")[i:]) in ends for i in range(name.count(".") + 1))}


def _by_pattern(config: Table, key: str, names: Sequence[str], where: str) -> dict[str, Any]:
    """Module name -> the value of the first pattern that matches its end; names that none matches are left out."""
    patterns = config.get(key)
    if patterns is None:
        return {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}{key} is {patterns!r:.80}, want an object")
    for pattern, value in patterns.items():
        _number(value, f"{where}{key}.{pattern:.120}", rank=key == "rank_pattern")
    values = list(patterns.values())
    found = _first_match(list(patterns), names, f"{where}{key}", ends=True)
    return {name: values[index] for name, index in found.items()}


def _first_match(patterns: Sequence[str], names: Sequence[str], where: str, *, ends: bool = False) -> dict[str, int]:
    """Name -> index of the first pattern that matches it as a whole, or (`ends`) some last parts of it."""
    if len(patterns) > MAX_PATTERNS:
        raise CheckpointError(f"{where} has {len(patterns):,} patterns, want at most {MAX_PATTERNS:,}")
    tests = [("match", rf"(.*\.)?({pattern})$") if ends else ("fullmatch", pattern) for pattern in patterns]
    if all(PLAIN.fullmatch(pattern) for pattern in patterns):
        matched = [[bool(getattr(re, how)(pattern, name)) for name in names] for how, pattern in tests]
    else:
        matched = _match_apart(tests, names, where)
    found: dict[str, int] = {}
    for index, row in enumerate(matched):
        for name, hit in zip(names, row, strict=True):
            if hit:
                found.setdefault(name, index)
    return found


def _match_apart(tests: Sequence[tuple[str, str]], names: Sequence[str], where: str) -> list[list[bool]]:
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", MATCHER]
    try:
        done = subprocess.run(  # noqa: S603  # our own script; the patterns are its input
            command,
            input=json.dumps([tests, names]),
            capture_output=True,
            encoding="utf-8",
            timeout=MATCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise CheckpointError(f"{where} takes more than {MATCH_SECONDS} s to match, want simpler patterns") from exc
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["its matching ended by a signal"]
        raise CheckpointError(f"{where} is no regular expression: {reason[0]:.200}")
    matched: list[list[bool]] = json.loads(done.stdout)
    return matched


def _number(value: Any, where: str, *, rank: bool = False) -> None:
    """Raises CheckpointError unless it is a rank, or any finite number."""
    if rank:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise CheckpointError(f"{where} is {value!r:.80}, want an integer from 1 to {MAX_RANK:,}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise CheckpointError(f"{where} is {value!r:.80}, want a finite number")
