/* Figures of kinds: which kind each head is of, of which classes the neurons of a layer are; and layers' curves by subject. */
"use strict";

(function (atlas) {
  const { h, s, number, count, href, paths, chart, save } = atlas;

  /** A colour for each of some names, by their place; what has no kind has none. */
  const PLAIN = { "first token (sink)": "sink", other: "none" };
  const classOf = (name, place) => PLAIN[name] ?? `k${place % 10}`;

  /** The legend of kinds: patches with how many there are of each. */
  function legend(names, classes, counts) {
    return h("span", { class: "legend" }, names.map((name, i) => h("span", { class: `key patch ${classes[i]}` }, `${name} ${count(counts[i])}`)));
  }

  /** What stands in a caption while nothing is read. */
  const resting = (rest) => {
    const output = h("output", {}, rest);
    return { output, tell: (text) => (output.textContent = text), rest: () => (output.textContent = rest) };
  };

  /** A capital letter for each name, none twice: its first one that is free. */
  function letters(names) {
    const taken = new Set();
    return names.map((name) => {
      const free = name in PLAIN ? undefined : [...name.toUpperCase().replace(/[^A-Z0-9]/g, "")].find((letter) => !taken.has(letter));
      taken.add(free);
      return free ?? "";
    });
  }

  /** Layers by heads, each cell in the colour of its kind with a letter of it, so that colour is not all. */
  function headKinds(table) {
    const rows = table.rows((row) => table.value("kind", row) !== null);
    if (!table.has("kind") || !rows.length) return null;
    const tally = new Map();
    for (const row of rows) tally.set(table.value("kind", row), (tally.get(table.value("kind", row)) ?? 0) + 1);
    const rank = (name) => (name in PLAIN ? -1 : tally.get(name));
    const names = [...tally.keys()].sort((a, b) => rank(b) - rank(a) || (a < b ? -1 : 1));
    const classes = names.map(classOf);
    const letter = letters(names);
    const [layers, heads] = ["layer", "head"].map((key) => [...new Set(rows.map((row) => table.value(key, row)))].sort((a, b) => a - b));
    const [wide, tall] = [Math.max(6, Math.min(26, 780 / layers.length)), Math.max(6, Math.min(20, 420 / heads.length))];
    const [left, top] = [44, 4];
    const [width, height] = [left + wide * layers.length + 4, top + tall * heads.length + 22];
    const told = resting(`${count(rows.length)} heads`);
    let armed = null;
    const cell = (row) => {
      const [layer, head, kind] = ["layer", "head", "kind"].map((key) => table.value(key, row));
      const [x, y] = [left + layers.indexOf(layer) * wide, top + heads.indexOf(head) * tall];
      const text = `${layer}.${head}: ${kind}`;
      const read = () => told.tell(text);
      const tap = (event) => {
        if (event.pointerType === "touch" && armed !== text) event.preventDefault(); // the first tap reads
        armed = text;
        read();
      };
      const sign = wide >= 11 && tall >= 11 && s("text", { class: "letter", x: x + (wide - 1) / 2, y: y + tall / 2 + 3.5, "text-anchor": "middle" }, letter[names.indexOf(kind)]);
      const box = s("rect", { x, y, width: wide - 1, height: tall - 1, class: `kind ${classes[names.indexOf(kind)]}` });
      return s("a", { href: href(table.path(row)), tabindex: -1, "aria-label": text, pointerenter: read, focus: read, click: tap }, box, sign);
    };
    const [xEvery, yEvery] = [Math.ceil(22 / wide), Math.ceil(13 / tall)];
    const svg = s(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, class: "heat", role: "group", "aria-label": "kinds of heads: layer by head", pointerleave: told.rest },
      layers.map((layer, i) => i % xEvery === 0 && s("text", { class: "tick", x: left + (i + 0.5) * wide, y: height - 7, "text-anchor": "middle" }, String(layer))),
      heads.map((head, j) => j % yEvery === 0 && s("text", { class: "tick", x: left - 6, y: top + (j + 0.5) * tall + 4, "text-anchor": "end" }, String(head))),
      rows.map(cell),
    );
    svg.style.maxWidth = `${width}px`;
    const caption = h("figcaption", {}, h("b", { title: table.meaning("kind") }, "Kinds of heads"), h("span", { class: "where" }, "layer → · head ↓"), save.svg(), told.output,
      legend(names.map((name, i) => (letter[i] ? `${name} (${letter[i]})` : name)), classes, names.map((name) => tally.get(name))));
    return h("div", { class: "kinds" }, h("figure", {}, caption, svg), h("p", { class: "note" }, `By kind: ${table.meaning("kind")}.`));
  }

  const ATYPICAL = ", atypical";

  /** The numbers of classes, each followed by its atypical one. */
  function order(names) {
    const whole = names.map((_, k) => k).filter((k) => !names[k].endsWith(ATYPICAL));
    return whole.flatMap((k) => [k, names.indexOf(names[k] + ATYPICAL)]).filter((k) => k >= 0);
  }

  /** The legend of classes, each with its atypical ones, for these counts. */
  function classLegend(names, classes, counts) {
    const whole = order(names).filter((k) => !names[k].endsWith(ATYPICAL));
    const of = (k) => counts[k] + (counts[names.indexOf(names[k] + ATYPICAL)] ?? 0);
    const there = whole.filter((k) => of(k) > 0);
    const paler = names.some((name) => name.endsWith(ATYPICAL)) && h("span", { class: "where" }, "paler: the atypical of each");
    return [legend(there.map((k) => names[k]), there.map((k) => classes[k]), there.map(of)), paler];
  }

  /** Shares of classes by layer as columns that fill the height; a click opens the layer. `at` marks a layer. */
  function stacked({ title, meaning, names, classes, layers, counts, at = null }) {
    const shown = order(names).filter((k) => counts.some((row) => row[k] > 0));
    const totals = counts.map((row) => row.reduce((sum, n) => sum + n, 0));
    const [width, height, left, right, top, bottom] = [560, 230, 44, 552, 8, 206];
    const wide = (right - left) / layers.length;
    const y = (share) => bottom - share * (bottom - top);
    const told = resting("share of the neurons of each layer");
    const columns = layers.map((layer, i) => {
      let below = 0;
      const parts = shown.map((k) => {
        const [from, to] = [below, (below += counts[i][k] / totals[i])];
        return to > from && s("rect", { x: left + i * wide, width: Math.max(1, wide - 1), y: y(to), height: Math.max(0, y(from) - y(to)), class: `kind ${classes[k]}`,
          pointerenter: () => told.tell(`layer ${layer}: ${count(counts[i][k])} of ${count(totals[i])} ${names[k]} (${number((100 * counts[i][k]) / totals[i])} %)`) });
      });
      return s("a", { href: href(paths.layer(layer)), tabindex: -1, "aria-label": `layer ${layer}` }, parts, i === at && s("rect", { class: "here-box", x: left + i * wide - 0.5, y: top - 1, width: wide, height: bottom - top + 2 }));
    });
    const every = Math.ceil(layers.length / 12);
    const svg = s(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, class: "heat", role: "img", "aria-label": `${title} by layer`, pointerleave: told.rest },
      [0, 0.5, 1].map((share) => s("text", { class: "tick", x: left - 6, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`)),
      layers.map((layer, i) => i % every === 0 && s("text", { class: "tick", x: left + (i + 0.5) * wide, y: height - 6, "text-anchor": "middle" }, String(layer))),
      s("text", { class: "tick", x: left - 8, y: height - 6, "text-anchor": "end" }, "layer"),
      columns,
    );
    const all = at === null ? names.map((_, k) => counts.reduce((sum, row) => sum + row[k], 0)) : counts[at];
    const caption = h("figcaption", {}, h("b", { title: meaning }, title), save.svg(), told.output, classLegend(names, classes, all));
    return h("figure", { class: "stacked" }, caption, svg);
  }

  /** The classes of neurons by layer: one figure for each column whose numbers have names. */
  function neuronClasses(classes, described, at = null) {
    return (classes ?? []).map(({ name, names, layers, counts }) => {
      const half = names.length / 2;
      const colour = names.map((_, k) => (names[half]?.endsWith(ATYPICAL) ? `n${k % half}${k < half ? "" : " faint"}` : `k${k % 10}`));
      const title = name === "io_class" ? "What neurons do to what they read" : name.replaceAll("_", " ");
      const column = at === null ? null : layers.indexOf(at);
      return stacked({ title, meaning: described?.[name]?.meaning, names, classes: colour, layers, counts, at: column === -1 ? null : column });
    });
  }

  /** Mean over the heads of each layer of a column of shares, beside its control. */
  function headMeans(table, name, title, layers) {
    if (!table.has(name)) return null;
    const mean = (of) => layers.map((layer) => {
      const known = table.rows((row) => table.value("layer", row) === layer && table.value(of, row) !== null).map((row) => table.value(of, row));
      return known.length ? known.reduce((sum, v) => sum + v, 0) / known.length : null;
    });
    const control = table.controlOf(name);
    const series = [{ name: "mean over heads", title: table.meaning(name), values: mean(name) }];
    if (control) series.push({ name: "control", title: table.meaning(control), values: mean(control), control: true });
    return { title, note: table.described[name]?.unit ?? "", layers, series, open: (layer) => (location.hash = href(paths.layer(layer))) };
  }

  /** Sinks by layer, from the heads. */
  const SINKS = [["sink_attention", "Attention to the first token"], ["secondary_attention", "Attention to another token of the row's first half"], ["value_drain", "Value of the first token, relative to others"]];
  const sinks = (heads, layers, at = null) =>
    SINKS.map(([name, title]) => headMeans(heads, name, title, layers)).filter(Boolean).map((about) => chart.lines({ ...about, at }));

  /* By what their first column is called; what no subject knows comes last. */
  const SUBJECTS = [
    ["The residual stream", /^(resid_|attn_share|mlp_share|attn_cos|mlp_cos|block_|step_length|attn_norm|mlp_norm)/],
    ["Sinks and massive activations", /^(max_abs|median_abs|massive_|register|sink_|secondary_|turn_|first_)/],
    ["Geometry", /^(effective_rank|prompt_|top_component|curvature|rank_|row_similarity|self_similarity|anisotropy|text_entropy|unit_correlation|inertia|cka|kurtosis|collapse)/],
    ["Further", /./],
  ];

  /** Charts of layers under the headings of their subjects; `at` marks one layer in all of them. */
  function bySubject({ layers, heads }, at = null) {
    const charts = atlas.layerCharts(layers, at);
    const found = SUBJECTS.map(([subject]) => [subject, []]);
    for (const { names, figure } of charts) found[SUBJECTS.findIndex(([, fits]) => fits.test(names[0]))][1].push(figure);
    found[1][1].unshift(...sinks(heads, layers.columns.layer, at));
    return found.filter(([, figures]) => figures.length).map(([subject, figures]) => [h("h3", {}, subject), h("div", { class: "charts" }, figures)]);
  }

  /** How often the neurons of one layer fire. */
  function firingOf(firing, layer) {
    const i = firing ? firing.layers.indexOf(layer) : -1;
    if (i < 0) return null;
    const never = firing.never[i] ? `; ${count(firing.never[i])} never fire` : "";
    return chart.bars({ title: `Neurons by firing rate${never}`, meaning: "neurons by the share of tokens on which they fire", edges: firing.edges, counts: firing.counts[i], noun: "neurons", axis: "share of tokens", signed: false });
  }

  Object.assign(atlas, { figures: { headKinds, neuronClasses, bySubject, firingOf } });
})(window.atlas);
