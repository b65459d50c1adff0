/** The two tokens whose logits are compared: chosen among what the model expects, or written. */

import { useEffect, useState } from "preact/hooks";
import { html } from "../../view/drawings/html.js";
import { readToken } from "./server.js";
import { answered, promptOf } from "./state.js";

/** Returns the likeliest token after the last of a text, and its label. */
export function useLikeliest(name) {
  const prompt = promptOf(name);
  const { answer } = answered(prompt && { view: "text", prompt, interventions: [] });
  if (!answer) return {};
  const token = answer.tensors.top_ids.at(prompt.tokens.length - 1, 0);
  return { token, label: answer.facts.words[token] };
}

/** A field for a token's text; empty for what `usual` is. Calls `onToken` with an id, or undefined for the usual. */
export function TokenField({ title, usual, onToken }) {
  const [text, setText] = useState("");
  const [error, setError] = useState("");
  useEffect(() => {
    const isWritten = text !== "";
    const wait = setTimeout(async () => {
      setError("");
      try {
        onToken(isWritten ? await readToken(text) : undefined);
      } catch (problem) {
        setError(problem.message.split("\n")[0]);
      }
    }, isWritten ? 300 : 0);
    return () => clearTimeout(wait);
  }, [text]);
  return html`<label>${title} <input class="token-field" value=${text} placeholder=${usual ?? "none"} size="8" onInput=${({ target }) => setText(target.value)} />
    ${error && html`<span class="error">${error}</span>`}</label>`;
}
