// Keeps the page of `pageferry --web` up to date: parts of it come as server-sent events, escaped at
// the server. No framework, nothing from elsewhere.
"use strict";
(() => {
  const SILENT_MS = 12000; // the server says something every five seconds
  const AGAIN_MS = 2000;
  const link = document.getElementById("link");
  let stream = null;
  let heard = Date.now();
  let lost = null; // since when, if the connection is gone

  function say(text) {
    link.textContent = text;
    link.hidden = !text;
  }

  function put(parts) {
    for (const [name, html] of Object.entries(parts)) {
      if (name === "title") {
        document.title = html;
        continue;
      }
      const place = document.getElementById("part-" + name);
      if (!place) continue;
      // a table that was pushed aside on a narrow screen stays where it is, and what is open, open
      const wide = [...place.querySelectorAll(".wide")].map((e) => e.scrollLeft);
      const open = [...place.querySelectorAll("details")].map((e) => e.open);
      place.innerHTML = html;
      place.querySelectorAll(".wide").forEach((e, i) => (e.scrollLeft = wide[i] || 0));
      place.querySelectorAll("details").forEach((e, i) => (e.open = open[i] || false));
    }
  }

  function alive() {
    heard = Date.now();
    lost = null;
    say("");
  }

  function broken() {
    lost = lost || new Date();
    say("No connection to pageferry since " + lost.toLocaleTimeString() +
        ": what is shown is older. Trying again.");
  }

  function connect() {
    if (stream) stream.close();
    heard = Date.now();
    stream = new EventSource("events");
    stream.addEventListener("parts", (e) => { put(JSON.parse(e.data)); alive(); });
    stream.addEventListener("tick", alive);
    stream.addEventListener("over", (e) => {
      stream.close();
      stream = null;
      clearInterval(watch);
      document.body.dataset.over = "yes";
      say("It has ended, and pageferry with it: this page stays as it is.");
    });
    stream.onerror = broken;
  }

  const watch = setInterval(() => {
    const silent = Date.now() - heard > SILENT_MS;
    if (silent) broken();
    // a browser gives up by itself where it was refused
    if (silent || (stream && stream.readyState === EventSource.CLOSED)) connect();
  }, AGAIN_MS);
  connect();
})();
