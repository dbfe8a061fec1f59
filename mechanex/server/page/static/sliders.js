// The vectors in use, each with a slider of its strength and one for each of its layers.

import { byId, fill, make } from "./dom.js";
import { file } from "./api.js";

/**
 * @typedef {import("./state.js").Used} Used
 * @typedef {{id: string, names: string[], owner: string, layers: number[], norms: number[], method: string | null,
 *   calibrated: number | null}} Vector
 */

/** @param {Vector} vector */
export function titleOf(vector) {
  const whose = { server: "the server's", account: "yours", operator: "stored here" }[vector.owner] ?? vector.owner;
  const name = vector.names[0] ?? (vector.id.length > 20 ? `${vector.method ?? "vector"} ${vector.id.slice(0, 8)}` : vector.id);
  return `${name} (${whose}, layer${vector.layers.length > 1 ? "s" : ""} ${vector.layers.join(", ")})`;
}

/**
 * @param {Used[]} used
 * @param {Vector[]} vectors
 * @param {{changed: () => void, removed: (id: string) => void, failed: (error: unknown) => void}} told
 */
export function showSliders(used, vectors, told) {
  byId("div", "sliders").replaceChildren(...used.map((one) => oneVector(one, vectors.find((v) => v.id === one.id), told)));
  const free = vectors.filter((vector) => !used.some((one) => one.id === vector.id));
  fill(byId("select", "add"), free.map((vector) => [vector.id, titleOf(vector)]));
  byId("div", "add-row").hidden = !free.length;
  byId("button", "reset").hidden = !used.length;
  byId("p", "no-vectors").hidden = vectors.length > 0;
  fill(byId("select", "sweep-vector"), vectors.map((vector) => [vector.id, titleOf(vector)]));
}

/**
 * @param {Used} one
 * @param {Vector | undefined} vector
 * @param {{changed: () => void, removed: (id: string) => void, failed: (error: unknown) => void}} told
 */
function oneVector(one, vector, told) {
  const title = vector ? titleOf(vector) : `${one.id}: not on this server, remove it`;
  const remove = make("button", { type: "button" }, "Remove");
  remove.addEventListener("click", () => told.removed(one.id));
  const box = make("fieldset", { class: "vector" }, make("legend", {}, title));
  if (!vector) {
    box.append(remove);
    return box;
  }
  const most = Math.max(vector.calibrated === null ? 4 : 3 * Math.abs(vector.calibrated), Math.abs(one.strength));
  box.append(slider(`strength-${one.id}`, "Strength", one.strength, -most, most, (value) => {
    one.strength = value;
    told.changed();
  }));
  if (vector.calibrated !== null) box.append(make("p", { class: "quiet small" }, `Calibrated: ${vector.calibrated.toPrecision(3)}`));
  if (vector.layers.length > 1) {
    const layers = make("details", {}, make("summary", {}, "By layer"));
    vector.layers.forEach((layer, i) => layers.append(
      slider(`layer-${layer}-${one.id}`, `Layer ${layer}`, one.layers[layer] ?? 1, 0, 2, (value) => {
        if (value === 1) delete one.layers[layer];
        else one.layers[layer] = value;
        told.changed();
      }, `norm ${vector.norms[i]?.toPrecision(3)}`)));
    layers.open = Object.keys(one.layers).length > 0;
    box.append(layers);
  }
  const download = make("button", { type: "button" }, "Download");
  download.addEventListener("click", () => saveFile(vector.id).catch(told.failed));
  box.append(make("div", { class: "row" }, remove, download));
  return box;
}

/**
 * @param {string} id
 * @param {string} text
 * @param {number} value
 * @param {number} least
 * @param {number} most
 * @param {(value: number) => void} moved
 * @param {string} [note]
 */
function slider(id, text, value, least, most, moved, note = "") {
  const bounds = { min: String(least), max: String(most), value: String(value) };
  const range = make("input", { type: "range", id, step: String((most - least) / 80), ...bounds });
  const exact = make("input", { type: "number", step: "any", value: String(value), "aria-label": `${text}, exactly` });
  range.value = String(value);
  range.addEventListener("input", () => {
    exact.value = String(Number(Number(range.value).toPrecision(4)));
    moved(Number(exact.value));
  });
  exact.addEventListener("change", () => {
    const given = Number(exact.value);
    if (exact.value === "" || !Number.isFinite(given)) return;
    range.value = exact.value;
    moved(given);
  });
  return make("div", { class: "slider" }, make("label", { for: id }, text), range, exact, make("span", { class: "quiet small" }, note));
}

/** @param {string} id */
async function saveFile(id) {
  const url = URL.createObjectURL(await file(`/page/vectors/${encodeURIComponent(id)}`));
  const link = make("a", { href: url, download: `${id.replaceAll(/[^A-Za-z0-9_-]+/g, "_")}.safetensors` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
