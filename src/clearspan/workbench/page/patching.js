/** Patching: the values of one text's run put into the other's, cell by cell. The map fills as batches finish. */

import { useCallback, useState } from "preact/hooks";
import { HeatMap } from "../../view/drawings/heatmap.js";
import { html } from "../../view/drawings/html.js";
import { TokenField, useLikeliest } from "./answers.js";
import { Frame, signed } from "./frame.js";
import { answered, made, promptOf, prompts, selection } from "./state.js";

const POINTS = {
  resid_pre: ["Residual stream", ["layer", "position"]],
  attn_out: ["Attention's output", ["layer", "position"]],
  mlp_out: ["MLP's output", ["layer", "position"]],
  z: ["Heads, all positions", ["layer", "head"]],
};

export function Patching() {
  const [point, setPoint] = useState("resid_pre");
  const [direction, setDirection] = useState("denoising");
  const [given, setGiven] = useState();
  const [other, setOther] = useState();
  const [asked, setAsked] = useState();
  const clean = promptOf("clean"), corrupted = promptOf("corrupted");
  const right = useLikeliest("clean"), wrong = useLikeliest("corrupted");
  const isPair = clean?.tokens.length === corrupted?.tokens.length;
  const token = given ?? right.token, less = other ?? (wrong.token === right.token ? null : wrong.token);
  const request = {
    view: "patching", clean, corrupted, answer_token: token, incorrect_token: less ?? null, point, by: POINTS[point][1], direction, interventions: made.value,
  };
  const name = JSON.stringify(request);
  if (!corrupted) return html`<p class="note">Write a second text above, of as many tokens, that differs in what matters.</p>`;
  if (!isPair) return html`<p class="error" role="alert">The texts have ${clean.tokens.length} and ${corrupted.tokens.length} tokens: patching needs the same number.</p>`;
  return html`<${Frame} found=${asked === name ? answered(request) : {}}
    note="Which values of the clean run, put into the corrupted one, bring back the difference of the two logits. 1: all of it."
    controls=${html`<label>Values <select value=${point} onChange=${({ target }) => setPoint(target.value)}>
        ${Object.entries(POINTS).map(([key, [title]]) => html`<option value=${key}>${title}</option>`)}
      </select></label>
      <label>Way <select value=${direction} onChange=${({ target }) => setDirection(target.value)}>
        <option value="denoising">clean into corrupted</option><option value="noising">corrupted into clean</option>
      </select></label>
      <${TokenField} title="Logit of" usual=${right.label} onToken=${setGiven} />
      <${TokenField} title="less" usual=${wrong.token === right.token ? "none" : wrong.label} onToken=${setOther} />
      <button class="button primary" disabled=${token === undefined || asked === name} onClick=${() => setAsked(name)}>Patch</button>`}>
    ${(answer) => html`<pre class="plan">${answer.facts.plan.split("\n")[0]}</pre>
      ${answer.tensors.share && html`<${Map} answer=${answer} axes=${POINTS[point][1]} base=${direction === "denoising" ? "corrupted" : "clean"} />`}`}
  <//>`;
}

function Map({ answer, axes, base }) {
  const { facts, tensors } = answer;
  const { labels } = prompts[base].value;
  const value = useCallback((row, column) => tensors.share.at(row, column), [answer]);
  const [rows, columns] = axes.map((axis) => facts.axes[axis]);
  const columnLabels = axes[1] === "position" ? columns.map((position) => labels[position]) : columns.map((head) => `H${head}`);
  const columnAxes = axes[1] === "position" ? ["position", "target"] : ["head"];
  return html`<${HeatMap} label="Share of the difference that each cell brings back" selection=${selection.value}
    rows=${{ axes: ["layer"], labels: rows.map((layer) => `layer ${layer}`) }} columns=${{ axes: columnAxes, labels: columnLabels }}
    value=${value} bound=${[-1, 1]} colours="sides" cell=${{ width: 26, height: 28, most: 72 }}
    describe=${(row, column) => [
      `layer ${rows[row]}, ${axes[1]} ${columns[column]}${axes[1] === "position" ? ` ${columnLabels[column]}` : ""}`,
      Number.isFinite(value(row, column)) ? `${signed(tensors.mean.at(row, column))} logits; share ${value(row, column).toFixed(3)}` : "not there yet",
    ]} />
  <p class="note">${Object.entries(facts.ends ?? {}).map(([run, logits]) => `${run === "base" ? base : run.replace("source ", "")}: ${signed(logits)}`).join(" · ")} logits</p>`;
}
