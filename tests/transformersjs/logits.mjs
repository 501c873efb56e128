// Runs a bundle through transformers.js in Node and writes down what it computed; test_transformersjs.py judges it.
//
//     node logits.mjs BUNDLE CASES OUT [cpu|wasm]
//
// CASES holds cases.json, a list of
//     { name, ids: [token], new_tokens, pixels: null | { file, shape: [N, 3, S, S] },   file: raw little-endian f32
//       chat: null | { messages, image: null | [width, height] } }
// OUT (made here) gets results.json, a list of
//     { name, tokens: [token], chat_ids: null | [token], image_features, logits: { file, shape } }.
//
// Engines. "cpu" is onnxruntime-node. Its CPU library lies inside the npm package (Linux x64 and arm64, Windows,
// macOS arm64); the post-install script only fetches CUDA, so `npm ci --ignore-scripts` downloads nothing more.
// "wasm" is onnxruntime-web, the browser's engine. transformers.js picks onnxruntime-node under Node, but takes a
// runtime found under globalThis[Symbol.for("onnxruntime")] first: that is where this script puts it.

import fs from "node:fs";
import path from "node:path";
import { compute } from "./compute.mjs";

const [bundle, casesFolder, out, engine = "cpu"] = process.argv.slice(2);
if (!out || !["cpu", "wasm"].includes(engine)) {
  console.error("usage: node logits.mjs BUNDLE CASES OUT [cpu|wasm]");
  process.exit(2);
}

if (engine === "wasm") await installWasm();
const lib = await import("@huggingface/transformers");
const folder = path.resolve(bundle);
lib.env.allowRemoteModels = false;
lib.env.localModelPath = path.dirname(folder) + path.sep;

// onnxruntime-web reads no external data from a path, so a graph is handed over with the files beside it.
async function installWasm() {
  const web = await import("onnxruntime-web");
  web.env.wasm.numThreads = 1;
  web.env.wasm.wasmPaths = new URL(".", import.meta.resolve("onnxruntime-web")).href; // else a public host is asked
  const create = (model, given) => {
    const options = { ...given, executionProviders: ["wasm"] };
    if (typeof model !== "string") return web.InferenceSession.create(model, options); // the library's own small graphs
    options.externalData = [];
    for (let count = 0, data = `${model}_data`; fs.existsSync(data); data = `${model}_data_${++count}`)
      options.externalData.push({ path: path.basename(data), data: fs.readFileSync(data) });
    return web.InferenceSession.create(fs.readFileSync(model), options);
  };
  globalThis[Symbol.for("onnxruntime")] = { env: web.env, Tensor: web.Tensor, InferenceSession: { create } };
}

function readPixels({ file, shape }) {
  const bytes = fs.readFileSync(path.join(casesFolder, file));
  return { values: new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4), shape };
}

function write(tensor, file) {
  if (!tensor) return null;
  const { buffer, byteOffset, byteLength } = tensor.data;
  fs.writeFileSync(path.join(out, file), new Uint8Array(buffer, byteOffset, byteLength));
  return { file, shape: tensor.dims };
}

const cases = JSON.parse(fs.readFileSync(path.join(casesFolder, "cases.json"), "utf8"));
for (const entry of cases) entry.pixels &&= readPixels(entry.pixels);
const results = await compute(lib, path.basename(folder), engine === "wasm" ? "auto" : "cpu", cases);
fs.mkdirSync(out);
for (const [index, result] of results.entries()) {
  result.image_features = write(result.image_features, `${index}.features.f32`);
  result.logits = write(result.logits, `${index}.logits.f32`);
}
fs.writeFileSync(path.join(out, "results.json"), JSON.stringify(results));
