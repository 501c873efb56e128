// What a visitor sees and does. Loading is in load.js, the model in worker.js.

import { forget, load, LoadError, survey } from "./load.js";

const MANY_TILES = 4; // the detail that is offered goes up to the model's own, at most this many tiles on a side
const $ = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;

let worker = null, ready = false, picture = null, number = 0, shown = null, asked = 0, answering = false;

// ---- what is said

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = false;
  $("error").scrollIntoView({ block: "nearest" }); // it stands at the top, and a phone may show the page's end
}

function say(text) {
  $("status").textContent = text;
}

/** A bar at `done` of `total`; without a total it only moves; null hides it. */
function bar(element, done, total) {
  element.hidden = done === null;
  if (total) [element.max, element.value] = [total, done];
  else element.removeAttribute("value");
}

function update() {
  $("ask").disabled = !ready || !picture || answering;
  $("stop").hidden = !answering;
  $("answer").setAttribute("aria-busy", String(answering));
  if (answering || $("answer").textContent) return;
  say(!picture ? "First choose a picture." : !ready ? "The model is not loaded yet." : "Ready.");
}

// ---- the model

function missing() {
  if (!window.isSecureContext) return "This page must be opened over https, or from 127.0.0.1.";
  if (typeof WebAssembly !== "object") return "WebAssembly is switched off in this browser; the model needs it.";
  const needed = { Worker: "workers", OffscreenCanvas: "OffscreenCanvas", caches: "Cache storage", createImageBitmap: "createImageBitmap" };
  for (const [name, text] of Object.entries(needed)) if (!(name in window)) return `This browser is too old: it has no ${text}.`;
  return null;
}

/** Once this page is controlled, everything that the worker loads comes from what was kept. */
async function controlled() {
  if (!navigator.serviceWorker || navigator.serviceWorker.controller) return;
  const patience = new Promise((resolve) => setTimeout(resolve, 3000));
  const taken = new Promise((resolve) => navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true }));
  await Promise.race([taken, patience]);
}

async function prepare() {
  const reason = missing();
  if (reason) return fail(reason);
  navigator.serviceWorker?.register("sw.js").catch(() => {}); // without it the page works, online
  let plan;
  try {
    plan = await survey();
  } catch (error) {
    return fail(error instanceof LoadError ? error.message : `The page cannot start: ${error.message}`);
  }
  $("question").value = plan.site.example.question;
  if (plan.site.example.picture) {
    $("example").hidden = false;
    $("example").onclick = () => useExample(plan);
  }
  $("loading").hidden = false;
  $("load-start").onclick = () => start(plan);
  const rest = plan.size - plan.kept;
  const some = plan.kept ? "The rest of the model" : "The model";
  $("load-text").textContent = `${some} is loaded once (${megabytes(rest)}) and kept in this browser; after that the page works without a network.`;
  if (rest === 0) await start(plan);
}

async function start(plan) {
  const abort = new AbortController();
  $("error").hidden = true;
  $("load-start").hidden = true;
  $("load-stop").hidden = false;
  $("load-stop").onclick = () => abort.abort();
  let result;
  try {
    result = await load(
      plan,
      (done, total) => {
        bar($("load-bar"), done, total);
        $("load-text").textContent = `Loading: ${megabytes(done)} of ${megabytes(total)}`;
      },
      abort.signal,
    );
  } catch (error) {
    if (abort.signal.aborted) $("load-text").textContent = "Stopped. What was loaded stays, and loading goes on from there.";
    else fail(error instanceof LoadError ? error.message : `Loading failed: ${error.message}`);
    bar($("load-bar"), null);
    $("load-start").hidden = false;
    return;
  } finally {
    $("load-stop").hidden = true;
  }
  if (result.replaced) return location.reload(); // the page itself may be of the older version
  $("load-text").textContent = "Starting the engine";
  bar($("load-bar"), 0);
  if (result.kept) await controlled();
  open(result);
}

function open(result) {
  worker?.terminate();
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data }) => hear(data, result);
  worker.onerror = (event) => {
    event.preventDefault();
    broken(event.message ? `The engine failed: ${event.message}` : "The engine could not be started.");
  };
  worker.postMessage({ type: "open", files: result.files });
}

/** The worker is lost, and another would fail as it did. */
function broken(message) {
  worker?.terminate();
  fail(message);
  $("loading").hidden = true;
  ready = answering = false;
  bar($("bar"), null);
  update();
}

