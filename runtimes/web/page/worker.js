// The model, off the page's thread.
//
// In:  { type: "open", files: Map(path -> Blob) } once, then any number of
//      { type: "ask", id, picture: Blob, number (of the picture), question, edge } and { type: "stop", id }.
// Out: { type: "opened", about }, { type: "step", id, stage, done, total }, { type: "text", id, text },
//      { type: "answered", id, reason, tokens, times }, { type: "failed", id, message, fatal }.
// After a fatal failure the worker is of no more use: an engine that ran out of memory does not recover.

import * as lib from "./vendor/transformers.min.js";
import { Model, Stopped } from "./model.js";
import { cut, decode, normalize, PictureError, readSettings } from "./picture.js";
import { PromptEncoder, PromptError, TextStream } from "./prompt.js";

let files, model, encoder, settings;
let stopped = null; // id of the question that is to end
let last = null; // the latest picture's features: a second question need not wait for them

const json = async (path) => JSON.parse(await files.get(`bundle/${path}`).text());

async function open(message) {
  files = message.files;
  const { env } = lib;
  const base = new URL("./", self.location.href);
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = base.pathname;
  env.useBrowserCache = env.useWasmCache = false; // load.js keeps files, and has checked them
  env.fetch = async (url) => {
    const blob = files.get(decodeURI(new URL(url, base).pathname.slice(base.pathname.length)));
    if (!blob) return new Response(null, { status: 404 });
    return new Response(blob, { headers: { "content-length": blob.size } });
  };
  env.backends.onnx.wasm.wasmPaths = {
    mjs: new URL("vendor/ort-wasm-simd-threaded.mjs", base).href,
    wasm: new URL("vendor/ort-wasm-simd-threaded.wasm", base).href,
  };
  // Threads need an isolated page. The engine alone would take half of the cores, one of a small device's two.
  env.backends.onnx.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 4) : 1;
  const manifest = await json("manifest.json");
  settings = readSettings(await json("preprocessor_config.json"));
  const seqLen = (await json("processor_config.json")).image_seq_len;
  encoder = new PromptEncoder(
    lib.PreTrainedTokenizer,
    await json("tokenizer.json"),
    await json("tokenizer_config.json"),
    seqLen,
  );
  const loaded = await lib.AutoModelForImageTextToText.from_pretrained("bundle", { device: "wasm", local_files_only: true });
  model = new Model(lib, loaded, manifest);
  const { name, revision } = manifest.model;
  const about = {
    model: revision ? `${name} at ${revision}` : name,
    version: manifest.version,
    recipe: manifest.recipe.name,
    digest: manifest.payload_digest,
    proof: manifest.proof.state,
    threads: env.backends.onnx.wasm.numThreads,
    tileSize: settings.tileSize,
    longestEdge: settings.longestEdge,
    split: settings.split,
  };
  self.postMessage({ type: "opened", about });
}

async function read(picture, edge) {
  const { tiles, rows, cols } = cut(await decode(picture), { ...settings, longestEdge: edge });
  return { grid: { rows, cols }, tiles: tiles.map((tile) => normalize(tile, settings)) };
}

async function answer({ id, picture, number, question, edge }) {
  const stop = () => stopped === id;
  const step = (stage, done, total) => self.postMessage({ type: "step", id, stage, done, total });
  const began = performance.now();
  let tokens = 0, firstAt = 0, reason = "length";
  try {
    const known = last?.number === number && last.edge === edge ? last : null;
    if (!known) {
      last = null;
      step("picture", 0, 0);
    }
    const { grid, tiles } = known ?? (await read(picture, edge));
    const ids = encoder.encode([{ role: "user", parts: [grid, question] }]);
    model.check(ids); // before the longest part of the work
    if (!known) {
      const onTile = (done, total) => step("tiles", done, total);
      last = { number, edge, grid, features: await model.encode(tiles, { onTile, stopped: stop }) };
    }
    const stream = new TextStream((list) => encoder.decode(list));
    let begun = false;
    const onTokens = (done, total) => step("prompt", done, total);
    for await (const token of model.generate(ids, last.features, { onTokens, stopped: stop })) {
      if (!tokens++) firstAt = performance.now();
      if (model.text.eos_ids.includes(token)) {
        reason = "stop";
        continue;
      }
      let text = stream.push(token);
      if (text && !begun) [text, begun] = [text.replace(/^ /, ""), true]; // the space after "Assistant:" is the format's
      self.postMessage({ type: "text", id, text });
    }
  } catch (error) {
    if (!(error instanceof Stopped)) throw error;
    reason = "stopped";
  }
  const ended = performance.now();
  const times = { first: firstAt - began, rest: ended - firstAt };
  self.postMessage({ type: "answered", id, reason, tokens, times });
}

// What an engine says when memory runs out; a bare number is an exception that it could not even put into words.
const NO_MEMORY = /memory|alloc|OOM|Maximum call stack|Invalid array (buffer )?length/i;

const plain = (error) => error instanceof PictureError || error instanceof PromptError;

function explain(error) {
  if (plain(error)) return error.message;
  const text = String(error?.message ?? error);
  if (typeof error === "number" || NO_MEMORY.test(text))
    return "This browser has not enough memory for it. Close other tabs, choose less detail, or use a smaller model.";
  return `The engine failed: ${text}`;
}

let work = Promise.resolve(); // one thing at a time
self.onmessage = ({ data }) => {
  if (data.type === "stop") {
    stopped = data.id;
    return;
  }
  work = work
    .then(() => (data.type === "open" ? open(data) : answer(data)))
    .catch((error) => self.postMessage({ type: "failed", id: data.id, message: explain(error), fatal: !plain(error) }));
};
