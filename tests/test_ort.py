"""ONNX Runtime behind the Runner protocol, over a bundle with small graphs that have the real ones' inputs."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import runtimes.ort
from runtimes.bundle import Bundle
from runtimes.manifest import BundleError
from runtimes.memory import CHUNK, RELEASE_TILES
from runtimes.ort import OrtRunner, cpu_features, saturates
from runtimes.runner import Cancelled, EngineError, Floats, InputError, graph_paths, open_runner, read_bundle_settings
from tests.fakes import CONTEXT, HIDDEN, SEQ_LEN, TILE, decoder_graph, make_bundle, save

TOKENS = [int(i) for i in np.random.default_rng(1).integers(0, 250, 24)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("fake") / "bundle")


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same graphs, but for the decoder's word that its cache may be one buffer."""
    return make_bundle(tmp_path_factory.mktemp("fake") / "growing", in_place=False)


@pytest.fixture(scope="module")
def runner(bundle: Bundle) -> OrtRunner:
    return OrtRunner(bundle, threads=1)


def pixels(tiles: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(tiles, 3, TILE, TILE)).astype(np.float32)


def edited(bundle: Bundle, out: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Bundle:
    """A copy of the bundle with another JSON file (digests are `read_bundle`'s business, not the runner's)."""
    shutil.copytree(bundle.folder, out)
    content = json.loads((out / name).read_text())
    change(content)
    (out / name).write_text(json.dumps(content))
    return replace(bundle, folder=out)


def test_tokens_in_pieces_give_the_logits_of_all_at_once(runner: OrtRunner) -> None:
    whole = runner.extend(runner.new_cache(), TOKENS, keep=0)
    cache = runner.new_cache()
    pieces = [runner.extend(cache, TOKENS[:9], keep=0), runner.extend(cache, TOKENS[9:12], keep=0)]
    pieces += [runner.extend(cache, [token]) for token in TOKENS[12:]]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-4, atol=1e-4)
    assert cache.length == len(TOKENS)


def test_the_past_counts(runner: OrtRunner) -> None:
    last = [runner.extend(runner.new_cache(), [first, *TOKENS])[-1] for first in (1, 2)]
    assert np.abs(last[0] - last[1]).max() > 0.01


def test_only_the_logits_asked_for_are_returned(runner: OrtRunner) -> None:
    whole = runner.extend(runner.new_cache(), TOKENS, keep=0)
    assert whole.shape == (len(TOKENS), runner.settings.vocab)
    for keep in (1, 5, len(TOKENS)):
        rows = runner.extend(runner.new_cache(), TOKENS, keep=keep)
        np.testing.assert_allclose(rows, whole[-keep:], rtol=1e-4, atol=1e-4)


