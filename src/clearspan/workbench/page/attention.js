/** Attention of one layer: over the text, as a matrix, and all heads as pictures. */

import { AttentionMatrix, AttentionText, HeadPictures } from "../../view/drawings/attention.js";
import { html } from "../../view/drawings/html.js";
import { Frame } from "./frame.js";
import { Choice } from "./inspector.js";
import { answered, made, model, promptOf, prompts, selection } from "./state.js";

export function Attention() {
  const { layer } = selection.value.picked.value;
  const found = answered({ view: "attention", prompt: promptOf("clean"), layer, interventions: made.value });
  return html`<${Frame} found=${found} note="What the picked token looks at, over the text; and every token's attention as a matrix, each row a token that looks."
    controls=${html`<${Choice} name="Layer" axis="layer" options=${model.value.layers} /><${Choice} name="Head" axis="head" options=${model.value.heads} />`}>
    ${(answer) => html`<${Patterns} answer=${answer} />`}
  <//>`;
}

function Patterns({ answer }) {
  const { labels } = prompts.clean.value;
  const { pattern } = answer.tensors;
  if (labels.length !== pattern.shape[1]) return null;
  const at = (layer, head, query, key) => (layer === answer.facts.layer ? pattern.at(head, query, key) : NaN);
  const attention = { patterns: { shape: [1, ...pattern.shape], at }, first: 0, labels, tokens: labels };
  const given = { attention, selection: selection.value, isIds: !model.value.has_tokenizer };
  return html`<${AttentionText} ...${given} />
    <div class="attention" key=${`${answer.facts.layer} ${JSON.stringify(made.value)}`}>
      <${AttentionMatrix} ...${given} isWhole=${true} /><${HeadPictures} ...${given} />
    </div>`;
}
