/** The one script that a page holds as it is. It unpacks the page's own, which the page's policy names by hash. */

import { inflate } from "./inflate.js";

async function boot() {
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await inflate("script"));
  document.head.append(script);
}

boot();
