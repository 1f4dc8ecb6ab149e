// @ts-check
/** The server's metrics as they are now, and how they were in the last minutes. */

import { ApiError, call, LIMIT_MS } from "./api.js";
import { byId, el, svg, toast } from "./dom.js";

const EVERY_MS = 2000;
const POINTS = 90; // three minutes
const LINE = /^([a-z_]+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /([a-z_]+)="((?:[^"\\]|\\.)*)"/g;

/** Samples by name and labels: {name: [[labels, value], ...]}.
 * @param {string} text @returns {Map<string, [Record<string, string>, number][]>} */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = LINE.exec(line);
    if (!match) continue;
    const [, name, labels = "", value] = match;
    const pairs = [...labels.matchAll(LABEL)].map(([, key, given]) => [key, given.replace(/\\(.)/g, (_, sign) => (sign === "n" ? "\n" : sign))]);
    if (!found.has(name)) found.set(name, []);
    found.get(name).push([Object.fromEntries(pairs), Number(value)]);
  }
  return found;
}

/** @typedef {(name: string, labels?: Record<string, string>) => number|null} Get the sum of samples; null if there are none */
/** @typedef {(get: Get, before: Get|null, seconds: number) => number|null} Compute */

/** @param {string} name @param {Record<string, string>} [labels] @returns {Compute} */
const now = (name, labels) => (get) => get(name, labels);
/** @param {string} name @param {Record<string, string>} [labels] @returns {Compute} */
const rate = (name, labels) => (get, before, seconds) => {
  const [a, b] = [before?.(name, labels) ?? null, get(name, labels)];
  return a === null || b === null ? null : Math.max(b - a, 0) / seconds;
};
/** A part of a whole, in percent. @param {number|null} part @param {number|null} rest */
const share = (part, rest) => (part === null || rest === null || part + rest === 0 ? null : (100 * part) / (part + rest));
/** The mean since the last look, or since the beginning. @param {string} name @returns {Compute} */
const mean = (name) => (get, before) => {
  const [sum, count] = [get(`${name}_sum`) ?? 0, get(`${name}_count`) ?? 0];
  const [sum0, count0] = [before?.(`${name}_sum`) ?? 0, before?.(`${name}_count`) ?? 0];
  return count > count0 ? (1000 * (sum - sum0)) / (count - count0) : count ? (1000 * sum) / count : null;
};

/** Title, unit, and how it is found. @type {[string, string, Compute][]} */
const TEXT = [
  ["Running", "requests", now("squall_requests_running")],
  ["Waiting", "requests", now("squall_requests_waiting")],
  ["Answers", "tokens/s", rate("squall_answer_tokens_total")],
  ["Prompts", "tokens/s", rate("squall_prompt_tokens_total")],
  ["KV cache in use", "%", (get) => {
    const [used, cached, free] = ["used", "cached", "free"].map((state) => get("squall_kv_blocks", { state }));
    return share(used, (cached ?? 0) + (free ?? 0));
  }],
  ["Prefix cache hits", "%", (get) => share(get("squall_prefix_hit_tokens_total"), get("squall_prompt_tokens_total"))],
  ["First token", "ms", mean("squall_time_to_first_token_seconds")],
  ["Between tokens", "ms", mean("squall_inter_token_seconds")],
];
/** @type {[string, string, Compute][]} */
const PICTURES = [
  ["Running", "pictures", now("squall_pictures_running")],
  ["Waiting", "pictures", now("squall_pictures_waiting")],
  ["Pictures", "a minute", (get, before, seconds) => ((value) => value && value * 60)(rate("squall_pictures_total")(get, before, seconds))],
];

/** @param {number|null|undefined} value */
const shown = (value) => (value === null || value === undefined ? "–" : value.toFixed(value >= 100 || Number.isInteger(value) ? 0 : 1));

/** One number, and its line. */
class Chart {
  /** @param {string} title @param {string} unit @param {Compute} compute */
  constructor(title, unit, compute) {
    this.title = title;
    this.unit = unit;
    this.compute = compute;
    /** @type {(number|null)[]} */
    this.values = [];
    this.number = el("strong", {});
    this.line = svg("path", { class: "line", "vector-effect": "non-scaling-stroke" });
    this.area = svg("path", { class: "area" });
    this.picture = svg("svg", { viewBox: `0 0 ${POINTS - 1} 30`, preserveAspectRatio: "none", role: "img" }, this.area, this.line);
    this.root = el("div", { class: "chart" }, el("h4", {}, title), el("p", {}, this.number, ` ${unit}`), this.picture);
  }

  /** @param {Get} get @param {Get|null} before @param {number} seconds */
  add(get, before, seconds) {
    this.values.push(this.compute(get, before, seconds));
    if (this.values.length > POINTS) this.values.shift();
    const value = this.values.at(-1);
    this.number.textContent = shown(value);
    const known = this.values.filter((one) => one !== null);
    const most = Math.max(...known, this.unit === "%" ? 100 : 1);
    const x0 = POINTS - this.values.length;
    const points = this.values.flatMap((one, i) => (one === null ? [] : [`${x0 + i},${(29 - (27 * one) / most).toFixed(1)}`]));
    const first = points[0]?.split(",")[0];
    this.line.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
    this.area.setAttribute("d", points.length > 1 ? `M${first},30L${points.join("L")}V30Z` : "");
    const [length, highest] = [Math.round((this.values.length * EVERY_MS) / 1000), known.length ? Math.max(...known) : null];
    this.picture.setAttribute("aria-label",
      `${this.title}: now ${shown(value)} ${this.unit}, at most ${shown(highest)} in the last ${length} seconds`);
  }
}

