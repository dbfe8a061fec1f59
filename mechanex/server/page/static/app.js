// The page as a whole: its state, and what happens where something is pressed, typed or moved.

import { Refused, call, key, setKey } from "./api.js";
import { byId, fill, make, settled } from "./dom.js";
import { addExample, examples, makeVector } from "./maker.js";
import { showSliders } from "./sliders.js";
import { checked, fromLink, history, initial, keepHistory, steeringOf, toLink } from "./state.js";
import { showSweep, strengthsUpTo } from "./sweep.js";
import { Answer, Colouring } from "./tokens.js";
import { compare, plainKey, sweep, write } from "./writing.js";

/** @typedef {import("./sliders.js").Vector} Vector */

/** @type {{model: string, chat: boolean, vectors: Vector[], behaviors: {name: string, threshold: number}[]}} */
let about = { model: "", chat: true, vectors: [], behaviors: [] };
let state = initial();
let runs = history();
let plainOf = "";
let running = new AbortController();
const plain = new Answer("plain"), steered = new Answer("steered");
const number = /** @type {const} */ (["max_tokens", "temperature", "seed"]);

/** @param {string} text */
function say(text) {
  byId("p", "status").textContent = text;
}

/** @param {unknown} error */
function fail(error) {
  if (error instanceof DOMException && error.name === "AbortError") return;
  say("");
  if (error instanceof Refused && (error.status === 401 || error.status === 403)) askForKey(error.message);
  byId("p", "problem").textContent = error instanceof TypeError ? "The server can't be reached." : error instanceof Error ? error.message : String(error);
}

/** Does something that may fail, and tells so where it does. @param {() => Promise<void>} work */
async function tried(work) {
  byId("p", "problem").textContent = "";
  try {
    await work();
  } catch (error) {
    fail(error);
  }
}

/** @param {string} reason */
function askForKey(reason) {
  const dialog = byId("dialog", "key-dialog");
  byId("p", "key-reason").textContent = reason;
  if (!dialog.open) dialog.showModal();
  byId("input", "key").focus();
}

function colouring() {
  return new Colouring(state.colour, about.behaviors);
}

function items() {
  return steeringOf(state, new Map(about.vectors.map((vector) => [vector.id, vector.layers])));
}

const noteLink = settled(() => window.history.replaceState(null, "", toLink(state)), 150);
const writeSoon = settled(() => void writeBoth(), 250);

function moved() {
  noteLink();
  if (byId("input", "live").checked && state.prompt) writeSoon();
}

/** Puts the state into the page's fields. */
function show() {
  byId("textarea", "prompt").value = state.prompt;
  byId("select", "mode").value = state.mode;
  for (const name of number) byId("input", name).value = String(state[name]);
  /** @type {[string, string][]} */
  const colours = [["kl", "KL against plain"], ...about.behaviors.map(({ name }) => /** @type {[string, string]} */ ([`behavior:${name}`, `behavior ${name}`])), ["none", "nothing"]];
  fill(byId("select", "colour"), colours, state.colour);
  state.colour = byId("select", "colour").value;
  colouring().showLegend();
  showSliders(state.vectors, about.vectors, {
    changed: moved,
    removed: (id) => {
      state.vectors = state.vectors.filter((one) => one.id !== id);
      show();
      moved();
    },
    failed: fail,
  });
  noteLink();
}

function showTokens() {
  for (const answer of [plain, steered]) answer.show(colouring());
}

async function learn() {
  about = await call("/page/about");
  byId("span", "model").textContent = about.model;
}

async function writeBoth() {
  running.abort();
  const mine = (running = new AbortController());
  await tried(async () => {
    if (!state.prompt.trim()) throw new Error("Write a prompt first.");
    const gone = state.vectors.find((one) => !about.vectors.some((vector) => vector.id === one.id));
    if (gone) throw new Error(`The vector ${gone.id} is not on this server: remove it, or make it again.`);
    byId("button", "stop").disabled = false;
    say("Writing…");
    const steering = items(), colours = colouring(), wanted = plainKey(state);
    const asked = checked(structuredClone(state));
    const tasks = [write(asked, steering, steered, colours, mine.signal)];
    if (wanted !== plainOf) {
      plainOf = "";
      tasks.push(write(asked, [], plain, colours, mine.signal));
    }
    try {
      await Promise.all(tasks);
    } catch (error) {
      mine.abort(); // the other one
      throw error;
    }
    plainOf = wanted;
    await compare(asked, steering, [plain, steered], mine.signal);
    showTokens();
    say(`Written: ${steered.compared.length} tokens, of ${mean(steered).toFixed(2)} nats in the mean.`);
    remember(asked);
  });
  if (running === mine) byId("button", "stop").disabled = true;
}

