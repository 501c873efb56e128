// A picture -> tiles, equal bit for bit to runtimes/preprocess.py (and so to Hugging Face's Pillow processor).
//
// A canvas resizes as its browser likes, so the resizing is done here, in Pillow's arithmetic: filters evaluated in
// double, weights rounded to 22 bits, every pass rounded to bytes. Only decoding the file is the browser's.
// Not covered: Pillow's "nearest", and images that are not resized before they are split.

const MAX_EDGE = 4096; // the reference never resizes beyond this
const MAX_PIXELS = 178_956_970; // as runtimes/preprocess.py: above this an image is refused
const PRECISION = 22; // bits of a weight; Pillow keeps 8 for the byte and 2 for the overshoot
const STRIP = 256; // rows that are read from a canvas at once: phones limit its area

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
const HAMMING = [Math.fround(0.54), Math.fround(0.46)]; // Pillow has them as 32-bit constants
const FILTERS = {
  1: { support: 3, at: (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0) }, // Lanczos
  2: { support: 1, at: (x) => Math.max(1 - Math.abs(x), 0) }, // bilinear
  3: { support: 2, at: bicubic },
  4: { support: 0.5, at: (x) => (-0.5 < x && x <= 0.5 ? 1 : 0) }, // box
  5: { support: 1, at: (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (HAMMING[0] + HAMMING[1] * Math.cos(x * Math.PI))) }, // Hamming
};

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

export class PictureError extends Error {}

/** The fields of preprocessor_config.json that matter; throws where it asks for what is not done here. */
export function readSettings(config) {
  const fault = (key) => new PictureError(`preprocessor_config.json: ${key} is ${JSON.stringify(config[key])}`);
  for (const key of ["do_rescale", "do_normalize", "do_convert_rgb", "do_resize"])
    if ((config[key] ?? true) !== true) throw fault(key);
  const edge = (key) => {
    const found = config[key]?.longest_edge;
    if (!Number.isInteger(found) || found < 1 || found > MAX_EDGE * 4) throw fault(key);
    return found;
  };
  const triple = (key) => {
    const found = config[key];
    if (!Array.isArray(found) || found.length !== 3 || !found.every(Number.isFinite)) throw fault(key);
    return found;
  };
  const resample = config.resample ?? 1;
  if (!(resample in FILTERS)) throw fault("resample");
  return {
    tileSize: edge("max_image_size"),
    longestEdge: edge("size"),
    split: config.do_image_splitting ?? true,
    resample,
    factor: config.rescale_factor ?? 1 / 255,
    mean: triple("image_mean"),
    std: triple("image_std"),
  };
}

/** A file -> { data: bytes [H, W, 3], width, height }: upright, colours as they lie in the file, white behind. */
export async function decode(blob) {
  if (!canvasIsTrue())
    throw new PictureError(
      "This browser changes the pixels that a page reads, to prevent tracking. Allow this site to read canvas data.",
    );
  let bitmap;
  try {
    const asTheyLie = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
    bitmap = await createImageBitmap(blob, asTheyLie);
  } catch {
    throw new PictureError(`This browser cannot read that picture (${blob.type || "unknown type"}). Try JPEG or PNG.`);
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new PictureError(`The picture has ${width} x ${height} pixels: too many.`);
  const data = new Uint8Array(width * height * 3);
  const context = new OffscreenCanvas(width, Math.min(STRIP, height)).getContext("2d", { willReadFrequently: true });
  for (let top = 0; top < height; top += STRIP) {
    const rows = Math.min(STRIP, height - top);
    context.clearRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, top, width, rows, 0, 0, width, rows);
    const rgba = context.getImageData(0, 0, width, rows).data;
    let out = top * width * 3;
    for (let i = 0; i < rgba.length; i += 4) {
      const alpha = rgba[i + 3];
      for (let c = 0; c < 3; c++) {
        const value = rgba[i + c];
        data[out++] = alpha === 255 ? value : Math.round((value * alpha + 255 * (255 - alpha)) / 255);
      }
    }
  }
  bitmap.close();
  return { data, width, height };
}

// Some browsers add noise to what a page reads from a canvas; it would be noise in the answer.
function canvasIsTrue() {
  const context = new OffscreenCanvas(16, 16).getContext("2d", { willReadFrequently: true });
  const drawn = context.createImageData(16, 16);
  for (let i = 0; i < drawn.data.length; i++) drawn.data[i] = i % 4 === 3 ? 255 : (i * 89) % 256;
  context.putImageData(drawn, 0, 0);
  const found = context.getImageData(0, 0, 16, 16).data;
  return found.every((value, i) => value === drawn.data[i]);
}

/** [width, height] with the longest edge at `longestEdge`, the other made even, MAX_EDGE as a cap. */
function resizedSize(width, height, longestEdge) {
  let aspect = width / height;
  if (width >= height) {
    width = longestEdge;
    height = Math.trunc(longestEdge / aspect);
    height += height % 2;
  } else {
    width = Math.trunc(longestEdge * aspect);
    height = longestEdge;
    width += width % 2;
  }
  width = Math.max(width, 1);
  height = Math.max(height, 1);
  aspect = width / height;
  if (width >= height && width > MAX_EDGE) [width, height] = [MAX_EDGE, Math.trunc(MAX_EDGE / aspect)];
  else if (height > width && height > MAX_EDGE) [width, height] = [Math.trunc(MAX_EDGE * aspect), MAX_EDGE];
  return [Math.max(width, 1), Math.max(height, 1)];
}

