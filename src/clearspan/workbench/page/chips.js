/** Interventions as chips: a click switches one off and on, the cross takes it away. */

import { html } from "../../view/drawings/html.js";
import { chips } from "./state.js";

export function Chips() {
  if (!chips.value.length) return null;
  const change = (at, chip) => (chips.value = chips.value.flatMap((one, i) => (i === at ? chip : [one])));
  return html`<ul class="chips" aria-label="Interventions">${chips.value.map((chip, at) => html`
    <li key=${JSON.stringify(chip.intervention)} class=${chip.is_on ? "on" : ""}>
      <button aria-pressed=${chip.is_on} onClick=${() => change(at, [{ ...chip, is_on: !chip.is_on }])}>${titleOf(chip.intervention)}</button>
      <button aria-label=${`Take away ${titleOf(chip.intervention)}`} onClick=${() => change(at, [])}>×</button>
    </li>`)}
  </ul>`;
}

/** Adds an intervention that is on, unless it is there already. */
export function add(intervention) {
  const isThere = chips.value.some((chip) => JSON.stringify(chip.intervention) === JSON.stringify(intervention));
  if (!isThere) chips.value = [...chips.value, { intervention, is_on: true }];
}

/** Returns an intervention in words. */
export function titleOf({ point, layer, heads, positions, action }) {
  const where = [layer === undefined ? "" : `L${layer}`, heads ? `H${heads.join(",")}` : ` ${point}`].join("");
  const when = Array.isArray(positions) ? ` at ${positions.join(", ")}` : "";
  const done = action.kind === "scale" ? `× ${action.factor}` : action.kind === "zero" ? "= 0" : action.kind;
  return `${where}${when} ${done}`;
}
