// Answer: one adapter's answer, as it streams.

import { hideTip, make, Parts, placeTip, showTip, tokensOf } from "./tokens.js";

const template = document.getElementById("answer");
const WORDS = { stop: "complete", length: "cut at max_tokens", tool_calls: "calls a tool" };

export class Answer {
  constructor(name, label, hue, onStop) {
    this.name = name;
    this.isOpen = true;
    this.node = template.content.firstElementChild.cloneNode(true);
    this.node.dataset.state = "waiting";
    this.node.setAttribute("aria-label", `Answer of ${label}`);
    this.node.style.setProperty("--hue", hue);
    if (hue === "base") this.node.classList.add("is-base");
    const find = (cls) => this.node.querySelector(cls);
    find(".name").textContent = label;
    this.text = find(".text");
    this.text.setAttribute("aria-label", `Text of ${label}`);
    this.text.setAttribute("aria-busy", "true");
    this.error = find(".error");
    this.state = find(".state");
    this.figures = find(".figures");
    this.stopButton = find(".stop");
    this.stopButton.setAttribute("aria-label", `Stop ${label}`);
    this.stopButton.addEventListener("click", () => onStop(this));
    this.parts = new Parts();
    this.tokens = new WeakMap(); // by span
    this.numTokens = 0;
    this.state.textContent = "waiting";
    this.#hover();
  }

  // Takes one event of the stream: a chunk, or an error.
  take(data) {
    if (!this.isOpen) return;
    if (data.error) {
      this.fail(data.error.message);
      return;
    }
    this.numTokens = data.usage?.completion_tokens ?? this.numTokens;
    const choice = data.choices[0];
    if (!choice) return;
    const text = choice.delta ? choice.delta.content ?? "" : choice.text;
    const tokens = tokensOf(choice);
    if (text || tokens.length) this.#write(text, tokens, false);
    if (choice.finish_reason) this.#end(choice, data.redmux);
  }

  fail(message) {
    this.#close("failed", "failed");
    this.error.textContent = message;
    this.error.hidden = false;
  }

  stopped() {
    if (this.isOpen) this.#close("stopped", "stopped");
  }

  #write(text, tokens, isLast) {
    if (this.firstAt === undefined) {
      this.firstAt = performance.now();
      this.node.dataset.state = "streaming";
      this.state.textContent = "streaming";
    }
    const isAtEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 24;
    this.hasTokens ||= tokens.length > 0;
    if (!this.hasTokens) {
      this.text.append(text);
    } else {
      for (const part of this.parts.push(text, tokens, isLast)) {
        const span = make("span", "t", part.text);
        const known = part.tokens.filter((t) => t.logprob !== null);
        if (known.length) {
          span.style.setProperty("--p", Math.exp(Math.min(...known.map((t) => t.logprob))));
        }
        this.tokens.set(span, part.tokens);
        this.text.append(span);
      }
    }
    if (isAtEnd) this.text.scrollTop = this.text.scrollHeight;
    this.#count();
  }

  #told() {
    return this.numTokens === 1 ? "1 token" : `${this.numTokens} tokens`;
  }

  #count() {
    const seconds = (performance.now() - this.firstAt) / 1000;
    const rate = seconds > 0.2 ? ` · ${((this.numTokens - 1) / seconds).toFixed(0)} tok/s` : "";
    this.figures.textContent = `${this.#told()}${rate}`;
  }

  #end(choice, told) {
    if (this.hasTokens) this.#write("", [], true);
    let word = WORDS[choice.finish_reason] ?? choice.finish_reason;
    if (typeof choice.stop_reason === "string") word = `stopped at ${JSON.stringify(choice.stop_reason)}`;
    this.#close("done", word);
    const seconds = told.total_s - told.first_token_s;
    const rate = this.numTokens > 1 && seconds > 0
      ? ` · ${((this.numTokens - 1) / seconds).toFixed(0)} tok/s` : "";
    this.figures.textContent =
      `${this.#told()}${rate} · first after ${(1000 * told.first_token_s).toFixed(0)} ms`;
  }

  #close(state, word) {
    if (this.hasTokens && state !== "done") this.#write("", [], true);
    this.isOpen = false;
    this.node.dataset.state = state;
    this.state.textContent = word;
    this.text.setAttribute("aria-busy", "false");
    this.stopButton.hidden = true;
  }

  // Tokens tell about themselves under the pointer, under a finger, and by arrow keys.
  #hover() {
    const show = (span) => {
      this.current?.classList.remove("is-current");
      this.current = span;
      span.classList.add("is-current");
      showTip(span, this.tokens.get(span));
    };
    let isPinned = false; // by a click or a finger, until the text loses the focus
    const hide = () => {
      isPinned = false;
      this.current?.classList.remove("is-current");
      this.current = undefined;
      hideTip();
    };
    const over = (event) => {
      if (this.tokens.has(event.target)) show(event.target);
    };
    this.text.addEventListener("mouseover", over);
    this.text.addEventListener("click", (event) => {
      isPinned = true;
      over(event);
    });
    this.text.addEventListener("mouseleave", () => {
      if (!isPinned) hide();
    });
    this.text.addEventListener("scroll", placeTip, { passive: true });
    this.text.addEventListener("blur", hide);
    this.text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
      if (!step || !this.hasTokens) return;
      event.preventDefault();
      const next = this.current ? this.current[step] : this.text.firstElementChild;
      if (next) show(next);
    });
  }
}
