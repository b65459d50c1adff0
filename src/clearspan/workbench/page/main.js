/** The workbench's page: texts and chips on top, history left, the view in the middle, the inspector right. */

import { render } from "preact";
import { html } from "../../view/drawings/html.js";
import { Attention } from "./attention.js";
import { Attribution } from "./attribution.js";
import { Chips } from "./chips.js";
import { Generation } from "./generation.js";
import { History } from "./history.js";
import { Inspector } from "./inspector.js";
import { Lens } from "./lens.js";
import { Model } from "./model.js";
import { Patching } from "./patching.js";
import { model, promptOf, reopened, selection, start, view } from "./state.js";
import { Texts } from "./texts.js";

const VIEWS = {
  lens: ["Lens", Lens],
  attention: ["Attention", Attention],
  attribution: ["Direct attribution", Attribution],
  patching: ["Patching", Patching],
  generation: ["Generation", Generation],
  model: ["Model", Model],
};

function Page() {
  const [, View] = VIEWS[view.value];
  const { name, architecture, parameters, layers, heads, width } = model.value;
  const isReady = promptOf("clean") || view.value === "model";
  return html`
    <header>
      <p class="brand">clearspan <code>${name}</code>
        <span>${architecture}, ${parameters.toLocaleString("en")} parameters, ${layers} layers × ${heads} heads, width ${width}</span></p>
      <${Texts} />
      <${Chips} />
    </header>
    <div class="columns">
      <${History} />
      <main>
        <nav class="tabs" role="tablist" aria-label="Views">${Object.entries(VIEWS).map(([key, [title]]) => html`
          <button key=${key} role="tab" aria-selected=${key === view.value} onClick=${() => (view.value = key)}>${title}</button>`)}
        </nav>
        ${isReady ? html`<${View} key=${`${view.value} ${JSON.stringify(reopened.value)}`} />` : html`<p class="note">Write a text above to look into it.</p>`}
      </main>
      <${Inspector} />
    </div>`;
}

async function open() {
  await start();
  addEventListener("keydown", ({ key }) => key === "Escape" && selection.value.clear());
  document.title = `clearspan ${model.value.name}`;
  render(html`<${Page} />`, document.body);
}

open();
