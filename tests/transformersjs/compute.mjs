// What a bundle computes in transformers.js, for logits.mjs (Node) and for a page (tests/test_transformersjs.py).
//
// Nothing but the bundle's own files says how to load it: the class by config.json's model_type, each graph's
// file by transformers.js_config.dtype, the chat by tokenizer_config.json. Remote files are off.

/**
 * @param lib transformers.js, its env set up
 * @param id the name of the bundle's folder
 * @param device for from_pretrained
 * @param cases { name, ids, new_tokens, pixels: null | { values: Float32Array, shape: [N, 3, S, S] }, chat }
 * @returns { name, tokens, chat_ids, image_features, logits } a case, the last two null or { data: Float32Array, dims }
 */
export async function compute(lib, id, device, cases) {
  const { AutoModelForImageTextToText, AutoProcessor, RawImage, Tensor } = lib;
  const integers = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

  function image({ values, shape }) {
    const [tiles, , height, width] = shape;
    const mask = new Uint8Array(tiles * height * width).fill(1);
    return {
      pixel_values: new Tensor("float32", values, [1, ...shape]),
      pixel_attention_mask: new Tensor("bool", mask, [1, tiles, height, width]),
    };
  }

  // The prompt as transformers.js itself makes it, from a chat and a grey image of the given size.
  async function chatIds({ messages, image }) {
    const text = processor.apply_chat_template(messages, { add_generation_prompt: true });
    if (!image) return Array.from(processor.tokenizer(text).input_ids.data, Number);
    const [width, height] = image;
    const grey = new RawImage(new Uint8ClampedArray(width * height * 3).fill(128), width, height, 3);
    return Array.from((await processor(text, [grey])).input_ids.data, Number);
  }

  function floats(tensor) {
    if (tensor.type !== "float32") throw new Error(`is ${tensor.type}, want float32`);
    return { data: tensor.data, dims: tensor.dims };
  }

  const model = await AutoModelForImageTextToText.from_pretrained(id, { device });
  const processor = await AutoProcessor.from_pretrained(id);
  const results = [];
  for (const { name, ids, new_tokens, pixels, chat } of cases) {
    const given = pixels ? image(pixels) : {};
    const inputs = { input_ids: integers(ids), attention_mask: integers(ids.map(() => 1)), ...given };
    const features = pixels && (await model.encode_image(given));
    const { logits } = await model(inputs); // all positions
    const sequence = await model.generate({ ...inputs, max_new_tokens: new_tokens, do_sample: false });
    results.push({
      name,
      tokens: Array.from(sequence.data, Number).slice(ids.length),
      chat_ids: chat && (await chatIds(chat)),
      image_features: features && floats(features),
      logits: floats(logits),
    });
  }
  return results;
}
