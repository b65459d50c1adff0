/** What the page knows: the model, two texts, the chips, the jobs, and the answers that were fetched. */

import { batch, computed, effect, signal } from "@preact/signals";
import { Selection } from "../../view/drawings/selection.js";
import { keepDesk, listen, readAnswer, readDesk, readModel, readText, readTokens, submit } from "./server.js";

export const model = signal(null);
export const texts = { clean: signal(""), corrupted: signal("") };
/** The texts as the model reads them: `text`, `tokens` and `labels`, or the `error` that says why it cannot. */
export const prompts = { clean: signal({}), corrupted: signal({}) };
/** Interventions: `{ intervention, is_on }`. */
export const chips = signal([]);
export const jobs = signal({});
export const view = signal("lens");

export const made = computed(() => chips.value.filter((chip) => chip.is_on).map((chip) => chip.intervention));

/** What is picked, for a text of so many tokens. */
const count = computed(() => prompts.clean.value.tokens?.length ?? 1);
export const selection = computed(() => {
  const { layers, heads } = model.value;
  const sizes = { position: count.value, target: count.value, layer: layers, head: heads };
  return new Selection(sizes, { target: count.value - 1, position: count.value - 1, layer: 0, head: 0 });
});

/** Returns a prompt as requests have it; undefined where the text cannot be read. */
export function promptOf(name) {
  const { tokens, text } = prompts[name].value;
  return tokens && { tokens, text };
}

// --- answers ---------------------------------------------------------------------------------------------------------

const questions = new Map();

/** Returns what is known of a request: its `job`, its `answer` as far as it is there, and an `error`. */
export function answered(request) {
  return request ? question(request).value : {};
}

function question(request) {
  const name = JSON.stringify(request);
  if (!questions.has(name)) {
    questions.set(name, signal({ request }));
    ask(request);
  }
  return questions.get(name);
}

/** Asks, or asks again after a failure. */
export async function ask(request) {
  const found = question(request);
  try {
    const { key } = await submit(request);
    found.value = { ...found.peek(), key, error: undefined };
    const job = jobs.peek()[key]; // an event may have come first; the others are still to come
    if (job) note(job);
  } catch (error) {
    found.value = { ...found.peek(), error: error.message };
  }
}

/** Takes in the state of a job. */
async function note(job) {
  jobs.value = { ...jobs.peek(), [job.key]: job };
  const revision = job.state === "done" ? "done" : job.revision;
  for (const found of [...questions.values()].filter((one) => one.peek().key === job.key)) {
    const isNew = revision && found.peek().revision !== revision;
    found.value = { ...found.peek(), job, revision: revision || found.peek().revision };
    if (!isNew) continue;
    const answer = await readAnswer(job.key);
    if (found.peek().revision === revision) found.value = { ...found.peek(), answer };
  }
}

// --- texts -----------------------------------------------------------------------------------------------------------

const PAUSE = 350;
const waits = {};

/** Changes a text, and reads it once nothing has been typed for a moment. */
export function write(name, text) {
  texts[name].value = text;
  clearTimeout(waits[name]);
  waits[name] = setTimeout(() => read(name), PAUSE);
}

async function read(name) {
  const text = texts[name].peek();
  try {
    const found = text ? await readText(text) : {};
    if (texts[name].peek() === text) prompts[name].value = found;
  } catch (error) {
    prompts[name].value = { text, error: error.message };
  }
}

/** Makes the clean text what some tokens say. */
export async function branch(tokens) {
  const { text } = await readTokens(tokens);
  texts.clean.value = text;
  await read("clean");
}

/** The request that was brought back last: views begin with its settings. */
export const reopened = signal({});

/** Brings back a request of the history: its texts, its interventions, its place, and its view. */
export async function reopen(request) {
  batch(() => {
    texts.clean.value = (request.prompt ?? request.clean)?.text ?? texts.clean.value;
    texts.corrupted.value = request.corrupted?.text ?? texts.corrupted.value;
    chips.value = (request.interventions ?? []).map((intervention) => ({ intervention, is_on: true }));
  });
  await Promise.all([read("clean"), read("corrupted")]);
  const { layer, position } = request;
  if (layer !== undefined) selection.value.pick({ layer });
  if (position >= 0) selection.value.pick({ position, target: position });
  batch(() => {
    reopened.value = request;
    view.value = request.view === "verification" ? "model" : request.view;
  });
}

/** Returns the settings with which a view begins: those of the request that was brought back, or the usual ones. */
export function settings(kind, usual) {
  return reopened.peek().view === kind ? { ...usual, ...reopened.peek() } : usual;
}

/** Fetches what is there, and follows it from then on. */
export async function start() {
  const [facts, desk] = await Promise.all([readModel(), readDesk()]);
  batch(() => {
    model.value = facts;
    texts.clean.value = desk.clean;
    texts.corrupted.value = desk.corrupted;
    chips.value = desk.chips;
  });
  listen(note);
  await Promise.all([read("clean"), read("corrupted")]);
  let isFirst = true;
  effect(() => {
    const kept = { clean: texts.clean.value, corrupted: texts.corrupted.value, chips: chips.value };
    clearTimeout(waits.desk);
    if (!isFirst) waits.desk = setTimeout(() => keepDesk(kept), PAUSE);
    isFirst = false;
  });
}
