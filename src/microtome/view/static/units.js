/* The pages of one layer, one head, one neuron. */
"use strict";

(function (atlas) {
  const { h, number, count, plural, measured, token, alone, inText, href, paths, chart, Problem } = atlas;

  /** Title, address, and the neighbours of a unit; j and k follow the neighbours. */
  function top(title, site, previous, next, ...links) {
    const step = (path, label, rel) =>
      path ? h("a", { href: href(path), rel, id: `step-${rel}` }, label) : h("span", { class: "off" }, label);
    return h(
      "div",
      { class: "top-line" },
      h("h1", { tabindex: -1 }, title),
      site && h("code", { class: "site" }, site),
      h("span", { class: "links" }, links),
      h(
        "nav",
        { class: "steps", "aria-label": "Neighbours" },
        step(previous, "‹ previous", "prev"),
        step(next, "next ›", "next"),
      ),
    );
  }

  /** The share of known values below one, ties counted half, in per cent. */
  function percentile(values, value) {
    const known = values.filter((v) => v !== null);
    if (value === null || !known.length) return null;
    let [below, equal] = [0, 0];
    for (const v of known) {
      if (v < value) below++;
      else if (v === value) equal++;
    }
    return (100 * (below + equal / 2)) / known.length;
  }

  /** Every column of one row, with where it stands among the others: `stand(name)` draws that, `rank(name)` says it. */
  function standing(table, row, headingsOfStanding, stand, rank, explain = false) {
    const told = explain && table.names.some((name) => table.described[name]);
    const cells = (name) => [
      h("td", { class: "stand" }, table.isQuantity(name) && stand(name)),
      h("td", { class: "float" }, table.isQuantity(name) && rank(name)),
      told && h("td", { class: "meaning" }, table.described[name] && table.meaning(name)),
    ];
    const all = h(
      "table",
      { class: "standing" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { scope: "col" }, "measure"),
          h("th", { scope: "col", class: "float" }, "value"),
          headingsOfStanding.map((text, i) => h("th", { scope: "col", class: i ? "float" : null }, text)),
          told && h("th", { scope: "col", class: "meaning" }, "meaning"),
        ),
      ),
      h(
        "tbody",
        {},
        table.names.filter((name) => name !== atlas.names.COLUMN).map((name) =>
          h(
            "tr",
            {},
            h("th", { scope: "row", title: table.meaning(name) }, name.replaceAll("_", " ")),
            h(
              "td",
              { class: table.types[name] },
              table.described[name]?.names?.[table.value(name, row)] ?? measured(table.value(name, row), table.types[name], table.bounds(name, row)),
            ),
            cells(name),
          ),
        ),
      ),
    );
    const content = () => ({
      heads: ["measure", "unit", "value", "lower end", "upper end", headingsOfStanding.at(-1), "meaning"],
      rows: table.names.map((name) => {
        const ends = table.bounds(name, row);
        const { unit, meaning } = table.described[name] || {};
        return [name, unit, table.value(name, row), ends?.lo, ends?.hi, table.isQuantity(name) ? rank(name) : null, meaning];
      }),
    });
    return [h("div", { class: "scroll" }, all), h("p", { class: "saves" }, atlas.save.csv("measures", content))];
  }

  /** The values of what a column controls, whose scale it shares; null where it controls nothing. */
  function controlled(table, name) {
    const of = table.names.find((other) => table.controlOf(other) === name);
    return of ? table.columns[of] : null;
  }

  const percent = (value) => (value === null ? "–" : value.toFixed(1));

  function rankOf(values, value) {
    if (value === null) return "–";
    const known = values.filter((v) => v !== null);
    return `${1 + known.filter((v) => v > value).length} of ${known.length}`;
  }

  function missing(unit, address, what) {
    return new Problem(`This atlas has no ${unit} ${address}: ${what}.`);
  }

  const span = (values) =>
    values.length ? `${Math.min(...values)} to ${values.reduce((a, b) => Math.max(a, b))}` : "none";

  async function layerPage(route) {
    const { manifest, tables, neurons: counts, firing, classes } = await atlas.data.model();
    const { layers, heads } = tables;
    const layer = Number(route.parts[1]);
    const row = layers.find(layer);
    if (row < 0) throw missing("layer", route.parts[1], `its layers are ${span(layers.columns.layer)}`);
    const measuredHere = counts.find((part) => part.layer === layer);
    const own = heads.rows((r) => heads.columns.layer[r] === layer);
    const [neurons, vocab] = measuredHere
      ? await Promise.all([atlas.data.neurons(layer), atlas.data.vocab()])
      : [null, null];
    const load = () => atlas.data.words([layer]);
    const typed = route.params.get("q") ?? "";
    const words = neurons && atlas.query.hasWords(neurons, typed) ? await load() : null;
    const small = await atlas.patterns.ofLayer(layer);
    return {
      title: `Layer ${layer}`,
      content: [
        top(
          `Layer ${layer}`,
          null,
          row > 0 && layers.path(row - 1),
          row + 1 < layers.length && layers.path(row + 1),
          h("a", { href: href("/layers") }, "all layers"),
        ),
        atlas.names.banner("layers", layer),
        small && h("section", {}, h("h2", {}, "What its heads attend to"), small),
        h("section", {}, h("h2", {}, "The layer among the layers"), atlas.figures.bySubject(tables, row)),
        measuredHere &&
          h("section", {}, h("h2", {}, "Its neurons at a glance"),
            h("div", { class: "maps" }, atlas.figures.firingOf(firing, layer), atlas.figures.neuronClasses(classes, manifest.tables?.neurons?.columns, layer))),
        h(
          "section",
          {},
          h("h2", {}, "All measures of the layer"),
          standing(
            layers,
            row,
            ["across the layers", "rank"],
            (name) => chart.spark(layers.columns[name], row, controlled(layers, name)),
            (name) => rankOf(layers.columns[name], layers.value(name, row)),
            true,
          ),
        ),
        own.length > 0 &&
          h(
            "section",
            {},
            h("h2", {}, plural(own.length, "head")),
            atlas.list({ table: part(heads, own), route, prefix: "heads-", filter: false }),
          ),
        neurons &&
          h(
            "section",
            {},
            h("h2", {}, plural(neurons.length, "neuron")),
            atlas.list({
              table: neurons,
              route,
              sort: neurons.has("max") ? "max" : "address",
              vocab,
              words,
              load,
              length: manifest.text?.length,
            }),
          ),
      ],
    };
  }

  /** A table of some rows of another. */
  function part(table, rows) {
    const columns = Object.fromEntries(
      Object.entries(table.columns).map(([name, values]) => [name, rows.map((row) => values[row])]),
    );
    return new atlas.Table(table.kind, { rows: rows.length, types: table.types, columns }, table.described);
  }

  async function headPage(route) {
    const { manifest, tables } = await atlas.data.model();
    const { heads } = tables;
    const [layer, head] = route.parts[1].split(".").map(Number);
    const row = heads.find(layer, head);
    if (row < 0)
      throw missing(
        "head",
        route.parts[1],
        `its heads are ${span(heads.columns.head)} in layers ${span(heads.columns.layer)}`,
      );
    const siblings = heads.rows((r) => heads.columns.layer[r] === layer);
    const sharing = (r) => heads.has("kv_head") && heads.value("kv_head", r) === heads.value("kv_head", row);
    return {
      title: `Head ${layer}.${head}`,
      content: [
        top(
          `Head ${layer}.${head}`,
          `${layer}.attn.z[${head}]`,
          row > 0 && heads.path(row - 1),
          row + 1 < heads.length && heads.path(row + 1),
          h("a", { href: href(paths.layer(layer)) }, `layer ${layer}`),
          h("a", { href: href("/heads") }, "all heads"),
          heads.has("kind") && h("span", { class: "of-kind", title: heads.meaning("kind") }, heads.value("kind", row)),
        ),
        atlas.names.banner("heads", layer, head),
        await atlas.patterns.ofHead(layer, head),
        h(
          "section",
          {},
          h("h2", {}, `The head among the ${count(heads.length)} heads of the model`),
          standing(
            heads,
            row,
            ["among all heads", "percentile"],
            (name) => chart.strip(heads.columns[name], heads.value(name, row), { like: controlled(heads, name) }),
            (name) => percent(percentile(heads.columns[name], heads.value(name, row))),
            true,
          ),
        ),
        atlas.relationsOfHead(manifest, heads, row),
        h(
          "section",
          {},
          h("h2", {}, `The heads of layer ${layer}`),
          siblings.some((r) => r !== row && sharing(r)) &&
            h(
              "p",
              { class: "note" },
              "Shares its keys and values with ",
              siblings
                .filter((r) => r !== row && sharing(r))
                .flatMap((r, i) => [i ? ", " : "", h("a", { href: href(heads.path(r)) }, heads.address(r))]),
              ".",
            ),
          atlas.list({ table: part(heads, siblings), route, here: siblings.indexOf(row), filter: false }),
        ),
      ],
    };
  }

  /** Tokens with the size of their effect, as bars. */
  function effects(title, meaning, ids, logits, vocab) {
    if (!ids?.length) return null;
    const most = Math.max(...(logits || []).map((value) => Math.abs(value ?? 0))) || 1;
    return h(
      "div",
      {},
      h("h2", { title: meaning }, title),
      h(
        "ol",
        { class: "effects" },
        ids.map((id, i) =>
          h(
            "li",
            {},
            token(vocab[id]),
            h("span", { class: "amount" }, number(logits?.[i] ?? null)),
            h("span", { class: "bar", style: `width:${((100 * Math.abs(logits?.[i] ?? 0)) / most).toFixed(1)}%` }),
          ),
        ),
      ),
    );
  }

  /** A token of an example, shaded by the neuron's activation there: `share` is in hundredths of the passage's peak. */
  function shaded(word, share, { value, most }, peak) {
    const text = peak && /^\s*$/.test(word) ? alone(word) : inText(word);
    const amount = share === null ? null : (share / 100) * Math.abs(value);
    const title = amount === null ? null : `${JSON.stringify(word)}: ${number(peak ? value : amount)}`;
    const colour = share < 0 ? "var(--cold)" : "var(--c0)";
    const strength = Math.min(70, Math.round((70 * Math.abs(amount ?? 0)) / (most || 1)));
    const style = strength >= 3 ? `background:color-mix(in srgb, ${colour} ${strength}%, transparent)` : null;
    if (peak) return h("mark", { title: title ?? `${JSON.stringify(word)}: ${number(value)}`, style, class: style && "peak" }, text);
    return style || title ? h("span", { title, style }, text) : text;
  }

  /** One example: the tokens around its peak, never beyond its sequence. */
  async function example({ place, value, start, around, most }, { length, before }) {
    let [from, to] = atlas.query.window(place, start, length);
    const known = (i) => (around?.[i - place + before] ?? null) !== null;
    if (around) {
      while (to > place + 1 && !known(to - 1)) to--; // a row shorter than the others ends here
      while (from < place && !known(from)) from++;
    }
    const words = await atlas.data.text(from, to);
    const share = (i) => around?.[from + i - place + before] ?? null;
    return h(
      "li",
      {},
      h("span", { class: "amount", title: `token ${place} of the text` }, number(value)),
      h(
        "p",
        { class: "context" },
        from > (start ?? place) && h("span", { class: "mark" }, "… "),
        words.map((word, i) => shaded(word, share(i), { value, most }, from + i === place)),
      ),
    );
  }

  /** The examples of one kind that were kept of a neuron, in their order. */
  async function examples(columns, kind, row, text) {
    const of = (name, i) => columns[`${kind}_${name}`]?.[row]?.[i] ?? null;
    const most = Math.abs(columns.example_value?.[row]?.[0] ?? 0);
    const items = (columns[`${kind}_index`]?.[row] || []).map((place, i) =>
      example({ place, value: of("value", i), start: of("start", i), around: of("around", i), most }, text),
    );
    return items.length ? h("ol", { class: "examples" }, await Promise.all(items)) : null;
  }

  /** Where a neuron is strongest, and what it does in rows drawn at random, token by token. */
  async function passages(table, columns, row, text) {
    const meaning = (kind) => table.described[`${kind}_value`]?.meaning;
    const [top, drawn] = await Promise.all(["example", "drawn"].map((kind) => examples(columns, kind, row, text)));
    const shades = columns.example_around && h("p", { class: "note" }, "Shaded by activation: ",
      h("span", { class: "shade-hot" }, " positive "), " ", h("span", { class: "shade-cold" }, " negative "),
      ", as a share of its highest peak; point at a token for its value.");
    return [
      h("section", {}, h("h2", { title: meaning("example") }, "Where it is strongest"),
        top ?? h("p", { class: "note" }, "No examples were kept for this neuron."), top && shades),
      drawn && h("section", {}, h("h2", { title: meaning("drawn") }, "In rows drawn at random"), drawn),
    ];
  }

  const SIGNS = ["gate_pos_in_pos", "gate_pos_in_neg", "gate_neg_in_pos", "gate_neg_in_neg"];

  /** The signs of gate and input, each with how often they occur and an example: the token where the neuron is strongest. */
  async function signExamples(table, row, columns, text) {
    if (!SIGNS.every((name) => table.has(name) && table.value(name, row) !== null)) return null;
    const of = (name) => columns[`signs_${name}`]?.[row];
    const [values, places, starts] = ["value", "index", "start"].map(of);
    if (places?.length !== SIGNS.length) return null;
    const line = async (name, k) => {
      const share = table.value(name, row);
      const style = `background:color-mix(in srgb, var(--c0) ${Math.round(60 * share)}%, transparent)`;
      const [gate, input] = name.match(/pos|neg/g).map((sign) => (sign === "pos" ? "> 0" : "≤ 0"));
      const there = places[k] >= 0;
      return h("tr", {}, h("th", { scope: "row" }, `gate ${gate}, input ${input}`), h("td", { class: "float", style, title: table.meaning(name) }, `${(100 * share).toFixed(1)} %`),
        h("td", { class: "float" }, there ? number(values[k]) : "–"),
        h("td", {}, there ? await around(places[k], starts[k], text) : h("span", { class: "where" }, "never")));
    };
    const own = h("table", { class: "signs told" }, h("thead", {}, h("tr", {}, ["signs", "share of tokens", "activation", "where it is strongest with these signs"].map((label, i) => h("th", { scope: "col", class: i === 1 || i === 2 ? "float" : null }, label)))),
      h("tbody", {}, await Promise.all(SIGNS.map(line))));
    return h("section", {}, h("h2", { title: table.described.signs_value?.meaning }, "Signs of gate and input ", atlas.save.csvOf("signs of gate and input", own)), h("div", { class: "scroll" }, own));
  }

  /** A token with the words around it. */
  async function around(place, start, { length }) {
    const [from, to] = atlas.query.window(place, start, length);
    const words = await atlas.data.text(from, to);
    const text = (word, i) => (from + i === place ? h("mark", {}, /^\s*$/.test(word) ? alone(word) : inText(word)) : inText(word));
    return h("p", { class: "context" }, from > start && h("span", { class: "mark" }, "… "), words.map(text));
  }

  /** How often gate and input have which signs: a table of two by two. */
  function signs(table, row) {
    if (!SIGNS.every((name) => table.has(name) && table.value(name, row) !== null)) return null;
    const cell = (name) => {
      const share = table.value(name, row);
      const style = `background:color-mix(in srgb, var(--c0) ${Math.round(60 * share)}%, transparent)`;
      return h("td", { class: "float", title: table.meaning(name), style }, `${(100 * share).toFixed(1)} %`);
    };
    const line = (label, names) => h("tr", {}, h("th", { scope: "row" }, label), names.map(cell));
    const head = h("tr", {}, ["", "input > 0", "input < 0"].map((text) => h("th", { scope: "col" }, text)));
    const own = h("table", { class: "signs" }, h("thead", {}, head),
      h("tbody", {}, line("gate > 0", SIGNS.slice(0, 2)), line("gate < 0", SIGNS.slice(2))));
    return h("div", {}, h("h3", {}, "Signs of gate and input, share of tokens ", atlas.save.csvOf("signs of gate and input", own)), own);
  }

  /** How the activations of a neuron are distributed. */
  function distribution(table, row, columns) {
    const { bins } = table.described.histogram || {};
    const counts = columns.histogram?.[row];
    const bars = bins && counts &&
      chart.bars({ title: "Activations", edges: bins, counts, meaning: table.meaning("histogram") });
    const quadrants = columns.signs_index?.[row]?.length === SIGNS.length ? null : signs(table, row); // else they have examples
    return (bars || quadrants) && h("section", {}, h("h2", {}, "How it is distributed"), h("div", { class: "spread" }, bars, quadrants));
  }

  const KNOWN_LISTS = [
    "promoted",
    "promoted_logit",
    "suppressed",
    "suppressed_logit",
    "example_index",
    "example_value",
    "example_start",
    "example_around",
    "drawn_index",
    "drawn_value",
    "drawn_start",
    "drawn_around",
    "histogram",
    "signs_value",
    "signs_index",
    "signs_start",
  ];

  /** The tokens that a neuron promotes and suppresses. */
  function directions(table, row, columns, vocab) {
    const meaning = (name) => table.described[name]?.meaning;
    const { suppressed, promoted_logit: up, suppressed_logit: down } = columns;
    const counted = (up || down) && meaning("promoted_logit");
    return h(
      "section",
      {},
      h(
        "div",
        { class: "pair" },
        effects("Promotes", meaning("promoted"), table.value("promoted", row), up?.[row], vocab),
        effects("Suppresses", meaning("suppressed"), suppressed?.[row], down?.[row], vocab),
      ),
      counted && h("p", { class: "note" }, `Amounts in logits: ${counted}.`),
    );
  }

  /** The lists of values that no other part of the page shows. */
  function furtherLists(table, row, columns, vocab) {
    const names = Object.keys(columns).filter((name) => !KNOWN_LISTS.includes(name) && !name.startsWith("group_") && columns[name][row]);
    if (!names.length) return null;
    const told = names.map((name) => [
      h("dt", { title: table.meaning(name) }, name.replaceAll("_", " ")),
      h("dd", {}, listed(table, name, columns[name][row], vocab)),
    ]);
    return h("section", {}, h("h2", {}, "Further"), h("dl", { class: "facts" }, told));
  }

  /** A list of values: tokens as tokens, numbers as numbers. */
  function listed(table, name, values, vocab) {
    if (table.described[name]?.unit !== "token") return number(values);
    return values.filter((id) => id >= 0).map((id) => [token(vocab[id]), " "]);
  }

  async function neuronPage(route) {
    const { manifest, neurons: counts } = await atlas.data.model();
    const [layer, neuron] = route.parts[1].split(".").map(Number);
    if (!counts.some((part) => part.layer === layer))
      throw missing("neuron", route.parts[1], `layers with neurons are ${span(counts.map((part) => part.layer))}`);
    const { rows } = counts.find((part) => part.layer === layer);
    const first = neuron < rows ? atlas.data.detailsOf(layer, neuron).catch(() => null) : null; // mostly its row is its number
    const table = await atlas.data.neurons(layer);
    const row = table.find(layer, neuron);
    if (row < 0)
      throw missing("neuron", route.parts[1], `the neurons of layer ${layer} are ${span(table.columns.neuron)}`);
    const { columns, strings: vocab } = (row === neuron && (await first)) || (await atlas.data.detailsOf(layer, row));
    const here = counts.findIndex((part) => part.layer === layer);
    const across = (step) => counts[here + step] && paths.layer(counts[here + step].layer);
    return {
      title: `Neuron ${layer}.${neuron}`,
      content: [
        top(
          `Neuron ${layer}.${neuron}`,
          `${layer}.mlp.post[${neuron}]`,
          row > 0 ? table.path(row - 1) : across(-1),
          row + 1 < table.length ? table.path(row + 1) : across(1),
          h("a", { href: href(paths.layer(layer)) }, `layer ${layer}`),
          h("a", { href: href("/neurons") }, "all neurons"),
        ),
        atlas.names.banner("neurons", layer, neuron),
        h(
          "div",
          { class: "beside neuron" },
          h(
            "section",
            {},
            h("h2", {}, `The neuron among the ${count(table.length)} of its layer`),
            standing(
              table,
              row,
              ["among the layer", "percentile"],
              (name) => chart.strip(table.columns[name], table.value(name, row)),
              (name) => percent(percentile(table.columns[name], table.value(name, row))),
            ),
          ),
          h("div", {}, directions(table, row, columns, vocab), distribution(table, row, columns)),
        ),
        () => signExamples(table, row, columns, { length: manifest.text?.length }),
        await atlas.groupsOfNeuron(table, row, columns),
        () => passages(table, columns, row, { length: manifest.text?.length, before: manifest.text?.examples?.[0] ?? 0 }),
        furtherLists(table, row, columns, vocab),
      ],
    };
  }

  Object.assign(atlas, { top, layerPage, headPage, neuronPage });
})(window.atlas);
