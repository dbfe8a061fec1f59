// Calls of the server: with the key where there is one, errors as texts, streams as events.

const KEY = "mechanex-key";

/** A refusal of the server, with its own reason. */
export class Refused extends Error {
  /** @param {number} status @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
  } catch {
    return memory;
  }
}

let memory = "";

/** @param {string} text "" forgets it @param {boolean} keep in this browser, not only in this tab */
export function setKey(text, keep) {
  memory = text;
  try {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (text) (keep ? localStorage : sessionStorage).setItem(KEY, text);
  } catch {
    // Storage is forbidden: the key lives as long as the page.
  }
}

/**
 * @param {string} path
 * @param {any} [body] makes it a POST
 * @param {AbortSignal} [signal]
 */
async function send(path, body, signal) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key()) headers.authorization = `Bearer ${key()}`;
  const answer = await fetch(path, {
    method: body === undefined ? "GET" : "POST", headers, signal: signal ?? null, credentials: "omit",
    body: body === undefined ? null : JSON.stringify(body),
  });
  if (!answer.ok) throw new Refused(answer.status, await reason(answer));
  return answer;
}

/** @param {Response} answer */
async function reason(answer) {
  const text = await answer.text();
  try {
    const told = JSON.parse(text);
    const detail = told.error?.message ?? told.detail;
    if (typeof detail === "string") return detail;
    return detail.map((/** @type {any} */ one) => `${one.loc.slice(1).join(".")}: ${one.msg}`).join("; ");
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

/** @param {string} path @param {any} [body] @param {AbortSignal} [signal] */
export async function call(path, body, signal) {
  return (await send(path, body, signal)).json();
}

/** @param {string} path */
export async function file(path) {
  return (await send(path)).blob();
}

/**
 * The events of a streamed answer.
 * @param {string} path
 * @param {any} body
 * @param {AbortSignal} signal
 */
export async function* events(path, body, signal) {
  const answer = await send(path, { ...body, stream: true }, signal);
  if (!answer.body) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(502, "The server ended the stream before its answer was whole.");
    const lines = (rest + value).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const told = JSON.parse(line.slice(6));
      if (told.error) throw new Refused(500, told.error.message);
      yield told;
    }
  }
}
