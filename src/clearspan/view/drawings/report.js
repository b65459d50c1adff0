/** The page of a report: what it shows, made of the drawings beside this file. */

import { render } from "preact";
import { useCallback, useMemo, useState } from "preact/hooks";
import { AttentionMatrix, AttentionText, HeadPictures } from "./attention.js";
import { Bars } from "./bars.js";
import { unpack } from "./data.js";
import { Graph } from "./graph.js";
import { HeatMap } from "./heatmap.js";
import { html } from "./html.js";
import { inflate } from "./inflate.js";
import { Lines } from "./lines.js";
import { attentionPaths } from "./paths.js";
import { Selection, keepInAddress } from "./selection.js";
import { ColouredText, named } from "./text.js";

const LONG = 96;
const FULL_SURPRISE = 10;

function Report({ found, selection }) {
  const views = { found, selection };
  return html`
    <${Text} ...${views} />
    <${Lens} ...${views} />
    <${Effect} ...${views} />
    <${Heads} ...${views} />
    <${Attention} ...${views} />
    <${Paths} ...${views} />
    <footer>
      <p>Logit lens: nostalgebraist (2020). Induction heads: Olsson et al. (2022), arXiv:2209.11895. Causal effect: mean
      ablation of the stream, after Meng et al. (2022), arXiv:2202.05262. Layers, heads and positions count from 0.
      Attention is kept in steps of 0.004, other numbers in 16 bits.</p>
      <p>The arrow keys move the selection in the drawing that has the focus, Escape clears it. The address has it.</p>
    </footer>`;
}

function Section({ id, title, children }) {
  return html`<section id=${id} aria-labelledby="${id}-title"><h2 id="${id}-title">${title}</h2>${children}</section>`;
}

function Text({ found, selection }) {
  const { tokens, words, guesses, probabilities, isIds } = found;
  const { target } = selection.shown.value;
  const surprise = useMemo(() => probabilities.row().map((p) => -Math.log2(Math.max(p, 1e-9))), []);
  const describe = (at) => {
    const p = probabilities.at(at);
    return `${named(tokens, at)}: ${Number.isFinite(p) ? `probability ${p.toFixed(4)}` : "the first token"}`;
  };
  const entries = guesses.ids[target].map((word, i) => ({
    name: words[word],
    value: guesses.probabilities.at(target, i),
  }));
  return html`<${Section} id="text" title=${`The ${isIds ? "tokens" : "text"} and what comes next`}>
    <p class="note">${tokens.length} tokens. The deeper the colour, the more a token surprised the model. Point at one
      to see what the model expected after it, and where it appears in all that follows; click to keep it.</p>
    <div class="split">
      <${ColouredText} label="The text, coloured by surprise" tokens=${tokens} isIds=${isIds} describe=${describe}
        values=${surprise} bound=${[0, FULL_SURPRISE]} colours="surprise" selection=${selection} />
      <div class="next" aria-live="polite">
        <h3>After <code>${tokens[target]}</code> at ${target}</h3>
        <${Bars} label="Likeliest next tokens" entries=${entries} />
        <p class="note">${describe(target)}</p>
      </div>
    </div>
  <//>`;
}

