// Meter: what the server computes now, asked for twice a second while something runs.

import { request } from "./api.js";
import { make } from "./tokens.js";

const BUSY_MS = 500, IDLE_MS = 4000, MAX_CELLS = 64;
const find = (id) => document.getElementById(id);

export class Meter {
  constructor(onFirst) {
    this.onFirst = onFirst;
    this.isBusy = false;
    document.addEventListener("visibilitychange", () => this.ask());
  }

  // Asks now, and again soon while `isBusy`.
  async ask(isBusy = this.isBusy) {
    this.isBusy = isBusy;
    clearTimeout(this.timer);
    if (document.hidden || this.isAsking) return;
    this.isAsking = true;
    try {
      this.#show(await (await request("GET", "/v1/status")).json());
    } catch {
      this.#forget(); // whatever else is asked tells why
    } finally {
      this.isAsking = false;
    }
    this.timer = setTimeout(() => this.ask(), this.isBusy ? BUSY_MS : IDLE_MS);
  }

  #show(status) {
    const now = performance.now(), num = status.decode_tokens;
    if (this.last === undefined) this.onFirst(status);
    else if (now > this.last.now) {
      const rate = (1000 * (num - this.last.num)) / (now - this.last.now);
      find("rate").textContent = rate.toFixed(rate && rate < 10 ? 1 : 0);
    }
    this.last = { now, num };
    find("running").textContent = status.running;
    find("waiting").textContent = status.waiting;
    find("distinct").textContent = status.adapter_rows.length;
    this.#draw(status);
  }

  #draw(status) {
    const cells = [...Array(status.base_rows).fill("base")];
    status.adapter_rows.forEach((num, i) => cells.push(...Array(num).fill(i)));
    const scale = Math.max(1, status.max_running / MAX_CELLS);
    const nodes = [];
    for (let i = 0; i < status.max_running / scale; i += 1) {
      const kind = cells[Math.floor(i * scale)];
      const cell = make("span", kind === undefined ? "" : kind === "base" ? "is-base" : "is-row");
      if (typeof kind === "number") cell.style.setProperty("--hue", hueOf(kind));
      nodes.push(cell);
    }
    find("rows").replaceChildren(...nodes);
    find("rows").setAttribute("aria-label",
      `${status.running} of ${status.max_running} rows of the batch are used, ` +
      `by ${status.adapter_rows.length} adapters`);
  }

  #forget() {
    this.last = undefined;
    for (const id of ["rate", "running", "waiting", "distinct"]) find(id).textContent = "–";
  }
}

// Hues far from each other, however many.
export function hueOf(index) {
  return (12 + 137.5 * index) % 360;
}
