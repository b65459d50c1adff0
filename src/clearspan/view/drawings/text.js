/** A text whose tokens are coloured by values. */

import { useId, useLayoutEffect, useRef } from "preact/hooks";
import { colourOf, palette, theme } from "./colours.js";
import { html } from "./html.js";
import { keys } from "./keyboard.js";

/**
 * Draws the tokens of a text in the flow of its lines. Pointing at one shows it as position and target; a click or
 * the arrow keys keep it.
 *
 * - `tokens`: labels, with white space visible; `values`: one each, NaN for none
 * - `bound`, `colours`: as in a heat map
 * - `isIds`: whether tokens are numbers, which stand apart
 * - `describe(position)`: what is said of a token, for a screen reader
 */
export function ColouredText({ label, tokens, values, bound, colours, selection, isIds = false, describe }) {
  theme.value;
  const strip = useRef(null), name = useId();
  const { position, target } = selection.shown.value;
  const picked = selection.picked.value.target;
  useLayoutEffect(() => {
    const token = strip.current.querySelectorAll(".token")[picked];
    if (token) strip.current.scrollTo({ top: token.offsetTop - strip.current.clientHeight / 2 });
  }, [picked]);
  const shades = palette(colours);
  const both = (at) => ({ position: at, target: at });
  const onKeyDown = keys({
    ArrowLeft: () => selection.step(["position", "target"], -1),
    ArrowRight: () => selection.step(["position", "target"], 1),
    ArrowUp: () => selection.step(["layer"], 1),
    ArrowDown: () => selection.step(["layer"], -1),
  });
  return html`<div class="strip ${isIds ? "ids" : ""}" ref=${strip} role="listbox" tabindex="0"
      aria-label=${label} aria-orientation="horizontal" aria-activedescendant=${`${name}-${position ?? target}`}
      onPointerLeave=${() => selection.leave()} onKeyDown=${onKeyDown}>
    ${tokens.map((token, at) => {
      const shade = colourOf(values[at], bound, shades);
      const names = ["token", at === position && "at", at === target && "target"].filter(Boolean).join(" ");
      return html`<span key=${at} id=${`${name}-${at}`} class=${names}
          role="option" aria-selected=${at === target} aria-label=${describe(at)}
          style=${{ background: shade?.ground, color: shade?.ink }}
          onPointerEnter=${() => selection.point(both(at))} onClick=${() => selection.pick(both(at))}
        >${broken(token)}</span><wbr />`;
    })}
  </div>`;
}

/** Returns how a token of a text is spoken of. */
export const named = (tokens, at) => `${tokens[at]} at ${at}`;

/** Returns a token with a new line after each visible line break. */
function broken(token) {
  return token.split(/(⏎)/).map((part) => (part === "⏎" ? [part, html`<br />`] : part));
}
