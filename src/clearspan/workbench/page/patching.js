/** Patching: the values of one text's run put into the other's, cell by cell. The map fills as batches finish. */

import { useCallback, useRef, useState } from "preact/hooks";
import { HeatMap } from "../../view/drawings/heatmap.js";
import { html } from "../../view/drawings/html.js";
import { TokenField, useLikeliest } from "./answers.js";
import { Frame, signed } from "./frame.js";
import { answered, made, promptOf, prompts, selection, settings } from "./state.js";

const POINTS = {
  resid_pre: ["Residual stream", ["layer", "position"]],
  attn_out: ["Attention's output", ["layer", "position"]],
  mlp_out: ["MLP's output", ["layer", "position"]],
  z: ["Heads, all positions", ["layer", "head"]],
};

export function Patching() {
  const clean = promptOf("clean"), corrupted = promptOf("corrupted");
  if (!corrupted) return html`<p class="note">Write a second text above, of as many tokens, that differs in what matters.</p>`;
  if (clean.tokens.length !== corrupted.tokens.length) {
    return html`<p class="error" role="alert">The texts have ${clean.tokens.length} and ${corrupted.tokens.length} tokens:
      patching needs the same number.</p>`;
  }
  return html`<${Sweep} clean=${clean} corrupted=${corrupted} />`;
}

function Sweep({ clean, corrupted }) {
  const begun = settings("patching", { point: "resid_pre", direction: "denoising" });
  const [point, setPoint] = useState(begun.point);
  const [direction, setDirection] = useState(begun.direction);
  const [given, setGiven] = useState(begun.answer_token);
  const [other, setOther] = useState(begun.incorrect_token);
  const [region, setRegion] = useState({ layers: begun.layers ?? null, positions: begun.positions ?? null });
  const right = useLikeliest("clean"), wrong = useLikeliest("corrupted");
  const [, by] = POINTS[point];
  const isReady = right.token !== undefined && wrong.token !== undefined;
  const usual = wrong.token === right.token ? null : wrong.token;
  const request = {
    view: "patching", clean, corrupted, point, by, direction, interventions: made.value,
    answer_token: given ?? right.token,
    incorrect_token: (other === undefined ? usual : other) ?? null,
    layers: region.layers,
    positions: by.includes("position") ? region.positions : null,
  };
  const name = JSON.stringify(request);
  const [asked, setAsked] = useState(begun.answer_token === undefined ? undefined : name);
  const base = direction === "denoising" ? "corrupted" : "clean";
  const controls = html`<${Choice} title="Values" value=${point} onChange=${setPoint}
      options=${Object.entries(POINTS).map(([key, [title]]) => [key, title])} />
    <${Choice} title="Way" value=${direction} onChange=${setDirection}
      options=${[["denoising", "clean into corrupted"], ["noising", "corrupted into clean"]]} />
    <${TokenField} title="Logit of" usual=${given === undefined ? right.label : `#${given}`} onToken=${setGiven} />
    <${TokenField} title="less" usual=${other === undefined ? usual !== null && wrong.label : `#${other}`} onToken=${setOther} />
    ${(region.layers || region.positions) && html`<span>${regionName(region)}
      <button class="link" onClick=${() => setRegion({ layers: null, positions: null })}>whole map</button></span>`}
    <button class="button primary" disabled=${!isReady || asked === name}
      onClick=${() => setAsked(name)}>Patch</button>`;
  return html`<${Frame} found=${asked === name ? answered(request) : {}} controls=${controls}
    note="Which values of one run, put into the other, carry the difference of the two logits. 1: all of it. Drag over the map to choose a region.">
    ${(answer) => html`<pre class="plan">${answer.facts.plan.split("\n")[0]}</pre>
      ${answer.tensors.share && html`<${Map} answer=${answer} by=${by} base=${base} onRegion=${setRegion} />`}`}
  <//>`;
}

function Choice({ title, value, options, onChange }) {
  return html`<label>${title} <select value=${value} onChange=${({ target }) => onChange(target.value)}>
    ${options.map(([key, name]) => html`<option value=${key}>${name}</option>`)}
  </select></label>`;
}

function Map({ answer, by, base, onRegion }) {
  const { facts, tensors } = answer;
  const { labels } = prompts[base].value;
  const isByPosition = by[1] === "position";
  const [layers, columns] = by.map((axis) => facts.axes[axis]);
  const value = useCallback((row, column) => tensors.share.at(row, column), [answer]);
  const names = columns.map((place) => (isByPosition ? labels[place] : `H${place}`));
  const start = useRef();
  const under = () => selection.value.pointed.peek();
  const drop = () => {
    const from = start.current ?? {}, to = under();
    const isRegion = Number.isInteger(from.layer) && Number.isInteger(to.layer) && JSON.stringify(from) !== JSON.stringify(to);
    if (isRegion) onRegion({ layers: between(from.layer, to.layer), positions: isByPosition ? between(from.position, to.position) : null });
  };
  const said = (row, column) =>
    Number.isFinite(value(row, column)) ? `${signed(tensors.mean.at(row, column))} logits; share ${value(row, column).toFixed(3)}` : "not there yet";
  return html`<div onPointerDown=${() => (start.current = under())} onPointerUp=${drop}>
    <${HeatMap} label="Share of the difference that each cell carries" selection=${selection.value}
      rows=${{ axes: ["layer"], labels: layers.map((layer) => `layer ${layer}`), first: layers[0] }}
      columns=${{ axes: isByPosition ? ["position", "target"] : ["head"], labels: names, first: columns[0] }}
      value=${value} bound=${[-1, 1]} colours="sides" cell=${{ width: 26, height: 28, most: 72 }}
      describe=${(row, column) => [`layer ${layers[row]}, ${by[1]} ${columns[column]} ${isByPosition ? names[column] : ""}`, said(row, column)]} />
  </div>
  <p class="note">${Object.entries(facts.ends ?? {}).map(([run, logits]) => `${run === "base" ? base : run.replace("source ", "")}: ${signed(logits)}`).join(" · ")} logits</p>`;
}

const between = (from, to) => Array.from({ length: Math.abs(to - from) + 1 }, (_, i) => Math.min(from, to) + i);

function regionName({ layers, positions }) {
  const named = (title, places) => places && `${title} ${places[0]} to ${places.at(-1)}`;
  return [named("layers", layers), named("positions", positions)].filter(Boolean).join(", ");
}
