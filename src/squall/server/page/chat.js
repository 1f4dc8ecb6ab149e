// @ts-check
/** A conversation: asking, showing what comes, stopping, and going on from anywhere. */

import { ApiError, stream } from "./api.js";
import { announce, byId, el } from "./dom.js";
import { View } from "./message.js";
import { chatFields, pictureFields } from "./settings.js";
import { hide } from "./tokens.js";
import { add, goTo, isWhole, path, versions } from "./store.js";

/** @typedef {import("./store.js").Message} Message */
/** @typedef {import("./store.js").Conversation} Conversation */
/**
 * An answer on its way. draws: the frame it is shown in next, rests: and not before; told, heard: what was announced of it, and when.
 * @typedef {{message: Message, conversation: Conversation, control: AbortController, started: number, model: string,
 *   draws: number, rests: number, view: View|null, told: number, heard: number}} Job
 */

const SAVE_MS = 1000; // how often what came is kept
const NEAR = 80; // pixels from the end that still are the end
const MOST = 60; // messages that are shown at once

export class Chat {
  /**
   * @param {import("./store.js").Store} store @param {import("./models.js").Models} models
   * @param {(conversation: Conversation) => void} changed the list should show it
   */
  constructor(store, models, changed) {
    this.store = store;
    this.models = models;
    this.changed = changed;
    /** @type {Map<Message, Job>} */
    this.jobs = new Map();
    /** @type {Conversation} */
    this.conversation = store.create({});
    this.root = byId("messages");
    this.scroller = byId("conversation");
    this.most = MOST;
    this.follows = true;
    this.scroller.addEventListener("scroll", () => {
      this.follows = this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight < NEAR;
      byId("to-end").hidden = this.follows;
    });
    byId("to-end").addEventListener("click", () => this.toEnd());
    addEventListener("pagehide", () => this.jobs.forEach((job) => store.save(job.conversation)));
  }

  /** The job whose answer is shown. */
  get running() {
    const last = path(this.conversation).at(-1);
    return last && this.jobs.get(last);
  }

  /** @param {Conversation} conversation */
  open(conversation) {
    this.conversation = conversation;
    this.most = MOST;
    this.show();
    this.toEnd();
  }

  show() {
    hide();
    for (const job of this.jobs.values()) job.view = null;
    const whole = path(this.conversation);
    const views = whole.slice(-this.most).map((message) => {
      const view = new View(message, this.actions);
      const job = this.jobs.get(message);
      if (job) {
        job.view = view;
        this.draw(job);
      }
      return view.root;
    });
    const earlier = el("button", { type: "button", class: "earlier", click: () => this.showEarlier(), hidden: whole.length <= this.most }, "Earlier messages");
    this.root.replaceChildren(earlier, ...views);
    byId("empty").hidden = views.length > 0;
    this.showRunning();
  }

  /** More of the beginning; what is read stays where it is. */
  showEarlier() {
    const { scrollHeight, scrollTop } = this.scroller;
    this.most += MOST;
    this.show();
    this.scroller.scrollTop = scrollTop + this.scroller.scrollHeight - scrollHeight;
    this.scroller.focus({ preventScroll: true });
  }

  showRunning() {
    const runs = Boolean(this.running);
    byId("send").hidden = runs;
    byId("stop").hidden = !runs;
  }

