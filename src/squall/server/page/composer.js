// @ts-check
/** Where messages are typed. What is typed is kept until it is sent. */

import { announce, button, byId, el } from "./dom.js";
import { small } from "./store.js";

const MOST_BYTES = 20 * 2 ** 20;
const MOST_IMAGES = 16;
const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

export class Composer {
  /** @param {(text: string, images: string[]) => boolean} send whether it was taken */
  constructor(send) {
    this.send = send;
    this.id = "";
    /** @type {string[]} */
    this.images = [];
    this.others = new Map(); // images of other conversations' drafts
    this.sees = true; // whether the model takes images
    this.area = byId("prompt");
    this.area.addEventListener("input", () => this.changed());
    this.area.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.submit();
    });
    byId("composer").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.submit();
    });
    const file = byId("file");
    byId("attach").addEventListener("click", () => file.click());
    file.addEventListener("change", () => {
      this.attach([...file.files]);
      file.value = "";
    });
    this.area.addEventListener("paste", (/** @type {ClipboardEvent} */ event) => this.take(event, event.clipboardData));
    // Anywhere, since a browser would leave the page for a file that nobody takes.
    document.addEventListener("dragover", (event) => {
      if (event.target !== this.area) event.preventDefault();
      document.body.classList.toggle("drop", Boolean(event.dataTransfer?.types.includes("Files")));
    });
    document.addEventListener("dragleave", () => document.body.classList.remove("drop"));
    document.addEventListener("drop", (event) => {
      document.body.classList.remove("drop");
      if (event.target !== this.area) event.preventDefault();
      if (!byId("chat").hidden) this.take(event, event.dataTransfer);
    });
  }

  /** Files among what was pasted or dropped. @param {Event} event @param {DataTransfer|null} data */
  take(event, data) {
    const files = [...(data?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    this.attach(files);
  }

  /** The draft of a conversation. @param {string} id */
  open(id) {
    this.others.set(this.id, this.images);
    this.id = id;
    this.area.value = small.get(`draft.${id}`) ?? "";
    this.images = this.others.get(id) ?? [];
    this.others.delete(id);
    this.showImages();
    this.problem("");
    this.grow();
  }

  changed() {
    small.set(`draft.${this.id}`, this.area.value);
    this.problem("");
    this.grow();
  }

  grow() {
    this.area.style.height = "auto";
    this.area.style.height = `${Math.min(this.area.scrollHeight, innerHeight * 0.4)}px`;
  }

  submit() {
    const text = this.area.value;
    if (!text.trim() && !this.images.length) return;
    if (!this.send(text, this.images)) return;
    this.area.value = "";
    this.images = [];
    this.showImages();
    this.changed();
    this.area.focus();
  }

  /** @param {string} text */
  problem(text) {
    byId("problem").textContent = text;
  }

  /** @param {File[]} files */
  async attach(files) {
    const { images } = this;
    const problems = [];
    for (const file of files) {
      const wrong = [
        !this.sees && "cannot be attached: the model takes no images",
        !TYPES.includes(file.type) && "is no PNG, JPEG, WebP, GIF or BMP image",
        file.size > MOST_BYTES && "is larger than 20 MiB",
        images.length >= MOST_IMAGES && `is more than the ${MOST_IMAGES} images of a message`,
      ].find(Boolean);
      try {
        if (wrong) throw wrong;
        images.push(await read(file));
        announce(`${file.name} attached`);
      } catch (error) {
        problems.push(`${file.name} ${wrong || "cannot be read as an image"}.`);
      }
    }
    this.problem(problems.join(" "));
    this.showImages();
  }

  /** What the model is for. @param {boolean} sees @param {boolean} paints */
  showKind(sees, paints) {
    this.sees = sees;
    byId("attach").hidden = !sees;
    this.area.placeholder = paints ? "Describe a picture" : "Ask anything";
  }

  showImages() {
    const remove = (/** @type {number} */ i) => () => {
      this.images.splice(i, 1);
      this.showImages();
      this.area.focus();
    };
    const thumb = (/** @type {string} */ url, /** @type {number} */ i) =>
      el("div", { class: "thumb" }, el("img", { src: url, alt: `Attached image ${i + 1}` }), button("close", `Remove image ${i + 1}`, remove(i)));
    byId("attached").replaceChildren(...this.images.map(thumb));
  }
}

/** Its URL; throws where it is no image. @param {File} file @returns {Promise<string>} */
async function read(file) {
  const image = new Image();
  image.src = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  await image.decode();
  return image.src;
}
