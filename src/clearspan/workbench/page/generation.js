/** Generation: how the model goes on, with the alternatives at each step; a click on one branches there. */

import { useMemo, useState } from "preact/hooks";
import { Bars } from "../../view/drawings/bars.js";
import { html } from "../../view/drawings/html.js";
import { Selection } from "../../view/drawings/selection.js";
import { ColouredText } from "../../view/drawings/text.js";
import { Frame } from "./frame.js";
import { answered, branch, made, promptOf, settings } from "./state.js";

const LENGTHS = [10, 20, 50, 100];

export function Generation() {
  const [length, setLength] = useState(settings("generation", { length: 20 }).length);
  const prompt = promptOf("clean");
  const plain = answered({ view: "generation", prompt, length, interventions: [] });
  const changed = made.value.length ? answered({ view: "generation", prompt, length, interventions: made.value }) : undefined;
  const choice = html`<label>Tokens <select value=${length} onChange=${({ target }) => setLength(Number(target.value))}>
    ${LENGTHS.map((count) => html`<option value=${count}>${count}</option>`)}
  </select></label>`;
  return html`${changed && html`<${Continuation} title="With the interventions" found=${changed} prompt=${prompt} controls=${choice} />`}
    <${Continuation} title=${changed ? "Without them" : "Continuation"} found=${plain} prompt=${prompt} controls=${changed ? "" : choice} />`;
}

function Continuation({ title, found, prompt, controls }) {
  return html`<${Frame} found=${found} note=${`${title}: always the likeliest token. The deeper the colour, the less likely it was.`} controls=${controls}>
    ${(answer) => html`<${Steps} answer=${answer} prompt=${prompt} label=${title} />`}
  <//>`;
}

function Steps({ answer, prompt, label }) {
  const { tokens, top_ids: ids, top_probability: probabilities } = answer.tensors;
  const count = tokens.values.length;
  const selection = useMemo(() => new Selection({ position: count, target: count }, { target: 0, position: 0 }), [count]);
  const words = [...tokens.values].map((token) => answer.facts.words[token]);
  const { target } = selection.shown.value;
  const given = words.map((_, step) => probabilities.at(step, 0));
  return html`<${ColouredText} label=${label} tokens=${words} values=${given.map((p) => -Math.log2(p))} bound=${[0, 4]} colours="surprise"
      selection=${selection} describe=${(step) => `${words[step]}: probability ${given[step].toFixed(3)}`} />
    <div class="alternatives"><${Bars} label="Alternatives" entries=${ids.row(target).map((id, place) => ({
      name: answer.facts.words[id],
      value: probabilities.at(target, place),
      onClick: () => branch([...prompt.tokens, ...tokens.values.subarray(0, target), id]),
    }))} /></div>`;
}
