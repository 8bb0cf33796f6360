/* Elements, numbers and tokens, as the reader sees them.
 *
 * Every text becomes a text node or an attribute; nothing in these pages parses HTML, so a token cannot become markup.
 */
"use strict";
window.atlas = window.atlas || {};

(function (atlas) {
  const SVG = "http://www.w3.org/2000/svg";

  function build(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (typeof value === "function") node.addEventListener(name, value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  /** An HTML element. An attribute whose value is a function is a listener; empty children are left out. */
  const h = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);

  /** An SVG element. */
  const s = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

  /** A problem whose message is shown to the reader. */
  class Problem extends Error {}

  const NONE = "–";
  const minus = (text) => text.replaceAll("-", "\u2212");

  /** A value as text: floats with three digits and at most four decimals, a dash for what was not measured. */
  function number(value, type = "float") {
    if (value === null || value === undefined) return NONE;
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value === "string") return value;
    if (Array.isArray(value))
      return value.map((inner) => number(inner, Number.isInteger(inner) ? "int" : "float")).join(", ");
    if (type === "int" || value === 0) return minus(String(value));
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return minus(value.toExponential(size < 1 ? 1 : 2).replace("e+", "e"));
    if (size < 0.1) return minus(value.toFixed(4));
    if (size >= 1000) return minus(Math.round(value).toLocaleString("en-US"));
    return minus(size >= 100 ? value.toFixed(1) : value.toPrecision(3));
  }

  /** A count with thousands separated: 46,080. */
  const count = (value) => (typeof value === "number" ? value.toLocaleString("en-US") : number(value));

  /** "3 heads", "1 head". */
  const plural = (amount, noun) => `${count(amount)} ${noun}${amount === 1 ? "" : "s"}`;

  /** A value with its 95 % interval, where there is one. */
  function measured(value, type, bounds) {
    if (!bounds || value === null || bounds.lo === null || bounds.hi === null) return number(value, type);
    return [
      number(value, type),
      " ",
      h("span", { class: "interval", title: "95 % interval" }, `[${number(bounds.lo)}, ${number(bounds.hi)}]`),
    ];
  }

  /* Characters that show nothing or reorder what is around them: controls, joiners, directions, line ends, half pairs. */
  const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/gu;
  const escaped = (char) => `\\u${char.codePointAt(0).toString(16).padStart(4, "0")}`;

  /** The marks of a token in a running text: spaces stay spaces, line ends and tabs show. */
  const inText = (text) => text.replace(/\r?\n/g, "↵").replace(/\t/g, "⇥").replace(HIDDEN, escaped);

  /** The marks of a token by itself: a space at either end shows, and one made of spaces shows all of them. */
  function alone(text) {
    if (/^ +$/.test(text)) return "␣".repeat(text.length);
    return inText(text.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length))).replace(/\u00a0/g, "⍽") || "∅";
  }

  /** A token by itself, as a chip. */
  const token = (text, kind = "token") => h("code", { class: kind, title: JSON.stringify(text) }, alone(text));

  /** A sentence in which what stands between backticks is code. */
  const prose = (text) => String(text).split(/`([^`]+)`/).map((part, i) => (i % 2 ? h("code", {}, part) : part));

  /** The same for a tooltip, which has no code. */
  const plainly = (text) => text?.replace(/`([^`]+)`/g, "$1");

  /** The address of a page of the atlas, with the state of its lists. */
  function href(path, params) {
    const query = params ? String(params) : "";
    return `#${path}${query ? `?${query}` : ""}`;
  }

  const paths = {
    layer: (layer) => `/layer/${layer}`,
    head: (layer, head) => `/head/${layer}.${head}`,
    neuron: (layer, neuron) => `/neuron/${layer}.${neuron}`,
  };

  Object.assign(atlas, { h, s, Problem, number, count, plural, measured, token, alone, inText, prose, plainly, href, paths });
})(window.atlas);