function Lens({ found, selection }) {
  const { lens, tokens, words } = found;
  const { target } = selection.shown.value;
  const last = lens.depths.length - 1;
  const depths = { axes: ["layer"], labels: lens.depths, first: -1 };
  const value = useCallback((position, depth) => lens.probabilities.at(depth, position), []);
  const said = (position, depth) => words[lens.ids[depth][position]];
  const own = (position, depth) => lens.own.at(depth, position);
  const describe = (position, depth) => [
    `after ${named(tokens, position)}, ${lens.depths[depth]}: ` +
      `${said(position, depth)}, ${value(position, depth).toFixed(3)}`,
    `the model's own, ${said(position, last)}: ` +
      `rank ${lens.ranks[depth][position]}, ${own(position, depth).toFixed(3)}`,
  ];
  const series = [{ name: "probability", values: lens.depths.map((_, depth) => own(target, depth)) }];
  return html`<${Section} id="lens" title="Logit lens">
    <p class="note">What the model would predict after each token if it stopped at that depth: the residual stream goes
      straight to the final norm and the unembedding. The colour is the probability of the token written in the cell,
      which is bold where it is already the model's own prediction. The last column is that prediction.</p>
    <${HeatMap} label="Logit lens: positions down, depth from left to right" selection=${selection}
      rows=${{ axes: ["target", "position"], labels: found.labels }} columns=${depths} describe=${describe}
      value=${value} bound=${[0, 1]} colours="heat" unit="probability"
      text=${said} isBold=${(position, depth) => lens.ranks[depth][position] === 0}
      cell=${{ width: 78, height: 23, most: 190 }} opensAtEnd=${true} />
    <h3 class="under">How <code>${said(target, last)}</code> after <code>${tokens[target]}</code> at ${target} comes
      about</h3>
    <${Lines} label="Probability of the model's own prediction, by depth" places=${depths} series=${series}
      bound=${[0, 1]} selection=${selection} />
  <//>`;
}

function Effect({ found, selection }) {
  const { drop, bound, logProbability } = found.effect;
  const value = useCallback((layer, position) => drop.at(layer, position), []);
  const describe = (layer, position) => [
    `${named(found.tokens, position)}, ${found.layers[layer]}`,
    `costs ${signed(value(layer, position))} nats`,
  ];
  return html`<${Section} id="effect" title="Causal effect on the last prediction">
    <p class="note">The model's best guess, <code>${found.target}</code>, has log-probability
      ${" "}${logProbability.toFixed(3)} nats. Each cell says how many nats that falls by when the residual stream
      entering the layer is replaced, at that position alone, by its mean over the text. Red: the prediction depends on
      it. Green: it did better without. The scale is that of the positions before the last, which nearly always matters
      most.</p>
    <${HeatMap} label="Causal effect: layers down, positions from left to right" selection=${selection}
      rows=${{ axes: ["layer"], labels: found.layers }} columns=${{ axes: ["position"], labels: found.labels }}
      value=${value} bound=${[-bound, bound]} colours="sides" unit="nats" describe=${describe}
      cell=${{ width: 15, height: 26, most: 46 }} opensAtEnd=${true} />
  <//>`;
}

function Heads({ found, selection }) {
  return html`<${Section} id="heads" title="Induction and previous-token heads">
    <p class="note">Measured on random tokens that repeat, not on this text. An <em>induction</em> head looks from a
      token to the one that followed its earlier occurrence; a <em>previous-token</em> head looks one step back. Click a
      head to see its attention on the text.</p>
    <div class="pair">
      ${found.heads.map((scores) => html`<${HeadScores} scores=${scores} found=${found} selection=${selection} />`)}
    </div>
  <//>`;
}

function HeadScores({ scores: { name, values, strongest }, found, selection }) {
  const value = useCallback((layer, head) => values.at(layer, head), []);
  const show = (layer, head) => {
    selection.pick({ layer, head });
    document.getElementById("attention").scrollIntoView({ behavior: "smooth" });
  };
  const entries = strongest.map(([layer, head]) => ({
    name: `L${layer}H${head}`,
    value: value(layer, head),
    onClick: () => show(layer, head),
  }));
  return html`<div>
    <h3>${name}</h3>
    <${HeatMap} label=${`${name} scores: layers down, heads from left to right`} selection=${selection}
      rows=${{ axes: ["layer"], labels: found.layers }} columns=${{ axes: ["head"], labels: found.headNames }}
      value=${value} bound=${[0, 1]} colours="heat" unit="score" cell=${{ width: 26, height: 28, most: 60 }}
      describe=${(layer, head) => [`L${layer}H${head}: ${value(layer, head).toFixed(3)}`]} />
    <${Bars} label=${`Strongest ${name.toLowerCase()} heads`} entries=${entries} />
  </div>`;
}

