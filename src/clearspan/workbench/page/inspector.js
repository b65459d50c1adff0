/** The inspector: what the model expects at the place that is picked, and what can be done there. */

import { useState } from "preact/hooks";
import { Bars } from "../../view/drawings/bars.js";
import { html } from "../../view/drawings/html.js";
import { add } from "./chips.js";
import { answered, branch, model, prompts, selection } from "./state.js";
import { textRequest } from "./texts.js";

export function Inspector() {
  const { labels } = prompts.clean.value;
  return html`<aside class="inspector" aria-labelledby="inspector-title"><h2 id="inspector-title">Inspector</h2>
    ${labels && html`<${Next} /><${Actions} />`}
  </aside>`;
}

function Next() {
  const { labels, tokens } = prompts.clean.value;
  const { target } = selection.value.shown.value;
  const { answer } = answered(textRequest());
  if (!answer || target >= answer.tensors.top_ids.shape[0]) return null;
  const ids = answer.tensors.top_ids.row(target), probabilities = answer.tensors.top_probability.row(target);
  return html`<h3>After <code>${labels[target]}</code> at ${target}</h3>
    <${Bars} label="Likeliest next tokens" entries=${ids.map((id, i) => ({
      name: answer.facts.words[id],
      value: probabilities[i],
      onClick: () => branch([...tokens.slice(0, target + 1), id]),
    }))} />
    <p class="note">Click a token to go on from here with it.</p>`;
}

function Actions() {
  const { layer, head, position } = selection.value.picked.value;
  const [factor, setFactor] = useState(0);
  const [isHere, setHere] = useState(false);
  const action = factor === 0 ? { kind: "zero" } : { kind: "scale", factor };
  const places = isHere ? { positions: [position] } : {};
  const hasAttention = model.value.attention_layers.includes(layer);
  const parts = [
    hasAttention && ["z", { heads: [head] }, `head L${layer}H${head}`],
    hasAttention && ["attn_out", {}, `attention of layer ${layer}`],
    ["mlp_out", {}, `MLP of layer ${layer}`],
  ].filter(Boolean);
  return html`<h3>Intervene</h3>
    <p class="controls">
      <label>Times <input type="number" step="0.5" value=${factor} onInput=${({ target }) => setFactor(Number(target.value))} /></label>
      <label><input type="checkbox" checked=${isHere} onChange=${({ target }) => setHere(target.checked)} /> at ${position} alone</label>
    </p>
    <p class="controls">
      <${Choice} name="Layer" axis="layer" options=${model.value.layers} /><${Choice} name="Head" axis="head" options=${model.value.heads} />
    </p>
    <p class="actions">${parts.map(([point, own, title]) => html`
      <button class="button" key=${point} onClick=${() => add({ point, layer, ...places, ...own, action })}>${title}</button>`)}</p>`;
}

/** A choice of a place on an axis of the selection. */
export function Choice({ name, axis, options }) {
  const numbers = Array.from({ length: options }, (_, i) => i);
  return html`<label>${name} <select value=${selection.value.picked.value[axis]}
      onChange=${({ target }) => selection.value.pick({ [axis]: Number(target.value) })}>
    ${numbers.map((i) => html`<option value=${i}>${i}</option>`)}
  </select></label>`;
}