  toEnd() {
    this.follows = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** @returns {import("./message.js").Actions} */
  get actions() {
    const { conversation } = this;
    return {
      edit: (message, text) => this.edit(message, text),
      regenerate: (message) => {
        this.stop();
        conversation.at = message.parent;
        this.answer();
      },
      goOn: (message) => this.answer(message),
      goTo: (message) => {
        goTo(conversation, message);
        this.keep(conversation);
        this.show();
        this.root.querySelector(`[data-id="${CSS.escape(message.id)}"] footer button:enabled`)?.focus();
      },
      giveResults: (message) => this.giveResults(message),
      save: () => this.keep(conversation),
      versions: (message) => versions(conversation, message),
      isLast: (message) => conversation.at === message.id,
    };
  }

  /** @param {string} text @param {string[]} images */
  send(text, images) {
    add(this.conversation, { role: "user", text, ...(images.length ? { images } : {}) });
    this.answer();
  }

  /** Another version of a message; the results of other calls beside it stay. @param {Message} message @param {string} text */
  edit(message, text) {
    this.stop();
    const { conversation } = this;
    const whole = path(conversation);
    const at = whole.indexOf(message);
    const { id: _, parent, ...rest } = message;
    add(conversation, { ...rest, text }, parent);
    for (const next of whole.slice(at + 1)) {
      if (next.role !== "tool" || message.role !== "tool") break;
      const { id: _, parent: __, ...other } = next;
      add(conversation, other);
    }
    this.answer();
  }

  /** @param {Message} message */
  giveResults(message) {
    for (const { id, name, result = "" } of (message.calls ?? []).filter(isWhole)) add(this.conversation, { role: "tool", text: result, callId: id, name });
    this.answer();
  }

  /** Ask for the next message, or for more of the last one. @param {Message} [more] */
  async answer(more) {
    const { conversation } = this;
    const model = this.models.current;
    if (this.running) return;
    const sent = path(conversation);
    const message = more ?? add(conversation, { role: "assistant", text: "" });
    delete message.error;
    message.finish = "stopped"; // until its end is known; the page may be closed before
    /** @type {Job} */
    const job = {
      message, conversation, control: new AbortController(), started: performance.now(), model: model?.id ?? "",
      draws: 0, rests: 0, view: null, told: message.text.length, heard: 0,
    };
    this.jobs.set(message, job);
    this.show();
    this.toEnd();
    // What was focused may be gone.
    if (document.activeElement === document.body) this.scroller.focus({ preventScroll: true });
    this.keep(conversation);
    setTimeout(() => this.models.refresh(), 300); // which the request may have made load
    announce("Answering");
    const keeping = setInterval(() => this.keep(conversation), SAVE_MS);
    try {
      if (model?.kind === "pictures") await this.paint(job, sent, model.id);
      else await this.write(job, sent, model?.id, Boolean(more));
    } catch (error) {
      fail(job, error);
    }
    clearInterval(keeping);
    cancelAnimationFrame(job.draws);
    this.jobs.delete(message);
    conversation.updated = Date.now();
    this.keep(conversation);
    job.view?.update();
    if (this.follows) this.toEnd();
    this.showRunning();
    this.tell(job, true);
    this.models.refresh();
  }

  /** @param {Job} job @param {Message[]} sent @param {string|undefined} model @param {boolean} goesOn */
  async write(job, sent, model, goesOn) {
    const { message, conversation } = job;
    const { system } = conversation.settings;
    const messages = [...(system ? [{ role: "system", content: String(system) }] : []), ...told(sent)];
    /** @type {Record<string, any>} */
    const body = { model, messages, stream: true, stream_options: { include_usage: true }, ...chatFields(conversation.settings) };
    if (goesOn) body.continue_final_message = true;
    if (body.logprobs && !goesOn) message.tokens = [];
    if (!body.logprobs) delete message.tokens; // of the beginning only
    if (message.tokens) job.view?.prefer();
    message.stats = { model: model ?? "" };
    for await (const event of stream("v1/chat/completions", body, job.control.signal)) {
      if (event.usage) take(message, event.usage);
      if (event.squall_tools) (message.ran ??= []).push(...event.squall_tools);
      for (const choice of event.choices ?? []) {
        grow(job, choice);
        this.drawSoon(job);
      }
    }
  }

  /** @param {Job} job @param {Message[]} sent @param {string} model */
  async paint(job, sent, model) {
    const { message } = job;
    const last = sent.at(-1);
    const { strength, ...fields } = pictureFields(job.conversation.settings);
    const image = last?.images?.[0];
    const edit = image ? { image, ...(strength === undefined ? {} : { strength }) } : {};
    const body = { model, prompt: last?.text ?? "", response_format: "b64_json", stream: true, ...fields, ...edit };
    message.images = [];
    message.seeds = [];
    for await (const event of stream(image ? "v1/images/edits" : "v1/images/generations", body, job.control.signal)) {
      if (event.b64_json) {
        message.images.push(`data:image/png;base64,${event.b64_json}`);
        message.seeds.push(event.seed);
        if (event.notes) message.text = event.notes.join("\n");
      } else if (job.view) job.view.progress = event;
      this.drawSoon(job);
    }
    message.stats = { model, seconds: (performance.now() - job.started) / 1000 };
    message.finish = "stop";
  }

  /** Something changed beside the answers, such as the state of a model. */
  redraw() {
    for (const job of this.jobs.values()) this.drawSoon(job);
  }

  /** @param {Job} job */
  drawSoon(job) {
    if (job.draws) return;
    const frame = (/** @type {number} */ now) => {
      job.draws = now < job.rests ? requestAnimationFrame(frame) : 0;
      if (job.draws) return;
      const from = performance.now();
      this.draw(job);
      job.rests = from + 4 * (performance.now() - from); // what is long leaves time to read and type
    };
    job.draws = requestAnimationFrame(frame);
  }

  /** @param {Job} job */
  draw(job) {
    if (this.store.removed.has(job.conversation.id)) job.control.abort();
    if (!job.view) return;
    job.view.update(this.doing(job));
    if (this.follows) this.toEnd();
    this.tell(job, false);
  }

  /** @param {Job} job */
  doing({ message, view, model }) {
    if (view?.progress) return `Step ${view.progress.step} of ${view.progress.steps}`;
    if (message.calls?.length) return "Calling";
    if (message.text || message.reasoning) return "Answering";
    const isLoaded = (this.models.all.find((one) => one.id === model)?.state ?? "loaded") === "loaded";
    return isLoaded ? "Waiting for the first token" : "Loading the model";
  }

  /** Whole paragraphs for screen readers, and not each token. @param {Job} job @param {boolean} ended */
  tell(job, ended) {
    const { text, error, calls = [] } = job.message;
    if (!ended && (performance.now() - job.heard < 2000 || !job.view)) return;
    const to = ended ? text.length : Math.max(text.lastIndexOf("\n\n"), text.lastIndexOf(". ") + 1);
    if (to <= job.told && !ended) return;
    const called = ended ? calls.map((call) => ` Call of ${call.name}.`).join("") : "";
    announce(error ?? (text.slice(job.told, to).trim() + called || "Answered"));
    job.told = to;
    job.heard = performance.now();
  }

  stop() {
    this.running?.control.abort();
  }

  /** @param {Conversation} conversation */
  async keep(conversation) {
    const kept = await this.store.save(conversation);
    byId("not-kept").hidden = kept;
    this.changed(conversation);
  }
}

/** What the model is told: nothing of answers that failed before they began. @param {Message[]} messages */
function told(messages) {
  const found = /** @type {ReturnType<typeof toApi>[]} */ ([]);
  for (const message of messages) {
    if (message.role === "assistant" && !message.text && !message.calls?.some(isWhole) && !message.images?.length) continue;
    const next = toApi(message);
    const last = found.at(-1);
    // Many templates want users and assistants by turns.
    if (last?.role === "user" && next.role === "user") last.content = [...parts(last.content), ...parts(next.content)];
    else found.push(next);
  }
  return found;
}

/** @param {string|object[]} content */
const parts = (content) => (typeof content === "string" ? [{ type: "text", text: `${content}\n` }] : content);

/** A message as the server wants it. @param {Message} message
 * @returns {{role: string, content: string|object[], tool_call_id?: string, tool_calls?: object[], reasoning_content?: string}} */
function toApi({ role, text, images, calls, callId, reasoning }) {
  if (role === "tool") return { role, content: text, tool_call_id: callId };
  if (images?.length && role === "assistant") return { role, content: text || "(a picture)" };
  if (images?.length && role === "user") {
    const shown = images.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role, content: [...shown, ...(text ? [{ type: "text", text }] : [])] };
  }
  const whole = calls?.filter(isWhole) ?? [];
  if (!whole.length) return { role, content: text };
  const made = whole.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
  return { role, content: text, tool_calls: made, ...(reasoning ? { reasoning_content: reasoning } : {}) };
}