def test_a_cache_in_place_gives_what_a_growing_cache_gives(bundle: Bundle, growing: Bundle) -> None:
    rows = []
    for runner in (OrtRunner(bundle, threads=1), OrtRunner(growing, threads=1)):
        cache = runner.new_cache()
        long = [runner.extend(cache, TOKENS, keep=0), runner.extend(cache, TOKENS * 10, keep=0)]
        rooms = [cache.tensors[0].shape()[2]]
        rows.append(np.concatenate([*long, *(runner.extend(cache, [t]) for t in TOKENS * 3)]))
        rooms.append(cache.tensors[0].shape()[2])
        assert rooms[0] < rooms[1]  # the buffers have moved
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_a_long_prompt_in_chunks_gives_what_it_gives_at_once(
    runner: OrtRunner, growing: Bundle, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    ids = (TOKENS * 12)[: 2 * CHUNK + 10]
    at_once = OrtRunner(growing, threads=1)
    image = ids[CHUNK - 2 : CHUNK + 2] = [runner.settings.image_id] * 4  # features on both sides of an edge
    features = np.random.default_rng(3).normal(size=(len(image), HIDDEN)).astype(np.float32)
    lengths: list[int] = []
    decode = runner._decode  # noqa: SLF001

    def spy(embeds: Floats, *rest: Any) -> Any:
        lengths.append(embeds.shape[1])
        return decode(embeds, *rest)

    monkeypatch.setattr(runner, "_decode", spy)
    cache = runner.new_cache()
    rows = runner.extend(cache, ids, features, keep)
    np.testing.assert_allclose(rows, at_once.extend(at_once.new_cache(), ids, features, keep), rtol=1e-4, atol=1e-4)
    assert (lengths, cache.length) == ([CHUNK, CHUNK, 10], len(ids))


def test_an_error_in_a_later_chunk_leaves_the_cache(runner: OrtRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = runner.new_cache()
    wanted = runner.extend(cache, TOKENS)
    calls: list[int] = []
    decode = runner._decode  # noqa: SLF001

    def second_fails(embeds: Floats, *rest: Any) -> Any:
        calls.append(embeds.shape[1])
        if len(calls) == 2:
            raise Cancelled
        return decode(embeds, *rest)

    monkeypatch.setattr(runner, "_decode", second_fails)
    with pytest.raises(Cancelled):
        runner.extend(cache, TOKENS * 10)
    assert (cache.length, len(calls)) == (len(TOKENS), 2)
    monkeypatch.undo()
    after = runner.extend(cache, [1])
    again = runner.new_cache()
    np.testing.assert_array_equal(runner.extend(again, TOKENS), wanted)
    np.testing.assert_allclose(runner.extend(again, [1]), after, rtol=1e-4, atol=1e-4)


def test_an_image_of_many_tiles_lets_go_of_the_tower_and_the_next_image_loads_it_again(bundle: Bundle) -> None:
    runner = OrtRunner(bundle, threads=1)
    few = runner.encode_image(pixels(RELEASE_TILES - 1))
    assert runner._vision is not None  # noqa: SLF001
    many = runner.encode_image(pixels(RELEASE_TILES))
    assert runner._vision is None  # noqa: SLF001
    np.testing.assert_array_equal(runner.encode_image(pixels(RELEASE_TILES - 1)), few)
    assert len(many) == RELEASE_TILES


def test_two_conversations_do_not_mix(runner: OrtRunner) -> None:
    alone = runner.extend(runner.new_cache(), TOKENS)
    a, b = runner.new_cache(), runner.new_cache()
    for i, token in enumerate(TOKENS):
        row = runner.extend(a, [token])
        runner.extend(b, [TOKENS[-i]])
    np.testing.assert_allclose(row, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_place", [True, False])
def test_only_logits_become_numpy_arrays_and_a_cache_in_place_stays_there(
    bundle: Bundle, growing: Bundle, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    runner = OrtRunner(bundle if in_place else growing, threads=1)
    cache = runner.new_cache()
    runner.extend(cache, TOKENS)
    addresses = [tensor.data_ptr() for tensor in cache.tensors]
    shapes: list[tuple[int, ...]] = []
    original = onnxruntime.OrtValue.numpy

    def spy(value: onnxruntime.OrtValue) -> Any:
        shapes.append(tuple(value.shape()))
        return original(value)

    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", spy)
    runner.extend(cache, [1])
    assert shapes == ([] if in_place else [(1, 1, runner.settings.vocab)])  # in place even they are written straight
    assert (addresses == [tensor.data_ptr() for tensor in cache.tensors]) is in_place


def test_image_features_take_the_places_of_the_image_tokens_in_order(runner: OrtRunner) -> None:
    image = runner.settings.image_id
    features = np.random.default_rng(2).normal(size=(2, HIDDEN)).astype(np.float32)
    ids = [5, image, 7, image, 9]
    rows = runner.extend(runner.new_cache(), ids, features, keep=0)
    swapped = runner.extend(runner.new_cache(), ids, features[::-1], keep=0)
    np.testing.assert_allclose(rows[0], swapped[0], rtol=1e-5, atol=1e-5)
    assert np.abs(rows[1:] - swapped[1:]).max(axis=1).min() > 0.01
    # a feature equal to a token's embedding acts as that token
    embeds = runner._embeddings([11, 12], None)[0]  # noqa: SLF001
    as_features = runner.extend(runner.new_cache(), ids, embeds, keep=0)
    as_tokens = runner.extend(runner.new_cache(), [5, 11, 7, 12, 9], keep=0)
    np.testing.assert_array_equal(as_features, as_tokens)


def test_an_image_token_fed_alone_is_an_ordinary_token(runner: OrtRunner) -> None:
    image = runner.settings.image_id
    own = runner._embeddings([image], None)[0]  # noqa: SLF001
    wanted = runner.extend(runner.new_cache(), [image], own)
    np.testing.assert_array_equal(runner.extend(runner.new_cache(), [image]), wanted)


def test_a_tiles_features_do_not_depend_on_its_neighbours(runner: OrtRunner) -> None:
    tiles = pixels(5)
    together = runner.encode_image(tiles)
    assert together.shape == (5, SEQ_LEN, HIDDEN)
    assert together.dtype == np.float32
    for i in range(5):
        np.testing.assert_array_equal(runner.encode_image(tiles[i : i + 1])[0], together[i])
    # the graph itself does mix tiles: without the care taken, the check above would fail
    session = onnxruntime.InferenceSession(str(graph_paths_of(runner)))
    mask = np.ones((1, 5, TILE, TILE), dtype=np.bool_)
    (mixed,) = session.run(None, {"pixel_values": tiles[None], "pixel_attention_mask": mask})
    assert np.abs(mixed - together).max() > 1e-4


def graph_paths_of(runner: OrtRunner) -> Path:
    source = runner._graphs["vision_encoder"]  # noqa: SLF001
    assert isinstance(source, Path)
    return source


def test_the_vision_tower_is_loaded_with_the_first_image_or_when_asked_for(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    original = onnxruntime.InferenceSession

    def spy(path: str, *rest: Any, **options: Any) -> onnxruntime.InferenceSession:
        opened.append(Path(path).name)
        return original(path, *rest, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    runner = OrtRunner(bundle)
    runner.extend(runner.new_cache(), TOKENS)
    assert sorted(opened) == ["decoder_model_merged_q4.onnx", "embed_tokens_quantized.onnx"]
    for seed in range(2):
        runner.encode_image(pixels(1, seed))
    assert opened[2:] == ["vision_encoder.onnx"]
    open_runner(bundle, vision=True)
    assert sorted(opened[3:]) == [*sorted(opened[:2]), "vision_encoder.onnx"]


# ---- what cannot be run


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((1, 3, TILE, TILE + 1), np.float32), r"pixels are float32 \[1, 3, 8, 9\]"),
        (np.zeros((3, TILE, TILE), np.float32), r"want float32 \[tiles, 3, 8, 8\]"),
        (np.zeros((0, 3, TILE, TILE), np.float32), "pixels are"),
        (np.zeros((1, 3, TILE, TILE), np.float64), "pixels are float64"),
        (np.full((1, 3, TILE, TILE), np.nan, np.float32), "NaN"),
        (np.full((1, 3, TILE, TILE), np.inf, np.float32), "infinity"),
    ],
)
def test_pixels_of_another_shape_or_type_and_nan_are_refused(runner: OrtRunner, bad: Floats, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner.encode_image(bad)


@pytest.mark.parametrize(
    ("ids", "rows", "keep", "message"),
    [
        ([], None, 1, "no tokens"),
        ([-1], None, 1, "token ids from -1"),
        ([10**6], None, 1, "token ids from 1000000"),
        ([1], None, 2, "last 2 of 1"),
        (["image", 1], None, 1, r"image features are \[0, 32\], want \[1, 32\]"),
        ([1], 1, 1, r"image features are \[1, 32\], want \[0, 32\]"),
        (["image", "image"], 3, 1, r"image features are \[3, 32\], want \[2, 32\]"),
        ([1] * (CONTEXT + 1), None, 1, "385 tokens do not fit into the context of 384"),
    ],
)
def test_tokens_that_cannot_be_run_are_refused_and_the_cache_is_unchanged(
    runner: OrtRunner, ids: list[Any], rows: int | None, keep: int, message: str
) -> None:
    cache = runner.new_cache()
    features = None if rows is None else np.zeros((rows, HIDDEN), np.float32)
    with pytest.raises(InputError, match=message):
        runner.extend(cache, [runner.settings.image_id if i == "image" else i for i in ids], features, keep)
    assert cache.length == 0


def test_features_with_nan_are_refused(runner: OrtRunner) -> None:
    with pytest.raises(InputError, match="not finite"):
        runner.extend(runner.new_cache(), [runner.settings.image_id], np.full((1, HIDDEN), np.nan, np.float32))


def test_the_context_may_be_filled_to_the_last_token_and_not_beyond(runner: OrtRunner) -> None:
    cache = runner.new_cache()
    runner.extend(cache, [1] * (CONTEXT - 1))
    runner.extend(cache, [1])
    with pytest.raises(InputError, match="1 tokens after the 384 of the conversation so far do not fit"):
        runner.extend(cache, [1])
    assert cache.length == CONTEXT


def test_a_graph_that_computes_nan_is_an_error_and_leaves_the_cache(bundle: Bundle, tmp_path: Path) -> None:
    model = decoder_graph(np.random.default_rng(7), 278)
    head = next(t for t in model.graph.initializer if t.name == "head")
    head.CopyFrom(onnx.numpy_helper.from_array(np.full((HIDDEN, 278), np.nan, np.float32), "head"))
    save(model, tmp_path / "nan.onnx")
    runner = OrtRunner(bundle, graphs={"decoder_model_merged": tmp_path / "nan.onnx"})
    cache = runner.new_cache()
    with pytest.raises(EngineError, match="logits after 24 tokens hold NaN"):
        runner.extend(cache, TOKENS)
    assert cache.length == 0


# ---- what cannot be opened


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda c: c["text_config"].update(hidden_size=31), r"config\.json: hidden is 31, .* says 32"),
        ("config.json", lambda c: c["text_config"].pop("head_dim"), r"config\.json: head_dim is None"),
        ("config.json", lambda c: c.update(vision_config=3), r"config\.json: tile_size is None"),
        ("generation_config.json", lambda c: c.update(eos_token_id=3), r"generation_config\.json: eos_ids is \[3\]"),
        (
            "config.json",
            lambda c: c["transformers.js_config"]["dtype"].update(vision_encoder="q9"),
            "'q9', want one of",
        ),
        ("config.json", lambda c: c["transformers.js_config"].pop("dtype"), "embed_tokens is None, want one of"),
        (
            "config.json",
            lambda c: c["transformers.js_config"].update(dtype="fp16"),
            r"list onnx/embed_tokens_fp16\.onnx",
        ),
    ],
)
def test_a_configuration_that_disagrees_with_the_manifest_is_named(
    bundle: Bundle, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        OrtRunner(edited(bundle, tmp_path / "edited", name, change))


def test_one_dtype_may_stand_for_all_graphs(bundle: Bundle, tmp_path: Path) -> None:
    def one(config: dict[str, Any]) -> None:
        config["transformers.js_config"]["dtype"] = "q4"

    changed = edited(bundle, tmp_path / "edited", "config.json", one)
    entry = changed.manifest.files[0]
    files = tuple(replace(entry, path=f"onnx/{g}_q4.onnx") for g in ("embed_tokens", "vision_encoder"))
    changed = replace(changed, manifest=replace(changed.manifest, files=(*changed.manifest.files, *files)))
    assert {p.name for p in graph_paths(changed).values()} == {
        "embed_tokens_q4.onnx",
        "vision_encoder_q4.onnx",
        "decoder_model_merged_q4.onnx",
    }


def test_an_engine_that_is_too_old_or_another_is_refused(bundle: Bundle) -> None:
    def with_(**changes: Any) -> Bundle:
        return replace(bundle, manifest=replace(bundle.manifest, **changes))

    with pytest.raises(BundleError, match=r"needs ONNX Runtime 99\.1 or later, this is 1\."):
        OrtRunner(with_(engine=replace(bundle.manifest.engine, least="99.1")))
    with pytest.raises(BundleError, match="target coreml on onnxruntime"):
        OrtRunner(with_(target="coreml"))
    with pytest.raises(BundleError, match="target coreml on onnxruntime, want coreml on coreml"):
        open_runner(with_(target="coreml"))
    with pytest.raises(BundleError, match="target is 'tflite', want onnx or coreml"):
        open_runner(with_(target="tflite"))


def test_a_file_that_is_no_graph_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"bad\.onnx: ONNX Runtime .* refuses it"):
        OrtRunner(bundle, graphs={"decoder_model_merged": tmp_path / "bad.onnx"})
    with pytest.raises(BundleError, match=r"absent\.onnx: ONNX Runtime .* refuses it"):
        OrtRunner(bundle, graphs={"decoder_model_merged": tmp_path / "absent.onnx"})


def test_a_truncated_weights_file_is_refused_and_does_not_crash(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.folder, copy)
    data = copy / "onnx/decoder_model_merged_q4.onnx_data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"decoder_model_merged_q4\.onnx: ONNX Runtime .* refuses it"):
        OrtRunner(replace(bundle, folder=copy))


def test_weights_outside_of_the_bundle_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.folder, copy)
    (copy / "onnx/decoder_model_merged_q4.onnx_data").rename(tmp_path / "outside")
    path = copy / "onnx/decoder_model_merged_q4.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../outside"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="refuses it"):
        OrtRunner(replace(bundle, folder=copy))


