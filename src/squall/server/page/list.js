// @ts-check
/** The conversations at the side: opened, renamed, removed, exported and imported. */

import { button, byId, download, el, toast } from "./dom.js";

/** @typedef {import("./store.js").Conversation} Conversation */

export class List {
  /** @param {import("./store.js").Store} store @param {(id: string|null) => void} open */
  constructor(store, open) {
    this.store = store;
    this.open = open;
    this.current = "";
    this.root = byId("conversations");
    const file = byId("import-file");
    byId("import").addEventListener("click", () => file.click());
    byId("export").addEventListener("click", () => download("squall-conversations.json", "application/json", store.toJson()));
    file.addEventListener("change", () => this.import(file));
  }

  show() {
    const { list } = this.store;
    this.root.replaceChildren(...list.map((one) => this.row(one)));
    byId("no-conversations").hidden = list.length > 0;
    byId("export").disabled = list.length === 0;
  }

  /** One has changed; rows stay as they are where nothing else did. @param {Conversation} conversation */
  changed(conversation) {
    const row = this.root.querySelector(`[data-id="${conversation.id}"]`);
    if (row && row === this.root.firstElementChild && this.current === conversation.id) row.querySelector(".title").textContent = conversation.title;
    else if (!this.root.querySelector("input")) this.show();
  }

  /** @param {string} id */
  mark(id) {
    this.current = id;
    this.show();
  }

  /** @param {Conversation} one */
  row(one) {
    const title = el("button", { type: "button", class: "title", dir: "auto", click: () => this.open(one.id), "aria-current": one.id === this.current ? "true" : null }, one.title);
    const row = el("li", { "data-id": one.id }, title,
      button("edit", `Rename ${one.title}`, () => this.rename(one, row)),
      button("save", `Export ${one.title}`, () => download(`${fileName(one.title)}.json`, "application/json", this.store.toJson([one]))),
      button("remove", `Delete ${one.title}`, () => this.remove(one)));
    return row;
  }

  /** @param {Conversation} one @param {HTMLElement} row */
  rename(one, row) {
    let closed = false; // as removing the input blurs it
    const close = (/** @type {boolean} */ takes) => {
      if (closed) return;
      closed = true;
      const name = input.value.trim();
      if (takes && name) {
        one.title = name.slice(0, 200);
        one.named = true;
        this.store.save(one);
      }
      this.show();
      /** @type {any} */ (this.root.querySelector(`[data-id="${one.id}"] .title`))?.focus();
    };
    const input = el("input", { value: one.title, "aria-label": "Name of the conversation", maxlength: 200, blur: () => close(true) });
    input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Enter" || event.key === "Escape") close(event.key === "Enter");
      event.stopPropagation();
    });
    row.replaceChildren(input);
    input.select();
  }

  /** @param {Conversation} one */
  async remove(one) {
    await this.store.remove(one.id);
    if (one.id === this.current) this.open(null);
    this.show();
    toast(`“${one.title.slice(0, 40)}” is deleted.`, "Undo", async () => {
      await this.store.restore(one);
      this.open(one.id);
    });
  }

  /** @param {any} input */
  async import(input) {
    try {
      const count = await this.store.import(input.files[0]);
      toast(`${count} ${count === 1 ? "conversation" : "conversations"} imported.`);
    } catch (error) {
      toast(`Nothing was imported: ${/** @type {Error} */ (error).message}`);
    }
    input.value = "";
    this.show();
  }
}

/** @param {string} title */
const fileName = (title) => title.replace(/[^\p{L}\p{N} _-]/gu, "").trim().slice(0, 60) || "conversation";
