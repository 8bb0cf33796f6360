/* Figures saved as SVG and tables as CSV, from a page on disk and without a network.
 *
 * A saved figure stands alone: title, legend and scale are drawn into it, every colour and font is written on its element,
 * and all of it in the light palette on white. A saved table is RFC 4180: CRLF, quoted where needed, units in the header.
 */
"use strict";

(function (atlas) {
  const { h, s } = atlas;
  const SANS = "Helvetica, Arial, sans-serif";
  const MONO = "'DejaVu Sans Mono', Menlo, Consolas, monospace";
  const LETTER = 6.4; // pixels of a letter of 12 px, a little more than most are wide
  const SHAPE = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linejoin", "opacity"];
  const PLAIN = { "fill-opacity": "1", "stroke-width": "1px", "stroke-opacity": "1", "stroke-dasharray": "none", "stroke-linejoin": "miter", opacity: "1", stroke: "none" };

  function download(name, type, text) {
    const url = URL.createObjectURL(new Blob([text], { type }));
    const link = h("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  /** A file name out of what a figure or a table is called, and the page it is on. */
  function fileName(title, ending) {
    const page = document.title.split(" · ").reverse().join(" ");
    const words = `${page} ${title}`.normalize("NFKD").replace(/[^\w.]+/g, "-").replace(/^-+|-+$/g, "");
    return `${words.slice(0, 100) || "figure"}.${ending}`;
  }

  const button = (label, title, click) => h("button", { type: "button", class: "save", title, click }, label);

  /* SVG. */

  /** Colours and fonts of a drawing as attributes; what does not show is left out, and links become plain groups. */
  function inlined(node) {
    for (const child of [...node.children]) inlined(child);
    const style = getComputedStyle(node);
    if (style.visibility === "hidden" || style.display === "none") return void node.remove();
    const kind = node.tagName.toLowerCase();
    if (["path", "rect", "circle", "line", "text"].includes(kind)) {
      const font = kind === "text" ? { "font-size": style.fontSize, "font-family": /mono/i.test(style.fontFamily) ? MONO : SANS, "font-weight": style.fontWeight } : {};
      const look = Object.fromEntries(SHAPE.map((name) => [name, style.getPropertyValue(name)]));
      for (const [name, value] of Object.entries({ ...look, ...font })) if (value && value !== PLAIN[name]) node.setAttribute(name, value.replace(/"/g, "'"));
    }
    const told = node.getAttribute("aria-label");
    if (kind === "a") {
      const group = s("g", {}, told && s("title", {}, told), [...node.childNodes]);
      node.replaceWith(group);
      return;
    }
    for (const name of ["class", "style", "tabindex", "role", "aria-label", "aria-hidden"]) node.removeAttribute(name);
  }

  const words = (x, y, content, more = {}) => s("text", { x, y, "font-family": SANS, "font-size": 12, fill: "#1b1d21", ...more }, content);

  /** The title, the notes and the legend of a figure as lines of a drawing `width` wide; gives them and their height. */
  function heading(figure, width) {
    const caption = figure.querySelector("figcaption");
    const parts = [];
    let [x, y] = [0, 16];
    const place = (length, draw) => {
      if (x > 0 && x + length > width) [x, y] = [0, y + 17];
      parts.push(draw(x, y));
      x += length + 14;
    };
    const title = [figure.dataset.name, caption.querySelector("b")?.textContent].filter(Boolean).join(": ");
    place(title.length * 7.4, (at, on) => words(at, on, title, { "font-weight": 600, "font-size": 13 }));
    const notes = [...caption.querySelectorAll(".where, :scope > output, .ends"), { textContent: figure.dataset.scale ?? "" }];
    for (const { textContent: note } of notes) if (note.trim()) place(note.length * LETTER, (at, on) => words(at, on, note.trim(), { fill: "#62676f" }));
    const keys = [...caption.querySelectorAll(".key:not(.only)")];
    if (keys.length) [x, y] = [0, y + 18];
    for (const key of keys) {
      const name = key.firstChild?.nodeType === Node.TEXT_NODE ? key.firstChild.textContent : (key.querySelector(".key-name")?.textContent ?? "");
      const mark = getComputedStyle(key, "::before");
      const colour = key.classList.contains("control") ? "#62676f" : mark.backgroundColor;
      const tall = key.classList.contains("patch") ? 9 : 2.5;
      const dash = key.classList.contains("control") ? "3 2" : null;
      place(name.length * LETTER + 18, (at, on) => [
        dash ? s("path", { d: `M${at} ${on - 4}h13`, stroke: colour, "stroke-width": 1.6, "stroke-dasharray": dash, fill: "none" }) : s("rect", { x: at, y: on - 4 - tall / 2, width: 13, height: tall, fill: colour }),
        words(at + 18, on, name),
      ]);
    }
    return { parts: parts.flat(), tall: y + 10 };
  }

  /** A figure as the text of an SVG that stands alone. */
  function standalone(figure) {
    const original = figure.querySelector("svg");
    const copy = figure.cloneNode(true);
    const paper = h("div", { class: "paper" }, copy);
    document.body.append(paper);
    const drawing = copy.querySelector("svg");
    const box = original.viewBox.baseVal?.width ? original.viewBox.baseVal : { x: 0, y: 0, width: Number(original.getAttribute("width")), height: Number(original.getAttribute("height")) };
    const width = Math.max(box.width, 360);
    const { parts, tall } = heading(copy, width);
    const needed = [...drawing.querySelectorAll("*")].some((node) => getComputedStyle(node).fill.includes("#hatch"));
    const hatch = needed ? document.getElementById("hatch").cloneNode(true) : null;
    const lines = hatch?.querySelector("path");
    lines?.setAttribute("stroke", "#62676f");
    inlined(drawing);
    paper.remove();
    const [w, t] = [Math.ceil(width + 24), Math.ceil(box.height + tall + 24)];
    const whole = s(
      "svg",
      { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${w} ${t}`, width: w, height: t },
      hatch && s("defs", {}, hatch),
      s("rect", { width: w, height: t, fill: "#ffffff" }),
      s("g", { transform: "translate(12 8)" }, parts),
      s("svg", { x: 12, y: tall + 12, width: box.width, height: box.height, viewBox: `${box.x} ${box.y} ${box.width} ${box.height}` }, [...drawing.childNodes]),
    );
    return new XMLSerializer().serializeToString(whole).replaceAll("url(&quot;#hatch&quot;)", "url(#hatch)").replaceAll("url('#hatch')", "url(#hatch)");
  }

  /** The button of a figure, for its caption. */
  const svg = () =>
    button("SVG", "save this figure as SVG", (event) => {
      const figure = event.currentTarget.closest("figure");
      const title = figure.dataset.name || figure.querySelector("figcaption b")?.textContent || "figure";
      download(fileName(title, "svg"), "image/svg+xml", standalone(figure));
    });

  /* CSV. */

  function field(value) {
    if (value === null || value === undefined) return "";
    const text = Array.isArray(value) ? JSON.stringify(value) : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  const csvText = (heads, rows) => [heads, ...rows].map((row) => `${row.map(field).join(",")}\r\n`).join("");

  /** A heading with its unit, as in "max (activation)"; a unit of 1 is none. */
  const withUnit = (name, unit) => (unit && unit !== "1" ? `${name} (${unit})` : name);

  /** The button of a table; `content()` gives { heads, rows } when it is pressed, values as they are. */
  const csv = (title, content) =>
    button("CSV", "save this table as CSV", async () => {
      const { heads, rows } = await content();
      download(fileName(title, "csv"), "text/csv;charset=utf-8", csvText(heads, rows));
    });

  /** The button of a small table, read off the table itself: numbers with a plain minus, intervals in columns of their own. */
  function csvOf(title, table) {
    const rowOf = (cells) => [...cells].flatMap((cell) => (cell.matches(".bar-cell, .stand") ? [] : [cell]));
    const plain = (text) => text.trim().replace(/^[+](?=\d)/, "").replace(/^\u2212(?=[\d.])/, "-").replace(/^(-?[\d,]+)$/, (whole) => whole.replaceAll(",", ""));
    const value = (cell) => {
      const held = cell.cloneNode(true);
      for (const part of held.querySelectorAll(".interval")) part.remove();
      return plain(held.textContent);
    };
    const ends = (cell) => (cell.querySelector(".interval")?.textContent.match(/\[(.*), (.*)\]/) ?? []).slice(1).map(plain);
    return csv(title, () => {
      const lines = [...table.querySelectorAll("tbody tr")].map((row) => rowOf(row.cells));
      const wide = (i) => lines.some((cells) => cells[i]?.querySelector(".interval")?.textContent.trim());
      const heads = rowOf(table.tHead?.rows[0]?.cells ?? []).flatMap((cell, i) => {
        const name = cell.textContent.trim();
        return wide(i) ? [name, `${name}, lower end`, `${name}, upper end`] : [name];
      });
      const rows = lines.map((cells) => cells.flatMap((cell, i) => (wide(i) ? [value(cell), ...[0, 1].map((end) => ends(cell)[end] ?? "")] : [value(cell)])));
      return { heads, rows };
    });
  }

  Object.assign(atlas, { save: { svg, csv, csvOf, withUnit } });
})(window.atlas);
