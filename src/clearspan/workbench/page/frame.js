/** What all views have: a note, the state of their request, and the ways to take it along. */

import { useState } from "preact/hooks";
import { html } from "../../view/drawings/html.js";
import { cancel, notebookOf, readScript } from "./server.js";
import { ask } from "./state.js";

/** Frames a view. `found` is what is known of its request; `children(answer)` draws it as far as it is there. */
export function Frame({ note, found, controls, children }) {
  const { job, answer, error, request } = found;
  const isGoing = job?.state === "running" || job?.state === "waiting";
  return html`<section>
    <p class="note">${note}</p>
    <div class="controls">${controls}
      ${isGoing && html`<progress max=${job.total || 1} value=${job.done} aria-label="Progress"></progress>
        <button class="button" onClick=${() => cancel(job.key)}>Cancel</button>`}
      ${job?.state === "cancelled" && html`<span>Stopped. <button class="link" onClick=${() => ask(request)}>Go on</button></span>`}
      ${job?.state === "done" && html`<${Take} job=${job} />`}
    </div>
    ${(error ?? job?.error) && html`<pre class="error" role="alert">${error ?? job.error}</pre>`}
    ${answer && children(answer)}
  </section>`;
}

function Take({ job }) {
  const [script, setScript] = useState("");
  const copy = async () => {
    const text = await readScript(job.key);
    setScript(text);
    await navigator.clipboard.writeText(text).catch(() => undefined); // where it is not allowed, the text can be selected
  };
  return html`<span class="take">
    <button class="button" onClick=${copy}>Copy as Python</button>
    <a class="button" href=${notebookOf(job.key)} download=${`${job.request.view}.ipynb`}>Notebook</a>
  </span>
  ${script && html`<pre class="script" tabindex="0" aria-label="The view as Python">${script}</pre>`}`;
}

/** Writes a number with its sign. */
export const signed = (value, digits = 3) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
