// The page: one prompt to the chosen adapters, their answers side by side.

import { key, sideBySide, stopOne } from "./api.js";
import { Answer } from "./answer.js";
import { Meter } from "./meter.js";
import { Models } from "./models.js";
import { hideTip, make, placeTip } from "./tokens.js";
import * as upload from "./upload.js";

const find = (id) => document.getElementById(id);
const form = find("ask");
const models = new Models();
const meter = new Meter((status) => {
  if (!status.generates) showError("ask-error", "This model is an encoder, which generates nothing.");
});
let run = null; // {id, answers, abort}
const TOP = 5; // alternatives of a token
const MAX_MODELS = 256; // of a request, as the server has it

export function showError(id, message) {
  find(id).textContent = message;
  find(id).hidden = !message;
}

// -- what is sent ------------------------------------------------------------------------------

function mode() {
  return form.elements.mode.value;
}

// Returns the fields of the request; what is empty is left to the server.
function fields() {
  const sent = { stream_options: { include_usage: true, continuous_usage_stats: true } };
  for (const input of form.querySelectorAll(".numbers input")) {
    if (input.validity.badInput) throw new FieldError(input, `${input.name} is not a number`);
    if (input.value !== "") sent[input.name] = Number(input.value);
  }
  const stop = form.elements.stop.value.split("\n").filter(Boolean)
    .map((line) => line.replaceAll("\\n", "\n"));
  if (stop.length) sent.stop = stop;
  const wantsTokens = find("logprobs").checked;
  if (mode() === "plain") {
    if (wantsTokens) sent.logprobs = TOP;
    return { path: "/v1/completions", body: { ...sent, prompt: find("prompt").value } };
  }
  if (wantsTokens) Object.assign(sent, { logprobs: true, top_logprobs: TOP });
  const system = find("system").value;
  const messages = system ? [{ role: "system", content: system }] : [];
  messages.push({ role: "user", content: find("prompt").value });
  return { path: "/v1/chat/completions", body: { ...sent, messages } };
}

class FieldError extends Error {
  constructor(input, message) {
    super(message);
    this.input = input;
  }
}

// Tells an error at the field that it is about, if the page has it.
function markField(param, message) {
  const input = param && form.elements[param];
  if (!(input instanceof HTMLElement) || input.hasAttribute("aria-invalid")) return;
  find("sampling").open = true;
  input.setAttribute("aria-invalid", "true");
  input.after(make("span", "wrong", message));
}

function clearErrors() {
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  for (const told of form.querySelectorAll(".wrong")) told.remove();
  for (const id of ["ask-error", "models-error"]) showError(id, "");
}

// -- a run -------------------------------------------------------------------------------------

async function send() {
  if (run) return;
  clearErrors();
  const chosen = models.selected();
  if (!chosen.length) return showError("models-error", "Choose at least one adapter, or the base model.");
  if (chosen.length > MAX_MODELS) {
    return showError("models-error", `${chosen.length} are chosen, at most ${MAX_MODELS} answer at a time.`);
  }
  if (!find("prompt").value) {
    showError("ask-error", "Write a prompt first.");
    return find("prompt").focus();
  }
  let asked;
  try {
    asked = fields();
  } catch (err) {
    markField(err.input.name, err.message);
    return err.input.focus();
  }
  const answers = chosen.map((m) => new Answer(m.id, m.id, m.hue, stopAnswer));
  run = { id: `page-${crypto.getRandomValues(new Uint32Array(4)).join("-")}`, answers, abort: new AbortController() };
  find("answers").replaceChildren(...answers.map((a) => a.node));
  find("empty").hidden = true;
  const isFar = find("answers").getBoundingClientRect().top > 0.7 * innerHeight;
  if (isFar) find("answers").scrollIntoView();
  show(`Asking ${answers.length}.`);
  meter.ask(true);
  try {
    await sideBySide(run.id, asked.path, chosen.map((m) => m.model), asked.body, run.abort.signal, take);
    for (const answer of answers) if (answer.isOpen) answer.fail("the stream ended early");
  } catch (err) {
    for (const answer of answers) {
      if (err.name === "AbortError") answer.stopped();
      else if (answer.isOpen) answer.fail(err.message ?? "the connection broke");
    }
    if (err.status === 401) askForKey(err.message);
    markField(err.param, err.message);
  }
  run = null;
  show(summary(answers));
  meter.ask(false);
}

function take(index, data) {
  if (index === null) {
    if (data?.error) for (const answer of run.answers) answer.take(data);
  } else if (data === null) {
    if (run.answers[index].isOpen) run.answers[index].fail("the stream ended early");
  } else {
    run.answers[index].take(data);
    if (data.error) markField(data.error.param, data.error.message);
  }
}

async function stopAnswer(answer) {
  const { id, answers } = run;
  answer.stopped();
  if (!answers.some((a) => a.isOpen)) return run.abort.abort();
  try {
    await stopOne(id, answers.indexOf(answer));
  } catch (err) {
    if (err.status !== 404) answer.fail(err.message); // else it has ended by itself
  }
}

function stopAll() {
  if (!run) return;
  for (const answer of run.answers) answer.stopped();
  run.abort.abort();
}

function summary(answers) {
  const count = (state) => answers.filter((a) => a.node.dataset.state === state).length;
  const parts = [["done", "complete"], ["stopped", "stopped"], ["failed", "failed"]]
    .filter(([state]) => count(state)).map(([state, word]) => `${count(state)} ${word}`);
  return `${parts.join(", ")}.`;
}

function show(message) {
  find("said").textContent = message;
  find("send").disabled = run !== null;
  find("stop-all").disabled = run === null;
}

// -- the rest of the page ----------------------------------------------------------------------

async function loadModels() {
  try {
    const base = await models.load();
    find("base").textContent = base.id;
    find("base").title = `${base.root}, context of ${base.max_model_len} tokens`;
    showError("models-error", "");
    showError("key-error", "");
  } catch (err) {
    if (err.status === 401) askForKey(err.message);
    else showError("models-error", err.message);
  }
}

function askForKey(message) {
  showError("key-error", message);
  find("key").focus();
}

const dark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
}

function nameTheme() {
  find("theme").textContent = isDark() ? "Light" : "Dark";
  find("theme").setAttribute("aria-label", `Change to the ${isDark() ? "light" : "dark"} theme`);
}

function setUp() {
  const theme = localStorage.getItem("redmux-theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  nameTheme();
  dark.addEventListener("change", nameTheme);
  find("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem("redmux-theme", document.documentElement.dataset.theme);
    nameTheme();
  });
  find("key").value = key.get();
  find("key").addEventListener("change", async () => {
    key.set(find("key").value.trim());
    await loadModels();
    meter.ask();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  for (const radio of form.elements.mode) radio.addEventListener("change", showMode);
  find("tint").addEventListener("change", () => find("answers").classList.toggle("is-tinted", find("tint").checked));
  find("stop-all").addEventListener("click", stopAll);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      hideTip();
      stopAll();
    }
  });
  window.addEventListener("scroll", placeTip, { passive: true });
  if (matchMedia("(max-width: 820px)").matches) find("sampling").open = false;
  upload.setUp(async (name) => {
    await loadModels();
    models.select(name);
  }, showError);
}

function showMode() {
  const isChat = mode() === "chat";
  find("system-field").hidden = !isChat;
  find("mode-note").textContent = isChat
    ? "The prompt is a message, written by the chat template."
    : "The prompt is text that the model writes on from.";
}

setUp();
await loadModels();
meter.ask();
