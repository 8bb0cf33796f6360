/* The overview: the model's shape, what was run, and every layer and head at a glance. */
"use strict";

(function (atlas) {
  const { h, number, count, plural, measured, href, paths, chart } = atlas;

  /** A column as a heading: its title, else its name. */
  const heading = (table, name) => {
    const words = table.described[name]?.title || name.replaceAll("_", " ");
    return words.charAt(0).toUpperCase() + words.slice(1);
  };

  /**
   * The charts of a table: columns that the manifest gives one `chart` are drawn together, in the order they stand, with
   * their `title` as labels; a column without one gets a chart of its own.
   */
  function grouped(table) {
    const found = new Map();
    for (const name of table.quantities()) {
      if (!table.columns[name].some((value) => value !== null)) continue;
      const { chart: title, log } = table.described[name] || {};
      const one = title ? found.get(title) || { title, names: [], log: false } : { title: heading(table, name), names: [], log: false };
      one.names.push(name);
      one.log ||= Boolean(log);
      found.set(title || ` ${name}`, one);
    }
    return [...found.values()];
  }

  /** A chart for each group of columns, with their names: { names, figure }; `at` is the row of a marked layer. */
  function layerCharts(table, at = null) {
    return grouped(table).map(({ title, names, log }) => {
      const own = Object.fromEntries(
        atlas.groups(names).flatMap(({ members }) => members.map(({ name, label }) => [name, label])),
      );
      const series = names.flatMap((name) => {
        const label = names.length > 1 ? table.described[name]?.title || own[name] : ""; // alone it is what the title says
        const alone = !label && table.controlOf(name) ? heading(table, name).toLowerCase() : label;
        const line = { name: alone, title: `${name}: ${table.meaning(name)}`, values: table.columns[name] };
        const ends = table.hasInterval(name) ? { lo: table.columns[`${name}_lo`], hi: table.columns[`${name}_hi`] } : {};
        const control = table.controlOf(name);
        if (!control) return [{ ...line, ...ends }];
        const beside = { name: `${label} control`.trim(), title: table.meaning(control), control: true };
        return [{ ...line, ...ends }, { ...beside, values: table.columns[control] }];
      });
      const open = (layer) => (location.hash = href(paths.layer(layer)));
      const units = [...new Set(names.map((name) => table.described[name]?.unit))];
      const note = units.length === 1 && units[0] && units[0] !== "1" ? units[0] : "";
      return { names, figure: chart.lines({ title, log, layers: table.columns.layer, open, series, note, at }) };
    });
  }

  /** What a cell says beside its value: the control and the difference of both, where there are. */
  function besideValue(table, name, row) {
    const [control, difference] = [table.controlOf(name), table.differenceOf(name)];
    const told = (of) => number(table.value(of, row)) + within(table.bounds(of, row));
    return (control ? `, control ${number(table.value(control, row))}` : "") + (difference ? `, difference ${told(difference)}` : "");
  }

  /** The ends of an interval with a space before; nothing where one is missing. */
  function within(ends) {
    return ends && ends.lo !== null && ends.hi !== null ? ` [${number(ends.lo)}, ${number(ends.hi)}]` : "";
  }

  function headMaps(table) {
    const distinct = (name) => [...new Set(table.columns[name])].sort((a, b) => a - b);
    const [columns, rows] = [distinct("layer"), distinct("head")];
    const rowOf = new Map(table.rows().map((row) => [table.address(row), row]));
    return table.quantities().filter((name) => !atlas.ofRelation(name)).map((name) =>
      chart.heat({
        title: heading(table, name),
        meaning: table.meaning(name),
        columns,
        rows,
        across: "layer",
        down: "head",
        cell(layer, head) {
          const row = rowOf.get(`${layer}.${head}`);
          if (row === undefined) return {};
          const value = table.value(name, row);
          const interval = within(table.bounds(name, row));
          const text = `${layer}.${head}: ${number(value)}${interval}${besideValue(table, name, row)}`;
          return { value, text, href: href(table.path(row)) };
        },
      }),
    );
  }

  function topHeads(table) {
    return table.quantities().filter((name) => !atlas.ofRelation(name)).map((name) => {
      const there = table.rows((row) => table.value(name, row) !== null);
      const best = table.sorted(there, name, true).slice(0, 6);
      const control = table.controlOf(name);
      const all = href("/heads", new URLSearchParams({ sort: name, desc: "1" }));
      const line = (row) =>
        h(
          "li",
          {},
          h("a", { href: href(table.path(row)) }, table.address(row)),
          " ",
          measured(table.value(name, row), "float", table.bounds(name, row)),
          control && h("span", { class: "interval", title: besideValue(table, name, row).slice(2) }, `, control ${number(table.value(control, row))}`),
        );
      const link = h("a", { href: all, title: table.meaning(name) }, heading(table, name));
      return h("div", {}, h("h3", {}, link), h("ol", { class: "top" }, best.map(line)));
    });
  }

  function firingMap({ edges, layers, never, counts }) {
    const bins = counts[0].map((_, bin) => bin).reverse();
    const total = layers.map((_, i) => never[i] + counts[i].reduce((sum, n) => sum + n, 0));
    const span = (bin) => `${number(edges[bin])} to ${number(edges[bin + 1])}`;
    return chart.heat({
      title: "Firing rate",
      meaning: "neurons of each layer by the share of tokens on which they fire",
      columns: layers,
      rows: [...bins.map((bin) => edges[bin]), "never"],
      across: "layer",
      down: "share of tokens",
      cell(layer, row) {
        const i = layers.indexOf(layer);
        const bin = edges.indexOf(row);
        const n = row === "never" ? never[i] : counts[i][bin];
        const last = bin === bins.length - 1; // the last bin holds its upper edge too
        const range = `firing_rate>0 firing_rate>=${edges[bin]} firing_rate${last ? "<=" : "<"}${edges[bin + 1]}`;
        const query = row === "never" ? "firing_rate=0" : range;
        const what = row === "never" ? "never fire" : `fire on ${span(bin)}`;
        return {
          value: n,
          text: `layer ${layer}: ${count(n)} of ${count(total[i])} ${what}`,
          href: href(paths.layer(layer), new URLSearchParams({ q: query })),
        };
      },
    });
  }

  function duration(seconds) {
    if (typeof seconds !== "number") return number(seconds);
    if (seconds < 90) return `${number(seconds)} s`;
    const minutes = Math.round(seconds / 60);
    return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  }

  function bytes(size) {
    if (typeof size !== "number") return number(size);
    const power = Math.min(4, Math.floor(Math.log2(Math.max(size, 1)) / 10));
    return `${number(size / 1024 ** power, power ? "float" : "int")} ${["bytes", "KiB", "MiB", "GiB", "TiB"][power]}`;
  }

  /** One entry of the manifest as text, by what its name says of its unit. */
  function entry(name, value) {
    if (/(^|_)seconds$/.test(name)) return duration(value);
    if (/(^|_)bytes$/.test(name)) return bytes(value);
    if (typeof value === "number")
      return Number.isInteger(value) ? (name === "seed" ? String(value) : count(value)) : number(value);
    if (/^[0-9a-f]{24,}$/i.test(value)) return h("code", { title: value }, `${value.slice(0, 16)}…`);
    if (Array.isArray(value)) return value.join(", ");
    return typeof value === "object" && value !== null ? JSON.stringify(value) : number(value);
  }

  function facts(title, values) {
    const known = Object.entries(values || {});
    if (!known.length) return null;
    return h(
      "div",
      {},
      h("h3", {}, title),
      h(
        "dl",
        { class: "facts" },
        known.map(([name, value]) => [
          h("dt", {}, name.replace(/_(bytes|seconds)$/, "").replaceAll("_", " ")),
          h("dd", {}, entry(name, value)),
        ]),
      ),
    );
  }

  /** Stages of the cost are seconds; only what is not says so in its name. */
  const inSeconds = (cost) =>
    Object.fromEntries(
      Object.entries(cost || {}).map(([name, value]) => [/(_bytes|seconds)$/.test(name) ? name : `${name}_seconds`, value]),
    );

  /** What was run, from the manifest: everything in it but the descriptions of columns. */
  function provenance(manifest) {
    const { model, text, versions, cost, tables, measures, thin, relations, ...run } = manifest;
    const flat = Object.entries(run).filter(([, value]) => typeof value !== "object" || value === null);
    const rest = Object.entries(run).filter(
      ([, value]) => typeof value === "object" && value !== null && !Array.isArray(value),
    );
    const columns = h(
      "div",
      { class: "columns" },
      facts("Model", model),
      facts("Text", text),
      facts("Run", Object.fromEntries(flat)),
      facts("Cost", inSeconds(cost)),
      facts("Versions", versions),
      rest.map(([name, value]) => facts(name.replaceAll("_", " "), value)),
    );
    return [columns, measuresTable(measures)];
  }

  /** What each measure asks, of what it was read, and where it comes from. */
  function measuresTable(measures) {
    const all = Object.entries(measures || {});
    if (!all.length) return null;
    const head = ["measure", "what it asks", "read on", "from"].map((text) => h("th", { scope: "col" }, text));
    const row = ([name, { question, looked_at: on, source }]) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, name.replaceAll("_", " ")),
        [question, on, source].map((text) => h("td", {}, atlas.prose(text ?? ""))),
      );
    const own = h("table", { class: "measures" }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, all.map(row)));
    return [h("h3", {}, "Measures ", atlas.save.csvOf("measures", own)), h("div", { class: "scroll" }, own)];
  }

  async function overview() {
    const { manifest, layers, heads, firing, classes, neurons, tables } = await atlas.data.model();
    const model = manifest.model || {};
    const { thin } = manifest;
    const total = neurons.reduce((sum, { rows }) => sum + rows, 0);
    const link = (path, label) => h("a", { href: href(path) }, label);
    return {
      title: null,
      content: [
        h("h1", { tabindex: -1 }, model.name || "A model"),
        h(
          "p",
          { class: "lede" },
          [
            model.parameters && `${count(model.parameters)} parameters`,
            link("/layers", plural(layers.rows, "layer")),
            link("/heads", plural(heads.rows, "head")),
            link("/neurons", plural(total, "neuron")),
            manifest.text?.tokens && `measured on ${plural(manifest.text.tokens, "token")}`,
            manifest.loss !== undefined && `loss ${number(manifest.loss)} nats per token`,
          ]
            .filter(Boolean)
            .flatMap((part, i) => (i ? [h("span", { class: "dot" }, " · "), part] : [part])),
        ),
        thin?.length > 0 && h("p", { class: "complaint", role: "note" }, "Thin: ", thin.join(" ")),
        h("div", { class: "scroll" }, atlas.diagram(model)),
        h(
          "section",
          {},
          h("h2", {}, "Across the layers"),
          atlas.figures.bySubject(tables),
          h(
            "p",
            { class: "note" },
            "Shaded bands are 95 % intervals. A click opens the layer. ",
            link("/layers", "The same as a list"),
            ".",
          ),
        ),
        heads.rows > 0 && (() =>
          h(
            "section",
            {},
            h("h2", {}, "Heads"),
            atlas.figures.headKinds(tables.heads),
            h("div", { class: "maps" }, headMaps(tables.heads)),
            h("p", { class: "note" }, "A click opens the head. ", link("/heads", "The same as a list"), "."),
            h("div", { class: "columns" }, topHeads(tables.heads)),
          )),
        firing &&
          firing.layers.length > 0 && (() =>
          h(
            "section",
            {},
            h("h2", {}, "Neurons"),
            h("div", { class: "maps" }, firingMap(firing), atlas.figures.neuronClasses(classes, manifest.tables?.neurons?.columns)),
            h("p", { class: "note" }, "A click opens those neurons. ", link("/neurons", "All neurons as a list"), "."),
          )),
        await atlas.groupsSection(),
        atlas.relationsSection(manifest, tables.heads),
        atlas.names.labelsList(),
        () => h("section", {}, h("h2", {}, "What was run"), provenance(manifest)),
      ],
    };
  }

  Object.assign(atlas, { overview, layerCharts });
})(window.atlas);
