/* A list of the rows of a table: filtered, sorted, paged. Its state is in the address, so a view of it is a link. */
"use strict";

(function (atlas) {
  const { h, count, plural, measured, token, inText, href, query, save, Problem } = atlas;
  const ROWS = 50;
  const TOKENS = 6; // promoted tokens in a row
  const CONTEXT = 5; // tokens shown before and after words found in an example

  /**
   * Columns in groups that share their first words, for headings of two rows:
   * resid_pre_norm, resid_mid_norm, entropy -> resid (pre norm, mid norm), entropy.
   */
  function groups(names) {
    const found = [];
    for (let i = 0; i < names.length;) {
      const words = names[i].split("_");
      let [shared, end] = [0, i + 1];
      while (end < names.length && words.length > 1 && names[end].startsWith(`${words[0]}_`)) end++;
      const run = names.slice(i, end).map((name) => name.split("_"));
      const fits = (depth) => run.every((other) => other.length > depth + 1 && other[depth] === words[depth]);
      if (run.length > 1) while (fits(shared)) shared++;
      const members = run.map((other) => ({ name: other.join("_"), label: other.slice(shared).join(" ") }));
      found.push({ label: words.slice(0, shared).join(" "), members });
      i = end;
    }
    return found;
  }

  const firstHeading = (table) => (table.kind === "layers" ? "layer" : table.keys.join("."));

  /** The headings, each a link that sorts by its column: largest first, and the other way when it is already so. */
  function headings(list, names, view, places) {
    const heading = (name, label, meaning, attributes) => {
      const here = view.sort === name;
      const first = name === "address" ? "0" : "1";
      const desc = here ? (view.descending ? "0" : "1") : first;
      return h(
        "th",
        { ...attributes, scope: "col", "aria-sort": here ? (view.descending ? "descending" : "ascending") : null },
        h(
          "a",
          {
            href: list.link({ sort: name, desc, page: null }),
            id: `${list.prefix}by-${name}`,
            title: meaning,
            class: here ? "here" : null,
          },
          label,
          here && h("span", { class: "arrow", "aria-hidden": "true" }, view.descending ? "▾" : "▴"),
        ),
      );
    };
    const { table } = list;
    const grouped = groups(names);
    const top = grouped.flatMap(({ label, members }) =>
      label
        ? [h("th", { colspan: members.length, class: "group", scope: "colgroup" }, label)]
        : members.map(({ name, label: own }) => heading(name, own, table.meaning(name), { rowspan: 2 })),
    );
    const below = grouped
      .filter(({ label }) => label)
      .flatMap(({ members }) =>
        members.map(({ name, label }, i) => heading(name, label, table.meaning(name), { class: i ? null : "first" })),
      );
    return h(
      "thead",
      {},
      h(
        "tr",
        {},
        heading("address", firstHeading(table), "where it is in the model", { rowspan: 2, class: "address" }),
        places.length > 0 && h("th", { rowspan: 2, class: "tokens", scope: "col" }, "found in"),
        top,
        list.vocab &&
          table.has("promoted") &&
          h("th", { rowspan: 2, class: "tokens", scope: "col", title: table.meaning("promoted") }, "promotes"),
      ),
      h("tr", {}, below),
    );
  }

  /** The first tokens that a neuron promotes, before them those that were searched for. */
  function tokens({ table, vocab }, row, found) {
    const ids = table.value("promoted", row) || [];
    const first = [...ids.filter((id) => found.has(id)), ...ids.filter((id) => !found.has(id))].slice(0, TOKENS);
    return first.map((id) => [token(vocab[id], found.has(id) ? "token hit" : "token"), " "]);
  }

  /** Where a row has the words that were searched for. */
  function foundIn(list, row, { promotes, suppresses, example, name }) {
    const { vocab, words } = list;
    return [
      promotes && "what it promotes ",
      suppresses.length > 0 && ["what it suppresses: ", suppresses.map((id) => token(vocab[id], "token hit")), " "],
      name && `${name.replaceAll("_", " ")} `,
      example?.peak && "its peak: ",
      example &&
        h("span", { class: "context" }, "… ", contextOf(words.tokens, example.first - CONTEXT, example.first),
          h("mark", {}, contextOf(words.tokens, example.first, example.last + 1)),
          contextOf(words.tokens, example.last + 1, example.last + 1 + CONTEXT), " …"),
    ];
  }

  const contextOf = (tokens, from, to) => tokens.slice(Math.max(0, from), to).map(inText).join("");

  function line(list, names, row, { tokens: found, places }) {
    const { table, vocab } = list;
    return h(
      "tr",
      { class: list.here === row ? "here" : null },
      h("th", { scope: "row", class: "address" }, h("a", { href: href(table.path(row)) }, table.address(row))),
      places.length > 0 && h("td", { class: "found" }, places.map((where) => foundIn(list, row, where(row)))),
      names.map((name) =>
        h(
          "td",
          { class: table.types[name] },
          measured(table.value(name, row), table.types[name], table.bounds(name, row)),
        ),
      ),
      vocab && table.has("promoted") && h("td", { class: "tokens" }, tokens(list, row, found)),
    );
  }

  /** The state of a list, from the address. */
  function read(list, params) {
    const get = (key) => params.get(list.prefix + key);
    const sort = get("sort") ?? (get("q") ? "address" : list.sort);
    const known = sort === "address" || (list.table.has(sort) && list.table.types[sort] !== "list");
    const [page, desc] = [get("page"), get("desc")];
    const unknown = [...params.keys()].filter((key) => !/^(heads-)?(q|sort|desc|page)$/.test(key));
    return {
      query: get("q") ?? "",
      sort: known ? sort : "address",
      chosen: get("sort") !== null,
      descending: get("sort") === null ? sort !== "address" && list.descending : desc === "1",
      page: Math.max(1, parseInt(page, 10) || 1),
      complaints: [
        !known && `There is no column "${sort}" to sort by.`,
        page !== null && !/^[1-9]\d*$/.test(page) && `Cannot read the page "${page}": this is the first.`,
        desc !== null && !/^[01]$/.test(desc) && `Cannot read desc="${desc}": it is 0 or 1.`,
        unknown.length > 0 && `The address says "${unknown[0]}", which no list here knows; it may say q, sort, desc, page.`,
      ],
    };
  }

  /** How a list is sorted, in words. */
  function orderOf({ sort, descending }) {
    if (sort === "address") return "in the order of the model; a heading sorts";
    return `by ${sort.replaceAll("_", " ")}, ${descending ? "largest" : "smallest"} first; a heading sorts`;
  }

  function pager(list, page, pages) {
    if (pages < 2) return null;
    const near = [...new Set([1, page - 2, page - 1, page, page + 1, page + 2, pages])].filter(
      (p) => p >= 1 && p <= pages,
    );
    const step = (to, label, name) =>
      to >= 1 && to <= pages
        ? h("a", { href: list.link({ page: to }), id: list.prefix + name, rel: name }, label)
        : h("span", { class: "off" }, label);
    return h(
      "nav",
      { class: "pager", "aria-label": "Pages of the list" },
      step(page - 1, "‹ previous", "prev"),
      near.map((p, i) => [
        i > 0 && p > near[i - 1] + 1 && h("span", {}, "…"),
        p === page ? h("b", { "aria-current": "page" }, count(p)) : h("a", { href: list.link({ page: p }) }, count(p)),
      ]),
      step(page + 1, "next ›", "next"),
    );
  }

  /** All rows of a list, in its order, with the ends of intervals and what it lists of each row, as values. */
  function content({ table, vocab }, rows) {
    const lists = vocab && table.has("promoted") ? ["promoted"] : [];
    const columns = [...table.keys, ...Object.keys(table.types).filter((name) => table.types[name] !== "list" && !table.keys.includes(name))];
    const unitOf = (name) => (table.keys.includes(name) ? "" : table.described[name]?.unit);
    return {
      heads: [...columns.map((name) => save.withUnit(name, unitOf(name))), ...lists],
      rows: rows.map((row) => [...columns.map((name) => table.columns[name][row]), ...lists.map((name) => (table.value(name, row) || []).map((id) => vocab[id]))]),
    };
  }

  /** The part of a list that changes as it is filtered. */
  function body(list, names) {
    const view = read(list, list.route.params);
    const { complaints } = view;
    let rows = [];
    let found = { tokens: new Set(), columns: new Set(), places: [], atPeak: new Set() };
    try {
      ({ rows, ...found } = query.search(list, view.query));
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      complaints.push(problem.message);
    }
    if (view.sort !== "address") rows = list.table.sorted(rows, view.sort, view.descending);
    else if (view.descending) rows.reverse();
    // Where nobody asked for an order, what has the words at its peak comes first.
    if (!view.chosen) rows.sort((a, b) => found.atPeak.has(b) - found.atPeak.has(a));
    const pages = Math.max(1, Math.ceil(rows.length / ROWS));
    const page = Math.min(view.page, pages);
    if (page < view.page) complaints.push(`There is no page ${count(view.page)}: this is the last of ${count(pages)}.`);
    const shown = rows.slice((page - 1) * ROWS, page * ROWS);
    const whole = plural(list.table.length, list.table.unit);
    const wide = names.length > 12 ? "wide" : null;
    return [
      h(
        "div",
        { class: "tally" },
        list.filter && h("span", { role: "status" }, view.query ? `${count(rows.length)} of ${whole}` : whole),
        rows.length > 1 && h("span", { class: "order" }, orderOf(view)),
        complaints.filter(Boolean).map((text) => h("span", { class: "complaint", role: "alert" }, text)),
        [...found.columns].map((name) =>
          h("span", {}, `"${name.replaceAll("_", " ")}" is a column: `, h("a", { href: list.link({ sort: name, desc: "1", q: null }) }, "sort by it"), `, or compare it, as in ${name}>1.`),
        ),
        view.query && list.filter && atlas.names.links(list.manifest, view.query),
        rows.length > 0 && save.csv(list.table.kind, () => content(list, rows)),
        pager(list, page, pages),
      ),
      h(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": `List of ${list.table.kind}` },
        h(
          "table",
          { class: wide },
          headings(list, names, view, found.places),
          h(
            "tbody",
            {},
            shown.map((row) => line(list, names, row, found)),
          ),
        ),
        !rows.length && !complaints.some(Boolean) && h("p", { class: "note" }, "Nothing here passes this filter."),
      ),
    ];
  }

  /** What the columns mean, for those who cannot hover. */
  function glossary(table, names) {
    const told = [...table.keys, ...names, ...table.lists].filter((name) => table.described[name]);
    if (!told.length) return null;
    return h(
      "details",
      { class: "glossary" },
      h("summary", {}, "What the columns mean"),
      h(
        "dl",
        {},
        told.map((name) => [h("dt", {}, h("code", {}, name)), h("dd", {}, table.meaning(name))]),
      ),
    );
  }

  /**
   * A list of a table.
   *   route       the page it is on, whose address keeps its state        prefix  of its parameters there
   *   sort, descending  the order when the address names none             vocab   strings of promoted tokens
   *   here        the row of the page's own unit                          filter  whether there is a filter box
   *   words       what words are searched in beside the table, if loaded  load    a function that loads it
   *   length      tokens in a row of the text                             example what may be typed into that box
   */
  function list({
    table,
    route,
    prefix = "",
    sort = "address",
    descending = true,
    vocab = null,
    here = null,
    filter = true,
    words = null,
    load = null,
    length = null,
    example: given = null,
  }) {
    const example =
      given ?? (table.kind === "neurons"
        ? 'Paris   "New York"   12.431   12.*   max>5   firing_rate<0.01'
        : table.kind === "heads"
          ? "12.3   12.*   induction>0.3"
          : "12   mlp_share>0.5");
    const own = { manifest: atlas.data.manifest, words, length, example, table, route, prefix, sort, descending: sort !== "address" && descending, vocab, here, filter };
    own.link = (changes) => {
      const params = new URLSearchParams(route.params);
      for (const [key, value] of Object.entries(changes)) {
        if (value === null || value === "") params.delete(prefix + key);
        else params.set(prefix + key, value);
      }
      return href(route.path, params);
    };
    const { names } = table;
    const part = h("div", { class: "rows" }, body(own, names));
    const type = (event) => {
      const address = own.link({ q: event.target.value, page: null });
      history.replaceState(null, "", address); // no entry in the history for every letter
      route.params = new URLSearchParams(address.split("?")[1] || "");
      draw();
    };
    const draw = async () => {
      if (load && !own.words && query.hasWords(table, read(own, route.params).query)) {
        part.replaceChildren(h("p", { class: "note", role: "status" }, "Reading the examples …"));
        own.words = await load();
      }
      part.replaceChildren(...body(own, names).filter(Boolean));
    };
    const box =
      filter &&
      h(
        "label",
        { class: "filter" },
        "Filter ",
        h("input", {
          type: "search",
          id: `${prefix}filter`,
          value: read(own, route.params).query,
          placeholder: example,
          input: type,
          spellcheck: "false",
          autocomplete: "off",
        }),
      );
    return h("section", { class: "list" }, box, part, glossary(table, names));
  }

  Object.assign(atlas, { list, groups, rowsOf: content });
})(window.atlas);
