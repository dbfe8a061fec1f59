// A sweep's picture: effect and price by strength, a line for each layer, and the same as a table.

import { byId, drawn, make } from "./dom.js";

/**
 * @typedef {{strength: number, kl: number, effect: number | null}} Point
 * @typedef {{layer: number | null, points: Point[]}} Line
 */

const WIDTH = 360, HEIGHT = 240, LEFT = 46, BOTTOM = 34, TOP = 26, RIGHT = 12;

/** @param {Line} line */
const named = (line) => (line.layer === null ? "all layers" : `layer ${line.layer}`);

/** @param {number} most each side of 0 @returns {number[]} */
export function strengthsUpTo(most) {
  return [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1].map((share) => Number((share * most).toPrecision(4)));
}

/**
 * @param {Line[]} lines
 * @param {(strength: number, layer: number | null) => void} use is told the setting that somebody chooses
 */
export function showSweep(lines, use) {
  const effects = lines.some((line) => line.points.some((point) => point.effect !== null));
  const panels = [panel(lines, "kl", "Price: KL in nats", 0)];
  if (effects) panels.push(panel(lines, "effect", "Effect: nats a token", WIDTH));
  const title = drawn("title", {}, "Sweep of the vector's strength");
  const summary = drawn("desc", {}, lines.map(described).join(" "));
  const svg = drawn("svg", { viewBox: `0 0 ${WIDTH * panels.length} ${HEIGHT}`, role: "img", "aria-label": "Sweep of the vector's strength; the table below has its numbers" }, title, summary, ...panels);
  const legend = make("div", { class: "legend small" }, ...lines.map((line, i) => make("span", {}, dash(i), ` ${named(line)}`)));
  byId("div", "picture").replaceChildren(svg, legend, table(lines, effects, use));
}

/** @param {number} i */
function dash(i) {
  const sample = drawn("svg", { viewBox: "0 0 24 8", width: 24, height: 8, "aria-hidden": "true" });
  sample.append(drawn("path", { d: "M0 4H24", ...style(i) }));
  return sample;
}

/** Lines of one colour differ in their dashes. @param {number} i */
const style = (i) => ({ class: `line c${i % 6}`, "stroke-dasharray": ["none", "6 3", "2 3"][Math.floor(i / 6) % 3] ?? "none" });

/** @param {Line} line */
function described(line) {
  const last = line.points.at(-1);
  const effect = last && last.effect !== null ? ` and an effect of ${last.effect.toFixed(2)}` : "";
  return last ? `With ${named(line)} at strength ${last.strength} the price is ${last.kl.toFixed(2)} nats${effect}.` : "";
}

/** @param {Line[]} lines @param {"kl" | "effect"} what @param {string} title @param {number} offset */
function panel(lines, what, title, offset) {
  const all = lines.flatMap((line) => line.points);
  const values = all.map((point) => point[what] ?? 0);
  const low = Math.min(0, ...values), high = Math.max(1e-6, ...values);
  const strengths = all.map((point) => point.strength);
  const first = Math.min(...strengths), last = Math.max(...strengths);
  /** @param {number} strength */
  const x = (strength) => LEFT + ((strength - first) / (last - first || 1)) * (WIDTH - LEFT - RIGHT);
  /** @param {number} value */
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - BOTTOM - TOP);
  const group = drawn("g", { transform: `translate(${offset} 0)` });
  group.append(
    drawn("text", { x: LEFT, y: 15 }, title),
    drawn("path", { class: "axis", fill: "none", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}M${LEFT} ${y(0)}H${WIDTH - RIGHT}` }),
    ...[low, high].map((value) => drawn("text", { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, value.toPrecision(2))),
    ...[first, 0, last].map((value) => drawn("text", { x: x(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, String(value))),
    drawn("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, "strength"),
  );
  lines.forEach((line, i) => {
    const places = line.points.map((point) => [x(point.strength).toFixed(1), y(point[what] ?? 0).toFixed(1)]);
    group.append(drawn("path", { d: `M${places.map((place) => place.join(" ")).join("L")}`, ...style(i) }));
    for (const [cx = "", cy = ""] of places) group.append(drawn("circle", { cx, cy, r: 3, class: `dot f${i % 6}` }));
  });
  return group;
}

/** @param {Line[]} lines @param {boolean} effects @param {(strength: number, layer: number | null) => void} use */
function table(lines, effects, use) {
  const head = ["Where", "Strength", "KL", ...(effects ? ["Effect"] : []), ""];
  const rows = lines.flatMap((line) => line.points.map((point) => {
    const button = make("button", { type: "button", "aria-label": `Use strength ${point.strength}, ${named(line)}` }, "Use");
    button.addEventListener("click", () => use(point.strength, line.layer));
    const cells = [named(line), String(point.strength), point.kl.toFixed(3), ...(effects ? [(point.effect ?? 0).toFixed(3)] : [])];
    return make("tr", {}, ...cells.map((text) => make("td", {}, text)), make("td", {}, button));
  }));
  return make("details", {}, make("summary", {}, "The numbers"), make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))), make("tbody", {}, ...rows)));
}