export class Metrics {
  /** @param {import("./models.js").Models} models */
  constructor(models) {
    this.models = models;
    this.root = byId("metrics-models");
    /** @type {Map<string, {root: any, about: any, problem: any, body: any, state: any, button: any, charts: Chart[]}>} */
    this.cards = new Map();
    /** @type {{at: number, samples: ReturnType<typeof parse>}|null} */
    this.last = null;
    this.timer = 0;
    this.looks = false;
  }

  /** @param {boolean} visible */
  run(visible) {
    clearInterval(this.timer);
    if (!visible) return;
    this.look();
    this.timer = setInterval(() => document.hidden || this.look(), EVERY_MS);
  }

  /** One look at a time, also where the server takes long. */
  async look() {
    if (this.looks) return;
    this.looks = true;
    await this.update();
    this.looks = false;
  }

  async update() {
    let samples;
    try {
      samples = parse(await (await call("metrics", { limit: LIMIT_MS })).text());
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) clearInterval(this.timer); // and do not ask again
      byId("metrics-problem").textContent = /** @type {Error} */ (error).message;
      return;
    }
    byId("metrics-problem").textContent = (await this.models.refresh())?.message ?? "";
    const at = performance.now();
    const before = this.last;
    this.last = { at, samples };
    this.showServer(samples);
    const wanted = this.models.all.filter((model) => model.parent === null);
    for (const model of wanted) {
      const card = this.cards.get(model.id) ?? this.make(model);
      for (const chart of card.charts) chart.add(getter(samples, model.id), before && getter(before.samples, model.id), before ? (at - before.at) / 1000 : 1);
    }
    this.showStates();
    for (const [id, card] of this.cards) {
      if (wanted.some((model) => model.id === id)) continue;
      card.root.remove();
      this.cards.delete(id);
    }
  }

  /** @param {import("./api.js").ModelCard} model */
  make(model) {
    const charts = { text: TEXT, pictures: PICTURES }[model.kind]?.map((row) => new Chart(...row)) ?? [];
    const state = el("span", { class: "tag" });
    const button = el("button", { type: "button", click: () => this.change(model.id) }, "");
    const about = el("p", { class: "hint" });
    const head = el("header", {}, el("div", {}, el("h3", {}, model.id), about), state, button);
    const problem = el("p", { class: "problem" });
    const body = el("div", { class: "charts" }, ...charts.map((chart) => chart.root));
    const card = { root: el("section", { class: "model", "aria-label": `Model ${model.id}` }, head, problem, body), about, problem, body, state, button, charts };
    this.cards.set(model.id, card);
    this.root.append(card.root);
    return card;
  }

  showStates() {
    for (const model of this.models.all) {
      const card = this.cards.get(model.id);
      if (card) showState(card, model);
    }
  }

  /** @param {string} id */
  async change(id) {
    const model = this.models.all.find((one) => one.id === id);
    try {
      await this.models.change(id, model?.state === "loaded" ? "unload" : "load");
    } catch (error) {
      toast(/** @type {Error} */ (error).message);
    }
    this.look();
  }

  /** @param {ReturnType<typeof parse>} samples */
  showServer(samples) {
    const all = samples.get("squall_http_responses_total") ?? [];
    const sum = (/** @type {RegExp} */ status) => all.filter(([labels]) => status.test(labels.status)).reduce((total, [, value]) => total + value, 0);
    const rows = Object.entries({ Responses: sum(/./), Refused: sum(/^4/), Failed: sum(/^5/) });
    byId("metrics-server").replaceChildren(...rows.map(([title, value]) => el("div", {}, el("dt", {}, title), el("dd", {}, value.toLocaleString("en")))));
  }
}

/** @param {ReturnType<typeof parse>} samples @param {string} model @returns {Get} */
function getter(samples, model) {
  return (name, labels = {}) => {
    const wanted = Object.entries({ ...labels, model });
    const found = (samples.get(name) ?? []).filter(([has]) => wanted.every(([key, value]) => has[key] === value));
    return found.length ? found.reduce((sum, [, value]) => sum + value, 0) : null;
  };
}

/** @param {{state: any, button: any, about: any, problem: any, body: any}} card @param {import("./api.js").ModelCard} model */
function showState({ state, button, about, problem, body }, model) {
  const context = model.context && `context ${model.context.toLocaleString("en")} tokens`;
  about.textContent = [model.kind, context, model.pinned && "pinned"].filter(Boolean).join(" · ");
  state.textContent = model.state;
  state.className = `tag ${model.state}`;
  const loaded = model.state === "loaded";
  body.hidden = !loaded;
  problem.textContent = model.error;
  button.textContent = loaded ? "Unload" : model.state === "loading" ? "Loading…" : "Load";
  button.disabled = model.state === "loading";
  button.setAttribute("aria-label", `${loaded ? "Unload" : "Load"} ${model.id}`);
}
