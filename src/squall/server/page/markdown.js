// @ts-check
/**
 * Markdown as elements. What models write is made of text nodes and of a few kinds of elements only, so
 * that nothing in it can be HTML, and links lead to the web or to mail. Images are links: none is loaded.
 */

import { button, copy, el } from "./dom.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";

const DEEPEST = 16; // lists and quotes within each other; what is deeper is text
const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})[ \t]*(\S*)/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const UNDERLINE = /^ {0,3}(=+|-+)[ \t]*$/;
const QUOTE = /^ {0,3}>[ ]?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( {1,4}(?=\S)| *$| (?= ))/;
const DIVIDER = /^ {0,3}[|:-][|: \t-]*$/;
const BLANK = /^[ \t]*$/;
const indentOf = (/** @type {string} */ line) => line.length - line.trimStart().length;

/**
 * @typedef {{kind: string, start: number, lines: string[], level?: number, info?: string, open?: boolean,
 *   items?: string[][], ordered?: number|null, loose?: boolean}} Block
 */

/** The blocks of some lines; `start` is the index of a block's first line. @param {string[]} lines @returns {Block[]} */
export function blocks(lines) {
  const found = /** @type {Block[]} */ ([]);
  let at = 0;
  while (at < lines.length) {
    if (BLANK.test(lines[at])) {
      at++;
      continue;
    }
    const [block, next] = fence(lines, at) ?? simple(lines, at) ?? quote(lines, at) ?? list(lines, at) ?? table(lines, at) ?? paragraph(lines, at);
    found.push(block);
    at = next;
  }
  return found;
}

/** @typedef {[Block, number]|null} Found */

/** @param {string[]} lines @param {number} start @returns {Found} */
function fence(lines, start) {
  const match = FENCE.exec(lines[start]);
  if (!match) return null;
  const [, mark, info] = match;
  const end = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}[ \\t]*$`);
  const indent = indentOf(lines[start]);
  let at = start + 1;
  const code = [];
  for (; at < lines.length && !end.test(lines[at]); at++) code.push(lines[at].slice(Math.min(indent, indentOf(lines[at]))));
  const open = at >= lines.length;
  return [{ kind: "code", start, lines: code, info, open }, at + 1];
}

/** Headings and rules. @param {string[]} lines @param {number} start @returns {Found} */
function simple(lines, start) {
  const line = lines[start];
  if (RULE.test(line)) return [{ kind: "rule", start, lines: [] }, start + 1];
  const match = HEADING.exec(line);
  if (!match) return null;
  const text = (match[2] ?? "").trim();
  let end = text.length;
  while (text[end - 1] === "#") end--;
  const isClosed = /^\s?$/.test(text[end - 1] ?? "");
  return [{ kind: "heading", start, lines: [isClosed ? text.slice(0, end) : text], level: match[1].length }, start + 1];
}

/** Whether a line begins something other than the text before it. @param {string} line */
function interrupts(line) {
  const item = ITEM.exec(line);
  // As CommonMark has it, a number within a text begins no list, unless it is 1.
  const begins = item && item[0].length < line.length && /^(?:\D|1\D)/.test(item[2]);
  return begins || BLANK.test(line) || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

/** @param {string[]} lines @param {number} start @returns {Found} */
function quote(lines, start) {
  if (!QUOTE.test(lines[start])) return null;
  const inner = [];
  let at = start;
  for (; at < lines.length && (QUOTE.test(lines[at]) || !interrupts(lines[at])); at++) inner.push(lines[at].replace(QUOTE, ""));
  return [{ kind: "quote", start, lines: inner }, at];
}

/** @param {string[]} lines @param {number} start @returns {Found} */
function list(lines, start) {
  const first = ITEM.exec(lines[start]);
  if (!first) return null;
  const kind = first[2].slice(-1);
  const items = /** @type {string[][]} */ ([]);
  let [at, loose, width] = [start, false, 0];
  for (let blank = false; at < lines.length; at++) {
    const line = lines[at];
    const item = ITEM.exec(line);
    if (BLANK.test(line)) {
      blank = true;
      items.at(-1)?.push("");
    } else if (items.length && indentOf(line) >= width) {
      items.at(-1)?.push(line.slice(width));
      blank = false;
    } else if (item && item[2].slice(-1) === kind && !RULE.test(line)) {
      loose ||= blank;
      width = Math.max(item[0].length, item[1].length + item[2].length + 1);
      items.push([line.slice(item[0].length)]);
      blank = false;
    } else if (blank || interrupts(line)) break;
    else items.at(-1)?.push(line);
  }
  const ordered = /\d/.test(first[2]) ? parseInt(first[2], 10) : null;
  return [{ kind: "list", start, lines: [], items, ordered, loose }, at];
}

/** The cells of a row. @param {string} line */
function cells(line) {
  const found = [""];
  let code = false;
  for (const part of line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(\\\||[|`])/)) {
    if (part === "`") code = !code;
    if (part === "|" && !code) found.push("");
    else found[found.length - 1] += part === "\\|" ? "|" : part;
  }
  return found.map((cell) => cell.trim());
}

