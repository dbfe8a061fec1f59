// What the page shows, as one object: checked where it comes from a link or from storage, and written into a link.

/**
 * @typedef {{id: string, strength: number, layers: Record<string, number>}} Used A vector in use: its strength, and by
 *   layer what multiplies that; 1 where a layer isn't named.
 * @typedef {{model: string, mode: "chat" | "text", prompt: string, max_tokens: number, temperature: number,
 *   seed: number, colour: string, vectors: Used[]}} State
 */

const HISTORY = "mechanex-history";
const MOST_RUNS = 30;
const MOST_VECTORS = 16;

/** @returns {State} */
export function initial() {
  return { model: "", mode: "chat", prompt: "", max_tokens: 48, temperature: 0.7, seed: 0, colour: "kl", vectors: [] };
}

/**
 * A state of what may be anything: a field that doesn't fit is the initial one.
 * @param {any} given
 * @returns {State}
 */
export function checked(given) {
  const found = initial();
  const from = given && typeof given === "object" ? given : {};
  for (const name of /** @type {const} */ (["model", "prompt", "colour"])) {
    if (typeof from[name] === "string") found[name] = from[name].slice(0, 100000);
  }
  if (from.mode === "chat" || from.mode === "text") found.mode = from.mode;
  found.max_tokens = Math.round(number(from.max_tokens, 1, 1000, found.max_tokens));
  found.temperature = number(from.temperature, 0, 2, found.temperature);
  found.seed = Math.round(number(from.seed, 0, 2147483647, found.seed));
  const vectors = Array.isArray(from.vectors) ? from.vectors.slice(0, MOST_VECTORS) : [];
  for (const one of vectors) {
    if (!one || typeof one.id !== "string" || !one.id || found.vectors.some((other) => other.id === one.id)) continue;
    /** @type {Record<string, number>} */
    const layers = {};
    for (const [layer, factor] of Object.entries(one.layers ?? {}).slice(0, 512)) {
      if (/^\d{1,4}$/.test(layer)) layers[layer] = number(factor, 0, 2, 1);
    }
    found.vectors.push({ id: one.id.slice(0, 256), strength: number(one.strength, -1e6, 1e6, 0), layers });
  }
  return found;
}

/** @param {any} value @param {number} least @param {number} most @param {number} otherwise */
export function number(value, least, most, otherwise) {
  return typeof value === "number" && Number.isFinite(value) ? Math.min(most, Math.max(least, value)) : otherwise;
}

/**
 * The items of a request's field `steering`: one for a vector, or one for each layer where layers differ.
 * @param {State} state
 * @param {Map<string, number[]>} layersOf the layers of each vector
 */
export function steeringOf(state, layersOf) {
  /** @type {{vector: string, strength: number, layers?: number[]}[]} */
  const items = [];
  for (const { id, strength, layers } of state.vectors) {
    if (!strength) continue;
    /** @type {Map<number, number[]>} */
    const alike = new Map();
    for (const layer of layersOf.get(id) ?? []) {
      const factor = layers[layer] ?? 1;
      alike.set(factor, [...(alike.get(factor) ?? []), layer]);
    }
    if (alike.size < 2 && (alike.get(1) || !alike.size)) items.push({ vector: id, strength });
    else for (const [factor, of] of alike) if (factor) items.push({ vector: id, strength: strength * factor, layers: of });
  }
  return items;
}

/** @param {State} state */
export function toLink(state) {
  const bytes = new TextEncoder().encode(JSON.stringify(state));
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  return "#s=" + btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/**
 * The state of a link's fragment, which servers never see; null for none.
 * @param {string} fragment
 */
export function fromLink(fragment) {
  if (!fragment.startsWith("#s=")) return null;
  try {
    const binary = atob(fragment.slice(3).replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(binary, (letter) => letter.charCodeAt(0));
    return checked(JSON.parse(new TextDecoder().decode(bytes)));
  } catch {
    return null;
  }
}

/**
 * @typedef {{at: number, state: State, plain: string, steered: string}} Run
 * @returns {Run[]}
 */
export function history() {
  try {
    const kept = JSON.parse(localStorage.getItem(HISTORY) ?? "[]");
    if (!Array.isArray(kept)) return [];
    return kept.map((one) => ({
      at: number(one?.at, 0, Infinity, 0), state: checked(one?.state), plain: String(one?.plain ?? ""), steered: String(one?.steered ?? ""),
    }));
  } catch {
    return [];
  }
}

/** @param {Run[]} runs */
export function keepHistory(runs) {
  try {
    localStorage.setItem(HISTORY, JSON.stringify(runs.slice(0, MOST_RUNS)));
  } catch {
    // Storage is full or forbidden: the history is this tab's.
  }
}
