/** The one script that a page holds uncompressed. It runs the page's own script, which the page's policy knows by hash. */

import { inflate } from "./inflate.js";

async function boot() {
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await inflate("script"));
  document.head.append(script);
}

boot();
