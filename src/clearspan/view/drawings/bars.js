/** Bars with a name and a number each. */

import { html } from "./html.js";

/** Draws `entries`: `name`, `value` from 0 to `most`, and `onClick` where the name is to be chosen. */
export function Bars({ label, entries, most = 1, digits = 3 }) {
  return html`<ol class="bars" aria-label=${label}>
    ${entries.map(({ name, value, onClick }) => html`<li key=${name}>
      ${onClick ? html`<button class="link" onClick=${onClick}>${name}</button>` : html`<code>${name}</code>`}
      <i><b style=${{ width: `${(100 * Math.max(0, value)) / most}%` }}></b></i>
      <span>${value.toFixed(digits)}</span>
    </li>`)}
  </ol>`;
}
