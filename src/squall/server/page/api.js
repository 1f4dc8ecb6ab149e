// @ts-check
/** The server: requests, errors as it tells them, and event streams. */

const ROOT = new URL("..", import.meta.url); // also where a proxy serves all of it below a path
const KEY = "squall.key";

export class ApiError extends Error {
  /** @param {string} message @param {number} [status] @param {string} [code] */
  constructor(message, status = 0, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Asks for the key; resolves to it, or to null. @type {(wrong: boolean) => Promise<string|null>} */
let askKey = async () => null;
/** @type {Promise<string|null>|null} */
let asking = null;
let refused = 0; // when; other requests do not ask again at once
const AGAIN_MS = 2000;
export const LIMIT_MS = 20000; // for what a server knows at once

/** @param {typeof askKey} ask */
export function whenKeyIsNeeded(ask) {
  askKey = ask;
}

/** Ask once, whoever needs it. @param {string|null} used */
async function newKey(used) {
  const current = sessionStorage.getItem(KEY);
  if (current !== used) return current; // somebody else asked meanwhile
  if (refused && performance.now() - refused < AGAIN_MS) return null;
  asking ??= askKey(used !== null).finally(() => (asking = null));
  const key = await asking;
  if (key === null) refused = performance.now();
  else sessionStorage.setItem(KEY, key);
  return key;
}

/**
 * The response, if it is a good one. Throws ApiError, and AbortError.
 * @param {string} path @param {{body?: unknown, method?: string, signal?: AbortSignal, limit?: number}} [options] limit: milliseconds
 * @returns {Promise<Response>}
 */
export async function call(path, options = {}) {
  const { body, method, limit, signal = limit && AbortSignal.timeout(limit) } = options;
  const key = sessionStorage.getItem(KEY);
  /** @type {Record<string, string>} */
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const data = body === undefined ? undefined : JSON.stringify(body);
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { method: method ?? (data ? "POST" : "GET"), headers, body: data, signal, cache: "no-store" });
  } catch (error) {
    if (limit && signal.aborted) throw new ApiError("The server does not answer in time.");
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached. Check that it runs, and try again.");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    const next = await newKey(key);
    if (next !== null) return call(path, options);
  }
  throw await toError(response);
}

/** @param {Response} response */
async function toError(response) {
  const text = await response.text().catch(() => "");
  try {
    return fromBody(JSON.parse(text), response.status);
  } catch {
    // Proxies have pages for it.
    const shown = /^\s*</.test(text) ? "" : text.slice(0, 500);
    return new ApiError(shown || `The server answered with ${response.status} ${response.statusText}`.trim() + ".", response.status);
  }
}

/** @param {any} body @param {number} status */
function fromBody(body, status) {
  const { message, code } = body.error;
  return new ApiError(String(message), status, String(code ?? ""));
}

/**
 * The events of a stream, parsed. Throws ApiError for one that tells of an error, or that breaks off.
 * @param {string} path @param {object} body @param {AbortSignal} signal
 * @returns {AsyncGenerator<any>}
 */
export async function* stream(path, body, signal) {
  const response = await call(path, { body, signal });
  for await (const data of events(response, signal)) {
    if (data === "[DONE]") return;
    const event = parsed(data);
    if (event.error) throw fromBody(event, 500);
    yield event;
  }
  throw broken();
}

/** @param {string} data */
function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw broken();
  }
}

const broken = () => new ApiError("The connection to the server broke off; this is what came until then.");

/** @param {Response} response @param {AbortSignal} signal @returns {AsyncGenerator<string>} */
async function* events(response, signal) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = /** @type {string[]} */ ([]);
  try {
    for (;;) {
      const { done, value } = await reader.read();
      const lines = (rest + decoder.decode(value, { stream: !done })).split(/\r?\n/);
      rest = lines.pop() ?? "";
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
    throw broken();
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** @typedef {{id: string, kind: string, state: string, pinned: boolean, sees: boolean, context: number|null, parent: string|null, error: string}} ModelCard */

/** @returns {Promise<ModelCard[]>} */
export async function models() {
  const { data } = await (await call("v1/models", { limit: LIMIT_MS })).json();
  return data.map((/** @type {any} */ card) => ({
    id: String(card.id),
    kind: card.kind ?? ("max_model_len" in card ? "text" : "pictures"),
    state: card.state ?? "loaded",
    pinned: Boolean(card.pinned),
    sees: card.kind === "pictures" || (card.capabilities?.includes("vision") ?? true),
    context: card.max_model_len ?? null,
    parent: card.parent ?? null,
    error: String(card.error ?? ""),
  }));
}

/** @param {string} id @param {"load"|"unload"} what */
export async function change(id, what) {
  // Names may have slashes, which are parts of the path.
  const path = id.split("/").map(encodeURIComponent).join("/");
  await call(`v1/models/${path}/${what}`, { method: "POST" });
}
