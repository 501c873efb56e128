// A bundle in transformers.js: its three graphs, run step by step so that what happens can be shown and stopped.
//
// transformers.js' own generate() is one long task: between two tokens no message reaches the worker, and "Stop"
// would be heard when all is over. Here the worker listens after each tile, each part of the prompt and each token.

import { PromptError } from "./prompt.js";

const CHUNK = 128; // tokens of a prompt that are run at once

/** Thrown where `stopped` became true. */
export class Stopped extends Error {}

/** Lets messages in. */
const breathe = () => new Promise((resolve) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => {
    port1.close();
    resolve();
  };
  port2.postMessage(null);
});

export class Model {
  /**
   * @param lib transformers.js
   * @param model what AutoModelForImageTextToText gave
   * @param manifest manifest.json
   */
  constructor(lib, model, manifest) {
    this.lib = lib;
    this.model = model;
    this.text = manifest.text;
    this.image = manifest.image;
  }

  #integers(values) {
    return new this.lib.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  }

  /** Features f32 [tiles * L * hidden] of tiles that are f32 [3, S, S] each, one after the other. */
  async encode(tiles, { onTile = () => {}, stopped = () => false } = {}) {
    const { tile_size: side, tokens_per_tile: rows } = this.image;
    const size = rows * this.text.hidden;
    const features = new Float32Array(tiles.length * size);
    for (const [index, tile] of tiles.entries()) {
      onTile(index, tiles.length);
      await breathe();
      if (stopped()) throw new Stopped();
      const found = await this.model.encode_image({
        pixel_values: new this.lib.Tensor("float32", tile, [1, 1, 3, side, side]),
        pixel_attention_mask: new this.lib.Tensor("bool", new Uint8Array(side * side).fill(1), [1, 1, side, side]),
      });
      features.set(found.data, index * size);
      found.dispose();
    }
    onTile(tiles.length, tiles.length);
    return features;
  }

  /** A conversation without tokens. */
  newCache() {
    return { length: 0, past: null, used: 0 };
  }

  /** Feeds `ids`, whose image tokens are the next rows of `features`; the logits of the last `keep` (0: all). */
  async extend(cache, ids, features = null, keep = 1) {
    const { hidden, image_token_id: imageId } = this.text;
    const embeddings = await this.model.encode_text({ input_ids: this.#integers(ids) }); // [1, T, hidden]
    for (const [row, id] of ids.entries()) {
      if (id !== imageId) continue;
      const from = cache.used++ * hidden;
      embeddings.data.set(features.subarray(from, from + hidden), row * hidden);
    }
    const { logits, ...present } = await this.model({
      inputs_embeds: embeddings,
      attention_mask: this.#integers(new Array(cache.length + ids.length).fill(1)),
      past_key_values: cache.past,
      num_logits_to_keep: new this.lib.Tensor("int64", BigInt64Array.of(BigInt(keep)), []),
    });
    for (const tensor of Object.values(cache.past ?? {})) tensor.dispose();
    cache.past = Object.fromEntries(Object.entries(present).map(([k, v]) => [k.replace("present", "past_key_values"), v]));
    cache.length += ids.length;
    return logits;
  }

  /** Feeds a prompt in parts and gives the logits [vocab] of its last token. */
  async prefill(cache, ids, features, { onTokens = () => {}, stopped = () => false } = {}) {
    const wanted = ids.filter((id) => id === this.text.image_token_id).length * this.text.hidden;
    if (wanted !== (features?.length ?? 0)) throw new Error(`${features?.length ?? 0} features, want ${wanted}`);
    let logits;
    for (let from = 0; from < ids.length; from += CHUNK) {
      onTokens(from, ids.length);
      await breathe();
      if (stopped()) throw new Stopped();
      logits = await this.extend(cache, ids.slice(from, from + CHUNK), features);
    }
    return logits.data;
  }

  /** Throws where a prompt has no room. */
  check(ids) {
    const { context } = this.text;
    if (ids.length > context) throw new PromptError(`The question is too long: ${ids.length} tokens of ${context}.`);
  }

  /** Yields the best token each time until a stop token (which is yielded), `limit` tokens or the end of the context. */
  async *generate(ids, features, { limit = 256, onTokens, stopped = () => false } = {}) {
    const { context, eos_ids: ends, image_token_id: imageId } = this.text;
    this.check(ids);
    const cache = this.newCache();
    try {
      let scores = await this.prefill(cache, ids, features, { onTokens, stopped });
      for (let made = 1; ; made++) {
        await breathe();
        if (stopped()) throw new Stopped();
        let best = -1; // the image token stands for nothing in an answer
        for (let i = 0; i < scores.length; i++)
          if (i !== imageId && (best < 0 || scores[i] > scores[best])) best = i;
        yield best;
        if (ends.includes(best) || made === limit || cache.length >= context) return;
        scores = (await this.extend(cache, [best])).data;
      }
    } finally {
      for (const tensor of Object.values(cache.past ?? {})) tensor.dispose();
    }
  }
}
