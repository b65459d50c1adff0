/** The model: its hook points with their shapes, and whether they do what they promise. */

import { useState } from "preact/hooks";
import { html } from "../../view/drawings/html.js";
import { Frame } from "./frame.js";
import { answered, model } from "./state.js";

export function Model() {
  const [text, setText] = useState("");
  const [isAsked, setAsked] = useState(false);
  const points = model.value.points.filter(({ name }) => name.includes(text));
  return html`<${Frame} found=${isAsked ? answered({ view: "verification" }) : {}} note="Every value that can be read and written, in the order of the forward."
    controls=${html`<label>Find <input value=${text} onInput=${({ target }) => setText(target.value)} /></label>
      <span class="note">${points.length} of ${model.value.points.length}</span>
      <button class="button" disabled=${isAsked} onClick=${() => setAsked(true)}>Verify</button>`}>
    ${(answer) => html`<${Checks} found=${answer.facts.verification} />`}
  <//>
  <table class="points"><tbody>${points.map(({ name, shape }) => html`<tr key=${name}><td><code>${name}</code></td><td>${shape}</td></tr>`)}</tbody></table>`;
}

function Checks({ found }) {
  const failed = found.checks.filter(({ passed }) => !passed);
  return html`<p role="status">${failed.length ? `${failed.length} of ${found.checks.length} checks fail.` : `All ${found.checks.length} checks hold.`}</p>
    <ul>${failed.map(({ group, what }) => html`<li>${group}: ${what}</li>`)}</ul>`;
}
