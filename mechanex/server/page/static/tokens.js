// One answer as it is written, then token by token: coloured, and walked along by mouse or keys.

import { byId, make } from "./dom.js";

/**
 * @typedef {[string, number][]} Likeliest
 * @typedef {{token: string, kl: number, logprobs: [number, number], plain: Likeliest, steered: Likeliest}} Compared
 * @typedef {{token: string, scores: Record<string, number | null>}} Scored
 */

const KL_LEVELS = [0.02, 0.1, 0.3, 0.7, 1.5, 3, 6];
const SCORE_LEVELS = [0.25, 0.5, 0.75, 1, 1.25, 1.5, 2];

/** @param {number} value @param {number[]} levels */
const level = (value, levels) => levels.filter((bound) => value >= bound).length;

/** What tokens are coloured by. */
export class Colouring {
  /** @param {string} chosen "none", "kl" or "behavior:NAME" @param {{name: string, threshold: number}[]} behaviors */
  constructor(chosen, behaviors) {
    this.behavior = chosen.startsWith("behavior:") ? chosen.slice("behavior:".length) : null;
    this.kl = chosen === "kl";
    this.threshold = behaviors.find((one) => one.name === this.behavior)?.threshold ?? 1;
  }

  /** @param {Compared | null} compared @param {number | null} score @returns {[number, string]} how hot, and why */
  of(compared, score) {
    if (this.kl && compared) return [level(compared.kl, KL_LEVELS), `KL ${compared.kl.toFixed(2)} nats`];
    if (this.behavior && score !== null) {
      const share = this.threshold > 0 ? score / this.threshold : 1 + score - this.threshold;
      return [level(share, SCORE_LEVELS), `${this.behavior} ${score.toFixed(2)}, shown from ${this.threshold.toFixed(2)}`];
    }
    return [0, ""];
  }

  showLegend() {
    const legend = byId("div", "legend");
    legend.replaceChildren();
    const told = this.kl ? KL_LEVELS.map(String) : SCORE_LEVELS.map((share) => `${share} ×`);
    if (this.kl) legend.append("KL(steered‖plain) in nats, from");
    else if (this.behavior) legend.append(`Score of ${this.behavior}, in thresholds, from`);
    else return;
    told.forEach((text, i) => legend.append(make("span", { class: `h${i + 1}` }, text)));
  }
}

/** One of the two columns. */
export class Answer {
  /** @param {"plain" | "steered"} id */
  constructor(id) {
    this.element = byId("div", id);
    this.name = id === "plain" ? "Plain answer" : "Steered answer";
    this.text = "";
    /** @type {Scored[]} */
    this.scored = [];
    /** @type {Compared[]} */
    this.compared = [];
    this.at = -1;
    this.element.addEventListener("keydown", (event) => this.walk(event));
    this.element.addEventListener("focus", () => this.go(Math.max(this.at, 0)));
    this.element.addEventListener("pointerover", (event) => this.go(this.placeOf(event)));
    this.element.addEventListener("click", (event) => this.go(this.placeOf(event)));
  }

  begin() {
    this.text = "";
    this.scored = [];
    this.compared = [];
    this.at = -1;
    this.element.replaceChildren(document.createTextNode(""));
    for (const name of ["role", "tabindex", "aria-label", "aria-activedescendant"]) this.element.removeAttribute(name);
    this.element.setAttribute("aria-busy", "true");
  }

  /** @param {string} text @param {Scored[]} scored @param {Colouring} colouring */
  add(text, scored, colouring) {
    this.text += text;
    this.scored.push(...scored);
    if (colouring.behavior) this.show(colouring);
    else this.element.firstChild?.replaceWith(document.createTextNode(this.text));
  }

  /** Shows the tokens as they are known by now. @param {Colouring} colouring */
  show(colouring) {
    const tokens = this.compared.length ? this.compared : this.scored;
    const scores = this.scoresAt(colouring.behavior);
    let begin = 0;
    const shown = tokens.map((one, i) => {
      const compared = "kl" in one ? one : null;
      const [heat, why] = colouring.of(compared, scores.get(begin) ?? null);
      begin += one.token.length;
      const label = JSON.stringify(one.token) + (why && `, ${why}`);
      const chosen = i === this.at;
      return make("span", {
        role: "option", id: `${this.element.id}-${i}`, class: `token h${heat}${chosen ? " at" : ""}`, "aria-label": label,
        "aria-selected": String(chosen),
      }, one.token);
    });
    const rest = this.text.slice(begin);
    this.element.replaceChildren(...shown, ...(this.compared.length ? [] : [rest]));
    if (!this.compared.length) return;
    this.element.setAttribute("role", "listbox");
    this.element.setAttribute("tabindex", "0");
    this.element.setAttribute("aria-orientation", "horizontal");
    this.element.setAttribute("aria-label", `${this.name}, token by token`);
  }

  end() {
    this.element.setAttribute("aria-busy", "false");
  }

  /** Scores by where in the text a token begins. @param {string | null} behavior */
  scoresAt(behavior) {
    /** @type {Map<number, number>} */
    const found = new Map();
    let begin = 0;
    for (const one of this.scored) {
      const score = behavior === null ? null : one.scores[behavior];
      if (typeof score === "number") found.set(begin, score);
      begin += one.token.length;
    }
    return found;
  }

  /** @param {Event} event */
  placeOf(event) {
    const token = event.target instanceof Element ? event.target.closest(".token") : null;
    return token ? Number(token.id.split("-")[1]) : -1;
  }

  /** @param {KeyboardEvent} event */
  walk(event) {
    const last = this.compared.length - 1;
    const to = { ArrowRight: this.at + 1, ArrowDown: this.at + 1, ArrowLeft: this.at - 1, ArrowUp: this.at - 1, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.go(Math.min(last, Math.max(0, to)));
  }

  /** @param {number} place */
  go(place) {
    const compared = this.compared[place];
    if (!compared) return;
    const tokens = this.element.querySelectorAll(".token");
    for (const old of document.querySelectorAll(".token.at")) {
      old.classList.remove("at");
      old.setAttribute("aria-selected", "false");
    }
    tokens[place]?.classList.add("at");
    tokens[place]?.setAttribute("aria-selected", "true");
    this.at = place;
    this.element.setAttribute("aria-activedescendant", `${this.element.id}-${place}`);
    showDetails(compared);
  }
}

/** @param {Compared} one */
function showDetails(one) {
  const rows = Array.from({ length: Math.max(one.plain.length, one.steered.length) }, (_, i) =>
    make("tr", {}, ...[one.plain[i], one.steered[i]].flatMap((pair) =>
      pair ? [make("td", {}, make("code", {}, pair[0])), make("td", {}, percent(pair[1]))] : [make("td"), make("td")])));
  const head = make("tr", {}, make("th", { colspan: "2", scope: "colgroup" }, "Plain, likeliest"), make("th", { colspan: "2", scope: "colgroup" }, "Steered, likeliest"));
  const [plain, steered] = one.logprobs;
  byId("div", "details").replaceChildren(
    make("p", {}, make("code", {}, one.token), ` plain ${percent(plain)}, steered ${percent(steered)}; KL(steered‖plain) ${one.kl.toFixed(3)} nats`),
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
  );
}

/** @param {number} logprob */
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
