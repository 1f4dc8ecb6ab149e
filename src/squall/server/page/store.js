// @ts-check
/** Conversations, as trees of messages, in the browser's database; small things beside it. */

/**
 * @typedef {{id: string, name: string, arguments: string, result?: string}} Call
 * @typedef {{token: string, logprob: number, bytes: number[]}} Likely
 * @typedef {Likely & {top_logprobs: Likely[]}} Token
 * @typedef {{model: string, tokens?: number, rate?: number, first?: number, seconds?: number, prompt?: number, cached?: number}} Stats
 * @typedef {{id: string, parent: string|null, role: "user"|"assistant"|"tool", text: string, images?: string[], reasoning?: string,
 *   calls?: Call[], ran?: Call[], callId?: string, name?: string, tokens?: Token[], stats?: Stats, error?: string, finish?: string, seeds?: number[]}} Message
 * @typedef {{id: string, title: string, named: boolean, created: number, updated: number, at: string|null, messages: Message[],
 *   settings: import("./settings.js").Settings}} Conversation
 */

const NAME = "squall";
const TABLE = "conversations";
const MOST_IMPORT = 64 * 2 ** 20;

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** Small things: drafts, the last settings, the theme. Browsers may refuse to keep them. */
export const small = {
  /** @param {string} name @returns {any} */
  get(name) {
    try {
      return JSON.parse(localStorage.getItem(`${NAME}.${name}`) ?? "null");
    } catch {
      return null;
    }
  },
  /** @param {string} name @param {unknown} value */
  set(name, value) {
    try {
      if (value === null || value === "") localStorage.removeItem(`${NAME}.${name}`);
      else localStorage.setItem(`${NAME}.${name}`, JSON.stringify(value));
    } catch {
      /* what is typed stays on the page, at least */
    }
  },
};

/** @template T @param {IDBRequest<T>} request @returns {Promise<T>} */
const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** All conversations; those of this page are the objects that others hold. */
export class Store {
  constructor() {
    /** @type {Map<string, Conversation>} */
    this.all = new Map();
    /** @type {IDBDatabase|null} */
    this.database = null;
    this.removed = new Set(); // answers may come for them yet
    this.kept = new Set(); // what the database has, so that what it has no more was removed elsewhere
  }

  /** Whether they can be kept. */
  async open() {
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
      this.database = await done(request);
      await this.catchUp(() => false);
      return true;
    } catch {
      return false;
    }
  }

  /** Take over what other tabs have kept since; which of ours that changed. @param {(id: string) => boolean} busy */
  async catchUp(busy) {
    const changed = new Set();
    if (!this.database) return changed;
    const found = await done(this.table("readonly").getAll());
    const gone = this.kept;
    this.kept = new Set(found.map((one) => one.id));
    for (const id of gone) if (!this.kept.has(id) && !busy(id) && this.all.delete(id)) changed.add(id);
    for (const one of found) {
      const known = this.all.get(one.id);
      if (this.removed.has(one.id) || (known && (known.updated >= one.updated || busy(one.id)))) continue;
      if (known) Object.assign(known, one);
      else this.all.set(one.id, one);
      changed.add(one.id);
    }
    return changed;
  }

  /** @param {IDBTransactionMode} mode */
  table(mode) {
    return /** @type {IDBDatabase} */ (this.database).transaction(TABLE, mode).objectStore(TABLE);
  }

  /** The latest first. */
  get list() {
    return [...this.all.values()].sort((a, b) => b.updated - a.updated);
  }

  /** @param {import("./settings.js").Settings} settings @returns {Conversation} */
  create(settings) {
    const now = Date.now();
    return { id: newId(), title: "New chat", named: false, created: now, updated: now, at: null, messages: [], settings };
  }

  /** Keeps it; whether that worked. @param {Conversation} conversation */
  async save(conversation) {
    if (this.removed.has(conversation.id)) return true;
    this.all.set(conversation.id, conversation);
    if (!this.database) return false;
    try {
      await done(this.table("readwrite").put(conversation));
      this.kept.add(conversation.id);
      return true;
    } catch {
      return false;
    }
  }

  /** @param {string} id */
  async remove(id) {
    this.all.delete(id);
    this.removed.add(id);
    if (this.database) await done(this.table("readwrite").delete(id));
  }

  /** Undo that. @param {Conversation} conversation */
  restore(conversation) {
    this.removed.delete(conversation.id);
    return this.save(conversation);
  }

  /** @param {Conversation[]} [which] */
  toJson(which = this.list) {
    return JSON.stringify({ format: "squall-conversations", version: 1, conversations: which }, null, 1);
  }

  /** How many came. Throws for files of another kind. @param {File} file */
  async import(file) {
    if (file.size > MOST_IMPORT) throw new Error("The file is larger than 64 MiB.");
    const { format, conversations } = JSON.parse(await file.text());
    if (format !== "squall-conversations" || !Array.isArray(conversations)) throw new Error("The file is no export of conversations.");
    const found = conversations.map(checked);
    for (const one of found) await this.save(one);
    return found.length;
  }
}