def other_inputs() -> list[tuple[str, onnx.ModelProto, str]]:
    """Decoders that would run, but not as the manifest says."""

    def decoder() -> onnx.ModelProto:
        return decoder_graph(np.random.default_rng(7), 278)

    without, extra, narrow, whole = decoder(), decoder(), decoder(), decoder()
    without.graph.input[2].name = "how_many"
    extra.graph.input.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["b", "s"]))
    narrow.graph.input[3].type.tensor_type.shape.dim[3].dim_value = 8
    whole.graph.input[1].type.tensor_type.elem_type = TensorProto.INT32
    return [
        ("another name", without, "inputs differ .*how_many.*num_logits_to_keep"),
        ("an extra input", extra, "inputs differ .*position_ids"),
        ("another head width", narrow, r"input past_key_values\.0\.key is tensor\(float\) .*8\], want"),
        ("another type", whole, r"input attention_mask is tensor\(int32\)|refuses it"),
    ]


@pytest.mark.parametrize(("what", "model", "message"), other_inputs(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_graph_with_other_inputs_is_refused(
    bundle: Bundle, tmp_path: Path, what: str, model: onnx.ModelProto, message: str
) -> None:
    (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=rf"other\.onnx: .*({message}|refuses it)"):
        OrtRunner(bundle, graphs={"decoder_model_merged": tmp_path / "other.onnx"})


def test_a_graph_given_as_bytes_finds_its_data_in_the_bundle(bundle: Bundle, runner: OrtRunner) -> None:
    path = bundle.path("onnx/decoder_model_merged_q4.onnx")
    other = OrtRunner(bundle, threads=1, graphs={"decoder_model_merged": path.read_bytes()})
    wanted = runner.extend(runner.new_cache(), TOKENS)
    np.testing.assert_array_equal(other.extend(other.new_cache(), TOKENS), wanted)


def test_the_settings_are_the_manifests(bundle: Bundle) -> None:
    settings = read_bundle_settings(bundle)
    text = bundle.manifest.text
    assert (settings.vocab, settings.context, settings.eos_ids) == (text.vocab, text.context, text.eos_ids)
    assert (settings.tile_size, settings.seq_len, settings.image_id) == (TILE, SEQ_LEN, text.image_token_id)


# ---- cancellation


def slow_decoder(bundle: Bundle, folder: Path) -> OrtRunner:
    """A runner whose decoder takes most of a second for a whole context, in many steps."""
    model = decoder_graph(np.random.default_rng(7), 278, in_place=False)
    wide, steps = 100, 60
    nodes = [helper.make_node("Tile", ["inputs_embeds", "repeats"], ["slow.0"])]
    nodes += [helper.make_node("Sin", [f"slow.{i}"], [f"slow.{i + 1}"]) for i in range(steps)]
    nodes += [
        helper.make_node("Slice", [f"slow.{steps}", "zeros", "width", "axis"], ["narrow"]),
        helper.make_node("Add", ["inputs_embeds", "narrow"], ["begin"]),
    ]
    for name, value in (("repeats", [1, 1, wide]), ("zeros", [0]), ("width", [HIDDEN]), ("axis", [2])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    for node in model.graph.node:
        node.input[:] = ["begin" if name == "inputs_embeds" else name for name in node.input]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes + rest)
    save(model, folder / "slow.onnx")
    return OrtRunner(bundle, threads=1, graphs={"decoder_model_merged": folder / "slow.onnx"})


def test_a_running_call_is_cancelled_in_its_middle_and_the_cache_is_as_before(bundle: Bundle, tmp_path: Path) -> None:
    runner = slow_decoder(bundle, tmp_path)
    cache = runner.new_cache()
    runner.extend(cache, TOKENS)
    began = time.perf_counter()
    runner.extend(runner.new_cache(), [1] * CONTEXT)
    whole_s = time.perf_counter() - began
    timer = threading.Timer(whole_s / 5, runner.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        runner.extend(cache, [1] * (CONTEXT - len(TOKENS)))
    timer.join()
    assert cache.length == len(TOKENS)
    with pytest.raises(Cancelled):  # until resumed
        runner.extend(cache, [1])
    with pytest.raises(Cancelled):
        runner.encode_image(pixels(1))
    runner.resume()
    whole = runner.extend(runner.new_cache(), [*TOKENS, 1])
    np.testing.assert_allclose(runner.extend(cache, [1]), whole, rtol=1e-4, atol=1e-4)


def test_encoding_an_image_is_cancelled_between_its_tiles(bundle: Bundle) -> None:
    runner = OrtRunner(bundle, vision=True)
    many = pixels(50_000)
    timer = threading.Timer(0.05, runner.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        runner.encode_image(many)
    timer.join()


# ---- instruction sets


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "expected"),
    [
        ("x86_64", "processor: 0\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor: 1\nflags : fpu\n", False),
        ("x86_64", "flags: avx2 avx_vnni", False),
        ("AMD64", "flags: avx2 avx512bw", True),
        ("x86_64", None, True),
        ("aarch64", "processor : 0\nFeatures\t: fp asimd asimddp\n", False),
        ("arm64", None, False),
    ],
)
def test_saturation_is_told_by_machine_and_flags(
    tmp_path: Path, machine: str, cpuinfo: str | None, expected: bool
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert saturates(cpu_features(tmp_path / "cpuinfo"), machine) is expected


@pytest.mark.parametrize(
    ("here", "bundle_saturates", "mode"), [(True, True, "1"), (True, False, ""), (False, True, "")]
)
def test_the_exact_mode_is_set_where_products_would_saturate(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, here: bool, bundle_saturates: bool, mode: str
) -> None:
    monkeypatch.setattr(runtimes.ort, "saturates", lambda *_: here)
    instructions = replace(bundle.manifest.instruction_set, saturates_without_vnni=bundle_saturates)
    runner = OrtRunner(replace(bundle, manifest=replace(bundle.manifest, instruction_set=instructions)))
    options = runner._decoder.get_session_options()  # noqa: SLF001
    if mode:
        assert options.get_session_config_entry("session.x64quantprecision") == mode
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.x64quantprecision")
