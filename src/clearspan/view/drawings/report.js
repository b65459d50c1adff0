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
      <p>Keys: the arrows move the selection in the drawing that has the focus, Escape clears it. The address keeps it.</p>
    </footer>`;
}

function Section({ id, title, children }) {
  return html`<section id=${id} aria-labelledby="${id}-title"><h2 id="${id}-title">${title}</h2>${children}</section>`;
}

function Text({ found, selection }) {
  const { target } = selection.shown.value;
  const surprise = useMemo(() => found.probabilities.row().map((p) => -Math.log2(Math.max(p, 1e-9))), []);
  const describe = (at) => {
    const p = found.probabilities.at(at);
    return `${named(found.tokens, at)}: ${Number.isFinite(p) ? `probability ${p.toFixed(4)}` : "the first token"}`;
  };
  return html`<${Section} id="text" title=${`The ${found.isIds ? "tokens" : "text"} and what comes next`}>
    <p class="note">${found.tokens.length} tokens. The deeper the colour, the more a token surprised the model. Point at one to see
      what the model expected after it, and where it appears in all that follows; click to keep it.</p>
    <div class="split">
      <${ColouredText} label="The text, coloured by surprise" tokens=${found.tokens} values=${surprise} bound=${[0, FULL_SURPRISE]}
        colours="surprise" selection=${selection} isIds=${found.isIds} describe=${describe} />
      <div class="next" aria-live="polite">
        <h3>After <code>${found.tokens[target]}</code> at ${target}</h3>
        <${Bars} label="Likeliest next tokens" entries=${found.guesses.ids[target].map((word, i) => ({
          name: found.words[word],
          value: found.guesses.probabilities.at(target, i),
        }))} />
        <p class="note">${describe(target)}</p>
      </div>
    </div>
  <//>`;
}

function Lens({ found, selection }) {
  const { lens, words } = found;
  const depths = { axes: ["layer"], labels: lens.depths, first: -1 };
  const { target } = selection.shown.value;
  const value = useCallback((position, depth) => lens.probabilities.at(depth, position), []);
  const said = (position, depth) => words[lens.ids[depth][position]];
  const last = lens.depths.length - 1;
  return html`<${Section} id="lens" title="Logit lens">
    <p class="note">What the model would predict after each token if it stopped at that depth: the residual stream goes straight to
      the final norm and the unembedding. The colour is the probability of the token written in the cell, which is bold
      where it is already the model's own prediction. The last column is that prediction.</p>
    <${HeatMap} label="Logit lens: positions down, depth from left to right" selection=${selection}
      rows=${{ axes: ["target", "position"], labels: found.labels }} columns=${depths} value=${value} bound=${[0, 1]} colours="heat"
      cell=${{ width: 78, height: 23, most: 190 }} opensAtEnd=${true} text=${said}
      isBold=${(position, depth) => lens.ranks[depth][position] === 0}
      describe=${(position, depth) => [
        `after ${named(found.tokens, position)}, ${lens.depths[depth]}: ${said(position, depth)}, ${value(position, depth).toFixed(3)}`,
        `the model's own, ${said(position, last)}: rank ${lens.ranks[depth][position]}, ${lens.own.at(depth, position).toFixed(3)}`,
      ]} />
    <h3 class="under">How <code>${said(target, last)}</code> after <code>${found.tokens[target]}</code> at ${target} comes about</h3>
    <${Lines} label="Probability of the model's own prediction, by depth" places=${depths} bound=${[0, 1]} selection=${selection}
      series=${[{ name: "probability", values: lens.depths.map((_, depth) => lens.own.at(depth, target)) }]} />
  <//>`;
}

function Effect({ found, selection }) {
  const { drop, bound, logProbability } = found.effect;
  const value = useCallback((layer, position) => drop.at(layer, position), []);
  return html`<${Section} id="effect" title="Causal effect on the last prediction">
    <p class="note">The model's best guess, <code>${found.target}</code>, has log-probability ${logProbability.toFixed(3)} nats. Each cell
      says how many nats that falls by when the residual stream entering the layer is replaced, at that position alone, by
      its mean over the text. Red: the prediction depends on it. Green: it did better without. The scale is that of the
      positions before the last, which nearly always matters most.</p>
    <${HeatMap} label="Causal effect: layers down, positions from left to right" selection=${selection}
      rows=${{ axes: ["layer"], labels: found.layers }} columns=${{ axes: ["position"], labels: found.labels }} value=${value} bound=${[-bound, bound]} colours="sides"
      cell=${{ width: 15, height: 26, most: 46 }} opensAtEnd=${true}
      describe=${(layer, position) => [`${named(found.tokens, position)}, ${found.layers[layer]}`, `costs ${signed(value(layer, position))} nats`]} />
  <//>`;
}

