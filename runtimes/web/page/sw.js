// Answers from what load.js has kept, so that the page opens again without a network. Keeps nothing by itself.

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  const scope = new URL(self.registration.scope);
  if (event.request.method !== "GET" || url.origin !== scope.origin || !url.pathname.startsWith(scope.pathname)) return;
  if (url.pathname.endsWith("/site.json")) return; // load.js asks the network first: is there a new version?
  const key = event.request.mode === "navigate" ? new URL("index.html", scope).href : event.request;
  event.respondWith(caches.match(key).then((kept) => kept ?? fetch(event.request)));
});
