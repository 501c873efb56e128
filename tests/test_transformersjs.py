"""A bundle, dropped into transformers.js in Node and in Chromium, computes what ONNX Runtime computes from Python.

Fixed pixels and token ids go in, so resizing, which differs between the two, does not count. Skipped, visibly,
where Node, npm or Chromium is missing or no package registry answers. Not covered: WebGPU.
"""

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from runtimes.ask import ask
from runtimes.preprocess import ImageSettings, read_settings
from runtimes.prompt import ImagePart, Message, PromptEncoder
from runtimes.publish import publish
from tests.browser import Chromium, open_chromium, serving

pytestmark = pytest.mark.node

HERE = Path(__file__).resolve().parent / "transformersjs"
SUFFIX = {"fp32": "", "q8": "_quantized", "q4": "_q4"}  # transformers.js: dtype -> ending of the file's name
NEW_TOKENS = 12
SAME_KERNELS = 1e-4  # relative L2: two builds of one engine on one processor
# The browser's engine has no int8 kernels: it multiplies dequantized weights in fp32. What int8 compute differs from
# that is the recipe's activation error, and this is the limit that the shipped recipes set for it.
OTHER_KERNELS = 5e-2
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """What both sides compute: a prompt of `ids` with `pixels` [N, 3, S, S], if any, and how a chat spells it."""

    name: str
    ids: list[int]
    pixels: F32 | None
    messages: list[dict[str, object]]
    image_size: tuple[int, int] | None


@dataclass(frozen=True)
class Result:
    """What one side computed: features [M, C], logits of every position [T, V], greedy tokens."""

    features: F32 | None
    logits: F32
    tokens: list[int]
    chat_ids: list[int]


