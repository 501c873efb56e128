// Runs a bundle through transformers.js and writes down what it computed; test_transformersjs.py judges it.
//
//     node logits.mjs BUNDLE CASES OUT [cpu|wasm]
//
// CASES holds cases.json, a list of
//     { name, ids: [token], new_tokens, pixels: null | { file, shape: [N, 3, S, S] },   file: raw little-endian f32
//       chat: null | { messages, image: null | [width, height] } }
// OUT (made here) gets results.json, a list of
//     { name, tokens: [token], chat_ids: null | [token], image_features, logits: { file, shape } }.
//
// Nothing but the bundle's own files says how to load it: the class by config.json's model_type, each graph's
// file by transformers.js_config.dtype, the chat by tokenizer_config.json. Remote files are off.
//
// Engines. "cpu" is onnxruntime-node. Its CPU library lies inside the npm package (Linux x64 and arm64, Windows,
// macOS arm64); the post-install script only fetches CUDA, so `npm ci --ignore-scripts` downloads nothing more.
// "wasm" is onnxruntime-web, the browser's engine. transformers.js picks onnxruntime-node under Node, but takes a
// runtime found under globalThis[Symbol.for("onnxruntime")] first: that is where this script puts it.
// Not covered: a browser (fetching, caching, threads) and WebGPU.

import fs from "node:fs";
import path from "node:path";

const [bundle, casesFolder, out, engine = "cpu"] = process.argv.slice(2);
if (!out || !["cpu", "wasm"].includes(engine)) {
  console.error("usage: node logits.mjs BUNDLE CASES OUT [cpu|wasm]");
  process.exit(2);
}

if (engine === "wasm") await installWasm();
const { AutoModelForImageTextToText, AutoProcessor, RawImage, Tensor, env } = await import("@huggingface/transformers");
const folder = path.resolve(bundle);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder) + path.sep;

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
  const values = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
  const [tiles, , height, width] = shape;
  const mask = new Uint8Array(tiles * height * width).fill(1);
  return {
    pixel_values: new Tensor("float32", values, [1, ...shape]),
    pixel_attention_mask: new Tensor("bool", mask, [1, tiles, height, width]),
  };
}

function integers(values) {
  return new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

function writeTensor(tensor, file) {
  if (tensor.type !== "float32") throw new Error(`${file}: is ${tensor.type}, want float32`);
  const { buffer, byteOffset, byteLength } = tensor.data;
  fs.writeFileSync(path.join(out, file), new Uint8Array(buffer, byteOffset, byteLength));
  return { file, shape: tensor.dims };
}

// The prompt as transformers.js itself makes it, from a chat and a grey image of the given size.
async function chatIds(processor, { messages, image }) {
  const text = processor.apply_chat_template(messages, { add_generation_prompt: true });
  if (!image) return Array.from(processor.tokenizer(text).input_ids.data, Number);
  const [width, height] = image;
  const grey = new RawImage(new Uint8ClampedArray(width * height * 3).fill(128), width, height, 3);
  return Array.from((await processor(text, [grey])).input_ids.data, Number);
}

const options = engine === "wasm" ? { device: "auto" } : { device: "cpu" };
const model = await AutoModelForImageTextToText.from_pretrained(path.basename(folder), options);
const processor = await AutoProcessor.from_pretrained(path.basename(folder));
fs.mkdirSync(out);
const results = [];
for (const [index, { name, ids, new_tokens, pixels, chat }] of JSON.parse(
  fs.readFileSync(path.join(casesFolder, "cases.json"), "utf8"),
).entries()) {
  const image = pixels ? readPixels(pixels) : {};
  const inputs = { input_ids: integers(ids), attention_mask: integers(ids.map(() => 1)), ...image };
  const features = pixels && (await model.encode_image(image));
  const { logits } = await model(inputs); // all positions
  const sequence = await model.generate({ ...inputs, max_new_tokens: new_tokens, do_sample: false });
  results.push({
    name,
    tokens: Array.from(sequence.data, Number).slice(ids.length),
    chat_ids: chat && (await chatIds(processor, chat)),
    image_features: features && writeTensor(features, `${index}.features.f32`),
    logits: writeTensor(logits, `${index}.logits.f32`),
  });
}
fs.writeFileSync(path.join(out, "results.json"), JSON.stringify(results));
