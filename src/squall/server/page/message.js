// @ts-check
/** One message on the page, and what can be done with it. */

import { button, copy, el } from "./dom.js";
import { Markdown } from "./markdown.js";
import { isWhole, small } from "./store.js";
import { Tokens } from "./tokens.js";

/** @typedef {import("./store.js").Message} Message */
/**
 * @typedef {object} Actions
 * @property {(message: Message, text: string) => void} edit
 * @property {(message: Message) => void} regenerate
 * @property {(message: Message) => void} goOn
 * @property {(message: Message) => void} goTo
 * @property {(message: Message) => void} giveResults
 * @property {() => void} save
 * @property {(message: Message) => Message[]} versions
 * @property {(message: Message) => boolean} isLast
 */

const NAMES = { user: "You", assistant: "Answer", tool: "Result" };

export class View {
  /** @param {Message} message @param {Actions} actions */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.busy = "";
    /** Of a picture. @type {{step: number, steps: number}|null} */
    this.progress = null;
    this.body = el("div", { class: "body" });
    this.foot = el("footer", {});
    this.root = el("article", { class: `message ${message.role}`, "aria-label": NAMES[message.role], "data-id": message.id }, this.body, this.foot);
    if (message.role === "assistant") this.prepare();
    else this.showGiven();
    this.update();
    const draft = small.get(`edit.${message.id}`);
    if (typeof draft === "string") this.edit(draft);
  }

  /** What was typed: plain text, as it is. */
  showGiven() {
    const { role, name, text, images } = this.message;
    const title = role === "tool" ? el("p", { class: "label" }, `Result of ${name}`) : null;
    const shown = images?.length ? el("div", { class: "pictures" }, ...images.map((url, i) => picture(url, i))) : null;
    this.body.replaceChildren(...[title, shown, text ? el("div", { class: "plain", dir: "auto" }, text) : null].filter((part) => part !== null));
  }

  prepare() {
    const thought = el("div", { class: "markdown" });
    this.thoughts = new Markdown(thought);
    this.reasoning = el("details", { class: "reasoning", hidden: true }, el("summary", {}, "Reasoning"), thought);
    this.ran = el("div", {});
    this.text = el("div", { class: "markdown answer" });
    this.markdown = new Markdown(this.text);
    this.tokenBox = el("div", { class: "tokens", dir: "auto", hidden: true });
    this.tokens = new Tokens(this.tokenBox);
    this.calls = el("div", { class: "calls" });
    this.images = el("div", { class: "pictures" });
    this.state = el("p", { class: "state", hidden: true });
    this.error = el("div", { class: "error", role: "alert", hidden: true });
    this.body.append(this.reasoning, this.ran, this.text, this.tokenBox, this.calls, this.images, this.state, this.error);
    this.asTokens = false;
    this.prefer();
  }

  /** Tokens, where there are some, unless the reader turned them off the last time. */
  prefer() {
    this.asTokens = this.message.tokens !== undefined && small.get("tokens") !== false;
  }

  /** Show what there is by now. busy: what is going on, if anything is. @param {string} [busy] */
  update(busy = "") {
    this.busy = busy;
    this.root.classList.toggle("busy", Boolean(busy));
    if (this.message.role === "assistant") this.showAnswer();
    this.showFoot();
  }

  showAnswer() {
    const { reasoning = "", text, tokens = [], error } = this.message;
    this.reasoning.hidden = !reasoning;
    this.reasoning.firstElementChild.textContent = this.busy && !text ? "Reasoning…" : "Reasoning";
    this.thoughts?.update(reasoning);
    if (!this.busy) this.asTokens &&= tokens.length > 0;
    this.text.hidden = this.asTokens;
    this.tokenBox.hidden = !this.asTokens;
    if (this.asTokens) this.tokens?.update(tokens);
    else this.markdown?.update(this.busy ? text : asCode(text));
    this.showCalls();
    const { images = [], seeds, ran = [] } = this.message;
    for (const call of ran.slice(this.ran.childElementCount)) this.ran.append(ranCall(call));
    for (let i = this.images.childElementCount; i < images.length; i++) this.images.append(picture(images[i], i, seeds?.[i]));
    this.state.hidden = !this.busy;
    this.showState();
    this.error.hidden = !error;
    if (!error || this.error.textContent !== "") return;
    const again = el("button", { type: "button", click: () => this.actions.regenerate(this.message) }, "Try again");
    this.error.append(el("span", {}, error), again);
  }

  showState() {
    const { step, steps } = this.progress ?? {};
    if (!steps) this.state.replaceChildren(el("span", { class: "dots", "aria-hidden": "true" }), this.busy);
    else this.state.replaceChildren(el("progress", { max: steps, value: step, "aria-label": "Steps" }), this.busy);
  }

  showCalls() {
    const { calls = [] } = this.message;
    while (this.calls.querySelectorAll(".call").length < calls.length) this.calls.append(this.card(calls[this.calls.querySelectorAll(".call").length]));
    calls.forEach((call, i) => {
      const card = this.calls.children[i];
      card.querySelector(".name").textContent = call.name;
      card.querySelector("code").textContent = this.busy ? call.arguments : pretty(call.arguments, call.arguments);
      card.querySelector("label").hidden = Boolean(this.busy) || !isWhole(call) || !this.actions.isLast(this.message);
    });
    this.calls.querySelector(".give")?.remove();
    if (calls.some(isWhole) && !this.busy && this.actions.isLast(this.message)) {
      const give = () => this.actions.giveResults(this.message);
      const label = calls.length > 1 ? "Send results" : "Send result";
      this.calls.append(el("button", { type: "button", class: "give primary", click: give }, label));
    }
  }

  /** @param {import("./store.js").Call} call */
  card(call) {
    const input = el("textarea", { rows: 2, class: "mono", value: call.result ?? "", placeholder: "What the function returns" });
    input.addEventListener("input", () => {
      call.result = input.value;
      this.actions.save();
    });
    const head = el("p", { class: "label" }, "Call of ", el("strong", { class: "name" }, call.name));
    return el("div", { class: "call" }, head, box("Arguments", ""), el("label", { class: "field" }, el("span", {}, `Result of ${call.name}`), input));
  }

  showFoot() {
    const { message, actions } = this;
    const parts = /** @type {Node[]} */ ([]);
    if (this.busy) return this.foot.replaceChildren();
    parts.push(...this.versionButtons());
    if (message.text) parts.push(button("copy", "Copy", () => copy(message.text)));
    if (message.role !== "assistant") parts.push(button("edit", "Edit", () => this.edit(message.text)));
    else {
      parts.push(button("again", "Regenerate", () => actions.regenerate(message)));
      const cut = ["length", "stopped"].includes(message.finish ?? "") && message.text && !message.calls?.length;
      if (cut && actions.isLast(message)) parts.push(button("on", "Continue", () => actions.goOn(message)));
      if (message.tokens?.length) parts.push(button("tokens", "Tokens", () => this.switchView(), { "aria-pressed": this.asTokens ? "true" : "false" }));
      parts.push(el("span", { class: "stats" }, told(message)));
    }
    this.foot.replaceChildren(...parts);
  }

  versionButtons() {
    const all = this.actions.versions(this.message);
    const at = all.indexOf(this.message);
    if (all.length < 2) return [];
    const go = (/** @type {number} */ to) => () => this.actions.goTo(all[to]);
    return [
      button("back", "Earlier version", go(at - 1), { disabled: at === 0 }),
      el("span", { class: "stats" }, `${at + 1} / ${all.length}`),
      button("forward", "Later version", go(at + 1), { disabled: at === all.length - 1 }),
    ];
  }

  switchView() {
    this.asTokens = !this.asTokens;
    small.set("tokens", this.asTokens);
    this.update();
    this.foot.querySelector("[aria-pressed]")?.focus();
  }

  /** @param {string} text */
  edit(text) {
    const { message, actions } = this;
    const draft = `edit.${message.id}`;
    const close = () => {
      small.set(draft, null);
      this.showGiven();
      this.showFoot();
      this.foot.querySelector("[aria-label=Edit]")?.focus();
    };
    const send = () => {
      small.set(draft, null);
      actions.edit(message, area.value);
    };
    const rows = Math.min(12, text.split("\n").length + 1);
    const area = el("textarea", { value: text, rows, dir: "auto", "aria-label": "Edit message", input: () => small.set(draft, area.value) });
    area.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const no = el("button", { type: "button", click: close }, "Cancel");
    const yes = el("button", { type: "button", class: "primary", click: send }, "Send");
    this.body.replaceChildren(el("div", { class: "editor" }, area, el("div", { class: "row" }, no, yes)));
    this.foot.replaceChildren();
    area.focus();
  }
}

