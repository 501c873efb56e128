// Fetches everything that site.json lists, once: each file is checked by size and SHA-256 and kept in Cache storage.
//
// A cache is named after site.json's digest, and site.json goes into it last: a cache that has it is whole. What was
// fetched before a stop stays, and the next start goes on from there. A new version takes over the files that it shares
// with the one that was kept.

const PREFIX = `smolport ${new URL("./", document.baseURI).pathname} `; // an origin may have several of these pages
const TYPES = { html: "text/html", css: "text/css", js: "text/javascript", mjs: "text/javascript", json: "application/json", wasm: "application/wasm" };
const ISOLATION = ["cross-origin-opener-policy", "cross-origin-embedder-policy", "cross-origin-resource-policy"];

/** What went wrong, in words for the person in front of the page. */
export class LoadError extends Error {}

async function digest(buffer) {
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const keptNames = async () => (await caches.keys()).filter((name) => name.startsWith(PREFIX));

const readSite = (text) => {
  const site = JSON.parse(text);
  if (site.schema !== 1 || !Array.isArray(site.files)) throw new Error("not the list of a page's files");
  return site;
};

/** Each kept version that is whole: [name of its cache, its site.json as a text]. */
async function wholeCaches() {
  const found = [];
  for (const name of await keptNames()) {
    const site = await (await caches.open(name)).match("site.json");
    if (site) found.push([name, await site.text()]);
  }
  return found;
}

/**
 * What there is to load: { text (of site.json), site, name (of its cache), size, kept (bytes) }.
 * Without a network it is what was kept.
 */
export async function survey() {
  let text;
  try {
    const response = await fetch("site.json", { cache: "no-store", credentials: "omit" });
    if (!response.ok) throw new LoadError(`site.json: the server answers ${response.status}. The page was not put up whole.`);
    text = await response.text();
  } catch (error) {
    if (error instanceof LoadError) throw error;
    const whole = await wholeCaches();
    if (!whole.length) throw new LoadError("There is no network, and the model was not kept in this browser yet.");
    text = whole.at(-1)[1];
  }
  let site;
  try {
    site = readSite(text);
  } catch {
    throw new LoadError("site.json cannot be read. The page was not put up whole.");
  }
  const name = PREFIX + (await digest(new TextEncoder().encode(text))).slice(0, 16);
  const there = new Set(), shared = await earlier(name);
  if ((await keptNames()).includes(name))
    for (const { url } of await (await caches.open(name)).keys()) there.add(url);
  let kept = 0;
  for (const { path, size, sha256 } of site.files)
    if (there.has(new URL(path, document.baseURI).href) || shared.get(path)?.sha256 === sha256) kept += size;
  const size = site.files.reduce((sum, file) => sum + file.size, 0);
  return { text, site, name, size, kept };
}

/** What whole caches of other versions hold: Map(path -> { cache, sha256 }). */
async function earlier(name) {
  const found = new Map();
  for (const [other, text] of await wholeCaches())
    if (other !== name)
      for (const { path, sha256 } of readSite(text).files) found.set(path, { cache: await caches.open(other), sha256 });
  return found;
}

/**
 * Loads what `survey` found.
 *
 * @param onBytes called with the bytes so far
 * @returns { files: Map(path -> Blob), kept: whether it will be there without a network, replaced: an older version }
 */
export async function load({ text, site, name, size }, onBytes, signal) {
  const cache = await caches.open(name);
  const files = new Map(), shared = await earlier(name);
  let done = 0, keep = true;
  for (const file of site.files) {
    const before = done;
    let response = await cache.match(file.path);
    if (!response && shared.get(file.path)?.sha256 === file.sha256) {
      response = await shared.get(file.path).cache.match(file.path);
      if (response && keep) keep = await store(cache, file.path, await response.clone().blob(), headers(file.path, response));
    }
    let blob = await response?.blob();
    if (blob?.size !== file.size) {
      response = await request(file, signal);
      blob = await read(response, file, signal, (bytes) => onBytes(before + bytes, size));
      if (keep) keep = await store(cache, file.path, blob, headers(file.path, response));
    }
    files.set(file.path, blob);
    onBytes((done += file.size), size);
  }
  let replaced = false;
  if (keep) keep = await store(cache, "site.json", new Blob([text]), { "content-type": "application/json" });
  if (keep)
    for (const other of await keptNames()) if (other !== name) replaced = (await caches.delete(other)) || replaced;
  return { files, kept: keep, replaced };
}

async function request({ path, sha256 }, signal) {
  let response;
  try {
    // The digest in the address keeps an older file, in a cache on the way, from being taken for this one. The
    // browser's own cache would be a second copy on the disk.
    response = await fetch(`${path}?${sha256.slice(0, 16)}`, { signal, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new LoadError(`${path}: the network failed. What was loaded stays; load again to go on.`);
  }
  if (!response.ok) throw new LoadError(`${path}: the server answers ${response.status}. The model is not there, or not whole.`);
  return response;
}

async function read(response, file, signal, onBytes) {
  const parts = [];
  let size = 0;
  try {
    for (let reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      size += value.length;
      if (size > file.size) {
        await reader.cancel();
        break;
      }
      parts.push(value);
      onBytes(size);
    }
  } catch (error) {
    if (signal.aborted) throw error;
    throw new LoadError(`${file.path}: the network failed. What was loaded stays; load again to go on.`);
  }
  const blob = new Blob(parts);
  if (size !== file.size || (await digest(await blob.arrayBuffer())) !== file.sha256)
    throw new LoadError(`${file.path}: is not the file that was published (its size or SHA-256 differs).`);
  return blob;
}

// The page's policy goes with every file: a worker obeys the one that its own script came with, not the page's.
function headers(path, response) {
  const policy = document.querySelector('meta[http-equiv="Content-Security-Policy"]').content;
  const kept = ISOLATION.filter((name) => response.headers.has(name)).map((name) => [name, response.headers.get(name)]);
  const type = TYPES[path.slice(path.lastIndexOf(".") + 1)] ?? response.headers.get("content-type");
  return { "content-type": type ?? "application/octet-stream", "content-security-policy": policy, ...Object.fromEntries(kept) };
}

/** Whether there was room. */
async function store(cache, path, blob, headers) {
  try {
    await cache.put(path, new Response(blob, { headers }));
    return true;
  } catch {
    return false;
  }
}

/** Removes all that this page has kept. */
export async function forget() {
  for (const name of await keptNames()) await caches.delete(name);
  await (await navigator.serviceWorker?.getRegistration())?.unregister();
}
