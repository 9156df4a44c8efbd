// Models: the base and the adapters that can be chosen, as pills.

import { listModels } from "./api.js";
import { hueOf } from "./meter.js";

const MAX_SHOWN = 80; // pills at a time; the filter finds the others
const find = (id) => document.getElementById(id);
const template = document.getElementById("pill");

export class Models {
  constructor() {
    this.known = []; // {id, model, note, hue}, the base first
    this.chosen = new Set();
    find("filter").addEventListener("input", () => this.#draw());
    find("all").addEventListener("click", () => this.#choose(this.#fitting()));
    find("none").addEventListener("click", () => this.#choose([]));
  }

  // Asks the server for what it serves; what was chosen stays so.
  async load() {
    const found = await listModels();
    const isFirst = this.known.length === 0;
    this.known = found.map((model, i) => ({
      id: model.id,
      // An adapter that is called like the base is reached behind its name.
      model: model.parent === null ? model.id : `${model.parent}:${model.id}`,
      note: model.redmux.description ?? "",
      hue: model.parent === null ? "base" : hueOf(i - 1),
    }));
    const ids = new Set(this.known.map((m) => m.model));
    this.chosen = new Set([...this.chosen].filter((id) => ids.has(id)));
    if (isFirst) for (const m of this.known.slice(0, 3)) this.chosen.add(m.model);
    find("filter").hidden = this.known.length <= 12;
    this.#draw();
    return found[0];
  }

  selected() {
    return this.known.filter((m) => this.chosen.has(m.model));
  }

  select(name) {
    const model = this.known.findLast((m) => m.id === name);
    if (model) this.chosen.add(model.model);
    this.#draw();
  }

  #fitting() {
    const sought = find("filter").value.trim().toLowerCase();
    return this.known.filter((m) => m.id.toLowerCase().includes(sought));
  }

  #choose(models) {
    this.chosen = new Set(models.map((m) => m.model));
    this.#draw();
  }

  #draw() {
    const fitting = this.#fitting();
    const focused = document.activeElement?.dataset?.model;
    find("models").replaceChildren(...fitting.slice(0, MAX_SHOWN).map((m) => this.#pill(m)));
    if (focused !== undefined) find("models").querySelector(`[data-model="${CSS.escape(focused)}"]`)?.focus();
    this.#tell();
  }

  // Tells what cannot be seen.
  #tell() {
    const num = this.#fitting().length - MAX_SHOWN;
    find("more").hidden = this.known.length <= 12;
    const more = num > 0 ? `${num} more, filter to see them; ` : "";
    find("more").textContent = `${more}${this.chosen.size} of ${this.known.length} chosen`;
  }

  #pill(model) {
    const pill = template.content.firstElementChild.cloneNode(true);
    pill.style.setProperty("--hue", model.hue);
    pill.title = model.note;
    if (model.hue === "base") pill.classList.add("is-base");
    pill.querySelector(".name").textContent = model.id;
    const box = pill.querySelector("input");
    box.dataset.model = model.model;
    box.checked = this.chosen.has(model.model);
    box.addEventListener("change", () => {
      if (box.checked) this.chosen.add(model.model);
      else this.chosen.delete(model.model);
      this.#tell();
    });
    return pill;
  }
}
