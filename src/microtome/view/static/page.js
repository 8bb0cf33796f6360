/* The page of a result: maps of one scale with a tooltip that follows pointer and keys, their strongest cells, and the
 * sections of all that is no map. */
"use strict";

(function (atlas) {
  const { h, s, number, count, plural, token, alone, prose } = atlas;
  const data = JSON.parse(document.getElementById("data").textContent);
  const LEVELS = 60; // shades from zero to an end of the scale
  const FIRST = [6, 20]; // rows of the table before all are asked for: of each map, and of one alone
  const tip = h("div", { class: "tip", role: "status", "aria-live": "polite", hidden: true });
  const drawn = data.maps.filter((map) => map.values);
  const listed = data.maps.filter((map) => map.listed);
  const views = [];
  let shared = true; // one scale for all maps of a unit, or each its own

  const NONE = "not measured";
  const minus = (text) => text.replaceAll("-", "\u2212");
  const signed = (value) => {
    if (value === null || value === undefined) return NONE;
    const size = Math.abs(value);
    const text = value !== 0 && (size >= 1e5 || size < 1e-3) ? value.toExponential(3) : value.toPrecision(4);
    return (value > 0 ? "+" : "") + minus(text);
  };
  const plain = (value) => signed(value).replace("+", "");
  const interval = (lo, hi) => (lo === null || lo === undefined || hi === null ? "" : ` [${signed(lo)}, ${signed(hi)}]`);
  const ofEdges = (map) => map.across.startsWith("receiver");
  const hole = (map) => (ofEdges(map) ? "no edge" : NONE);
  const limit = (map) => (shared ? map.limit : map.own);
  const isSigned = (map) => data.limits[map.scale].signed;
  const ends = (map) => (isSigned(map) ? `\u2212${number(limit(map))} to +${number(limit(map))}` : `0 to ${number(limit(map))}`);

  /* Names of places. */

  const axis = (name) => (name === "pos" ? "position" : name.replaceAll("_", " "));

  const spoken = data.prompts.filter(({ tokens }) => tokens.length);
  const marked = new Set(data.marked);
  const words = (pos) => [...new Set(spoken.map(({ tokens }) => tokens[pos]))];
  const tokenNames = (pos) => words(pos).map(alone).join("/");
  const isPlace = (map) => map.by_token && spoken.length > 0;
  const numbered = (axis, name) => (/^\d+$/.test(name) ? `${axis.replace("sender ", "")} ${name}` : alone(name));
  const rowName = (map, row) => (isPlace(map) ? tokenNames(row) : numbered(map.down, map.rows[row]));
  const address = (map, row, column) =>
    map.site
      ? map.site.replace("{column}", map.columns[column]).replace("{row}", map.rows[row])
      : ofEdges(map)
        ? `${alone(map.rows[row])} → ${alone(map.columns[column])}`
        : `${map.name}, ${axis(map.down)} ${map.rows[row]}, ${axis(map.across)} ${map.columns[column]}`;

  /** What a cell is coloured by: what was measured exactly, where it was, else its own value. */
  const exact = (map, row, column) => map.beside.exact?.[row]?.[column] ?? null;

  const level = (value, most) => Math.max(1, Math.ceil((Math.min(1, Math.abs(value) / most) || 0) * LEVELS));

  /** Cells of one shade as one path, so that a map of any size is a few elements. */
  function shades(map, { left, wide, tall }) {
    const most = limit(map);
    const paths = new Map();
    const gap = wide > 6 && tall > 6 ? 1 : 0;
    map.values.forEach((values, row) =>
      values.forEach((own, column) => {
        const value = exact(map, row, column) ?? own;
        if (value === 0) return;
        const key = value === null ? "missing" : `${value < 0 ? "cold" : "hot"} ${level(value, most)}`;
        const [w, t] = [wide - gap, tall - gap];
        const box = `M${(left + column * wide).toFixed(2)} ${row * tall}h${w.toFixed(2)}v${t}h${(-w).toFixed(2)}z`;
        paths.set(key, (paths.get(key) || "") + box);
      }),
    );
    return [...paths].map(([key, d]) => {
      const [kind, shade] = key.split(" ");
      return s("path", { class: kind, d, "fill-opacity": shade && (Number(shade) / LEVELS).toFixed(3) });
    });
  }

  /** Frames of the cells that were measured exactly, as one path; none where every cell is what it is. */
  function frames(map, { left, wide, tall }) {
    if (!map.beside.exact) return [];
    const gap = wide > 6 && tall > 6 ? 1 : 0;
    const [w, t] = [Math.max(1, wide - gap - 1), Math.max(1, tall - gap - 1)];
    const box = (row, column) => `M${(left + column * wide + 0.5).toFixed(2)} ${row * tall + 0.5}h${w.toFixed(2)}v${t}h${(-w).toFixed(2)}z`;
    const d = map.values.flatMap((values, row) => values.map((_, column) => (exact(map, row, column) === null ? "" : box(row, column)))).join("");
    return d ? [s("path", { class: "exact", d })] : [];
  }

  const LETTER = 7.2; // pixels of a letter of a row's name
  const NAME = 24; // letters of a column's name
  const shorten = (text, most) => ([...text].length > most ? `${[...text].slice(0, most - 1).join("")}…` : text);

  /** Whether the names of the columns are words, which stand upright below their columns. */
  const turned = (map) => map.columns.length <= 60 && map.columns.some((name) => !/^[\d.-]{1,4}$|^out$/.test(name));
  const below = (map) => (turned(map) ? 10 + 6.4 * Math.min(NAME, Math.max(...map.columns.map((name) => name.length))) : 19);
  const longest = Math.max(0, ...drawn.map((map) => map.across.length), ...drawn.flatMap((map) => map.rows.map((_, row) => [...rowName(map, row)].length)));

  /** How large the cells of a map are in so many pixels, and where they begin: in all maps at one place. */
  function measure(map, width) {
    const left = Math.min(Math.ceil(longest * LETTER) + 12, Math.floor(width * 0.34));
    const wide = Math.min(24, (width - left - 1) / map.columns.length);
    const tall = Math.round(Math.max(4, Math.min(18, 900 / map.rows.length)));
    return { left, wide, tall, letters: Math.floor((left - 10) / LETTER) };
  }

  function names(map, { left, wide, tall, letters }) {
    const every = Math.max(1, Math.ceil(13 / tall));
    const digits = Math.max(...map.columns.map((column) => column.length));
    const upright = turned(map);
    const step = [1, 2, 5, 10, 20, 50, 100, 200].find((n) => n * wide >= (upright ? 12 : digits * 7 + 8)) || 500;
    const bottom = map.rows.length * tall;
    const cut = (text) => shorten(text, letters);
    return [
      map.rows.map((_, row) => {
        if (row % every) return null;
        const kind = isPlace(map) && marked.size && !marked.has(row) ? "row-name same" : "row-name";
        const place = { class: kind, x: left - 6, y: row * tall + tall / 2 + 4, "text-anchor": "end" };
        return s("text", place, cut(rowName(map, row)));
      }),
      map.columns.map((column, i) => {
        if (i % step) return null;
        const [x, y] = [left + (i + 0.5) * wide, bottom + 13];
        if (!upright) return s("text", { class: "tick", x, y, "text-anchor": "middle" }, column);
        const turn = `translate(${x + 4} ${bottom + 6}) rotate(-90)`;
        return s("text", { class: "tick", transform: turn, "text-anchor": "end" }, shorten(alone(column), NAME));
      }),
      s("text", { class: "axis-name", x: left - 6, y: bottom + 13, "text-anchor": "end" }, axis(map.across)),
    ];
  }

  /* The tooltip. */

  function tell(map, row, column, box) {
    const [value, lo, hi] = [map.values, map.lo, map.hi].map((of) => of && of[row][column]);
    const where = [`${axis(map.across)} ${map.columns[column]}`, `${axis(map.down)} ${map.rows[row]}`];
    const chips = isPlace(map) ? spoken.slice(0, words(row).length) : [];
    tip.replaceChildren(
      h("p", {}, h("b", {}, value === null ? hole(map) : signed(value)), value === null ? "" : ` ${map.unit}`, interval(lo, hi)),
      ...Object.entries(map.beside).map(([name, of]) => h("p", {}, `${name}: ${signed(of[row][column])}`)),
      h("p", {}, where.join(", ")),
      ...chips.map(({ role, tokens }) => h("p", {}, chips.length > 1 ? `${role} ` : "", token(tokens[row]))),
      h("p", { class: "where" }, map.site ? address(map, row, column) : map.title),
    );
    tip.hidden = false;
    const [w, t] = [tip.offsetWidth, tip.offsetHeight];
    const x = box.right + 10 + w > document.documentElement.clientWidth ? box.left - w - 10 : box.right + 10;
    const y = box.bottom + 10 + t > window.innerHeight ? box.top - t - 6 : box.bottom + 6;
    tip.style.left = `${Math.max(8, Math.min(x, document.documentElement.clientWidth - w - 8))}px`;
    tip.style.top = `${Math.max(4, y)}px`;
  }

  /** Point at a cell of one map; the same layer, and where there is one the same cell, is marked in the others. */
  function point(view, row, column) {
    for (const other of views) other.mark(view === other || other.map.down === view.map.down ? row : null, column, view);
    const { left, wide, tall } = view.size;
    const corner = view.svg.getBoundingClientRect();
    const [x, y] = [corner.left + left + column * wide, corner.top + row * tall];
    tell(view.map, row, column, { left: x, right: x + wide, top: y, bottom: y + tall });
  }

  function away() {
    tip.hidden = true;
    for (const view of views) view.mark(null, null, view);
  }

  function show(map) {
    const column = s("rect", { class: "column", visibility: "hidden" });
    const at = s("rect", { class: "at", visibility: "hidden" });
    const caption = h("span", { class: "ends" });
    const same = map.title === map.name ? "" : map.name;
    const view = { map, size: null, current: null };
    const label =
      `${map.title}, ${map.down} by ${map.across}: ${plural(map.rows.length, "row")}, ` +
      `${plural(map.columns.length, "column")}. Arrow keys read the values.`;
    view.svg = s("svg", {
      class: "cells",
      role: "application",
      tabindex: 0,
      "aria-label": label,
      pointermove: (event) => follow(event),
      pointerdown: (event) => follow(event),
      pointerleave: away,
      focus: () => view.svg.matches(":focus-visible") && point(view, ...(view.current || view.best)),
      blur: away,
      keydown: (event) => press(event),
    });
    view.best = map.strongest.length ? map.strongest[0].slice(0, 2) : [0, 0];

    function follow(event) {
      const { left, wide, tall } = view.size;
      const box = view.svg.getBoundingClientRect();
      const c = Math.floor((event.clientX - box.left - left) / wide);
      const r = Math.floor((event.clientY - box.top) / tall);
      if (c < 0 || r < 0 || c >= map.columns.length || r >= map.rows.length) return away();
      view.current = [r, c];
      point(view, r, c);
    }

    function press(event) {
      const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
      const [r, c] = view.current || view.best;
      const last = map.columns.length - 1;
      if (event.key === "Escape") return away();
      const to = { Home: [r, 0], End: [r, last] }[event.key] || (steps[event.key] && [r + steps[event.key][0], c + steps[event.key][1]]);
      if (!to || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      view.current = [Math.max(0, Math.min(map.rows.length - 1, to[0])), Math.max(0, Math.min(last, to[1]))];
      point(view, ...view.current);
    }

    view.mark = (row, col, from) => {
      const { left, wide, tall } = view.size;
      const place = (rect, values) => Object.entries(values).forEach(([name, value]) => rect.setAttribute(name, value));
      const here = col !== null && col < map.columns.length && from.map.across === map.across;
      column.setAttribute("visibility", here ? "visible" : "hidden");
      at.setAttribute("visibility", here && row !== null && row < map.rows.length ? "visible" : "hidden");
      if (!here) return;
      place(column, { x: left + col * wide, y: 0, width: wide, height: map.rows.length * tall });
      if (row !== null) place(at, { x: left + col * wide - 0.5, y: row * tall - 0.5, width: wide, height: tall });
    };
    view.draw = (width) => {
      view.size = measure(map, width);
      const { left, wide, tall } = view.size;
      const [w, t] = [left + wide * map.columns.length, map.rows.length * tall];
      view.svg.setAttribute("width", Math.ceil(w) + 1);
      view.svg.setAttribute("height", t + below(map));
      caption.textContent = shared ? "" : ends(map);
      if (view.figure) view.figure.dataset.scale = `${shared ? ends(map) : ""} ${map.unit}`.trim();
      const sheet = s("rect", { class: "sheet", x: left, y: 0, width: wide * map.columns.length, height: t });
      view.svg.replaceChildren(sheet, ...shades(map, view.size), ...frames(map, view.size), ...names(map, view.size).flat().filter(Boolean), column, at);
    };
    views.push(view);
    return (view.figure = h("figure", {}, h("figcaption", {}, h("b", {}, map.title), h("code", { class: "where" }, same), caption, atlas.save.svg()), view.svg));
  }

  /* The scale. */

  function ramp(unit, { most, signed: below }) {
    const [steps, size] = [below ? 41 : 21, 5];
    const parts = Array.from({ length: steps }, (_, i) => {
      const value = below ? (i - 20) / 20 : i / 20;
      const kind = { x: i * size, y: 0, width: size, height: 12, class: value < 0 ? "cold" : "hot" };
      return s("rect", { ...kind, "fill-opacity": Math.abs(value).toFixed(3) });
    });
    const [low, high] = below ? [`\u2212${number(most)}`, `+${number(most)}`] : ["0", number(most)];
    const picture = s("svg", { width: steps * size, height: 12, role: "img", "aria-label": `from ${low} to ${high}` }, parts);
    return h("span", { class: "ramp" }, low, picture, `${high} ${unit}`);
  }

  function scale(redraw) {
    const choice = (name, on) =>
      h(
        "label",
        {},
        h("input", { type: "radio", name: "scale", checked: on, change: () => ((shared = on), redraw()) }),
        name,
      );
    const ramps = Object.entries(data.limits).map(([unit, most]) => h("span", { class: "shared" }, ramp(unit, most)));
    const holes = drawn.filter((map) => map.values.some((row) => row.includes(null))).map(hole);
    const framed = drawn.some((map) => map.beside.exact?.some((row) => row.some((value) => value !== null)));
    const frame = s("svg", { width: 18, height: 14 }, s("path", { class: "exact", d: "M1 1h16v12h-16z" }));
    const hatch = s("svg", { width: 18, height: 12 }, s("rect", { class: "missing", width: 18, height: 12 }));
    return h(
      "div",
      { class: "scale" },
      ramps,
      framed && h("span", { class: "ramp framed" }, frame, "measured exactly, in the colour of that value"),
      holes.length > 0 && h("span", { class: "ramp" }, hatch, [...new Set(holes)].join(" or ")),
      h("fieldset", {}, h("legend", {}, "Colours"), choice("one scale for all maps", true), choice("each map its own", false)),
    );
  }

  /* The strongest cells. */

  const known = (name) => data.maps.some((map) => map.strongest.some((cell) => more(map, cell)[name] !== undefined));
  const more = (map, cell) => Object.fromEntries(Object.keys(map.beside).map((name, i) => [name, cell[5 + i]]));
  const further = ["exact", "control", "difference", "from", "to", "p"].filter(known); // what is shown beside a value
  const edges = listed.every(ofEdges); // whose name says both ends
  const WANTED = { column: !edges, row: !edges, token: listed.some(isPlace) };
  const COLUMNS = [
    { name: "site", kind: "site", of: ({ map, row, column }) => address(map, row, column) },
    { name: "column", kind: "int", of: ({ map, column }) => place(map.columns[column], column) },
    { name: "row", kind: "int", of: ({ map, row }) => place(map.rows[row], row) },
    { name: "token", kind: "tokens", of: ({ map, row }) => (isPlace(map) ? tokenNames(row) : "") },
    { name: "value", kind: "float", of: ({ value }) => value },
    ...further.map((name) => ({ name, kind: "float", of: ({ told }) => told[name] ?? -Infinity })),
    { name: "size", kind: "bar-cell", of: ({ value, told }) => Math.abs(told.exact ?? value) },
  ].filter(({ name }) => WANTED[name] ?? true);
  const place = (name, at) => (/^\d+$/.test(name) ? Number(name) : (name ?? at));

  function head(name) {
    const axes = (which) => [...new Set(listed.map((map) => axis(map[which])))].join(" or ");
    return { column: axes("across"), row: axes("down"), value: further.includes("exact") ? "estimate" : "value" }[name] ?? name;
  }

  function bar(map, value) {
    const x = 60 + (58 * value) / map.limit;
    const box = { class: value < 0 ? "cold" : "hot", x: Math.min(60, x), y: 2, width: Math.abs(x - 60), height: 9 };
    return s("svg", { width: 120, height: 13, "aria-hidden": "true" }, s("rect", box), s("line", { x1: 60, x2: 60, y1: 0, y2: 13 }));
  }

  function table() {
    const all = data.maps.flatMap((map) =>
      map.strongest.map((cell, rank) => {
        const [row, column, value, lo, hi] = cell;
        return { map, rank, row, column, value, lo, hi, told: more(map, cell) };
      }),
    );
    let [by, down, only, whole] = ["size", true, "", false];
    let chosen = []; // the cells that are shown, in order
    const body = h("tbody", {});
    const tally = h("p", { class: "note", role: "status" });
    const wholeList = h("button", { class: "more", type: "button", click: () => ((whole = true), fill()) });

    function go({ map, row, column }) {
      const view = views.find((candidate) => candidate.map === map);
      view.current = [row, column];
      view.svg.scrollIntoView({ block: "center" });
      view.svg.focus({ focusVisible: true, preventScroll: true });
      point(view, row, column);
    }

    function line(cell) {
      const { map, value, lo, hi, told } = cell;
      const name = address(map, cell.row, cell.column);
      const show = { type: "button", title: "show it in its map", click: () => go(cell) };
      const cells = {
        site: map.values ? h("button", show, name) : name,
        column: map.columns[cell.column],
        row: map.rows[cell.row],
        token: isPlace(map) ? h("code", { class: "token" }, tokenNames(cell.row)) : "",
        value: [signed(value), h("span", { class: "interval" }, interval(lo, hi))],
        ...Object.fromEntries(further.map((name) => [name, signed(told[name])])),
        size: bar(map, told.exact ?? value),
      };
      return h("tr", {}, COLUMNS.map((column) => h("td", { class: column.kind }, cells[column.name])));
    }

    function fill() {
      const { of } = COLUMNS.find(({ name }) => name === by);
      const found = all.filter(({ map }) => !only || map.name === only);
      const most = FIRST[only || listed.length === 1 ? 1 : 0];
      chosen = whole ? [...found] : found.filter(({ rank }) => rank < most);
      const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      chosen.sort((a, b) => (down ? order(of(b), of(a)) : order(of(a), of(b))));
      body.replaceChildren(...chosen.map(line));
      const cells = listed.filter(({ name }) => !only || name === only).reduce((sum, { size }) => sum + size, 0);
      const each = only || listed.length === 1 ? "" : " of each map";
      tally.textContent = `the ${whole ? count(found.length) : `${most} strongest${each}`} of ${count(cells)} cells`;
      wholeList.hidden = chosen.length === found.length;
      wholeList.textContent = `Show the ${count(found.length)} strongest`;
      for (const th of heads) {
        if (th.dataset.by === by) th.setAttribute("aria-sort", down ? "descending" : "ascending");
        else th.removeAttribute("aria-sort");
      }
    }

    /** What the table shows, as values with the ends of their intervals. */
    function content() {
      const units = [...new Set(listed.map(({ unit }) => unit))];
      const unit = units.length === 1 ? units[0] : "";
      const columns = COLUMNS.filter(({ name }) => name !== "size");
      const wide = chosen.some(({ lo }) => (lo ?? null) !== null);
      const titled = (name) => (["value", ...further].includes(name) && name !== "p" ? atlas.save.withUnit(head(name), unit) : head(name));
      const own = ({ name, of }, cell) => {
        const found = of(cell);
        return name === "value" && wide ? [found, cell.lo, cell.hi] : [found === -Infinity ? null : found];
      };
      return {
        heads: columns.flatMap(({ name }) => (name === "value" && wide ? [titled(name), "lower end", "upper end"] : [titled(name)])),
        rows: chosen.map((cell) => columns.flatMap((column) => own(column, cell))),
      };
    }

    const heads = COLUMNS.map(({ name, kind }) => {
      const turn = () => ([by, down] = by === name ? [by, !down] : [name, name === "value" || name === "size"]);
      const press = { type: "button", click: () => (turn(), fill()) };
      const label = name === "size" ? "size" : head(name);
      return h("th", { class: kind, scope: "col", "data-by": name }, h("button", press, label));
    });
    const options = listed.map(({ name, title }) => h("option", { value: name }, title === name ? name : `${title} (${name})`));
    const pick = h("select", { change: () => ((only = pick.value), fill()) }, h("option", { value: "" }, "all maps"), options);
    fill();
    return h(
      "section",
      { class: "strongest" },
      h("h2", {}, "Strongest cells"),
      h("div", { class: "filter" }, h("label", {}, "of ", pick), tally, atlas.save.csv("strongest cells", content)),
      h("div", { class: "scroll", tabindex: -1 }, h("table", {}, h("thead", {}, h("tr", {}, heads)), body)),
      wholeList,
    );
  }

  /* The page. */

  function prompts() {
    if (!data.prompts.length) return null;
    const chips = (tokens) => tokens.map((word, i) => token(word, marked.has(i) ? "token hit" : "token"));
    return h(
      "dl",
      { class: "prompts" },
      data.prompts.map(({ role, tokens, value }) => [
        h("dt", {}, role),
        h("dd", {}, chips(tokens), value !== null && h("span", { class: "metric" }, `${data.metric} `, h("b", {}, plain(value)))),
      ]),
    );
  }

  function footer() {
    if (!data.facts.length) return null;
    const facts = data.facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, prose(value))]);
    return h("footer", {}, h("h2", {}, "What was run"), h("dl", { class: "facts" }, facts));
  }

  const sections = atlas.sections({ data, words });
  const large = data.maps.filter((map) => !map.values);
  const figures = drawn.map(show);
  const grids = h("div", { class: "grids" }, figures);
  const redraw = () => {
    views.forEach((view, i) => figures[i].clientWidth && view.draw(figures[i].clientWidth));
    for (const ramps of document.querySelectorAll(".shared")) ramps.hidden = !shared;
  };
  const hatch = s(
    "pattern",
    { id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    s("path", { d: "M0 0V5" }),
  );
  document.getElementById("main").replaceChildren(
    ...[
      h("h1", {}, data.title),
      h("p", { class: "lede" }, prose(data.lede)),
      prompts(),
      sections.first,
      drawn.length > 0 && scale(redraw),
      grids,
      sections.lines,
      sections.neurons,
      large.map(({ title, name, size }) => h("p", { class: "note" }, `${title === name ? name : `${title} (${name})`} has ${count(size)} cells, too many to draw: its strongest are listed.`)),
      data.not_drawn.length > 0 && h("p", { class: "note" }, `Not drawn: ${data.not_drawn.join("; ")}.`),
      listed.length > 0
        ? h("div", { class: "below" }, table(), h("div", {}, sections.beside, footer()))
        : [sections.beside, footer()],
      s("svg", { class: "defs", "aria-hidden": "true" }, hatch),
    ]
      .flat(Infinity)
      .filter(Boolean),
  );
  document.body.append(tip);
  redraw();
  new ResizeObserver(redraw).observe(grids);
  const followScroll = () => {
    const view = views.find(({ svg, current }) => current && svg === document.activeElement);
    if (view && !tip.hidden) point(view, ...view.current);
    else tip.hidden = true;
  };
  window.addEventListener("scroll", followScroll, { passive: true });
})(window.atlas);
