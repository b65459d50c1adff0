/** The lens: layers by positions, what the model would predict at each depth. */

import { useCallback, useState } from "preact/hooks";
import { HeatMap } from "../../view/drawings/heatmap.js";
import { html } from "../../view/drawings/html.js";
import { Frame } from "./frame.js";
import { answered, made, promptOf, prompts, selection } from "./state.js";

const SHOWN = {
  probability: ["Probability of the likeliest token", ({ top_log_probability: top }, depth, at) => Math.exp(top.at(depth, at, 0)), 1],
  rank: ["Rank of the model's own prediction", ({ target_rank: rank }, depth, at) => Math.log10(1 + rank.at(depth, at)), 4],
  entropy: ["Entropy, in nats", ({ entropy }, depth, at) => entropy.at(depth, at), 10],
  kl: ["KL from the model's own, in nats", ({ kl }, depth, at) => kl.at(depth, at), 10],
};

export function Lens() {
  const [shown, setShown] = useState("probability");
  const found = answered({ view: "lens", prompt: promptOf("clean"), interventions: made.value });
  return html`<${Frame} found=${found} note="What the model would predict after each token if it stopped at that depth. Bold: already its own prediction."
    controls=${html`<label>Colour <select value=${shown} onChange=${({ target }) => setShown(target.value)}>
      ${Object.entries(SHOWN).map(([key, [title]]) => html`<option value=${key}>${title}</option>`)}
    </select></label>`}>
    ${(answer) => html`<${Map} answer=${answer} shown=${shown} />`}
  <//>`;
}

function Map({ answer, shown }) {
  const { facts, tensors } = answer;
  const { labels } = prompts.clean.value;
  const [title, measure, most] = SHOWN[shown];
  const last = facts.depths.length - 1;
  const value = useCallback((depth, at) => measure(tensors, depth, at), [answer, shown]);
  const word = (depth, at, place = 0) => facts.words[tensors.top_ids.at(depth, at, place)];
  const described = (depth, at) => {
    const top = tensors.top_log_probability.row(depth, at).map((p, place) => `${word(depth, at, place)} ${Math.exp(p).toFixed(3)}`);
    return [
      `after ${labels[at]} at ${at}, ${facts.depths[depth]}: ${top.join(", ")}`,
      `the model's own, ${word(last, at)}: rank ${tensors.target_rank.at(depth, at)}, p ${Math.exp(tensors.target_log_probability.at(depth, at)).toPrecision(3)}`,
      `entropy ${tensors.entropy.at(depth, at).toFixed(2)}, KL ${tensors.kl.at(depth, at).toFixed(2)} nats`,
    ];
  };
  if (labels.length !== facts.tokens.length) return null;
  return html`<${HeatMap} label=${`Lens, layers down, positions from left to right: ${title}`} selection=${selection.value}
    rows=${{ axes: ["layer"], labels: facts.depths.map((depth, i) => (i ? `layer ${depth}` : depth)), first: -1 }} columns=${{ axes: ["target", "position"], labels }}
    value=${value} bound=${[0, most]} colours="heat" cell=${{ width: 72, height: 26, most: 130 }}
    text=${word} isBold=${(depth, at) => tensors.target_rank.at(depth, at) === 0} describe=${described} />`;
}
