// @ts-check
/** Code in colours: comments, texts, numbers and the words most languages share. */

import { el } from "./dom.js";

const LONGEST = 50_000; // characters; more stays plain
const WORDS = new Set(
  ("abstract and as assert async await break case catch class const continue def default defer del do elif else end enum except export extends " +
    "false finally fn for from func function if impl implements import in instanceof interface is lambda let loop match module mut new nil None " +
    "nonlocal not null of or package pass private protected pub public raise return select self static struct super switch then this throw trait " +
    "true True False try type typeof use using var void where while with yield SELECT FROM WHERE INSERT UPDATE DELETE CREATE TABLE JOIN ON AND OR NOT NULL").split(" "),
);
const HASH = new Set(["python", "py", "sh", "bash", "shell", "yaml", "yml", "toml", "ruby", "rb", "r", "perl", "make", "makefile", "dockerfile"]);
const DASH = new Set(["sql", "lua", "haskell", "hs"]);
// What nothing ends is text of at most so many characters, or all of the rest: none is read over and over.
const REST = /("""[^]*?(?:"""|$)|"(?:[^"\\\n]|\\.){0,1000}"|'(?:[^'\\\n]|\\.){0,1000}'|`(?:[^`\\]|\\.){0,1000}`)|(\b\d[\w.]*)|([A-Za-z_]\w*)/.source;
const COMMENT = { hash: "(#[^\\n]*)", dash: "(--[^\\n]*)", slash: "(\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$))" };

/** @param {string} text @param {string} language @returns {(Node|string)[]} */
export function highlight(text, language) {
  const name = language.toLowerCase();
  if (!name || text.length > LONGEST || ["text", "txt", "plain", "markdown", "md"].includes(name)) return [text];
  const comment = HASH.has(name) ? COMMENT.hash : DASH.has(name) ? COMMENT.dash : COMMENT.slash;
  const parts = /** @type {(Node|string)[]} */ ([]);
  let from = 0;
  for (const match of text.matchAll(new RegExp(`${comment}|${REST}`, "g"))) {
    const kind = match[1] ? "comment" : match[2] ? "text" : match[3] ? "number" : WORDS.has(match[4]) ? "word" : "";
    if (!kind) continue;
    parts.push(text.slice(from, match.index), el("span", { class: `code-${kind}` }, match[0]));
    from = match.index + match[0].length;
  }
  parts.push(text.slice(from));
  return parts;
}