/** @param {string[]} lines @param {number} start @returns {Found} */
function table(lines, start) {
  const divider = lines[start + 1];
  if (!lines[start].includes("|") || divider === undefined || !DIVIDER.test(divider)) return null;
  const sides = cells(divider);
  if (cells(lines[start]).length !== sides.length || !sides.every((side) => /^:?-+:?$/.test(side))) return null;
  let at = start + 2;
  while (at < lines.length && lines[at].includes("|") && !interrupts(lines[at])) at++;
  return [{ kind: "table", start, lines: lines.slice(start, at) }, at];
}

/** @param {string[]} lines @param {number} start @returns {[Block, number]} */
function paragraph(lines, start) {
  let at = start + 1;
  for (; at < lines.length; at++) {
    const under = UNDERLINE.exec(lines[at]);
    if (under) return [{ kind: "heading", start, lines: lines.slice(start, at), level: under[1][0] === "=" ? 1 : 2 }, at + 1];
    if (interrupts(lines[at]) || table(lines, at)) break;
  }
  return [{ kind: "paragraph", start, lines: lines.slice(start, at) }, at];
}

/** A block of the text itself, which has a direction of its own. @param {Block} block */
function whole(block) {
  const element = build(block, 0);
  if (block.kind !== "code") element.dir = "auto";
  return element;
}

/** @param {Block} block @param {number} depth @returns {HTMLElement} */
function build(block, depth) {
  const text = block.lines.map((line) => line.trim()).join("\n");
  if (block.kind === "code") return code(block);
  if (block.kind === "rule") return el("hr");
  // The page has a heading of its own above these.
  if (block.kind === "heading") return el(`h${Math.min((block.level ?? 1) + 1, 6)}`, { class: `level${block.level}` }, inline(text));
  if (block.kind === "quote") return el("blockquote", {}, many(block.lines, depth + 1));
  if (block.kind === "list") return makeList(block, depth);
  if (block.kind === "table") return rows(block.lines);
  return el("p", {}, inline(text));
}

/** @param {string[]} lines @param {number} depth @returns {Node[]} */
function many(lines, depth) {
  if (depth > DEEPEST) return [el("p", {}, lines.join("\n"))];
  return blocks(lines).map((block) => build(block, depth));
}

/** @param {Block} block @param {number} depth */
function makeList(block, depth) {
  const { ordered } = block;
  const inner = items(block, depth, 0);
  if (ordered === null) return el("ul", {}, inner);
  return el("ol", ordered === 1 ? {} : { start: ordered }, inner);
}

/** Those from one on. @param {Block} block @param {number} depth @param {number} from @returns {HTMLElement[]} */
function items({ items = [], loose }, depth, from) {
  return items.slice(from).map((lines) => {
    const task = /^\[([ xX])\]\s+/.exec(lines[0]);
    if (task) lines = [lines[0].slice(task[0].length), ...lines.slice(1)];
    const box = task ? el("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": "Task" }) : null;
    const parts = many(lines, depth + 1);
    // Items without blank lines between them are no paragraphs.
    const tight = !loose && parts.filter((part) => part instanceof HTMLParagraphElement).length < 2;
    const flat = parts.flatMap((part) => (tight && part instanceof HTMLParagraphElement ? [...part.childNodes] : [part]));
    return el("li", task ? { class: "task" } : {}, box, flat);
  });
}

