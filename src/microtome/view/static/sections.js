/* The sections of a result's page that are no maps: lines, neurons, tokens, parts, tables and facts, by their kind. */
"use strict";

(function (atlas) {
  const { h, s, number, count, plural, alone, chart, save } = atlas;
  const minus = (text) => text.replaceAll("-", "\u2212");
  const signed = (value) => (value === null ? "not measured" : minus((value > 0 ? "+" : "") + value.toPrecision(4)));
  const ends = (lo, hi) => ((lo ?? null) === null || (hi ?? null) === null ? "" : ` [${signed(lo)}, ${signed(hi)}]`);
  const head = (names) =>
    h("thead", {}, h("tr", {}, names.map((name, i) => h("th", { scope: "col", class: i ? "float" : null }, name))));
  const scroll = (...children) => h("div", { class: "scroll", tabindex: -1 }, children);
  const heading = ({ title, name, meaning }) =>
    h("h2", { title: meaning }, title, name && name !== title ? h("code", { class: "where" }, ` ${name}`) : "");

  /** A bar of a value, from a zero in the middle where any value is negative. */
  function bar(value, most, both) {
    const [zero, room] = both ? [60, 58] : [1, 117];
    const size = ((value ?? 0) / most) * room;
    const box = { class: value < 0 ? "cold" : "hot", x: Math.min(zero, zero + size), y: 2, width: Math.abs(size), height: 9 };
    return s("svg", { width: 120, height: 13, "aria-hidden": "true" }, s("rect", box), s("line", { x1: zero, x2: zero, y1: 0, y2: 13 }));
  }

  const largest = (values) => Math.max(...values.map((value) => Math.abs(value ?? 0))) || 1;

  function series({ title, name, unit, meaning, axis, places, values, lo, hi, beside }) {
    const { control, ...others } = beside;
    const lines = [{ name: control ? "measured" : "", title: meaning, values, lo, hi, beside: others }];
    if (control) lines.push({ name: "control", title: `control of ${title}`, values: control, control: true });
    return chart.lines({ title: title === name ? title : `${title} (${name})`, note: unit, axis, layers: places, series: lines });
  }

  function neurons(part) {
    const { layers, edges, counts, strongest, beside, unit, size } = part;
    const bins = counts[0].map((_, bin) => bin).reverse();
    const picture = chart.heat({
      title: "how many neurons have which value",
      columns: layers,
      rows: bins.map((bin) => number(edges[bin])),
      across: "layer",
      down: unit || "value",
      root: true,
      cell(layer, label, i, j) {
        const n = counts[i][bins[j]];
        return { value: n, text: `layer ${layer}: ${count(n)} from ${number(edges[bins[j]])} to ${number(edges[bins[j] + 1])}` };
      },
    });
    const most = largest(strongest.map((row) => row[2]));
    const both = strongest.some((row) => row[2] < 0);
    const rows = strongest.map(([layer, neuron, value, lo, hi, ...more]) =>
      h(
        "tr",
        {},
        h("td", { class: "site" }, `L${layer}N${neuron}`),
        h("td", { class: "float" }, signed(value), h("span", { class: "interval" }, ends(lo, hi))),
        more.map((of) => h("td", { class: "float" }, signed(of))),
        h("td", { class: "bar-cell" }, bar(value, most, both)),
      ),
    );
    const tally = `the ${strongest.length} strongest of ${plural(size, "neuron")}`;
    const own = h("table", {}, head(["neuron", unit || "value", ...beside, ""]), h("tbody", {}, rows));
    const bounds = strongest.some((row) => (row[3] ?? null) !== null) ? ["lower end", "upper end"] : [];
    const content = () => ({
      heads: ["neuron", save.withUnit(part.name, unit), ...bounds, ...beside],
      rows: strongest.map(([layer, neuron, value, lo, hi, ...more]) => [`L${layer}N${neuron}`, value, ...(bounds.length ? [lo, hi] : []), ...more]),
    });
    return h(
      "section",
      { class: "strongest neurons" },
      heading(part),
      h("div", { class: "beside-list" }, picture, h("div", {}, h("p", { class: "note" }, tally, " ", save.csv(part.name, content)),
        h("div", { class: "scroll short", tabindex: 0 }, own))),
    );
  }

  /** Tokens by layer and place: a grid, a slider that shows one layer as a running line, and what is in a cell. */
  function tokens(part, page) {
    const { layers, places, cells, shade, every, across } = part;
    const last = layers.length - 1; // the rows stand from the last layer down
    const line = ([word, value]) => `${alone(word)}${shade ? ` ${number(value)}` : ""}`;
    const chip = ([word, , share], kind = "word") => {
      const text = h("span", { class: kind }, alone(word));
      text.style.setProperty("--share", `${Math.round(75 * share)}%`);
      return text;
    };
    const ofPrompt = across === "pos";
    const name = (j) => (ofPrompt ? page.words(j).map(alone).join("/") : `head ${places[j]}`);
    const layer = (i) => (/^-?\d+$/.test(layers[i]) ? `layer ${layers[i]}` : layers[i]);
    const grid = cells.map((row, i) => row.map((cell, j) => h("td", { title: cell.map(line).join("\n"), "data-row": i, "data-column": j }, cell.map((word) => chip(word)))));
    const heads = layers.map((label) => h("th", { scope: "row" }, label));
    const body = grid.map((row, i) => h("tr", {}, heads[i], row));
    const notes = [shade && `coloured by ${shade}`, every > 1 && `every ${every}th layer`].filter(Boolean).join("; ");
    const at = { row: 0, column: places.length - 1 };
    const label = h("output", {});
    const running = h("div", { class: "running" });
    const told = h("p", { class: "told", role: "status", "aria-live": "polite" });
    const slider = h("input", { type: "range", min: 0, max: last, step: 1, "aria-label": "layer", input: () => go(last - Number(slider.value), at.column) });

    /** Show one layer as a line, and what its lens says at one place. */
    function go(row, column) {
      for (const marked of [body[at.row], grid[at.row][at.column]]) marked.classList.remove("on");
      Object.assign(at, { row, column });
      for (const marked of [body[row], grid[row][column]]) marked.classList.add("on");
      slider.value = String(last - row);
      slider.setAttribute("aria-valuetext", layer(row));
      label.textContent = layer(row);
      running.replaceChildren(
        ...cells[row].map((cell, j) =>
          h("button", { type: "button", class: j === column ? "place on" : "place", "data-column": j }, h("span", { class: "asked" }, name(j)), chip(cell[0], "said")),
        ),
      );
      const where = ofPrompt ? `position ${places[column]}, ${name(column)}` : name(column);
      told.replaceChildren(h("b", {}, `${layer(row)}, ${where}: `), cells[row][column].map(line).join(", "));
    }

    const near = (event) => event.target.closest("[data-column]");
    const pointed = (event) => {
      const found = near(event);
      if (found) go(found.dataset.row === undefined ? at.row : Number(found.dataset.row), Number(found.dataset.column));
    };
    const overLine = (event) => {
      const found = near(event);
      if (found && Number(found.dataset.column) !== at.column) go(at.row, Number(found.dataset.column));
    };
    running.addEventListener("pointerover", overLine);
    running.addEventListener("focusin", overLine);
    const press = (event) => {
      const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      go(Math.max(0, Math.min(last, at.row + by[0])), Math.max(0, Math.min(places.length - 1, at.column + by[1])));
    };
    const columns = places.map((place, j) => h("th", { scope: "col" }, name(j), ofPrompt && [" ", h("span", { class: "where" }, `@${place}`)]));
    const table = h(
      "table",
      { class: "word-map", tabindex: 0, "aria-label": `${part.title}: arrow keys read the cells`, pointerover: pointed, click: pointed, keydown: press },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "layer"), columns)),
      h("tbody", {}, body),
    );
    go(0, places.length - 1);
    return h(
      "section",
      { class: "tokens" },
      heading(part),
      notes && h("p", { class: "note" }, notes),
      last > 0 && h("div", { class: "layer-line" }, h("label", {}, "Layer ", slider, " ", label), running),
      told,
      scroll(table),
    );
  }

  function parts({ unit, parts: all, more, sum, heading: whole, whole: measured }) {
    const most = largest(all.map(([, value]) => value));
    const both = all.some(([, value]) => value < 0);
    const reads = all.some(([, , from]) => from);
    const rows = all.map(([name, value, from]) =>
      h("tr", {}, h("td", { class: "site" }, name), h("td", { class: "float" }, signed(value)), h("td", { class: "bar-cell" }, bar(value, most, both)), reads && h("td", {}, from)),
    );
    if (more[0]) rows.push(h("tr", {}, h("td", {}, `${count(more[0])} more`), h("td", { class: "float" }, signed(more[1]))));
    const last = h("tr", { class: "sum" }, h("td", {}, "sum"), h("td", { class: "float" }, signed(sum)));
    const table = h("table", {}, head(["part", unit || "value", "", ...(reads ? ["reads from"] : [])]), h("tbody", {}, rows));
    const content = () => ({
      heads: ["part", save.withUnit("value", unit), ...(reads ? ["reads from"] : [])],
      rows: all.map(([name, value, from]) => [name, value, ...(reads ? [from] : [])]),
    });
    return h(
      "section",
      { class: "strongest parts" },
      h("h2", {}, "Parts ", save.csv("parts", content)),
      h("div", { class: "scroll short", tabindex: 0 }, table),
      h("table", {}, h("tbody", {}, last)),
      measured !== null && h("p", { class: "note" }, `${whole} as measured ${signed(measured)}`),
    );
  }

  function table({ title, heads, rows }) {
    const cell = ([value, lo, hi]) => [number(value, Number.isInteger(value) ? "int" : "float"), h("span", { class: "interval" }, ends(lo, hi))];
    const wide = heads.map((_, i) => i > 0 && rows.some((row) => row[i].length > 1));
    const content = () => ({
      heads: heads.flatMap((name, i) => (wide[i] ? [name, `${name}, lower end`, `${name}, upper end`] : [name])),
      rows: rows.map((row) => row.flatMap((of, i) => (i === 0 ? [of] : wide[i] ? [0, 1, 2].map((k) => of[k] ?? null) : [of[0]]))),
    });
    const body = rows.map(([name, ...values]) => h("tr", {}, h("td", {}, alone(name)), values.map((value) => h("td", { class: "float" }, cell(value)))));
    return h(
      "section",
      { class: "strongest" },
      h("h2", {}, `${title[0].toUpperCase() + title.slice(1)} `, save.csv(title, content)),
      scroll(h("table", { class: "checks" }, head(heads), h("tbody", {}, body))),
    );
  }

  const facts = ({ facts: all }) =>
    h("section", {}, h("dl", { class: "facts" }, all.map(([name, value]) => [h("dt", {}, name), h("dd", {}, atlas.prose(value))])));

  const SECTIONS = { neurons, tokens, parts, table, facts, graph: atlas.graph };

  /** All sections of one page; lines stand side by side. */
  function sections(page) {
    const { sections: all } = page.data;
    const lines = all.filter(({ kind }) => kind === "series").map(series);
    const of = (...kinds) => all.filter(({ kind }) => kinds.includes(kind)).map((part) => SECTIONS[part.kind](part, page));
    return {
      first: of("parts", "graph", "tokens"),
      lines: lines.length ? h("section", {}, h("h2", {}, "Lines"), h("div", { class: "charts" }, lines)) : null,
      neurons: of("neurons"),
      beside: of("facts", "table"),
    };
  }

  Object.assign(atlas, { sections });
})(window.atlas);