/** @param {Answer} answer */
function mean(answer) {
  return answer.compared.reduce((sum, one) => sum + one.kl, 0) / Math.max(1, answer.compared.length);
}

/** @param {import("./state.js").State} asked */
function remember(asked) {
  const latest = runs[0];
  // Of a slider on its way only the place where it stops is kept.
  if (latest && Date.now() - latest.at < 3000 && plainKey(latest.state) === plainKey(asked)) runs.shift();
  runs.unshift({ at: Date.now(), state: { ...asked, model: about.model }, plain: plain.text, steered: steered.text });
  runs = runs.slice(0, 30);
  keepHistory(runs);
  showHistory();
}

function showHistory() {
  byId("ol", "history").replaceChildren(...runs.map((run) => {
    const settings = run.state.vectors.map((one) => `${one.id.slice(0, 20)} × ${Number(one.strength.toPrecision(3))}`).join(", ") || "no vector";
    const button = make("button", { type: "button" }, `${run.state.prompt.slice(0, 60)} (${settings}): ${run.steered.slice(0, 80)}`);
    button.addEventListener("click", () => void restore(run));
    return make("li", {}, button);
  }));
}

/** @param {import("./state.js").Run} run */
async function restore(run) {
  running.abort();
  state = checked(structuredClone(run.state));
  show();
  for (const [answer, text] of /** @type {const} */ ([[plain, run.plain], [steered, run.steered]])) {
    answer.begin();
    answer.add(text, [], new Colouring("none", []));
    answer.end();
  }
  plainOf = "";
  const mine = (running = new AbortController());
  await tried(async () => {
    await compare(state, items(), [plain, steered], mine.signal);
    showTokens();
    say("As it was written before.");
  });
  byId("textarea", "prompt").focus();
}

