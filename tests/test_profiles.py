"""Profiles of devices: what is shipped can be read, what is wrong is named."""

from pathlib import Path

import pytest

from device_harness.profiles import SHIPPED, ProfileError, find_profile, read_profiles

GOOD = """
[mine]
title = "Mine"
kind = "board"
target = "onnx"
cores = 2
memory_mib = 512
engine = "onnxruntime"
tiles = 5
context = 2048

[mine.options]
"mlas.disable_kleidiai" = "1"

[mine.limits]
load_ms = 1000
first_token_ms = 2000
token_ms = 30

[mine.sources]
cores = "data sheet"
memory_mib = "data sheet"
limits = "our choice"
"""


def test_every_device_that_is_promised_has_a_profile_with_sources() -> None:
    profiles = read_profiles()
    promised = {"pixel-8", "galaxy-s24", "android-6gb", "iphone-15-pro", "raspberry-pi-5", "x86-laptop"}
    assert promised <= profiles.keys()
    assert {p.kind for p in profiles.values()} == {"phone", "tablet", "board", "laptop"}
    assert {p.target for p in profiles.values()} == {"onnx", "coreml"}


def test_a_profile_is_found_by_name_or_in_a_file(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(GOOD)
    assert find_profile("pixel-8") == read_profiles(SHIPPED)["pixel-8"]
    assert find_profile(str(own)) == find_profile(f"{own}:mine")
    mine = find_profile(str(own))
    assert (mine.cores, mine.memory_mib, mine.limits.token_ms) == (2, 512, 30)
    assert mine.options == {"mlas.disable_kleidiai": "1"}
    with pytest.raises(ProfileError, match=r"'pixel-9' is unknown, want one of .*pixel-8"):
        find_profile("pixel-9")
    with pytest.raises(ProfileError, match=r"'yours' is unknown, want one of mine"):
        find_profile(f"{own}:yours")
    with pytest.raises(ProfileError, match=r"holds pixel-8, .*; name one as"):
        find_profile(str(SHIPPED))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores = 2", "cores = 2\ncolour = 1", r"own.toml: mine: unknown colour, want "),
        ("cores = 2", "", r"mine: cores missing"),
        ("cores = 2", "cores = 0", r"mine: cores is 0, want a whole number of 1 to "),
        ("cores = 2", "cores = true", r"mine: cores is True, want a whole number"),
        ("memory_mib = 512", "memory_mib = 0.5", r"mine: memory_mib is 0.5, want a whole number"),
        ("tiles = 5", "tiles = 4", r"mine: tiles is 4, want 1 or 5 or 10 or 17"),
        ("tiles = 5", "tiles = true", r"mine: tiles is True, want 1 or 5 or 10 or 17"),
        ('"onnxruntime"', '"coreml"', r"mine: engine is 'coreml', want onnxruntime"),
        ('target = "onnx"', 'target = "tflite"', r"mine: target is 'tflite', want onnx or coreml"),
        ('"mlas.disable_kleidiai"', "threads", r"mine: options: unknown threads, want mlas.disable_kleidiai, "),
        ('= "1"', "= 1", r"mine: options: mlas.disable_kleidiai is 1, want a line of text"),
        ("token_ms = 30", "", r"mine: limits: token_ms missing"),
        ("token_ms = 30", "token_ms = 30\nwatts = 5", r"mine: limits: unknown watts"),
        ('limits = "our choice"', 'limits = ""', r"mine: sources: limits is '', want a line of text"),
        ('cores = "data sheet"\nmem', "mem", r"mine: sources: cores missing"),
        (GOOD, "", r"own.toml: holds no profile"),
        (GOOD, "mine = 5", r"mine: is int, want a table"),
        (GOOD, "[mine", r"own.toml: is not TOML"),
    ],
)
def test_a_wrong_field_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    assert GOOD.count(old) >= 1
    own.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ProfileError, match=message):
        find_profile(str(own))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none.toml: cannot be read: No such file"):
        find_profile(str(tmp_path / "none.toml"))