function Heads({ found, selection }) {
  return html`<${Section} id="heads" title="Induction and previous-token heads">
    <p class="note">Measured on random tokens that repeat, not on this text. An <em>induction</em> head looks from a token to the one
      that followed its earlier occurrence; a <em>previous-token</em> head looks one step back. Click a head to see its
      attention on the text.</p>
    <div class="pair">${found.heads.map((score) => html`<${HeadScores} score=${score} found=${found} selection=${selection} />`)}</div>
  <//>`;
}

function HeadScores({ score, found, selection }) {
  const { name, values, strongest } = score;
  const value = useCallback((layer, head) => values.at(layer, head), []);
  const show = ([layer, head]) => {
    selection.pick({ layer, head });
    document.getElementById("attention").scrollIntoView({ behavior: "smooth" });
  };
  return html`<div>
    <h3>${name}</h3>
    <${HeatMap} label=${`${name} scores: layers down, heads from left to right`} selection=${selection} value=${value} bound=${[0, 1]}
      colours="heat" rows=${{ axes: ["layer"], labels: found.layers }} columns=${{ axes: ["head"], labels: found.headNames }}
      cell=${{ width: 26, height: 28, most: 60 }} describe=${(layer, head) => [`L${layer}H${head}: ${value(layer, head).toFixed(3)}`]} />
    <${Bars} label=${`Strongest ${name} heads`} entries=${strongest.map((place) => ({
      name: `L${place[0]}H${place[1]}`,
      value: value(...place),
      onClick: () => show(place),
    }))} />
  </div>`;
}

function Attention({ found, selection }) {
  const { attention } = found;
  const { layer, head } = selection.picked.value, { target } = selection.shown.value;
  const count = attention.labels.length, isLong = count > LONG;
  const [isWhole, setWhole] = useState(true);
  const scores = found.heads.map(({ name, values }) => `${name.toLowerCase()} ${values.at(layer, head).toFixed(3)}`);
  return html`<${Section} id="attention" title="Attention">
    <p class="note">What <code>${found.tokens[target]}</code> at ${target} looks at, over the text, and every token's attention as a matrix: each
      row is a token that looks, each column one that is looked at; rows sum to one.
      ${attention.first > 0 && html` The last ${count} of ${found.tokens.length} positions are shown, so that the page stays small.`}
      ${isLong && isWhole && html` Each point is the most in its part; “last positions” opens the end of the text.`}</p>
    <div class="controls">
      <${Choice} name="Layer" options=${found.layers.length} axis="layer" selection=${selection} />
      <${Choice} name="Head" options=${found.headNames.length} axis="head" selection=${selection} />
      ${isLong && html`<button class="button" aria-pressed=${!isWhole} onClick=${() => setWhole(!isWhole)}>${isWhole ? "last positions" : "whole text"}</button>`}
      <span class="note">${scores.join(", ")}</span>
    </div>
    <${AttentionText} attention=${attention} selection=${selection} isIds=${found.isIds} />
    <div class="attention">
      <${AttentionMatrix} attention=${attention} selection=${selection} isWhole=${isWhole} />
      <${HeadPictures} attention=${attention} selection=${selection} />
    </div>
  <//>`;
}

function Choice({ name, options, axis, selection }) {
  const numbers = Array.from({ length: options }, (_, i) => i);
  return html`<label>${name} <select value=${selection.picked.value[axis]} onChange=${({ target }) => selection.pick({ [axis]: Number(target.value) })}>
    ${numbers.map((i) => html`<option value=${i}>${i}</option>`)}
  </select></label>`;
}

function Paths({ found, selection }) {
  const [least, setLeast] = useState(0.4);
  const { target } = selection.picked.value;
  const { nodes, edges } = useMemo(() => attentionPaths(found.attention, target, least), [target, least]);
  const reached = [...new Set(nodes.map(({ position }) => position))].sort((a, b) => a - b);
  const depths = found.lens.depths;
  return html`<${Section} id="paths" title="Where attention leads">
    <p class="note">The ways, back from <code>${found.tokens[target]}</code> at ${target}, along which heads could have brought something here: an edge
      for each position that some head gives at least ${least.toFixed(2)} of its attention, three from each at most. The first position is
      left out, where idle heads look. A way that is open need not have been used: the causal effect says what was.</p>
    <div class="controls"><label>Least attention <input type="range" min="0.1" max="0.9" step="0.05" value=${least}
      onInput=${({ target: slider }) => setLeast(Number(slider.value))} /> ${least.toFixed(2)}</label></div>
    <${Graph} label="Ways of attention, from the embedding at the bottom to the last layer" nodes=${nodes} edges=${edges} selection=${selection}
      layers=${{ at: depths.map((_, depth) => depth), labels: depths }}
      positions=${{ at: reached, labels: reached.map((position) => found.tokens[position]) }} />
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
