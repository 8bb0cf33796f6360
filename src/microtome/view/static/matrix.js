/* A matrix of names by names: a number in each cell, its strength as colour, the diagonal framed. */
"use strict";

(function (atlas) {
  const { h, s, number } = atlas;
  const [WIDE, TALL] = [78, 42]; // of a cell
  const LETTERS = { row: 16, column: 10 }; // of a name before it is cut

  const cut = (name, most = LETTERS.row) => (name.length > most ? `${name.slice(0, most - 1)}…` : name);

  /**
   * A matrix. `cell(row, column)` gives { value, below, text, href }, or null where nothing was measured: the number, what
   * stands small under it, and what is read out. Strength is opacity, so that it reads on light and dark; what is
   * negative takes the second colour. Cells of one name are framed.
   */
  function matrix({ title, meaning, rows, columns, down, across, cell, note }) {
    const cells = rows.flatMap((row, j) => columns.map((column, i) => ({ i, j, own: row === column, ...(cell(row, column) || {}) })));
    const known = cells.filter(({ value }) => value !== null && value !== undefined);
    const most = Math.max(...known.map(({ value }) => Math.abs(value)), 0) || 1;
    const left = 18 + 7.2 * Math.max(...rows.map((name) => cut(name).length), down.length + 1);
    const top = 44;
    const [width, height] = [left + WIDE * columns.length + 4, top + TALL * rows.length + 4];
    const rest = known.length ? `${number(Math.min(...known.map(({ value }) => value)))} to ${number(Math.max(...known.map(({ value }) => value)))}` : "not measured";
    const reading = h("output", {}, rest);
    const draw = ({ i, j, own, value, below, text, href }) => {
      const [x, y] = [left + i * WIDE, top + j * TALL];
      const place = { x: x + 1, y: y + 1, width: WIDE - 2, height: TALL - 2 };
      const none = value === null || value === undefined;
      const share = none ? 0 : Math.abs(value) / most;
      const kind = `${value < 0 ? "cold" : "hot"}${share > 0.6 ? " strong" : ""}`;
      const middle = { x: x + WIDE / 2, "text-anchor": "middle" };
      const read = () => (reading.textContent = text || rest);
      return s(
        "a",
        { href, class: `matrix-cell ${none ? "none" : kind}`, "aria-label": text, pointerenter: read, focus: read },
        s("rect", { ...place, class: none ? "blank" : value < 0 ? "cold" : "hot", "fill-opacity": none ? null : (0.05 + 0.95 * share).toFixed(3) }),
        own && s("rect", { ...place, class: "own" }),
        s("text", { ...middle, y: y + (below ? 19 : 25), class: "figure" }, number(value ?? null)),
        below && s("text", { ...middle, y: y + 33, class: "below" }, below),
      );
    };
    const name = (text, most, attributes) =>
      s("text", { class: "matrix-name", ...attributes }, cut(text, most), s("title", {}, text));
    const svg = s(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, width, height, class: "matrix", role: "group", "aria-label": `${title}: ${down} by ${across}`, pointerleave: () => (reading.textContent = rest) },
      s("text", { class: "tick", x: left + 4, y: 14 }, `${across} →`),
      s("text", { class: "tick", x: left - 8, y: 34, "text-anchor": "end" }, `${down} ↓`),
      columns.map((text, i) => name(text, LETTERS.column, { x: left + (i + 0.5) * WIDE, y: 34, "text-anchor": "middle" })),
      rows.map((text, j) => name(text, LETTERS.row, { x: left - 8, y: top + (j + 0.5) * TALL + 4, "text-anchor": "end" })),
      cells.map(draw),
    );
    return h(
      "figure",
      { class: "matrix-figure" },
      h("figcaption", {}, h("b", { title: meaning }, title), atlas.save.svg(), reading),
      h("div", { class: "scroll" }, svg),
      note && h("p", { class: "note" }, note),
    );
  }

  atlas.chart.matrix = matrix;
})(window.atlas);
