/** Attention of one head: over the text, as a matrix, and small pictures of all heads of a layer. */

import { useCallback, useLayoutEffect, useRef } from "preact/hooks";
import { colourOf, palette, theme } from "./colours.js";
import { HeatMap } from "./heatmap.js";
import { html } from "./html.js";
import { keys } from "./keyboard.js";
import { ColouredText, named } from "./text.js";

const PICTURE = 96;
const CELL = 15;

/**
 * What the drawings here take as `attention`: `patterns`, a tensor [layer, head, query, key]; `first`, the position of
 * its first query and key; `labels`, those of the tokens from there; `tokens`, those of the whole text.
 */

/** Colours the text by what the target looks at, relative to the most that it gives to one token. */
export function AttentionText({ attention, selection, isIds }) {
  const { layer, head } = selection.picked.value, { target } = selection.shown.value;
  const given = attention.tokens.map((_, key) => weight(attention, layer, head, target, key));
  const most = Math.max(...given.filter(Number.isFinite), 1e-6);
  const said = (at) => (Number.isFinite(given[at]) ? `attention ${given[at].toFixed(2)}` : "not looked at");
  return html`<${ColouredText} label=${`What position ${target} looks at, layer ${layer} head ${head}`}
    tokens=${attention.tokens} values=${given} bound=${[0, most]} colours="glow" selection=${selection} isIds=${isIds}
    describe=${(at) => `${named(attention.tokens, at)}: ${said(at)}`} />`;
}

/**
 * Draws a pattern: each row is a token that looks, each column one that is looked at. With `isWhole` all of it has
 * room, and of a long text each point is the most in its part; otherwise it is scrolled, and opened at its end.
 */
export function AttentionMatrix({ attention, selection, isWhole }) {
  const { layer, head } = selection.picked.value;
  const { patterns, first, labels, tokens } = attention;
  const value = useCallback((query, key) => (key > query ? NaN : patterns.at(layer, head, query, key)), [layer, head]);
  const describe = (query, key) => [
    `from ${named(tokens, query + first)} to ${named(tokens, key + first)}`,
    key > query ? "comes later" : `attention ${value(query, key).toFixed(2)}`,
  ];
  return html`<${HeatMap} label=${`Attention of layer ${layer} head ${head}, from the rows' tokens to the columns'`}
    rows=${{ axes: ["target"], labels, first }} columns=${{ axes: ["position"], labels, first }}
    value=${value} bound=${[0, 1]} colours="heat" unit="attention" describe=${describe} selection=${selection}
    cell=${isWhole ? { width: 0.2, most: 34 } : { width: CELL }} most=${760} opensAtEnd=${!isWhole} />`;
}

/** Shows every head of the layer that is shown; the arrow keys go from head to head and from layer to layer. */
export function HeadPictures({ attention, selection }) {
  const { layer, head } = selection.picked.value;
  const heads = Array.from({ length: attention.patterns.shape[1] }, (_, i) => i);
  const onKeyDown = keys({
    ArrowLeft: () => selection.step(["head"], -1),
    ArrowRight: () => selection.step(["head"], 1),
    ArrowUp: () => selection.step(["layer"], 1),
    ArrowDown: () => selection.step(["layer"], -1),
  });
  return html`<div class="thumbs" role="group" aria-label="Heads of this layer" onKeyDown=${onKeyDown}>
    ${heads.map((one) => html`
      <button key=${one} aria-pressed=${one === head} onClick=${() => selection.pick({ head: one })}>
        <${Picture} patterns=${attention.patterns} layer=${layer} head=${one} />L${layer}H${one}
      </button>`)}
  </div>`;
}

/** A small square of one pattern; of a long text, each point is the most in its part. */
function Picture({ patterns, layer, head }) {
  const canvas = useRef(null);
  useLayoutEffect(() => {
    const count = patterns.shape[2], size = Math.min(count, PICTURE);
    canvas.current.width = canvas.current.height = size;
    const pooled = new Float32Array(size * size).fill(NaN);
    for (let query = 0; query < count; query++) {
      for (let key = 0; key <= query; key++) {
        const at = Math.floor((query * size) / count) * size + Math.floor((key * size) / count);
        const one = patterns.at(layer, head, query, key);
        if (!(one <= pooled[at])) pooled[at] = one;
      }
    }
    const context = canvas.current.getContext("2d"), shades = palette("heat");
    pooled.forEach((one, at) => {
      const shade = colourOf(one, [0, 1], shades);
      if (!shade) return;
      context.fillStyle = shade.ground;
      context.fillRect(at % size, Math.floor(at / size), 1, 1);
    });
  }, [layer, head, theme.value]);
  return html`<canvas ref=${canvas} aria-hidden="true"></canvas>`;
}

/** Returns the attention that a query gives to a key, by their positions in the text; NaN where none is kept. */
export function weight({ patterns, first }, layer, head, query, key) {
  return key > query || key < first ? NaN : patterns.at(layer, head, query - first, key - first);
}