function Attention({ found, selection }) {
  const { attention, tokens, isIds } = found;
  const { layer, head } = selection.picked.value, { target } = selection.shown.value;
  const count = attention.labels.length, isLong = count > LONG;
  const [isWhole, setWhole] = useState(true);
  const scores = found.heads.map(({ name, values }) => `${name.toLowerCase()} ${values.at(layer, head).toFixed(3)}`);
  const turn = html`<button class="button" onClick=${() => setWhole(!isWhole)}>
    ${isWhole ? "last positions" : "whole text"}
  </button>`;
  return html`<${Section} id="attention" title="Attention">
    <p class="note">What <code>${tokens[target]}</code> at ${target} looks at, over the text, and every token's
      attention as a matrix: each row is a token that looks, each column one that is looked at; rows sum to one.
      ${attention.first > 0 && ` The last ${count} of ${tokens.length} positions are shown: the page stays small.`}
      ${isLong && isWhole && " Each point is the most in its part; “last positions” opens the end of the text."}</p>
    <div class="controls">
      <${Choice} name="Layer" axis="layer" selection=${selection} />
      <${Choice} name="Head" axis="head" selection=${selection} />
      ${isLong && turn}
      <span class="note">${scores.join(", ")}</span>
    </div>
    <div class="attention">
      <${AttentionMatrix} attention=${attention} selection=${selection} isWhole=${isWhole} />
      <div class="beside">
        <${AttentionText} attention=${attention} selection=${selection} isIds=${isIds} />
        <${HeadPictures} attention=${attention} selection=${selection} />
      </div>
    </div>
  <//>`;
}

function Choice({ name, axis, selection }) {
  const pick = ({ target }) => selection.pick({ [axis]: Number(target.value) });
  const numbers = Array.from({ length: selection.sizes[axis] }, (_, i) => i);
  return html`<label>${name}
    <select value=${selection.picked.value[axis]} onChange=${pick}>
      ${numbers.map((i) => html`<option value=${i}>${i}</option>`)}
    </select>
  </label>`;
}

function Paths({ found, selection }) {
  const { attention, tokens, lens } = found;
  const { target } = selection.picked.value;
  const [least, setLeast] = useState(0.4);
  const { nodes, edges } = useMemo(() => attentionPaths(attention, target, least), [target, least]);
  const reached = [...new Set(nodes.map(({ position }) => position))].sort((a, b) => a - b);
  return html`<${Section} id="paths" title="Where attention leads">
    <p class="note">The ways, back from <code>${tokens[target]}</code> at ${target}, along which heads could have
      brought something here: an edge for each position that some head gives at least ${least.toFixed(2)} of its
      attention, three from each at most. The first position is left out, where idle heads look. A way that is open need
      not have been used: the causal effect says what was.</p>
    <div class="controls"><label>Least attention
      <input type="range" min="0.1" max="0.9" step="0.05" value=${least}
        onInput=${(event) => setLeast(Number(event.target.value))} />
      ${least.toFixed(2)}</label></div>
    <${Graph} label="Ways of attention, from the embedding at the bottom to the last layer" selection=${selection}
      nodes=${nodes} edges=${edges} layers=${{ at: lens.depths.map((_, depth) => depth), labels: lens.depths }}
      positions=${{ at: reached, labels: reached.map((position) => found.labels[position]) }} />
  <//>`;
}

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;

async function open() {
  const found = unpack(await inflate("data"));
  const count = found.tokens.length;
  const sizes = { position: count, target: count, layer: found.layers.length, head: found.headNames.length };
  const selection = new Selection(sizes, { target: count - 1, ...found.start });
  keepInAddress(selection);
  addEventListener("keydown", ({ key }) => key === "Escape" && selection.clear());
  const views = document.getElementById("views");
  views.replaceChildren();
  render(html`<${Report} found=${found} selection=${selection} />`, views);
}

open();
