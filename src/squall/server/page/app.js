// @ts-check
/** The page: its parts, and what holds for all of it. */

import { whenKeyIsNeeded } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { byId } from "./dom.js";
import { List } from "./list.js";
import { Metrics } from "./metrics.js";
import { Models } from "./models.js";
import { chatFields, Panel } from "./settings.js";
import { small, Store } from "./store.js";
import { hide } from "./tokens.js";

const THEMES = ["auto", "light", "dark"];
const WIDE = matchMedia("(min-width: 900px)");

const store = new Store();
const panel = new Panel((settings) => {
  small.set("settings", settings);
  if (chat.conversation.messages.length) chat.keep(chat.conversation);
});
const models = new Models(() => {
  const paints = models.current?.kind === "pictures";
  panel.showKind(paints);
  composer.showKind(models.current?.sees ?? true, paints);
  chat.redraw();
  metrics.showStates();
});
const list = new List(store, open);
const chat = new Chat(store, models, (conversation) => {
  list.changed(conversation);
  if (conversation === chat.conversation) document.title = `${conversation.title} · Squall`;
});
const metrics = new Metrics(models);
const composer = new Composer((text, images) => {
  try {
    if (chat.running) throw new Error("An answer is on its way: stop it, or wait for its end.");
    chatFields(chat.conversation.settings);
  } catch (error) {
    composer.problem(/** @type {Error} */ (error).message);
    return false;
  }
  chat.send(text, images);
  small.set(`draft.${composer.id}`, null);
  composer.id = chat.conversation.id;
  list.mark(composer.id);
  location.replace((byId("chat-tab").href = `#chat/${composer.id}`));
  return true;
});

/** A conversation, or a new one. @param {string|null} id */
function open(id) {
  location.hash = id === null ? "#chat" : `#chat/${id}`;
  if (id === null) route(); // also if it is where we are
  drawer(false);
}

/** Show what the address says. */
function route() {
  const [place, id] = location.hash.slice(1).split("/");
  const isChat = place !== "metrics";
  for (const [name, shown] of /** @type {const} */ ([["chat", isChat], ["metrics", !isChat]])) {
    byId(name).hidden = !shown;
    byId(`${name}-tab`).toggleAttribute("data-current", shown);
    if (shown) byId(`${name}-tab`).setAttribute("aria-current", "page");
    else byId(`${name}-tab`).removeAttribute("aria-current");
  }
  metrics.run(!isChat);
  byId("settings-toggle").hidden = !isChat;
  if (!isChat) return;
  const known = store.all.get(id ?? "");
  if (known && known === chat.conversation) return;
  if (!known && !chat.conversation.messages.length && composer.id) return;
  const conversation = known ?? store.create({ ...(small.get("settings") ?? {}) });
  chat.open(conversation);
  panel.show(conversation.settings);
  composer.open(known ? conversation.id : "new");
  byId("chat-tab").href = known ? `#chat/${conversation.id}` : "#chat";
  list.mark(conversation.id);
  document.title = known ? `${conversation.title} · Squall` : "Squall";
  if (WIDE.matches) composer.area.focus(); // elsewhere that opens a keyboard
}

/** The list of conversations, which lies over the page where that is narrow. @param {boolean} shown */
function drawer(shown) {
  document.body.toggleAttribute("data-list", shown);
  byId("list-toggle").setAttribute("aria-expanded", String(shown || WIDE.matches));
  if (shown) byId("new").focus();
}

/** @param {boolean} shown */
function settings(shown) {
  document.body.toggleAttribute("data-settings", shown);
  byId("settings").hidden = !shown;
  byId("settings-toggle").setAttribute("aria-expanded", String(shown));
  if (!WIDE.matches && document.activeElement !== document.body) byId(shown ? "settings-close" : "settings-toggle").focus();
  small.set("panel", shown && WIDE.matches ? true : null);
}

/** @param {string} theme */
function setTheme(theme) {
  const { dataset } = document.documentElement;
  dataset.theme = theme;
  byId("theme").setAttribute("aria-label", `Theme: ${theme}`);
  byId("theme").title = `Theme: ${theme}`;
  small.set("theme", theme === "auto" ? null : theme);
}

/** @param {boolean} wrong @returns {Promise<string|null>} */
function askKey(wrong) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  byId("key-problem").textContent = wrong ? "The server does not know this key." : "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" ? input.value.trim() : null), { once: true }));
}

/** @param {KeyboardEvent} event */
function shortcut(event) {
  if (event.key === "/" && event.ctrlKey) byId("shortcuts").showModal();
  else if (event.altKey && event.code === "KeyN") open(null);
  else if (event.altKey && event.code === "KeyS" && !byId("chat").hidden) settings(byId("settings").hidden);
  else if (event.key === "Escape") return escape(event);
  else if (event.key === "ArrowUp" && event.target === composer.area && !composer.area.value) editLast();
  else return;
  event.preventDefault();
}

/** @param {KeyboardEvent} event */
function escape(event) {
  if (document.querySelector("dialog[open]")) return;
  hide();
  if (chat.running) chat.stop();
  else if (document.body.hasAttribute("data-list")) drawer(false);
  else if (!byId("settings").hidden && byId("settings").contains(/** @type {Node} */ (event.target))) {
    settings(false);
    byId("settings-toggle").focus();
  }
}

function editLast() {
  const own = byId("messages").querySelectorAll(".message.user [aria-label=Edit]");
  own[own.length - 1]?.click();
}

function listen() {
  whenKeyIsNeeded(askKey);
  addEventListener("focus", async () => {
    models.refresh();
    const changed = await store.catchUp((id) => [...chat.jobs.values()].some((job) => job.conversation.id === id));
    if (changed.size) list.show();
    if (changed.has(chat.conversation.id)) chat.show();
  });
  addEventListener("hashchange", route);
  addEventListener("keydown", shortcut);
  addEventListener("scroll", hide, true);
  byId("skip").addEventListener("click", (/** @type {Event} */ event) => {
    event.preventDefault(); // the address is for conversations
    composer.area.focus();
  });
  byId("stop").addEventListener("click", () => chat.stop());
  byId("new").addEventListener("click", () => open(null));
  byId("list-toggle").addEventListener("click", () => drawer(!document.body.hasAttribute("data-list")));
  byId("shade").addEventListener("click", () => drawer(false));
  byId("settings-toggle").addEventListener("click", () => settings(byId("settings").hidden));
  byId("settings-close").addEventListener("click", () => settings(false));
  byId("shortcuts-show").addEventListener("click", () => byId("shortcuts").showModal());
  byId("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3]));
  for (const close of document.querySelectorAll("dialog [data-close]")) close.addEventListener("click", () => close.closest("dialog")?.close());
  byId("key-form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault(); // the policy allows no form to send anything anywhere
    byId("key-dialog").close("use");
  });
  const colours = byId("colours");
  colours.addEventListener("change", () => {
    small.set("colours", colours.checked);
    document.body.toggleAttribute("data-colours", colours.checked);
  });
  colours.checked = small.get("colours") ?? true;
  document.body.toggleAttribute("data-colours", colours.checked);
  setTheme(small.get("theme") ?? "auto");
  settings(WIDE.matches && Boolean(small.get("panel")));
}

async function start() {
  listen();
  byId("not-kept").hidden = await store.open();
  list.show();
  route();
  const error = await models.refresh();
  if (error) composer.problem(error.message);
}

start();
