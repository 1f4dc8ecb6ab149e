// @ts-check
/** The tokens of an answer: how likely each was, and what could have stood in its place. */

import { byId, el } from "./dom.js";

const LEVELS = [0.05, 0.2, 0.4, 0.6, 0.8, 0.95]; // of the colours' classes, p0 to p6
const percent = (/** @type {number} */ p) => `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)} %`;

/** @param {import("./store.js").Likely} token */
function visible({ token, bytes }) {
  // A part of a character has no sign of its own.
  if (token.includes("\ufffd")) return `‹${bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}›`;
  return token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
}

/** A text of tokens that grows. */
export class Tokens {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
    this.decoder = new TextDecoder();
    /** @type {import("./store.js").Token[]} */
    this.tokens = [];
    this.shown = 0;
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", "Tokens of the answer; the arrow keys go from one to the next");
    root.addEventListener("pointerover", (event) => this.point(event));
    root.addEventListener("pointerleave", hide);
    root.addEventListener("focusin", (event) => this.point(event));
    root.addEventListener("focusout", hide);
    root.addEventListener("keydown", (event) => this.move(event));
  }

  /** @param {import("./store.js").Token[]} tokens */
  update(tokens) {
    this.tokens = tokens;
    for (; this.shown < tokens.length; this.shown++) {
      const { token, logprob, bytes } = tokens[this.shown];
      // A character may be made of several tokens; it stands where the last of them is.
      const text = bytes.length ? this.decoder.decode(new Uint8Array(bytes), { stream: true }) : token;
      const level = LEVELS.filter((least) => Math.exp(logprob) >= least).length;
      const first = this.shown === 0 ? 0 : -1;
      this.root.append(el("span", { class: `token p${level}`, tabindex: first, "data-index": this.shown, "aria-describedby": "tip" },
        text.replaceAll("\n", "↵\n") || "·"));
    }
  }

  /** @param {Event} event */
  point(event) {
    const span = /** @type {HTMLElement} */ (event.target);
    const token = this.tokens[Number(span.dataset.index ?? -1)];
    if (token) show(span, token);
  }

  /** @param {KeyboardEvent} event */
  move(event) {
    const now = /** @type {HTMLElement} */ (event.target);
    const { nextElementSibling: ArrowRight, previousElementSibling: ArrowLeft } = now;
    const to = { ArrowRight, ArrowLeft, Home: this.root.firstElementChild, End: this.root.lastElementChild }[event.key];
    if (event.key === "Escape") hide();
    if (!(to instanceof HTMLElement)) return;
    event.preventDefault();
    now.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }
}

/** @param {HTMLElement} span @param {import("./store.js").Token} token */
function show(span, token) {
  const likely = token.top_logprobs;
  const others = likely.some((one) => one.token === token.token && one.logprob === token.logprob) ? likely : [...likely, token];
  const row = (/** @type {import("./store.js").Likely} */ one) => {
    const p = Math.exp(one.logprob);
    const chosen = one.token === token.token && one.logprob === token.logprob;
    return el("tr", chosen ? { class: "chosen" } : {}, el("th", { scope: "row" }, visible(one)),
      el("td", {}, el("progress", { max: 1, value: p, "aria-hidden": "true" })), el("td", {}, percent(p)));
  };
  const tip = byId("tip");
  tip.replaceChildren(el("p", {}, `Probability ${percent(Math.exp(token.logprob))}, log ${token.logprob.toFixed(3).replace("-", "−")}`),
    el("table", {}, el("tbody", {}, others.map(row))));
  tip.hidden = false;
  const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8));
  const above = place.bottom + tip.offsetHeight + 8 > innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${above ? place.top - tip.offsetHeight - 6 : place.bottom + 6}px`;
}

export function hide() {
  byId("tip").hidden = true;
}