/** Add what a part of the stream brings. @param {Job} job @param {any} choice */
function grow(job, { delta, logprobs, finish_reason }) {
  const { message } = job;
  const comes = delta.content || delta.reasoning_content || delta.tool_calls?.length;
  if (comes && message.stats && message.stats.first === undefined) message.stats.first = (performance.now() - job.started) / 1000;
  if (delta.reasoning_content) message.reasoning = (message.reasoning ?? "") + delta.reasoning_content;
  if (delta.content) message.text += delta.content;
  for (const call of delta.tool_calls ?? []) {
    const calls = (message.calls ??= []);
    const known = (calls[call.index] ??= { id: call.id ?? "", name: "", arguments: "" });
    known.name += call.function.name ?? "";
    known.arguments += call.function.arguments ?? "";
  }
  if (logprobs?.content && message.tokens) message.tokens.push(...logprobs.content);
  if (finish_reason) message.finish = finish_reason;
}

/** @param {Message} message @param {any} usage */
function take(message, usage) {
  const { stats } = message;
  if (!stats) return;
  stats.tokens = usage.completion_tokens;
  stats.rate = usage.avg_compl_tok_per_sec;
  stats.prompt = usage.prompt_tokens;
  stats.cached = usage.prompt_tokens_details?.cached_tokens;
}

/** @param {Job} job @param {any} error */
function fail({ message, control }, error) {
  if (control.signal.aborted) return;
  message.error = String(error?.message ?? error);
  if (error instanceof ApiError && error.code === "context_length_exceeded") {
    message.error = `The conversation is too long for the model: ${error.message}. Edit an earlier message, or begin a new chat.`;
  }
}