/** @param {string} label @param {string} text */
const box = (label, text) => el("pre", { tabindex: 0, role: "group", "aria-label": label }, el("code", {}, text));

/** A call that the server made itself. @param {import("./store.js").Call} call */
const ranCall = ({ name, arguments: given, result = "" }) =>
  el("details", { class: "call" }, el("summary", { class: "label" }, "Called ", el("strong", {}, name)), box("Arguments", pretty(given, given)),
    el("p", { class: "label" }, "Result"), box("Result", pretty(result, result)));

/** @param {string} url @param {number} i @param {number} [seed] */
function picture(url, i, seed) {
  const image = el("img", { src: url, alt: seed === undefined ? `Image ${i + 1}` : `Picture with seed ${seed}` });
  if (seed === undefined) return el("figure", {}, image);
  return el("figure", {}, image, el("figcaption", {}, `Seed ${seed} `, el("a", { href: url, download: `picture-${seed}.png` }, "Save")));
}

/** An answer that is an object, or a list, of JSON is shown as such. @param {string} text */
function asCode(text) {
  const better = /^\s*[[{]/.test(text) ? pretty(text, "") : "";
  return better ? `\`\`\`json\n${better}\n\`\`\`` : text;
}

/** JSON in lines; another text if it is none. @param {string} json @param {string} otherwise */
function pretty(json, otherwise) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return otherwise;
  }
}

/** What an answer took, in words. @param {Message} message */
function told({ stats, finish, error }) {
  const parts = [];
  if (finish === "stopped" && !error) parts.push("stopped");
  if (finish === "length") parts.push("cut at its longest");
  if (stats?.tokens !== undefined) parts.push(`${stats.tokens} tokens`);
  if (stats?.rate) parts.push(`${stats.rate.toFixed(1)} tokens/s`);
  if (stats?.seconds !== undefined) parts.push(`${stats.seconds.toFixed(1)} s`);
  if (stats?.first !== undefined) parts.push(`first after ${stats.first.toFixed(2)} s`);
  if (stats?.prompt !== undefined) parts.push(`prompt ${stats.prompt}${stats.cached ? ` (${stats.cached} cached)` : ""}`);
  if (stats?.model) parts.push(stats.model);
  return parts.join(" · ");
}
