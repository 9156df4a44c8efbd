// Tokens of an answer: which part of its text each one is, and what else was likely there.

// The tokens of a chunk of a chat or of a completion, in one shape.
export function tokensOf(choice) {
  const given = choice.logprobs;
  if (!given) return [];
  if (given.content) {
    return given.content.map((t) => ({
      text: t.token,
      logprob: t.logprob,
      top: t.top_logprobs.map((o) => ({ text: o.token, logprob: o.logprob })),
    }));
  }
  return given.tokens.map((text, i) => ({
    text,
    logprob: given.token_logprobs[i],
    top: Object.entries(given.top_logprobs?.[i] ?? {})
      .map(([text, logprob]) => ({ text, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}

// Cuts a text into the parts of its tokens. The text is what counts: it may lag behind the tokens,
// and end before them where a stop text was cut off. Tokens that are parts of one character have
// the replacement character as text, and end up in one part.
export class Parts {
  constructor() {
    this.text = "";
    this.at = 0;
    this.waiting = [];
    this.broken = [];
  }

  // Returns the parts that are known now: {text, tokens}.
  push(text, tokens, isLast) {
    this.text += text;
    this.waiting.push(...tokens);
    const parts = [];
    while (this.waiting.length) {
      const token = this.waiting[0];
      if (token.text.includes("\ufffd")) {
        this.broken.push(this.waiting.shift());
        continue;
      }
      let from = this.at;
      if (this.broken.length) from = token.text ? this.text.indexOf(token.text, this.at) : -1;
      const has = from >= 0 && this.text.length >= from + token.text.length;
      if (!has) break;
      this.#take(parts, from, this.broken);
      this.#take(parts, from + token.text.length, [token]);
      this.broken = [];
      this.waiting.shift();
    }
    if (isLast) this.#take(parts, this.text.length, [...this.broken, ...this.waiting]);
    return parts;
  }

  #take(parts, to, tokens) {
    if (to > this.at) parts.push({ text: this.text.slice(this.at, to), tokens: [...tokens] });
    this.at = to;
  }
}

const tip = document.getElementById("tip");

let shownAt = null;

export function hideTip() {
  tip.hidden = true;
}

// Shows what was likely in place of a part, beside it.
export function showTip(span, tokens) {
  tip.replaceChildren(...tokens.flatMap(describe));
  tip.hidden = false;
  shownAt = span;
  placeTip();
}

// Puts it beside its part, wherever that has been scrolled to.
export function placeTip() {
  if (tip.hidden) return;
  const at = shownAt.getClientRects()[0] ?? shownAt.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left), document.documentElement.clientWidth - width - 8);
  const below = at.bottom + 6;
  const top = below + height > window.innerHeight ? Math.max(8, at.top - height - 6) : below;
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}

function describe(token) {
  const head = make("p", "chosen");
  head.append(make("code", "", visible(token.text)), make("span", "", percent(token.logprob)),
    make("small", "", token.logprob === null ? "" : `log p ${log(token.logprob)}`));
  if (!token.top.length) return [head];
  const list = make("ol", "");
  for (const other of token.top) {
    const row = make("li", other.text === token.text ? "is-chosen" : "");
    const bar = make("span", "bar");
    bar.style.setProperty("--p", Math.exp(other.logprob));
    row.append(make("code", "", visible(other.text)), bar, make("span", "", percent(other.logprob)));
    list.append(row);
  }
  return [head, list];
}

function log(logprob) {
  const told = Math.abs(logprob).toFixed(3);
  return Number(told) ? `\u2212${told}` : told;
}

function percent(logprob) {
  if (logprob === null) return "";
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100 %" : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
}

function visible(text) {
  return text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replaceAll(" ", "\u00b7") || "\u2205";
}

export function make(tag, cls, text = "") {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  node.textContent = text; // what models write is text, never HTML
  return node;
}
