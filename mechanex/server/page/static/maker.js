// Contrastive examples that are typed in, and the vector that is made of them.

import { byId, make } from "./dom.js";
import { call } from "./api.js";

/** @typedef {{prompts: string[], positive_answers: string[], negative_answers: string[]}} Examples */

let made = 0;

export function addExample() {
  made += 1;
  /** @param {string} kind @param {string} text @param {string} placeholder */
  const field = (kind, text, placeholder) =>
    make("label", {}, text, make("input", { type: "text", class: kind, id: `${kind}-${made}`, placeholder }));
  const remove = make("button", { type: "button", "aria-label": `Remove example ${made}` }, "Remove");
  const row = make("li", {}, make("div", { class: "example" },
    field("asked", "Prompt", "How was the train?"), field("towards", "Towards", "It was calm and on time."),
    field("away", "Away from", "It was late and I was furious."), make("div", {}, remove)));
  remove.addEventListener("click", () => row.remove());
  byId("ol", "examples").append(row);
  return row;
}

/**
 * The examples that are filled in.
 * @returns {Examples}
 */
export function examples() {
  /** @type {Examples} */
  const found = { prompts: [], positive_answers: [], negative_answers: [] };
  document.querySelectorAll("#examples > li").forEach((row, i) => {
    const [prompt = "", towards = "", away = ""] = ["asked", "towards", "away"].map((kind) => {
      const input = row.querySelector(`.${kind}`);
      return input instanceof HTMLInputElement ? input.value : "";
    });
    if (!prompt.trim() && !towards.trim() && !away.trim()) return;
    if (!prompt.trim() || !towards.trim() || !away.trim()) throw new Error(`Example ${i + 1} lacks a part: fill in all three fields, or remove it.`);
    found.prompts.push(prompt);
    found.positive_answers.push(spaced(prompt, towards));
    found.negative_answers.push(spaced(prompt, away));
  });
  return found;
}

/** An answer as it goes on after its prompt: words don't run together. @param {string} prompt @param {string} answer */
function spaced(prompt, answer) {
  return /\s$/.test(prompt) || /^[\s.,;:!?)]/.test(answer) ? answer : ` ${answer}`;
}

/**
 * Makes the vector, and keeps it by name where one is given.
 * @returns {Promise<string>} its id
 */
export async function makeVector() {
  const given = examples();
  if (!given.prompts.length) throw new Error("Fill in at least one example: a prompt and two answers.");
  const layers = byId("input", "layers").value.split(/[\s,]+/).filter(Boolean).map(Number);
  if (layers.some((layer) => !Number.isInteger(layer))) throw new Error("Layers are whole numbers, such as 3, 4.");
  const body = { ...given, method: byId("select", "method").value, ...(layers.length ? { layer_idxs: layers } : {}) };
  const { steering_vector_id: id } = await call("/steering/generate", body);
  const name = byId("input", "name").value.trim();
  if (name) await call("/behaviors/create", { ...given, behavior_name: name, steering_vector_id: id });
  return id;
}