function opened(about, { kept }) {
  ready = true;
  $("loading").hidden = true;
  $("about").hidden = false;
  if ($("detail").length) return update(); // it was opened before
  const facts = {
    Model: `${about.model}, version ${about.version}, ${about.recipe}`,
    Proof: about.proof,
    Digest: about.digest,
    Runs: `WebAssembly, ${about.threads === 1 ? "1 thread" : `${about.threads} threads`}`,
    Offline: kept ? "kept in this browser" : "not kept: this browser gave no room for it",
  };
  $("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, text]) =>
      [["dt", name], ["dd", text]].map(([tag, content]) => Object.assign(document.createElement(tag), { textContent: content })),
    ),
  );
  const most = Math.min(Math.ceil(about.longestEdge / about.tileSize), MANY_TILES);
  for (let side = 1; about.split && side <= most; side++) {
    const tiles = side === 1 ? "1 tile" : `up to ${side * side + 1} tiles`;
    const edge = side === most ? about.longestEdge : side * about.tileSize;
    $("detail").append(new Option(tiles, edge, side === most, side === most));
  }
  $("detail-row").hidden = $("detail").length < 2;
  if (!$("detail").length) $("detail").append(new Option("all", about.longestEdge, true, true));
  update();
}

function hear(message, result) {
  if (message.type === "opened") return opened(message.about, result);
  if (message.type === "failed" && message.id === undefined) return broken(message.message);
  if (message.id !== asked) return;
  switch (message.type) {
    case "step":
      return step(message);
    case "text":
      bar($("bar"), 0);
      $("answer").textContent += message.text;
      return say("Answering");
    case "answered":
      return done(answered(message));
    case "failed":
      fail(message.message);
      if (message.fatal) {
        ready = false; // until the next worker has opened the model
        open(result);
      }
      return done("No answer.");
  }
}

function step({ stage, done, total }) {
  bar($("bar"), done, total);
  const at = Math.min(done + 1, total);
  if (stage === "picture") say("Reading the picture");
  if (stage === "tiles") say(`Looking at the picture: tile ${at} of ${total}`);
  if (stage === "prompt") say(`Reading the question: ${done} of ${total} tokens`);
}

function answered({ reason, tokens, times }) {
  if (reason === "stopped") return tokens ? `Stopped after ${tokens} tokens.` : "Stopped.";
  const speed = tokens > 1 ? `, then ${(((tokens - 1) * 1000) / times.rest).toFixed(0)} a second` : "";
  return `${tokens} tokens, the first after ${seconds(times.first)}${speed}.${reason === "length" ? " It was cut here." : ""}`;
}

function done(text) {
  answering = false;
  bar($("bar"), null);
  update();
  say(text);
}

// ---- the picture

function show(blob) {
  if (!blob.type.startsWith("image/")) return fail(`That is no picture (${blob.type || "unknown type"}).`);
  $("error").hidden = true;
  if (shown) URL.revokeObjectURL(shown);
  picture = blob;
  number += 1;
  shown = URL.createObjectURL(blob);
  $("picture").src = shown;
  $("picture").hidden = false;
  $("hint").hidden = true;
  $("answer").textContent = "";
  update();
}

async function useExample(plan) {
  try {
    const response = await fetch(plan.site.example.picture);
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    show(await response.blob());
    $("question").value = plan.site.example.question;
  } catch (error) {
    fail(`The example cannot be loaded: ${error.message}`);
  }
}

for (const id of ["file", "camera"])
  $(id).addEventListener("change", ({ target }) => {
    if (target.files[0]) show(target.files[0]);
    target.value = ""; // the same file may be chosen again
  });
$("picture").addEventListener("error", () => {
  $("picture").hidden = true;
  fail(`This browser cannot read that picture (${picture.type}). Try JPEG or PNG.`);
  picture = null;
  update();
});
for (const kind of ["dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // a picture dropped beside the box must not replace the page
    $("drop").classList.toggle("over", kind === "dragover");
    const file = kind === "drop" && event.dataTransfer.files[0];
    if (file) show(file);
  });
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  show(file);
});

// ---- the question

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question) {
    $("question").focus();
    return fail("The question is empty.");
  }
  if ($("ask").disabled) return;
  $("error").hidden = true;
  $("answer").textContent = "";
  answering = true;
  asked += 1;
  update();
  say("Starting");
  $("answer").scrollIntoView({ block: "nearest" }); // a tall picture pushes it off a phone's screen
  worker.postMessage({ type: "ask", id: asked, picture, number, question, edge: Number($("detail").value) });
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
const stop = () => answering && worker.postMessage({ type: "stop", id: asked });
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
$("forget").addEventListener("click", async () => {
  await forget();
  location.reload();
});

update();
await prepare();
