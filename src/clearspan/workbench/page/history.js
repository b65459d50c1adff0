/** The history: every request of the session, the latest first, with its progress. */

import { html } from "../../view/drawings/html.js";
import { cancel } from "./server.js";
import { ask, jobs, reopen } from "./state.js";

const SHOWN = 40;

export function History() {
  const all = Object.values(jobs.value).filter(({ request }) => request.view !== "text").reverse();
  return html`<aside class="history" aria-labelledby="history-title"><h2 id="history-title">History</h2>
    ${all.length === 0 && html`<p class="note">What you look at is kept here, and in the session's folder.</p>`}
    <ol>${all.slice(0, SHOWN).map((job) => html`<li key=${job.key} class=${job.state}>
      <button class="link" onClick=${() => reopen(job.request)}>${titleOf(job.request)}</button>
      <${State} job=${job} />
    </li>`)}</ol>
  </aside>`;
}

function State({ job }) {
  const { key, state, done, total, seconds, request } = job;
  const share = total ? Math.round((100 * done) / total) : 0;
  switch (state) {
    case "running":
    case "waiting":
      return html`<span>${state === "waiting" ? "waits" : `${share} %`} <button class="link" onClick=${() => cancel(key)}>cancel</button></span>`;
    case "cancelled":
      return html`<span>stopped <button class="link" onClick=${() => ask(request)}>go on</button></span>`;
    case "failed":
      return html`<span>failed</span>`;
    default:
      return html`<span>${seconds.toFixed(2)} s</span>`;
  }
}

const titleOf = (request) => [request.view, detail(request), (request.prompt ?? request.clean)?.text].filter(Boolean).join(" · ");
const detail = ({ layer, point, unit, level }) => (layer === undefined ? point ?? unit ?? level : `layer ${layer}`);