const text = (/** @type {unknown} */ value) => (typeof value === "string" ? value : "");
const number = (/** @type {unknown} */ value) => (typeof value === "number" && Number.isFinite(value) ? value : undefined);
const list = (/** @type {unknown} */ value) => (Array.isArray(value) ? value : []);
const isImage = (/** @type {unknown} */ value) => /^data:image\/(?:png|jpeg|webp|gif|bmp);base64,/.test(text(value));

/** @param {any} given @param {string[]} names @returns {any} */
const texts = (given, names) => Object.fromEntries(names.map((name) => [name, text(given[name])]));

/** A conversation from somewhere: what it should have, and nothing else; under a new id. @param {any} given @returns {Conversation} */
function checked(given) {
  const messages = list(given.messages).map(checkedMessage);
  const ids = new Set();
  for (const message of messages) {
    // Parents come first, so that there are no circles.
    const isOrdered = message.id && !ids.has(message.id) && (message.parent === null || ids.has(message.parent));
    if (!isOrdered) throw new Error("The messages of a conversation do not belong together.");
    ids.add(message.id);
  }
  const settings = Object.fromEntries(Object.entries(given.settings ?? {}).filter(([, value]) => ["string", "boolean"].includes(typeof value)));
  const now = Date.now();
  return {
    id: newId(), title: text(given.title).slice(0, 200) || "Imported", named: Boolean(given.named), created: number(given.created) ?? now,
    updated: number(given.updated) ?? now, at: ids.has(given.at) ? given.at : (messages.at(-1)?.id ?? null), messages, settings,
  };
}

/** @param {any} given @returns {Message} */
function checkedMessage(given) {
  const { role, stats } = given;
  if (!["user", "assistant", "tool"].includes(role)) throw new Error("A message has no role.");
  const message = /** @type {Message} */ ({ id: text(given.id), parent: given.parent === null ? null : text(given.parent), role, text: text(given.text) });
  for (const name of /** @type {const} */ (["reasoning", "callId", "name", "error", "finish"])) if (given[name]) message[name] = text(given[name]);
  if (given.images) message.images = list(given.images).filter(isImage);
  if (given.seeds) message.seeds = list(given.seeds).filter((seed) => number(seed) !== undefined);
  for (const name of /** @type {const} */ (["calls", "ran"])) {
    if (given[name]) message[name] = list(given[name]).map((call) => texts(call, ["id", "name", "arguments", "result"]));
  }
  if (given.tokens) {
    message.tokens = list(given.tokens).map((token) => ({ ...checkedToken(token), top_logprobs: list(token.top_logprobs).map(checkedToken) }));
  }
  if (stats) {
    const names = /** @type {const} */ (["tokens", "rate", "first", "seconds", "prompt", "cached"]);
    message.stats = { model: text(stats.model), ...Object.fromEntries(names.map((name) => [name, number(stats[name])])) };
  }
  return message;
}

/** @param {any} token */
const checkedToken = (token) => ({ token: text(token.token), logprob: number(token.logprob) ?? 0, bytes: list(token.bytes).map((byte) => number(byte) ?? 0) });

/** Whether a call came to its end. @param {Call} call */
export function isWhole(call) {
  try {
    return Boolean(JSON.parse(call.arguments));
  } catch {
    return false;
  }
}

/** The messages from the first to where the conversation is. @param {Conversation} conversation */
export function path({ messages, at }) {
  const byId = new Map(messages.map((message) => [message.id, message]));
  const found = [];
  for (let id = at; id !== null; ) {
    const message = byId.get(id);
    if (!message) break;
    found.push(message);
    id = message.parent;
  }
  return found.reverse();
}

/** The other versions of a message, and itself. @param {Conversation} conversation @param {Message} message */
export const versions = ({ messages }, message) => messages.filter((one) => one.parent === message.parent);

/** Go to a version, and to the latest of what follows it. @param {Conversation} conversation @param {Message} message */
export function goTo(conversation, message) {
  for (let next = /** @type {Message|undefined} */ (message); next; ) {
    const { id } = (conversation.at = next.id, next);
    next = conversation.messages.findLast((one) => one.parent === id);
  }
}

/** Add one after where the conversation is, or after `parent`. @param {Conversation} conversation
 * @param {Omit<Message, "id"|"parent">} given @param {string|null} [parent] */
export function add(conversation, given, parent = conversation.at) {
  const message = { ...given, id: newId(), parent };
  conversation.messages.push(message);
  conversation.at = message.id;
  conversation.updated = Date.now();
  if (!conversation.named && message.role === "user" && parent === null) conversation.title = message.text.trim().split("\n")[0].slice(0, 80) || "Images";
  return message;
}