/** [width, height] with each side up to a multiple of `tile`. */
function gridSize(width, height, tile) {
  const aspect = width / height;
  const up = (side) => Math.ceil(side / tile) * tile;
  if (width >= height) {
    width = up(width);
    return [width, up(Math.trunc(width / aspect))];
  }
  height = up(height);
  return [up(Math.trunc(height * aspect)), height];
}

/** The tiles of an image as bytes [S, S, 3] each, with rows and columns (0, 0 if it was not split). */
export function cut(image, settings) {
  const { tileSize: tile, resample } = settings;
  image = resize(image, ...resizedSize(image.width, image.height, settings.longestEdge), resample);
  if (!settings.split) return { tiles: [resize(image, tile, tile, resample).data], rows: 0, cols: 0 };
  image = resize(image, ...gridSize(image.width, image.height, tile), resample);
  if (image.width <= tile && image.height <= tile) return { tiles: [image.data], rows: 0, cols: 0 };
  const rows = image.height / tile, cols = image.width / tile;
  const tiles = [];
  for (let r = 0; r < rows; r++) for (let c = 0; c < cols; c++) tiles.push(crop(image, c * tile, r * tile, tile));
  tiles.push(resize(image, tile, tile, resample).data);
  return { tiles, rows, cols };
}

function crop({ data, width }, left, top, side) {
  const out = new Uint8Array(side * side * 3);
  for (let y = 0; y < side; y++) {
    const from = ((top + y) * width + left) * 3;
    out.set(data.subarray(from, from + side * 3), y * side * 3);
  }
  return out;
}

/** Bytes [S, S, 3] -> f32 [3, S, S]: (x * factor - mean) / std in the reference's arithmetic. */
export function normalize(tile, settings) {
  const plane = tile.length / 3;
  const out = new Float32Array(tile.length);
  for (let c = 0; c < 3; c++) {
    const mean = Math.fround(settings.mean[c]), std = Math.fround(settings.std[c]);
    const levels = Float32Array.from({ length: 256 }, (_, v) =>
      Math.fround(Math.fround(Math.fround(v * settings.factor) - mean) / std),
    );
    for (let i = 0; i < plane; i++) out[c * plane + i] = levels[tile[i * 3 + c]];
  }
  return out;
}

/** Resizes { data: bytes [H, W, 3], width, height } by one of Pillow's filters. */
export function resize(image, width, height, resample) {
  // Each pass rounds, so their order shows: Pillow 13 begins with the one between rows where that drops many more.
  const rowsLost = image.height - height, columnsLost = image.width - width;
  const order = rowsLost > 0 && rowsLost > 2 * columnsLost ? [false, true] : [true, false];
  for (const horizontal of order) {
    const size = horizontal ? width : height;
    if ((horizontal ? image.width : image.height) !== size) image = pass(image, size, resample, horizontal);
  }
  return image;
}

// For each of `size` outputs the first input, and the weights [size, taps] of it and the next ones as integers.
function weigh(inputs, size, { support, at }) {
  const scale = inputs / size;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  const taps = Math.ceil(reach) * 2 + 1;
  const first = new Int32Array(size), count = new Int32Array(size), weights = new Int32Array(size * taps);
  const row = new Float64Array(taps);
  for (let i = 0; i < size; i++) {
    const center = (i + 0.5) * scale;
    const from = Math.max(Math.trunc(center - reach + 0.5), 0);
    const number = Math.min(Math.trunc(center + reach + 0.5), inputs) - from;
    let sum = 0;
    for (let t = 0; t < number; t++) sum += row[t] = at((t + from - center + 0.5) * (1 / stretch));
    for (let t = 0; t < number; t++) {
      const weight = (sum === 0 ? row[t] : row[t] / sum) * 2 ** PRECISION;
      weights[i * taps + t] = Math.trunc(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    first[i] = from;
    count[i] = number;
  }
  return { first, count, weights, taps };
}

function pass({ data, width, height }, size, resample, horizontal) {
  const { first, count, weights, taps } = weigh(horizontal ? width : height, size, FILTERS[resample]);
  const outWidth = horizontal ? size : width, outHeight = horizontal ? height : size;
  const out = new Uint8ClampedArray(outWidth * outHeight * 3);
  const step = horizontal ? 3 : width * 3;
  for (let y = 0, o = 0; y < outHeight; y++) {
    for (let x = 0; x < outWidth; x++, o += 3) {
      const target = horizontal ? x : y;
      const w = target * taps, number = count[target];
      let i = horizontal ? (y * width + first[target]) * 3 : (first[target] * width + x) * 3;
      let r = 1 << (PRECISION - 1), g = r, b = r;
      for (let t = 0; t < number; t++, i += step) {
        const weight = weights[w + t];
        r += data[i] * weight;
        g += data[i + 1] * weight;
        b += data[i + 2] * weight;
      }
      out[o] = r >> PRECISION;
      out[o + 1] = g >> PRECISION;
      out[o + 2] = b >> PRECISION;
    }
  }
  return { data: new Uint8Array(out.buffer), width: outWidth, height: outHeight };
}