function listen() {
  byId("form", "ask").addEventListener("submit", (event) => {
    event.preventDefault();
    void writeBoth();
  });
  byId("button", "stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) void writeBoth();
    if (event.key === "Escape") stop();
  });
  byId("textarea", "prompt").addEventListener("input", (event) => {
    state.prompt = /** @type {HTMLTextAreaElement} */ (event.target).value;
    noteLink();
  });
  byId("select", "mode").addEventListener("change", () => {
    state.mode = byId("select", "mode").value === "chat" ? "chat" : "text";
    noteLink();
  });
  for (const name of number) {
    byId("input", name).addEventListener("change", () => {
      state = checked({ ...state, [name]: byId("input", name).valueAsNumber });
      byId("input", name).value = String(state[name]);
      show();
    });
  }
  byId("button", "dice").addEventListener("click", () => {
    state.seed = Math.floor(Math.random() * 1e6);
    show();
  });
  byId("select", "colour").addEventListener("change", () => {
    state.colour = byId("select", "colour").value;
    show();
    // Scores are taken while a text is written.
    if (state.colour.startsWith("behavior:") && steered.text) void writeBoth();
    else if (steered.compared.length) showTokens();
  });
  byId("button", "add-button").addEventListener("click", () => {
    const vector = about.vectors.find((one) => one.id === byId("select", "add").value);
    if (!vector) return;
    state.vectors.push({ id: vector.id, strength: vector.calibrated ?? 1, layers: {} });
    show();
    moved();
  });
  byId("button", "reset").addEventListener("click", () => {
    for (const one of state.vectors) one.strength = 0;
    show();
    moved();
  });
  byId("button", "more-examples").addEventListener("click", () => addExample().querySelector("input")?.focus());
  byId("form", "make").addEventListener("submit", (event) => {
    event.preventDefault();
    void waiting("make-button", "Making the vector…", async () => {
      const id = await makeVector();
      await learn();
      state.vectors.push({ id, strength: 1, layers: {} });
      show();
      say("The vector is made, and in use at strength 1.");
      moved();
    });
  });
  byId("form", "sweep").addEventListener("submit", (event) => {
    event.preventDefault();
    void waiting("sweep-button", "Sweeping…", async () => {
      const vector = byId("select", "sweep-vector").value;
      if (!vector) throw new Error("There is no vector to sweep: make one first.");
      if (!plain.text) throw new Error("Write an answer first: a sweep is measured on the plain one.");
      const most = byId("input", "sweep-most").valueAsNumber;
      const lines = await sweep(state, plain.text, vector, strengthsUpTo(most), byId("input", "sweep-layers").checked, examples());
      showSweep(lines, (strength, layer) => {
        useSetting(vector, strength, layer);
      });
      say("The sweep is done.");
    });
  });
  byId("button", "clear-history").addEventListener("click", () => {
    runs = [];
    keepHistory(runs);
    showHistory();
  });
  byId("button", "copy-link").addEventListener("click", () => void tried(async () => {
    const link = location.origin + location.pathname + toLink({ ...state, model: about.model });
    window.history.replaceState(null, "", link);
    try {
      await navigator.clipboard.writeText(link);
      say("The link is copied.");
    } catch {
      say("The link is in the address bar.");
    }
  }));
  byId("button", "change-key").addEventListener("click", () => askForKey("Its own key, an account's API key, or an access token."));
  byId("button", "close-key").addEventListener("click", () => byId("dialog", "key-dialog").close());
  byId("button", "forget-key").addEventListener("click", () => {
    setKey("", false);
    byId("input", "key").value = "";
  });
  byId("form", "key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(byId("input", "key").value.trim(), byId("input", "keep-key").checked);
    byId("input", "key").value = "";
    byId("dialog", "key-dialog").close();
    void begin();
  });
  window.addEventListener("hashchange", () => {
    const linked = fromLink(location.hash);
    if (!linked || JSON.stringify(linked) === JSON.stringify(state)) return;
    state = linked;
    show();
  });
}

function stop() {
  if (byId("button", "stop").disabled) return;
  running.abort();
  byId("button", "stop").disabled = true;
  say("Stopped.");
}

/** @param {string} vector @param {number} strength @param {number | null} layer */
function useSetting(vector, strength, layer) {
  const of = about.vectors.find((one) => one.id === vector)?.layers ?? [];
  const layers = Object.fromEntries(layer === null ? [] : of.filter((one) => one !== layer).map((one) => [String(one), 0]));
  state.vectors = [...state.vectors.filter((one) => one.id !== vector), { id: vector, strength, layers }];
  show();
  moved();
}

/** @param {string} button @param {string} text @param {() => Promise<void>} work */
async function waiting(button, text, work) {
  byId("button", button).disabled = true;
  say(text);
  await tried(work);
  byId("button", button).disabled = false;
}

/** The page's colours: as the system has them, or one of both. @param {string} chosen */
function wear(chosen) {
  const names = { auto: "as the system", light: "light", dark: "dark" };
  const name = chosen === "light" || chosen === "dark" ? chosen : "auto";
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  const button = byId("button", "theme");
  button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[name];
  button.setAttribute("aria-label", `Colours of the page: ${names[name]}`);
}

function listenToTheme() {
  /** @param {string} [text] */
  const kept = (text) => {
    try {
      if (text) localStorage.setItem("mechanex-theme", text);
      return localStorage.getItem("mechanex-theme") ?? "auto";
    } catch {
      return text ?? "auto";
    }
  };
  wear(kept());
  byId("button", "theme").addEventListener("click", () => {
    const order = ["auto", "light", "dark"];
    wear(kept(order[(order.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3]));
  });
}

async function begin() {
  await tried(async () => {
    await learn();
    const linked = fromLink(location.hash);
    if (linked) state = linked;
    else if (!about.chat && !state.prompt) state.mode = "text";
    show();
    say(linked && linked.model && linked.model !== about.model ? `This link is of ${linked.model}, and this server has ${about.model}.` : "");
    state.model = about.model;
  });
}

listenToTheme();
listen();
addExample();
addExample();
showHistory();
if (key() === "") byId("input", "keep-key").checked = false;
void begin();
