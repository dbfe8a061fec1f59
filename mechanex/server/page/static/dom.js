// Elements of the page, found or made; never from text that could be markup.

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} kind
 * @param {string} id
 * @returns {HTMLElementTagNameMap[K]}
 */
export function byId(kind, id) {
  const found = document.getElementById(id);
  if (!found || found.localName !== kind) throw new Error(`the page has no ${kind} #${id}`);
  return /** @type {HTMLElementTagNameMap[K]} */ (found);
}

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} kind
 * @param {Record<string, string>} [attributes]
 * @param {(Node | string)[]} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function make(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/**
 * @param {string} kind
 * @param {Record<string, string | number>} attributes
 * @param {(Node | string)[]} children
 */
export function drawn(kind, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.append(...children);
  return made;
}

/** @param {HTMLSelectElement} select @param {[string, string][]} options value and text @param {string} [chosen] */
export function fill(select, options, chosen = select.value) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

/**
 * The function, once nothing has called it for a while.
 * @param {() => void} fn
 * @param {number} milliseconds
 */
export function settled(fn, milliseconds) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = window.setTimeout(fn, milliseconds);
  };
}
