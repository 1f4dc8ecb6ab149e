// @ts-check
/** The server's models: which there are, which one answers, and what is loaded. */

import * as api from "./api.js";
import { byId, el } from "./dom.js";
import { small } from "./store.js";

const WHAT = { loaded: "", loading: " · loading", unloaded: " · not loaded", failed: " · failed" };
const SOON_MS = 1500;

export class Models {
  /** @param {() => void} changed */
  constructor(changed) {
    this.changed = changed;
    /** @type {api.ModelCard[]} */
    this.all = [];
    this.select = byId("model");
    this.wanted = small.get("model");
    this.timer = this.looks = 0;
    this.select.addEventListener("change", () => {
      small.set("model", (this.wanted = this.select.value));
      this.show();
    });
    this.select.addEventListener("focus", () => this.refresh());
  }

  /** Those that talk or make pictures. */
  get choices() {
    return this.all.filter((model) => model.kind === "text" || model.kind === "pictures");
  }

  get current() {
    return this.choices.find((model) => model.id === this.wanted) ?? this.choices[0];
  }

  /** Look again; the error, if there was one. */
  async refresh() {
    const look = ++this.looks;
    try {
      const all = await api.models();
      if (look !== this.looks) return null; // a later look knows better
      this.all = all;
    } catch (error) {
      return /** @type {Error} */ (error);
    }
    this.show();
    clearTimeout(this.timer);
    if (this.all.some((model) => model.state === "loading")) this.timer = setTimeout(() => this.refresh(), SOON_MS);
    return null;
  }

  show() {
    const options = this.choices.map(({ id, kind, state }) => {
      const what = /** @type {Record<string, string>} */ (WHAT)[state] ?? ` · ${state}`;
      return { id, label: `${id}${kind === "pictures" ? " · pictures" : ""}${what}` };
    });
    // Options that are the same stay, so that an open list does not close.
    const now = [...this.select.options].map((option) => `${option.value}\n${option.textContent}`).join();
    if (now !== options.map(({ id, label }) => `${id}\n${label}`).join()) {
      this.select.replaceChildren(...options.map(({ id, label }) => el("option", { value: id }, label)));
    }
    if (this.current) this.select.value = this.current.id;
    else this.select.replaceChildren(el("option", {}, "no model for chats"));
    byId("model-state").className = `light ${this.current?.state ?? "unloaded"}`;
    this.changed();
  }

  /** @param {string} id @param {"load"|"unload"} what */
  async change(id, what) {
    const waiting = api.change(id, what);
    setTimeout(() => this.refresh(), 100);
    try {
      await waiting;
    } finally {
      await this.refresh();
    }
  }
}