@pytest.fixture(scope="session")
def workspace(node_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts, from which Node finds the packages."""
    folder = tmp_path_factory.mktemp("node")
    for script in HERE.glob("*.mjs"):
        shutil.copyfile(script, folder / script.name)
    (folder / "node_modules").symlink_to(node_packages)
    return folder


def make_cases(bundle: Path) -> list[Case]:
    """A text, a single tile, and an image that is split; seeded noise for pixels."""
    encoder = PromptEncoder.from_folder(bundle)
    settings = read_settings(bundle / "preprocessor_config.json")
    edge, tile = settings.longest_edge, settings.tile_size
    grids = {"split": (edge // tile, edge // tile), "wide": (1, edge // tile)} if edge > tile else {"single": (0, 0)}
    cases = []
    for seed, (name, grid) in enumerate([("text", None), *grids.items()]):
        question = f"What is written here, in the {name} one?"
        parts: list[dict[str, object]] = [{"type": "text", "text": question}]
        if grid is None:
            ids = encoder.encode([Message("user", (question,))])
            cases.append(Case(name, ids, None, [{"role": "user", "content": parts}], None))
            continue
        rows, cols = grid
        ids = encoder.encode([Message("user", (ImagePart(rows, cols), question))])
        random = np.random.default_rng(seed)
        pixels = random.uniform(-1, 1, (rows * cols + 1, 3, tile, tile)).astype(np.float32)
        messages: list[dict[str, object]] = [{"role": "user", "content": [{"type": "image"}, *parts]}]
        cases.append(Case(name, ids, pixels, messages, image_size(settings, rows)))
    return cases


def image_size(settings: ImageSettings, rows: int) -> tuple[int, int]:
    """(width, height) of an image that is cut into `rows` rows (0: not cut) with nothing left to resize."""
    return settings.longest_edge, max(rows, 1) * settings.tile_size


def run_python(bundle: Path, cases: Sequence[Case]) -> list[Result]:
    """The same three graphs in ONNX Runtime, driven by a loop of this test's own."""
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    dtypes = config["transformers.js_config"]["dtype"]
    eos = json.loads((bundle / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    stops = set(eos if isinstance(eos, list) else [eos])
    text = config["text_config"]

    def session(name: str) -> ort.InferenceSession:
        path = bundle / "onnx" / f"{name}{SUFFIX[dtypes[name]]}.onnx"
        return ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    embed, vision, decoder = (session(n) for n in ("embed_tokens", "vision_encoder", "decoder_model_merged"))
    outputs = [output.name for output in decoder.get_outputs()]
    empty = np.zeros((1, text["num_key_value_heads"], 0, text["head_dim"]), np.float32)  # [B, G, P, D]

    def decode(inputs: F32, past: dict[str, F32], keep: int) -> tuple[F32, dict[str, F32]]:
        length = past["past_key_values.0.key"].shape[2] + inputs.shape[1]
        feed: dict[str, Any] = {"inputs_embeds": inputs, "attention_mask": np.ones((1, length), np.int64)}
        found = dict(zip(outputs, decoder.run(None, feed | past | {"num_logits_to_keep": np.array(keep)}), strict=True))
        logits: F32 = found.pop("logits")[0]
        return logits, {name.replace("present", "past_key_values"): value for name, value in found.items()}

    results = []
    for case in cases:
        ids = np.array([case.ids])
        (inputs,) = embed.run(None, {"input_ids": ids})  # [B, T, C]
        features = None
        if case.pixels is not None:
            mask = np.ones((1, len(case.pixels), *case.pixels.shape[2:]), bool)
            (features,) = vision.run(None, {"pixel_values": case.pixels[None], "pixel_attention_mask": mask})
            features = features.reshape(-1, features.shape[-1])  # [M, C]
            inputs[ids == config["image_token_id"]] = features
        start = {
            f"past_key_values.{i}.{part}": empty for i in range(text["num_hidden_layers"]) for part in ("key", "value")
        }
        logits, _ = decode(inputs, start, 0)
        last, past = decode(inputs, start, 1)
        tokens = [int(last[-1].argmax())]
        while len(tokens) < NEW_TOKENS and tokens[-1] not in stops:
            (inputs,) = embed.run(None, {"input_ids": np.array([[tokens[-1]]])})
            last, past = decode(inputs, past, 1)
            tokens.append(int(last[-1].argmax()))
        results.append(Result(features, logits, tokens, case.ids))
    return results


def run_node(bundle: Path, cases: Sequence[Case], folder: Path, engine: str, workspace: Path) -> list[Result]:
    """The bundle in transformers.js; see logits.mjs for the files between the two."""
    given, made = folder / "cases", folder / engine
    given.mkdir(exist_ok=True)
    entries = []
    for index, case in enumerate(cases):
        pixels = None
        if case.pixels is not None:
            pixels = {"file": f"{index}.pixels.f32", "shape": case.pixels.shape}
            case.pixels.astype("<f4").tofile(given / f"{index}.pixels.f32")
        chat = {"messages": case.messages, "image": case.image_size}
        entries.append({"name": case.name, "ids": case.ids, "new_tokens": NEW_TOKENS, "pixels": pixels, "chat": chat})
    (given / "cases.json").write_text(json.dumps(entries), encoding="utf-8")
    command = ["node", str(workspace / "logits.mjs"), str(bundle), str(given), str(made), engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]

    def tensor(entry: dict[str, Any] | None) -> F32 | None:
        if entry is None:
            return None
        values = np.fromfile(made / entry["file"], "<f4").reshape(entry["shape"])
        return values.reshape(-1, values.shape[-1])  # [M, C] or [T, V]

    results = []
    for entry in json.loads((made / "results.json").read_text(encoding="utf-8")):
        logits = tensor(entry["logits"])
        assert logits is not None
        results.append(Result(tensor(entry["image_features"]), logits, entry["tokens"], entry["chat_ids"]))
    return results


def difference(found: F32, wanted: F32) -> float:
    """Relative L2."""
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))


@pytest.fixture(scope="session", params=["tiny_bundle", "demo_bundle"])
def bundle(request: pytest.FixtureRequest) -> Path:
    """Each bundle that the tests share: a random model's and the demo's."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="session")
def python_results(bundle: Path) -> tuple[list[Case], list[Result]]:
    cases = make_cases(bundle)
    return cases, run_python(bundle, cases)


NodeResults = Callable[[str], list[Result]]


@pytest.fixture(scope="session")
def node_results(
    workspace: Path,
    bundle: Path,
    python_results: tuple[list[Case], list[Result]],
    tmp_path_factory: pytest.TempPathFactory,
) -> NodeResults:
    """What transformers.js computes for the cases of `python_results` on an engine; run once for each."""
    known: dict[str, list[Result]] = {}

    def run(engine: str) -> list[Result]:
        if engine not in known:
            known[engine] = run_node(bundle, python_results[0], tmp_path_factory.mktemp("node"), engine, workspace)
        return known[engine]

    return run


@pytest.mark.parametrize(("engine", "limit"), [("cpu", SAME_KERNELS), ("wasm", OTHER_KERNELS)])
def test_features_and_logits_in_transformersjs_are_those_of_python(
    engine: str, limit: float, python_results: tuple[list[Case], list[Result]], node_results: NodeResults
) -> None:
    for case, wanted, found in zip(*python_results, node_results(engine), strict=True):
        if wanted.features is None:
            assert found.features is None
        else:
            assert found.features is not None
            worst = difference(found.features, wanted.features)
            assert worst <= limit, f"{case.name}: image features differ by {worst:.2g}"
        worst = difference(found.logits, wanted.logits)
        assert worst <= limit, f"{case.name}: logits differ by {worst:.2g}"


def test_greedy_tokens_of_transformersjs_are_those_of_python(
    python_results: tuple[list[Case], list[Result]], node_results: NodeResults
) -> None:
    cases, wanted = python_results
    found = node_results("cpu")
    assert {c.name: r.tokens for c, r in zip(cases, found, strict=True)} == {
        c.name: r.tokens for c, r in zip(cases, wanted, strict=True)
    }


def test_transformersjs_makes_the_prompt_that_our_runtime_makes(
    python_results: tuple[list[Case], list[Result]], node_results: NodeResults
) -> None:
    for case, found in zip(python_results[0], node_results("cpu"), strict=True):
        assert found.chat_ids == case.ids, case.name


def test_the_comparison_sees_two_tiles_exchanged(
    python_results: tuple[list[Case], list[Result]], node_results: NodeResults
) -> None:
    for case, wanted, found in zip(*python_results, node_results("cpu"), strict=True):
        if case.pixels is not None and len(case.pixels) > 1:
            assert wanted.features is not None
            assert found.features is not None
            tiles = wanted.features.reshape(len(case.pixels), -1, wanted.features.shape[-1])
            exchanged = tiles[[1, 0, *range(2, len(tiles))]].reshape(wanted.features.shape)
            assert difference(found.features, exchanged) > OTHER_KERNELS


def test_the_file_of_each_graph_is_the_one_that_the_configuration_names(
    workspace: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_bundle / "config.json").read_text(encoding="utf-8"))
    assert config["transformers.js_config"]["dtype"]["embed_tokens"] == "q8"
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    config["transformers.js_config"]["dtype"]["embed_tokens"] = "fp32"
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(AssertionError, match=r"embed_tokens\.onnx"):
        run_node(copy, [], tmp_path, "cpu", workspace)


# ---- in a browser


PLAIN, DEFAULT = "ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify"  # transformers.js takes the second
BROWSER_SCRIPT = """
async ({ id, engine, cases }) => {
  const lib = await import("/transformers.min.js");
  const { compute } = await import("/compute.mjs");
  const { env } = lib;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = "/";
  env.useBrowserCache = env.useWasmCache = false;
  const path = `${location.origin}/${engine}`;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${path}.mjs`, wasm: `${path}.wasm` };
  env.backends.onnx.wasm.numThreads = crossOriginIsolated ? 2 : 1;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  for (const { pixels } of cases) if (pixels) pixels.values = new Float32Array(bytes(pixels.values).buffer);
  const text = ({ buffer, byteOffset, byteLength }) => {
    let binary = "";
    for (const byte of new Uint8Array(buffer, byteOffset, byteLength)) binary += String.fromCharCode(byte);
    return btoa(binary);
  };
  const results = await compute(lib, id, "wasm", cases);
  for (const result of results)
    for (const name of ["image_features", "logits"])
      if (result[name]) result[name] = { shape: result[name].dims, values: text(result[name].data) };
  return { isolated: crossOriginIsolated, results };
}
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """Headless Chromium that reaches loopback alone."""
    with open_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def published(node_packages: Path, quick_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a web server: the demo's bundle as `publish` put it there, transformers.js, its engines."""
    folder = tmp_path_factory.mktemp("published")
    publish(quick_bundle, str(folder / "demo"))
    (folder / "index.html").write_text("<!doctype html><title>empty</title>", encoding="utf-8")
    engines = [f"onnxruntime-web/dist/{name}.{kind}" for name in (PLAIN, DEFAULT) for kind in ("mjs", "wasm")]
    for file in ("@huggingface/transformers/dist/transformers.min.js", *engines):
        shutil.copyfile(node_packages / file, folder / Path(file).name)
    shutil.copyfile(HERE / "compute.mjs", folder / "compute.mjs")
    return folder


def run_browser(
    chromium: Chromium, folder: Path, cases: Sequence[Case], *, isolated: bool, engine: str = PLAIN
) -> list[Result]:
    """`folder`'s bundle in transformers.js in a browser, all files by HTTP."""
    entries: list[dict[str, Any]] = []
    for case in cases:
        pixels = None
        if case.pixels is not None:
            values = base64.b64encode(case.pixels.astype("<f4").tobytes()).decode()
            pixels = {"values": values, "shape": case.pixels.shape}
        chat = {"messages": case.messages, "image": case.image_size}
        entries.append({"name": case.name, "ids": case.ids, "new_tokens": NEW_TOKENS, "pixels": pixels, "chat": chat})
    with serving(folder, isolated=isolated) as server, chromium.page() as page:
        page.goto(server.url)
        found = page.evaluate(BROWSER_SCRIPT, {"id": "demo", "engine": engine, "cases": entries})
        threads = len(page.workers)
        assert chromium.outside(server.url) == []
    assert found["isolated"] == isolated
    assert threads == (1 if isolated else 0)  # beside the page's own

    def tensor(entry: dict[str, Any] | None) -> F32 | None:
        if entry is None:
            return None
        values = np.frombuffer(base64.b64decode(entry["values"]), "<f4")
        return values.reshape(-1, entry["shape"][-1])  # [M, C] or [T, V]

    results = []
    for entry in found["results"]:
        logits = tensor(entry["logits"])
        assert logits is not None
        results.append(Result(tensor(entry["image_features"]), logits, entry["tokens"], entry["chat_ids"]))
    return results


@pytest.mark.client
@pytest.mark.parametrize("isolated", [True, False])
def test_a_published_bundle_computes_in_a_browser_what_python_computes(
    isolated: bool, chromium: Chromium, published: Path, workspace: Path, quick_bundle: Path, tmp_path: Path
) -> None:
    cases = make_cases(quick_bundle)
    found = run_browser(chromium, published, cases, isolated=isolated)
    node = run_node(quick_bundle, cases, tmp_path, "wasm", workspace)
    for case, ours, same, wanted in zip(cases, found, node, run_python(quick_bundle, cases), strict=True):
        assert ours.chat_ids == case.ids, case.name
        assert ours.tokens == same.tokens, case.name
        for what, limit, other in (("Node", SAME_KERNELS, same), ("Python", OTHER_KERNELS, wanted)):
            worst = difference(ours.logits, other.logits)
            print(f"{case.name}, logits, browser against {what}: {worst:.2e}")
            assert worst <= limit, f"{case.name}: logits differ from {what}'s by {worst:.2g}"
            if case.pixels is None:
                continue
            assert ours.features is not None
            assert other.features is not None
            worst = difference(ours.features, other.features)
            print(f"{case.name}, features, browser against {what}: {worst:.2e}")
            assert worst <= limit, f"{case.name}: image features differ from {what}'s by {worst:.2g}"


@pytest.mark.client
def test_a_browser_needs_the_external_data_that_the_configuration_declares(
    chromium: Chromium, published: Path, tmp_path: Path
) -> None:
    from playwright.sync_api import Error

    copy = shutil.copytree(published, tmp_path / "copy")
    config = json.loads((copy / "demo" / "config.json").read_text(encoding="utf-8"))
    assert config["transformers.js_config"].pop("use_external_data_format")
    (copy / "demo" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(Error, match="onnx_data"):
        run_browser(chromium, copy, [], isolated=False)


@pytest.mark.client
def test_the_engine_that_transformersjs_takes_by_itself_cannot_look_up_our_embedding(
    chromium: Chromium, published: Path
) -> None:
    """FORMAT.md tells clients to choose another build. Where this fails, the engine has learnt it: drop that advice."""
    from playwright.sync_api import Error

    with pytest.raises(Error, match=r"implementation for GatherBlockQuantized.*embed_tokens"):
        run_browser(chromium, published, [], isolated=False, engine=DEFAULT)


# ---- the guide

GUIDE = HERE.parents[1] / "runtimes" / "TRANSFORMERSJS.md"
SAMPLES = HERE.parents[1] / "demo" / "samples"
QUESTION = "What is the total?"


def guide_blocks() -> list[str]:
    """The JavaScript of the guide: the program for Node, the settings for a browser."""
    node, browser = re.findall(r"^```js\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [node, browser]


def answer_of_python(bundle: Path) -> str:
    """What `runtimes.ask` says about the sample, whose resizing is Pillow's."""
    asked = ask(bundle, QUESTION, [SAMPLES / "form.png"])
    return asked.answer.text.strip()


def test_the_guide_s_program_answers_in_node(workspace: Path, quick_bundle: Path) -> None:
    wanted = json.loads((HERE.parents[1] / "runtimes" / "web" / "package.json").read_text(encoding="utf-8"))
    assert f"@huggingface/transformers@{wanted['dependencies']['@huggingface/transformers']}\n" in GUIDE.read_text()
    (workspace / "ask.mjs").write_text(guide_blocks()[0], encoding="utf-8")
    command = ["node", str(workspace / "ask.mjs"), str(quick_bundle), str(SAMPLES / "form.png"), QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer = answer_of_python(quick_bundle)
    assert answer
    assert done.stdout.strip() == answer


@pytest.mark.client
def test_the_guide_s_settings_answer_in_a_browser(chromium: Chromium, published: Path, quick_bundle: Path) -> None:
    program, settings = guide_blocks()
    after = program[program.index("const processor") :].replace(
        "from_pretrained(id)", 'from_pretrained(id, { device: "wasm" })'
    )
    script = f"""async ([id, picture, question]) => {{
        const lib = await import("/transformers.min.js");
        const {{ AutoModelForImageTextToText, AutoProcessor, env, load_image }} = lib;
        let said = "";
        class TextStreamer extends lib.TextStreamer {{
          constructor(tokenizer, options) {{
            super(tokenizer, {{ ...options, callback_function: (text) => (said += text) }});
          }}
        }}
        {settings}{after}
        return said;
    }}"""
    shutil.copyfile(SAMPLES / "form.png", published / "form.png")
    with serving(published, isolated=False) as server, chromium.page() as page:
        page.goto(server.url)
        said = page.evaluate(script, ["demo", "/form.png", QUESTION])
        assert chromium.outside(server.url) == []
    assert said.strip() == answer_of_python(quick_bundle)
