// @ts-check
/** What a conversation's requests say beside its messages. */

import { byId, el } from "./dom.js";

/** By the names of fields; texts as they were typed. @typedef {Record<string, string|boolean>} Settings */

/** Name, label, smallest, largest, step, and what it does. */
const NUMBERS = /** @type {const} */ ([
  ["temperature", "Temperature", 0, 2, 0.05, "0: always the likeliest token"],
  ["top_p", "Top p", 0, 1, 0.01, "The likeliest tokens, up to this probability together"],
  ["top_k", "Top k", -1, 1000, 1, "So many of the likeliest tokens"],
  ["min_p", "Min p", 0, 1, 0.01, "Tokens at least so likely, relative to the likeliest"],
  ["repetition_penalty", "Repetition penalty", 0.5, 2, 0.01, "Above 1: tokens of the text so far are less likely"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "For tokens that the answer has"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "For each time that it has them"],
  ["seed", "Seed", 0, Number.MAX_SAFE_INTEGER, 1, "The same seed gives the same answer"],
  ["max_tokens", "Longest answer", 1, 1000000, 1, "In tokens"],
]);
const PICTURES = /** @type {const} */ ([
  ["width", "Width", 16, 4096, 16, "In pixels, a multiple of 16"],
  ["height", "Height", 16, 4096, 16, "In pixels, a multiple of 16"],
  ["steps", "Steps", 1, 200, 1, "More take longer"],
  ["guidance", "Guidance", 0, 30, 0.5, "How closely the prompt is followed"],
  ["picture_seed", "Seed", 0, Number.MAX_SAFE_INTEGER, 1, "The same seed gives the same picture"],
  ["n", "Pictures", 1, 8, 1, "At a time"],
  ["strength", "Strength", 0, 1, 0.05, "How much of an attached picture is changed"],
]);
const EFFORTS = [["", "As the model does"], ["off", "Off"], ["on", "On"], ["low", "Low effort"], ["medium", "Medium effort"], ["high", "High effort"]];
const SHAPES = [
  ["", "Any text"], ["json_object", "JSON object"], ["json_schema", "JSON schema"], ["regex", "Regular expression"],
  ["choice", "One of several, a line each"], ["lark", "Lark grammar"], ["yacc", "yacc grammar"],
];
const CHOICES = [["auto", "The model decides"], ["required", "Always a call"], ["none", "None"]];

/** Reads a box of JSON. @param {string} value @param {string} what @returns {any} */
function parse(value, what) {
  try {
    return JSON.parse(value);
  } catch (error) {
    throw new Error(`${what} are no JSON: ${/** @type {Error} */ (error).message}`);
  }
}

/** @param {Settings} settings @param {readonly (readonly [string, ...any])[]} fields */
const numbers = (settings, fields) =>
  Object.fromEntries(fields.filter(([name]) => settings[name]).map(([name]) => [name.replace("picture_", ""), Number(settings[name])]));

/** The fields of a chat's request. Throws for boxes that are not right. @param {Settings} settings @returns {Record<string, any>} */
export function chatFields(settings) {
  const body = /** @type {Record<string, any>} */ (numbers(settings, NUMBERS));
  const { stop, thinking, shape, tools, tool_choice } = /** @type {Record<string, string>} */ (settings);
  if (stop) body.stop = stop.split("\n").filter(Boolean).map((one) => one.replaceAll("\\n", "\n"));
  if (thinking === "on" || thinking === "off") body.chat_template_kwargs = { enable_thinking: thinking === "on" };
  else if (thinking) body.reasoning_effort = thinking;
  if (shape) Object.assign(body, shaped(shape, String(settings.grammar ?? "")));
  if (tools?.trim()) {
    body.tools = functions(tools);
    body.tool_choice = tool_choice || "auto";
  }
  if (settings.probabilities) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  return body;
}

/** @param {string} shape @param {string} value */
function shaped(shape, value) {
  if (shape === "json_object") return { response_format: { type: "json_object" } };
  if (!value.trim()) throw new Error("The answer's shape is chosen, but its box in the settings is empty.");
  if (shape === "json_schema") {
    const schema = parse(value, "The contents of the schema's box");
    return { response_format: { type: "json_schema", json_schema: { name: "answer", schema } } };
  }
  return { grammar: { type: shape, value: shape === "choice" ? value.split("\n").filter(Boolean) : value } };
}

