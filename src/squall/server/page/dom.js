// @ts-check
/** Elements. Texts are always text: nothing here, or anywhere, parses HTML. */

/** @typedef {Record<string, any>} Properties */
/** @typedef {Node|string|null|undefined} Child */

/**
 * An element; functions are listeners, true and false turn attributes on and off.
 * @param {string} tag @param {Properties} [properties] @param {...(Child|Child[])} children
 * @returns {any}
 */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else if (name === "value") /** @type {any} */ (node).value = value;
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else node.setAttribute(name, String(value));
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

/** An element of the page. @param {string} id @returns {any} */
export const byId = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

/** @param {string} tag @param {Properties} attributes @param {...Node} children */
export function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

/** One of the symbols in index.html. @param {string} name */
export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));
}

/**
 * A button with an icon, and its name as a text or for whoever does not see the icon.
 * @param {string} name @param {string} label @param {(event: Event) => void} click
 * @param {Properties} [more]
 */
export function button(name, label, click, more = {}) {
  const { text, ...properties } = more;
  const about = text ? {} : { "aria-label": label, title: label };
  const shown = text ? label : undefined;
  return el("button", { type: "button", class: "quiet", click, ...about, ...properties }, name ? icon(name) : null, shown);
}

/** Says it to screen readers. @param {string} text */
export function announce(text) {
  byId("live").textContent = text;
}

let toastTimer = 0;

/** A short message; an action, such as undo, if there is one.
 * @param {string} text @param {string} [label] @param {() => void} [action] */
export function toast(text, label, action) {
  const box = byId("toast");
  const hide = () => box.replaceChildren();
  clearTimeout(toastTimer);
  const doIt = () => {
    hide();
    action?.();
  };
  box.replaceChildren(el("div", { class: "toast" }, el("span", {}, text), label ? el("button", { type: "button", click: doIt }, label) : null,
    button("close", "Dismiss", hide)));
  toastTimer = setTimeout(hide, label ? 15000 : 6000);
}

/** @param {string} text */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Only pages of https, or of this machine, may use the clipboard itself.
    const area = el("textarea", { class: "offscreen", value: text, "aria-hidden": "true" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  announce("Copied");
}

/** @param {string} name @param {string} type @param {string} text */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
