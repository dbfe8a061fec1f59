// Both answers to a prompt, streamed side by side with one seed, and then compared token by token.

import { call, events } from "./api.js";

/** @typedef {import("./state.js").State} State @typedef {import("./tokens.js").Answer} Answer */
/** @typedef {{vector: string, strength: number, layers?: number[]}} Item */

/** @param {State} state */
function asked(state) {
  return state.mode === "chat" ? { messages: [{ role: "user", content: state.prompt }] } : { prompt: state.prompt };
}

/** What the plain answer hangs on. @param {State} state */
export function plainKey(state) {
  const behavior = state.colour.startsWith("behavior:") ? state.colour : "";
  return JSON.stringify([state.mode, state.prompt, state.max_tokens, state.temperature, state.seed, behavior]);
}

/**
 * Streams one answer into its column.
 * @param {State} state
 * @param {Item[]} steering
 * @param {Answer} answer
 * @param {import("./tokens.js").Colouring} colouring
 * @param {AbortSignal} signal
 */
export async function write(state, steering, answer, colouring, signal) {
  const path = state.mode === "chat" ? "/v1/chat/completions" : "/v1/completions";
  const { behavior } = colouring;
  const body = {
    ...asked(state), max_tokens: state.max_tokens, temperature: state.temperature, seed: state.seed,
    ...(steering.length ? { steering } : {}),
    ...(behavior === null ? {} : { behavior_names: [behavior], behavior_action: "report", behavior_scores: true }),
  };
  answer.begin();
  try {
    for await (const event of events(path, body, signal)) {
      for (const choice of event.choices) {
        answer.add(choice.delta?.content ?? choice.text ?? "", choice.behaviors?.tokens ?? [], colouring);
      }
    }
  } finally {
    answer.end();
  }
}

/**
 * Tells of every token of both answers how far steering moves it.
 * @param {State} state
 * @param {Item[]} steering
 * @param {Answer[]} answers
 * @param {AbortSignal} signal
 */
export async function compare(state, steering, answers, signal) {
  const body = { ...asked(state), answers: answers.map((one) => one.text), steering };
  const told = await call("/page/compare", body, signal);
  answers.forEach((one, i) => {
    one.compared = told.answers[i];
  });
}

/**
 * @param {State} state
 * @param {string} answer
 * @param {string} vector
 * @param {number[]} strengths
 * @param {boolean} byLayer
 * @param {import("./maker.js").Examples} examples
 */
export async function sweep(state, answer, vector, strengths, byLayer, examples) {
  const given = examples.prompts.length ? { examples } : {};
  const told = await call("/page/sweep", { ...asked(state), answer, vector, strengths, by_layer: byLayer, ...given });
  return told.lines;
}
