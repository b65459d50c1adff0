/** The two texts, and the clean one as the model reads it, coloured by how much each token surprised it. */

import { html } from "../../view/drawings/html.js";
import { ColouredText } from "../../view/drawings/text.js";
import { answered, made, model, promptOf, prompts, selection, texts, write } from "./state.js";

const FULL_SURPRISE = 10;

export function Texts() {
  return html`<div class="texts">
    <${Field} name="clean" title="Text" />
    <${Field} name="corrupted" title="Corrupted text, to patch with" />
  </div>
  <${Read} />`;
}

function Field({ name, title }) {
  const { tokens, error } = prompts[name].value;
  const hint = model.value.has_tokenizer ? "" : " (token ids, as 5, 3, 9)";
  return html`<label>${title}${hint}${tokens && html` <span>${tokens.length} tokens</span>`}
    <textarea rows="2" spellcheck="false" value=${texts[name].value} onInput=${({ target }) => write(name, target.value)}></textarea>
    ${error && html`<pre class="error">${error}</pre>`}
  </label>`;
}

/** Returns the request for the predictions of the clean text, with the chips that are on. */
export const textRequest = () => {
  const prompt = promptOf("clean");
  return prompt && { view: "text", prompt, interventions: made.value };
};

function Read() {
  const { labels } = prompts.clean.value;
  const { answer } = answered(textRequest());
  if (!labels) return null;
  const given = answer?.tensors.probability.values ?? [];
  const describe = (at) => `${labels[at]} at ${at}` + (Number.isFinite(given[at]) ? `: probability ${given[at].toPrecision(3)}` : "");
  return html`<${ColouredText} label="The text, coloured by surprise" tokens=${labels} bound=${[0, FULL_SURPRISE]} colours="surprise"
    values=${labels.map((_, at) => -Math.log2(given[at]))} selection=${selection.value} isIds=${!model.value.has_tokenizer} describe=${describe} />`;
}
