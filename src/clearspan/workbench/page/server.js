/** The server: what is asked of it, the events it sends, and answers read from their bytes. */

const client = crypto.randomUUID();

async function request(method, path, body) {
  const headers = body === undefined ? {} : { "content-type": "application/json" };
  const response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  if (response.ok) return response;
  const text = await response.text();
  const isJson = response.headers.get("content-type")?.startsWith("application/json");
  throw new Error(isJson ? JSON.parse(text).error : text);
}

const json = async (...given) => (await request(...given)).json();

export const readModel = () => json("GET", "/api/model");
export const readDesk = () => json("GET", "/api/desk");
export const keepDesk = (desk) => json("PUT", "/api/desk", desk);
export const readText = (text) => json("POST", "/api/tokens", { text });
export const readTokens = (tokens) => json("POST", "/api/tokens", { tokens });
export const readToken = async (text) => (await json("POST", "/api/token", { text })).token;
export const submit = (view) => json("POST", "/api/jobs", { client, request: view });
export const cancel = (key) => json("DELETE", `/api/jobs/${key}?client=${client}`);
export const readScript = async (key) => (await request("GET", `/api/jobs/${key}/script`)).text();
export const notebookOf = (key) => `/api/jobs/${key}/notebook`;

/** Calls `onJob` with each job that changes, and with all of them whenever the connection is made again. */
export function listen(onJob) {
  const events = new EventSource(`/api/events?client=${client}`);
  events.addEventListener("job", ({ data }) => onJob(JSON.parse(data)));
}

/** Returns an answer: `facts`, and `tensors` by name. */
export async function readAnswer(key) {
  return unpack(await (await request("GET", `/api/jobs/${key}/answer`)).arrayBuffer());
}

const ARRAYS = { F32: Float32Array, I32: Int32Array, BOOL: Uint8Array };

/** Reads safetensors: the length of the header in 8 bytes, the header as JSON, the tensors' bytes. */
export function unpack(buffer) {
  const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
  const { __metadata__: metadata, ...entries } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, start - 8)));
  const tensors = Object.entries(entries).map(([name, { dtype, shape, data_offsets: [from, to] }]) => [
    name,
    new Tensor(shape, new ARRAYS[dtype](buffer.slice(start + from, start + to))),
  ]);
  return { facts: JSON.parse(metadata.facts), tensors: Object.fromEntries(tensors) };
}

/** Numbers with axes. */
export class Tensor {
  constructor(shape, values) {
    this.shape = shape;
    this.values = values;
  }

  /** Returns the value at one place, which names an index on each axis. */
  at(...place) {
    return this.values[place.reduce((index, at, axis) => index * this.shape[axis] + at, 0)];
  }

  /** Returns the values at a place of the first axes, as an array. */
  row(...place) {
    const size = this.shape.slice(place.length).reduce((product, count) => product * count, 1);
    const index = place.reduce((found, at, axis) => found * this.shape[axis] + at, 0);
    return [...this.values.subarray(index * size, (index + 1) * size)];
  }
}
