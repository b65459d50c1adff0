/** The two tokens whose logits are compared: chosen among what the model expects, or written. */

import { useRef, useState } from "preact/hooks";
import { html } from "../../view/drawings/html.js";
import { readToken } from "./server.js";
import { answered, promptOf } from "./state.js";

const PAUSE = 300;

/** Returns the likeliest token after the last of a text, and its label. */
export function useLikeliest(name) {
  const prompt = promptOf(name);
  const { answer } = answered(prompt && { view: "text", prompt, interventions: [] });
  if (!answer) return {};
  const token = answer.tensors.top_ids.at(prompt.tokens.length - 1, 0);
  return { token, label: answer.facts.words[token] };
}

/** A field for a token's text; empty for what `usual` is. Calls `onToken` with an id, or undefined when it is emptied. */
export function TokenField({ title, usual, onToken }) {
  const [text, setText] = useState("");
  const [error, setError] = useState("");
  const wait = useRef();
  const read = async (written) => {
    setError("");
    try {
      onToken(written ? await readToken(written) : undefined);
    } catch (problem) {
      setError(problem.message.split("\n")[0]);
    }
  };
  const write = ({ target }) => {
    setText(target.value);
    clearTimeout(wait.current);
    wait.current = setTimeout(read, PAUSE, target.value);
  };
  return html`<label>${title} <input class="token-field" value=${text} placeholder=${usual ?? "none"} size="8" onInput=${write} />
    ${error && html`<span class="error">${error}</span>`}</label>`;
}