/** @param {string[]} lines */
function rows([head, divider, ...rest]) {
  const sides = cells(divider).map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : null));
  // Cells that a line lacks are not made: few lines could ask for millions.
  const row = (/** @type {string} */ line, /** @type {string} */ tag) =>
    el("tr", {}, cells(line).slice(0, sides.length).map((cell, i) => el(tag, { class: sides[i], scope: tag === "th" ? "col" : null }, inline(cell))));
  return el("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Table" },
    el("table", {}, el("thead", {}, row(head, "th")), el("tbody", {}, rest.map((line) => row(line, "td")))));
}

/** @param {Block} block */
function code({ lines, info = "", open }) {
  const text = lines.join("\n");
  const shown = el("code", {}, open ? [text] : highlight(text, info));
  const pre = el("pre", { tabindex: 0, role: "group", "aria-label": info ? `Code, ${info}` : "Code" }, shown);
  const copies = button("copy", "Copy code", () => copy(shown.textContent));
  return el("div", { class: "code" }, el("div", { class: "bar" }, el("span", {}, info), copies), pre);
}

/** The element of a list that has more items now; null: make another. @param {{block: Block, element: HTMLElement}} old
 * @param {Block} block */
function prolong({ block: before, element }, block) {
  const isSame = block.kind === "list" && before.kind === "list" && before.loose === block.loose && before.ordered === block.ordered;
  if (!isSame) return null;
  // The last line may have looked like an item, and be text of the one before.
  const keep = Math.max((before.items?.length ?? 0) - 2, 0);
  while (element.children.length > keep) element.lastElementChild?.remove();
  for (const item of items(block, 0, keep)) element.append(item);
  return element;
}

/** A text that grows, of which only the end is made anew. */
export class Markdown {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
    this.text = "";
    this.from = 0; // where what may change yet begins
    /** The blocks and elements from there on. @type {{block: Block, element: HTMLElement}[]} */
    this.live = [];
    this.open = false; // whether the last block is code that has no end yet
  }

  /** @param {string} text */
  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text.slice(0, this.from))) this.clear();
    if (this.grows(text)) return;
    this.text = text;
    const lines = text.slice(this.from).split("\n");
    const found = blocks(lines);
    const before = this.live;
    this.live = found.map((block, i) => ({ block, element: (i === 0 && before[0] && prolong(before[0], block)) || whole(block) }));
    for (const { element } of before) if (element !== this.live[0]?.element) element.remove();
    for (const { element } of this.live) if (element.parentNode !== this.root) this.root.append(element);
    // The last line, and whether the one before it begins a table, may turn out to belong to the block before.
    let last = found.length - 1;
    while (last > 0 && found[last].start >= lines.length - 2) last--;
    if (last > 0) this.from += lines.slice(0, found[last].start).reduce((sum, line) => sum + line.length + 1, 0);
    this.live = this.live.slice(Math.max(last, 0));
    const end = found.at(-1);
    this.open = Boolean(end?.open) && lines.length > (end?.start ?? 0) + 1 && indentOf(lines[end?.start ?? 0]) === 0;
  }

  /** Whether the text was code that goes on, which is then shown. @param {string} text */
  grows(text) {
    const more = text.slice(this.text.length);
    const line = this.text.lastIndexOf("\n") + 1;
    // A line that may become the end of the fence is for the parser.
    if (!this.open || !text.startsWith(this.text) || /^ {0,3}[`~]/m.test(text.slice(line))) return false;
    const node = this.live.at(-1)?.element.querySelector("code")?.firstChild;
    if (!(node instanceof Text)) return false;
    node.appendData(more);
    this.text = text;
    return true;
  }

  clear() {
    this.root.replaceChildren();
    this.from = 0;
    this.text = "";
    this.live = [];
    this.open = false;
  }
}

/** @param {HTMLElement} root @param {string} text */
export function show(root, text) {
  new Markdown(root).update(text);
}
