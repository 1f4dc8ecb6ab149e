// @ts-check
/** What is within a line of Markdown: code, emphasis, links. Time grows with the length only. */

import { el } from "./dom.js";

const SAFE = /^(?:https?:\/\/|mailto:)/i;
// (address "title"), where the address may have one pair of brackets
const TARGET = /^\(\s*<?([^\s<>()]{0,2000}(?:\([^\s<>()]{0,500}\)[^\s<>()]{0,500})?)>?(?:\s+(?:"[^"]{0,500}"|'[^']{0,500}'))?\s*\)/;
const ESCAPED = /[!-/:-@[-`{-~]/;
// Each alternative begins with another character, and runs over no other's end.
const FORMULA = /\\\((?:[^\\\n]|\\[^()\n]){0,1000}\\\)|\\\[(?:[^\\]|\\[^[\]]){0,2000}\\\]|\$\$[^$]+\$\$|\$(?=\S)[^$\n]*[^\s$\\]\$(?!\d)/.source;
const MARK = /`+|\\.|\*+|_+|~~+|!?\[|\]/.source;
const ADDRESS = /<[a-z][a-z+.-]*:[^\s<>]{1,2000}>|https?:\/\/[^\s<>"'`\]]{1,2000}/.source;
const PIECES = new RegExp(`${FORMULA}|${MARK}|${ADDRESS}|\\n|[^\\\\$\`*_~![<h\\]\\n]+|.`, "gsu");
// What waits for its end; more is text, so that nothing takes long or is nested deep.
const MOST_OPEN = 32;
const LONGEST_RUN = 16; // of backquotes or delimiters

/** A node or a text. @typedef {{node?: Node, text?: string, mark?: string, count?: number, opens?: boolean, closes?: boolean}} Piece */

/** What a text is made of, for `el`. @param {string} text @returns {(Node|string)[]} */
export function inline(text) {
  const pieces = /** @type {Piece[]} */ ([]);
  const brackets = /** @type {number[]} */ ([]);
  const noEnd = new Set(); // runs of backquotes that nothing ends
  PIECES.lastIndex = 0;
  for (let match; (match = PIECES.exec(text)); ) {
    const [piece] = match;
    const at = match.index;
    const first = piece[0];
    const add = (/** @type {Node} */ node) => pieces.push({ node });
    const addText = (/** @type {string} */ more) => pieces.push({ text: more });
    if (first === "`") PIECES.lastIndex = code(text, at, piece, noEnd, pieces);
    else if (first === "\\" && piece.length === 2) {
      if (piece[1] === "\n") add(el("br"));
      else addText(ESCAPED.test(piece[1]) ? piece[1] : piece);
    } else if (first === "*" || first === "_" || piece.startsWith("~~")) pieces.push(delimiter(text, at, piece));
    else if (piece === "[" || piece === "![") {
      brackets.push(pieces.length);
      if (brackets.length > MOST_OPEN) brackets.shift();
      addText(piece);
    } else if (first === "]") PIECES.lastIndex = close(text, at, pieces, brackets);
    else if (first === "<" && SAFE.test(piece.slice(1))) add(link(piece.slice(1, -1)));
    else if (/^https?:\/\/./.test(piece)) PIECES.lastIndex = bare(at, piece, add);
    else if (first === "\n") add(el("br"));
    else addText(piece);
  }
  return joined(emphasize(pieces));
}

/** Nodes, and the texts between them. @param {Piece[]} pieces */
function joined(pieces) {
  const found = /** @type {(Node|string)[]} */ ([""]);
  for (const { node, text = "" } of pieces) {
    if (node) found.push(node, "");
    else found[found.length - 1] += text;
  }
  return found.filter((part) => part !== "");
}

/** Code goes to as many backquotes as began it. @param {string} text @param {number} at @param {string} mark
 * @param {Set<number>} noEnd @param {Piece[]} pieces */
function code(text, at, mark, noEnd, pieces) {
  const from = at + mark.length;
  for (let end = noEnd.has(mark.length) || mark.length > LONGEST_RUN ? -1 : text.indexOf(mark, from); end >= 0; ) {
    let stop = end;
    while (text[stop] === "`") stop++;
    if (stop - end === mark.length) {
      const inner = text.slice(from, end).replaceAll("\n", " ");
      const isPadded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
      pieces.push({ node: el("code", {}, isPadded ? inner.slice(1, -1) : inner) });
      return stop;
    }
    end = text.indexOf(mark, stop);
  }
  noEnd.add(mark.length);
  pieces.push({ text: mark });
  return from;
}

/** @param {string} text @param {number} at @param {string} run @returns {Piece} */
function delimiter(text, at, run) {
  const before = text[at - 1] ?? " ";
  const after = text[at + run.length] ?? " ";
  const space = /\s/;
  const sign = /[\p{P}\p{S}]/u;
  const left = !space.test(after) && (!sign.test(after) || space.test(before) || sign.test(before));
  const right = !space.test(before) && (!sign.test(before) || space.test(after) || sign.test(after));
  const inWord = run[0] === "_";
  if (run.length > LONGEST_RUN) return { text: run };
  return {
    text: run, mark: run[0], count: run.length,
    opens: left && (!inWord || !right || sign.test(before)),
    closes: right && (!inWord || !left || sign.test(after)),
  };
}

/** A closing bracket; the index after what it ends. @param {string} text @param {number} at
 * @param {Piece[]} pieces @param {number[]} brackets */
function close(text, at, pieces, brackets) {
  const open = brackets.pop();
  const target = open === undefined ? null : TARGET.exec(text.slice(at + 1, at + 4100));
  if (open === undefined || !target || !SAFE.test(target[1])) {
    pieces.push({ text: "]" });
    return at + 1;
  }
  const image = pieces[open].text === "![";
  const inner = joined(emphasize(pieces.splice(open).slice(1)));
  // Links do not hold links.
  const flat = inner.map((node) => (node instanceof HTMLAnchorElement ? (node.textContent ?? "") : node));
  pieces.push({ node: link(target[1], [image ? "Image: " : "", ...(flat.length ? flat : [target[1]])]) });
  if (!image) brackets.length = 0;
  return at + 1 + target[0].length;
}

/** @param {number} at @param {string} url @param {(node: Node) => void} add */
function bare(at, url, add) {
  let end = url.replace(/[.,:;!?*_~]+$/, "");
  if (end.endsWith(")") && !end.includes("(")) end = end.slice(0, -1);
  add(link(end));
  return at + end.length;
}

/** @param {string} url @param {(Node|string)[]} inner */
function link(url, inner = [url]) {
  return el("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, inner);
}

/** Pair the delimiters, as CommonMark does. @param {Piece[]} pieces */
function emphasize(pieces) {
  const open = /** @type {Piece[]} */ ([]);
  const done = /** @type {Piece[]} */ ([]);
  for (const piece of pieces) {
    let at = -1;
    while (piece.closes && piece.count) {
      at = open.length - 1;
      while (at >= 0 && !fits(open[at], piece)) at--;
      if (at < 0) break;
      wrap(open, at, piece, done);
    }
    if (!piece.mark || piece.count) done.push(piece);
    if (piece.opens && piece.count) {
      open.push(piece);
      if (open.length > MOST_OPEN) open.shift();
    }
  }
  return done;
}

/** @param {Piece} from @param {Piece} to */
function fits(from, to) {
  if (from.mark !== to.mark || (from.mark === "~" && from.count !== to.count)) return false;
  const sum = (from.count ?? 0) + (to.count ?? 0);
  return !((from.closes || to.opens) && sum % 3 === 0 && (from.count ?? 0) % 3 !== 0);
}

/** @param {Piece[]} open @param {number} at @param {Piece} to @param {Piece[]} done */
function wrap(open, at, to, done) {
  const from = open[at];
  const used = Math.min(from.count ?? 0, to.count ?? 0) >= 2 ? 2 : 1;
  const tag = from.mark === "~" ? "s" : used === 2 ? "strong" : "em";
  const place = done.lastIndexOf(from);
  const inner = done.splice(place + 1);
  open.length = at + 1;
  for (const one of [from, to]) {
    one.count = (one.count ?? 0) - used;
    one.text = (one.mark ?? "").repeat(one.count);
  }
  if (!from.count) {
    open.pop();
    done.pop();
  }
  done.push({ node: el(tag, {}, joined(inner)) });
}
