/** Direct attribution: what each part adds to a token's logit at the place that is picked. */

import { useCallback, useState } from "preact/hooks";
import { HeatMap } from "../../view/drawings/heatmap.js";
import { html } from "../../view/drawings/html.js";
import { TokenField } from "./answers.js";
import { Frame, signed } from "./frame.js";
import { answered, made, model, promptOf, prompts, selection, settings } from "./state.js";
import { textRequest } from "./texts.js";

const UNITS = { component: "Components", layer: "Layers", head: "Heads" };

export function Attribution() {
  const begun = settings("attribution", { unit: "component" });
  const [unit, setUnit] = useState(begun.unit);
  const [given, setGiven] = useState(begun.answer_token);
  const [other, setOther] = useState(begun.incorrect_token ?? undefined);
  const { target } = selection.value.picked.value;
  const { answer: text } = answered(textRequest());
  const usual = text?.tensors.top_ids.shape[0] > target ? text.tensors.top_ids.at(target, 0) : undefined;
  const token = given ?? usual;
  const found = answered(token !== undefined && {
    view: "attribution", prompt: promptOf("clean"), answer_token: token, incorrect_token: other ?? null, position: target, unit, interventions: made.value,
  });
  return html`<${Frame} found=${found} note=${`What each part of the model adds to the token's logit after ${prompts.clean.value.labels[target]} at ${target}, through the residual stream alone.`}
    controls=${html`<label>Parts <select value=${unit} onChange=${({ target: choice }) => setUnit(choice.value)}>
        ${Object.entries(UNITS).map(([key, title]) => html`<option value=${key}>${title}</option>`)}
      </select></label>
      <${TokenField} title="Token" usual=${text?.facts.words[token] ?? (token && `#${token}`)} onToken=${setGiven} />
      <${TokenField} title="less" usual=${other && `#${other}`} onToken=${setOther} />`}>
    ${(answer) => html`<p class="note">Sum ${signed(answer.facts.total)}, with a constant of ${signed(answer.facts.constant)}; the model's own ${signed(answer.facts.model)} logits.</p>
      ${answer.facts.unit === "head" ? html`<${Heads} answer=${answer} />` : html`<${Parts} answer=${answer} />`}`}
  <//>`;
}

/** Bars to both sides of zero, in the order of the forward. */
function Parts({ answer }) {
  const { parts } = answer.facts, { values } = answer.tensors.logits;
  const most = Math.max(...values.map(Math.abs), 1e-6);
  return html`<ol class="sides" aria-label="Logits by part">${parts.map((part, i) => html`<li key=${part}>
    <code>${part}</code><i><b class=${values[i] < 0 ? "below" : ""} style=${{ width: `${(100 * Math.abs(values[i])) / most}%` }}></b></i><span>${signed(values[i])}</span>
  </li>`)}</ol>`;
}

function Heads({ answer }) {
  const { values } = answer.tensors.logits;
  const layers = model.value.attention_layers, heads = (values.length - 1) / layers.length;
  const most = Math.max(...values.subarray(0, -1).map(Math.abs), 1e-6);
  const value = useCallback((row, head) => values[row * heads + head], [answer]);
  return html`<${HeatMap} label="Logits by layer and head" selection=${selection.value} value=${value} bound=${[-most, most]} colours="sides"
    rows=${{ axes: ["layer"], labels: layers.map((layer) => `layer ${layer}`) }}
    columns=${{ axes: ["head"], labels: Array.from({ length: heads }, (_, head) => `H${head}`) }}
    cell=${{ width: 30, height: 28, most: 64 }} describe=${(row, head) => [`L${layers[row]}H${head}: ${signed(value(row, head))} logits`]} />
  <p class="note">All else adds ${signed(values.at(-1))}.</p>`;
}
