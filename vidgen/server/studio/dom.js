// Elements in one line, and what every file needs of them.

/**
 * Make an element.
 * @param {string} tag with classes after dots: "a.card.wide".
 * @param {object} attributes: `onclick` and the like are listeners, true stands for a bare
 *     attribute, false and null for none; `value` and `checked` are properties.
 * @param {...(Node|string|null|false)} children
 */
export function h(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked") element[key] = value ?? "";
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** A picture of the sprite; the words next to it give its meaning. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `/studio/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

/** A button with a picture and words; without `words` its `label` is read by screen readers and shown on hover. */
export function button({ symbol, words, label, ...attributes }) {
  return h(
    "button",
    { type: "button", "aria-label": label, title: label, ...attributes },
    symbol && icon(symbol),
    words && h("span", {}, words),
  );
}

/** An identifier for a pair of label and field. */
export function newId(prefix) {
  newId.count = (newId.count ?? 0) + 1;
  return `${prefix}-${newId.count}`;
}

/** A field under its label, with room for a hint and for what is wrong with it. */
export function field(label, input, hint) {
  input.id ||= newId("field");
  const hintId = hint ? `${input.id}-hint` : null;
  if (hintId) input.setAttribute("aria-describedby", hintId);
  return h(
    "div.field",
    {},
    h("label", { for: input.id }, label),
    input,
    hint && h("small", { id: hintId }, hint),
  );
}

/** Whether letters that are typed now belong to a text. */
export function isTyping(target) {
  return target instanceof Element && target.closest("input:not([type=checkbox], [type=radio], [type=range]), textarea, select, [contenteditable]") !== null;
}

export const reducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