/** Tools as OpenAI has them, or only their functions. @param {string} value */
function functions(value) {
  const found = parse(value, "The tools");
  if (!Array.isArray(found) || !found.every((tool) => typeof tool === "object" && tool)) throw new Error("The tools are no list of functions: write [{\"name\": ..., \"description\": ..., \"parameters\": {...}}].");
  return found.map((tool) => ("function" in tool ? tool : { type: "function", function: tool }));
}

/** The fields of a request for pictures. @param {Settings} settings */
export const pictureFields = (settings) => numbers(settings, PICTURES);

/** The panel: shows the settings of one conversation, and changes them. */
export class Panel {
  /** @param {(settings: Settings) => void} changed */
  constructor(changed) {
    this.changed = changed;
    /** @type {Settings} */
    this.settings = {};
    this.problem = el("p", { class: "problem", role: "status", id: "settings-problem" });
    byId("settings-fields").append(...this.sections());
  }

  sections() {
    const section = (/** @type {string} */ id, /** @type {string} */ title, /** @type {Node[]} */ ...fields) =>
      el("fieldset", { id }, el("legend", {}, title), fields);
    this.grammar = this.area("grammar", "Schema, pattern or grammar", 5, true);
    return [
      section("settings-text", "Answers", this.area("system", "System prompt", 4), this.select("thinking", "Reasoning", EFFORTS),
        this.check("probabilities", "Token probabilities", "Each answer tells how likely its tokens were"), byId("colours-row")),
      section("settings-sampling", "Sampling", el("div", { class: "grid" }, ...NUMBERS.map((field) => this.number(field))), this.area("stop", "Stop at, a line each", 2)),
      section("settings-shape", "Structure", this.select("shape", "Shape of the answer", SHAPES), this.grammar),
      section("settings-tools", "Tools", this.area("tools", "Functions, as JSON", 5, true), this.select("tool_choice", "Calls", CHOICES), this.problem),
      section("settings-pictures", "Pictures", el("div", { class: "grid" }, ...PICTURES.map((field) => this.number(field)))),
    ];
  }

  /** @param {readonly [string, string, number, number, number, string]} field */
  number([name, label, min, max, step, help]) {
    return this.field(name, label, el("input", { type: "number", min, max, step, inputmode: "decimal", placeholder: "default", title: help }));
  }

  /** @param {string} name @param {string} label @param {number} rows @param {boolean} [isCode] */
  area(name, label, rows, isCode = false) {
    return this.field(name, label, el("textarea", { rows, spellcheck: isCode ? "false" : "true", class: isCode ? "mono" : "" }));
  }

  /** @param {string} name @param {string} label @param {string[][]} options */
  select(name, label, options) {
    return this.field(name, label, el("select", {}, ...options.map(([value, shown]) => el("option", { value }, shown))));
  }

  /** @param {string} name @param {string} label @param {string} help */
  check(name, label, help) {
    const box = el("input", { type: "checkbox", id: `setting-${name}`, name, change: () => this.set(name, box.checked) });
    return el("label", { class: "check", title: help }, box, el("span", {}, label));
  }

  /** @param {string} name @param {string} label @param {any} input */
  field(name, label, input) {
    input.id = `setting-${name}`;
    input.name = name;
    input.addEventListener("input", () => this.set(name, input.value));
    return el("label", { class: "field" }, el("span", {}, label), input);
  }

  /** @param {string} name @param {string|boolean} value */
  set(name, value) {
    if (value === "" || value === false) delete this.settings[name];
    else this.settings[name] = value;
    this.verify();
    this.changed(this.settings);
  }

  verify() {
    this.grammar.hidden = ["", "json_object"].includes(String(this.settings.shape ?? ""));
    try {
      chatFields({ tools: this.settings.tools ?? "" });
      this.problem.textContent = "";
    } catch (error) {
      this.problem.textContent = /** @type {Error} */ (error).message;
    }
  }

  /** @param {Settings} settings */
  show(settings) {
    this.settings = settings;
    for (const input of byId("settings").querySelectorAll("[name]")) {
      const value = settings[input.name] ?? (input.name === "tool_choice" ? "auto" : "");
      if (input.type === "checkbox") input.checked = Boolean(value);
      else input.value = String(value);
    }
    this.verify();
  }

  /** @param {boolean} pictures */
  showKind(pictures) {
    for (const id of ["text", "sampling", "shape", "tools"]) byId(`settings-${id}`).hidden = pictures;
    byId("settings-pictures").hidden = !pictures;
  }
}
