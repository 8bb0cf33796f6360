/* Small drawings: lines over layers, a heat map of layers, a strip that shows where one value stands among others. */
"use strict";

(function (atlas) {
  const { h, s, number, save } = atlas;

  /** Round numbers that cover a range, about `wanted` of them. */
  function ticks(low, high, wanted = 5) {
    const raw = (high - low) / wanted || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((candidate) => candidate >= raw);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++)
      found.push(Number((k * step).toPrecision(12)));
    return found;
  }

  /** Powers of ten that cover a range, with steps between where those are few. */
  function decades(low, high) {
    const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const every = Math.ceil((to - from) / 7) || 1;
    const wide = Math.log10(high / low);
    const found = [];
    for (let power = from; power <= to; power += every) {
      for (const m of wide <= 1.7 ? [1, 2, 5] : wide <= 2.7 ? [1, 3] : [1])
        found.push(Number((m * 10 ** power).toPrecision(6)));
    }
    return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  }

  const unsettled = []; // charts whose captions have no height of their own yet

  /** Keep the height that a caption has with its longest reading, so that reading a chart moves nothing. */
  function reserve(caption, longest, shortest) {
    if (unsettled.push({ caption, longest, shortest }) === 1) requestAnimationFrame(settle);
  }

  /** The heights of all captions at once: one layout of the page, not one for each. */
  function settle() {
    const all = unsettled.splice(0);
    for (const { longest } of all) longest();
    const heights = all.map(({ caption }) => caption.offsetHeight);
    all.forEach(({ caption, shortest }, i) => {
      caption.style.minHeight = `${heights[i]}px`;
      shortest();
    });
  }

  const short = (value) =>
    (value !== 0 && (Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3)
      ? value.toExponential(0).replace("e+", "e")
      : String(value)
    ).replaceAll("-", "\u2212");

  /** The vertical scale of some values: logarithmic if positive, and wanted or the only way. */
  function scale(values, top, bottom, wantLog = false) {
    let [low, high] = [Math.min(...values), Math.max(...values)];
    const log = low > 0 && high > low && (wantLog || high / low > 1e4);
    if (!log) {
      if (low > 0 && low < high * 0.6) low = 0;
      if (low === high) [low, high] = [low - 0.5, high + 0.5];
      const pad = (high - low) * 0.04;
      if (low !== 0) low -= pad;
      high += pad;
    }
    const at = log ? Math.log : (value) => value;
    const y = (value) => bottom - ((at(value) - at(low)) / (at(high) - at(low))) * (bottom - top);
    return { y, log, ticks: log ? decades(low, high) : ticks(low, high) };
  }

  /** The points of a line, with a break wherever a value is missing. */
  function path(values, x, y) {
    let pen = "M";
    return values
      .map((value, i) => {
        if (value === null) return ((pen = "M"), "");
        const point = `${pen}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = "L";
        return point;
      })
      .join("");
  }

  /** The area between two lines, in runs without missing ends. */
  function band(lo, hi, x, y) {
    const runs = [[]];
    lo.forEach((value, i) => (value === null || hi[i] === null ? runs.push([]) : runs.at(-1).push(i)));
    return runs
      .filter((run) => run.length)
      .map((run) => {
        const there = run.map((i) => `${x(i).toFixed(1)} ${y(hi[i]).toFixed(1)}`);
        const back = [...run].reverse().map((i) => `${x(i).toFixed(1)} ${y(lo[i]).toFixed(1)}`);
        return `M${[...there, ...back].join("L")}Z`;
      })
      .join("");
  }

  /** A line, with dots for the points that have no neighbour to draw it to. */
  function curve(values, kind, x, y) {
    const known = (i) => (values[i] ?? null) !== null;
    const alone = (i) => known(i) && !known(i - 1) && !known(i + 1);
    return [
      s("path", { class: `line ${kind}`, d: path(values, x, y) }),
      values.map((value, i) => alone(i) && s("circle", { class: `dot ${kind}`, cx: x(i), cy: y(value), r: 2 })),
    ];
  }

  function axes({ levels, layers, axis, x, y, left, right, height }) {
    const long = layers.some((layer) => String(layer).length > 3);
    const every = Math.ceil(layers.length / (long ? 6 : 12));
    const below = { class: "tick", y: height - 6, "text-anchor": "middle" };
    const ends = { 0: { "text-anchor": "start" }, [layers.length - 1]: { "text-anchor": "end" } };
    const inside = (i) => (long ? ends[i] : null);
    return [
      levels.map((level) => [
        s("line", { class: "grid", x1: left, x2: right, y1: y(level), y2: y(level) }),
        s("text", { class: "tick", x: left - 6, y: y(level) + 4, "text-anchor": "end" }, short(level)),
      ]),
      layers.map((layer, i) => i % every === 0 && s("text", { ...below, x: x(i), ...inside(i) }, String(layer))),
      s("text", { class: "tick", x: left - 8, y: height - 6, "text-anchor": "end" }, axis),
    ];
  }

  /**
   * Lines over layers. The legend reads out the values under the pointer, or where the arrow keys are.
   *   layers  the layer of each point           series  [{ name, title, values, lo, hi, control, beside }]
   *   log     whether ratios matter             open    what a click on a layer does, if anything
   *   axis    what the points are               note    what stands beside the title
   *   at      the point that is marked, and read out while no other is
   * Of a series, lo and hi may be null; a control is dashed; `beside` holds further values by name, which are read out.
   */
  function lines({ title, layers, series, log: wantLog, open = null, axis = "layer", note = "", at = null }) {
    const [width, height, left, right, top, bottom] = [420, 190, 44, 412, 8, 168];
    const known = series
      .flatMap(({ values, lo, hi }) => [...values, ...(lo || []), ...(hi || [])])
      .filter((v) => v !== null);
    if (!known.length)
      return h("figure", {}, h("figcaption", {}, h("b", {}, title)), h("p", { class: "note" }, "not measured"));
    const { y, log, ticks: levels } = scale(known, top, bottom, wantLog);
    const x = (i) => left + (layers.length > 1 ? (i / (layers.length - 1)) * (right - left) : (right - left) / 2);
    const guide = s("line", { class: "guide", y1: top, y2: bottom, visibility: "hidden" });
    const rest = [note, log && "log scale"].filter(Boolean).join(", ");
    const where = h("span", { class: "where" }, rest);
    const readings = series.map(() => h("output", {}));
    const own = series.filter(({ control }) => !control);
    const colour = (k) => (series[k].control ? "control" : `c${Math.min(4, own.indexOf(series[k]))}`);
    let [current, armed] = [null, null];

    function point(i) {
      current = i;
      guide.setAttribute("visibility", i === null ? "hidden" : "visible");
      where.textContent = i === null ? rest : [`${axis} ${layers[i]}`, note].filter(Boolean).join(", ");
      if (i !== null) for (const end of ["x1", "x2"]) guide.setAttribute(end, x(i));
      series.forEach(({ values, lo, hi, beside }, k) => {
        const more = Object.entries(beside || {}).map(([name, of]) => (i === null ? "" : `, ${name} ${number(of[i])}`));
        const ends =
          i !== null && lo && lo[i] !== null && hi[i] !== null ? ` [${number(lo[i])}, ${number(hi[i])}]` : "";
        readings[k].textContent = i === null ? "" : number(values[i]) + ends + more.join("");
      });
    }

    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const place = ((event.clientX - box.left) / box.width) * width;
      const i = Math.round(((place - left) / (right - left)) * (layers.length - 1));
      return Math.max(0, Math.min(layers.length - 1, i));
    }

    /** A click opens a layer; of a finger the first one on a layer reads it. */
    function tap(event, i) {
      const read = current === i && armed === i;
      armed = i;
      if (event.pointerType === "touch" && !read) point(i);
      else open?.(layers[i]);
    }

    function press(event) {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) {
        event.preventDefault();
        point(Math.max(0, Math.min(layers.length - 1, current === null ? 0 : current + step)));
      } else if (event.key === "Enter" && current !== null) open?.(layers[current]);
    }

    const svg = s(
      "svg",
      {
        viewBox: `0 0 ${width} ${height}`,
        class: open ? "lines" : "lines still",
        role: "img",
        tabindex: 0,
        "aria-label": `${title} by ${axis}; left and right arrows read values`,
        pointermove: (event) => point(nearest(event)),
        pointerleave: () => point(at),
        blur: () => point(at),
        click: (event) => tap(event, nearest(event)),
        keydown: press,
      },
      axes({ levels, layers, axis, x, y, left, right, height }),
      series.map(({ lo, hi }, k) => lo && hi && s("path", { class: `band ${colour(k)}`, d: band(lo, hi, x, y) })),
      at !== null && s("line", { class: "here-line", x1: x(at), x2: x(at), y1: top, y2: bottom }),
      guide,
      series.map(({ values }, k) => curve(values, colour(k), x, y)),
    );
    const legend = series.map(({ name, title: meaning }, k) =>
      h("span", { class: `key ${name || series.length > 1 ? colour(k) : "only"}`, title: meaning }, name, readings[k]),
    );
    const caption = h("figcaption", {}, h("b", {}, title), where, save.svg(), h("span", { class: "legend" }, legend));
    const longest = layers.map((_, i) => series.reduce((sum, { values }) => sum + number(values[i]).length, 0));
    reserve(caption, () => point(longest.indexOf(Math.max(...longest))), () => point(at));
    if (at !== null) point(at);
    return h("figure", {}, caption, svg);
  }

  const MANY = 1500; // cells from which on a map is one path a shade, read through one sheet, not one link a cell

  /** The cells of a large map, and the sheet above them that reads them: `read(cell)` on the way, `open(cell)` at a click. */
  function sheetOf(cells, place, strength, most, { read, open }) {
    const paths = new Map();
    const at = new Map();
    for (const cell of cells) {
      if (cell.text === undefined) continue;
      const { x, y, width, height } = place(cell);
      at.set(`${cell.i} ${cell.j}`, cell);
      const shade = cell.value === null ? "" : Math.ceil(40 * strength(Math.abs(cell.value) / most));
      const key = cell.value === null ? "blank" : `${cell.value < 0 ? "cold" : "hot"} ${shade}`;
      paths.set(key, `${paths.get(key) || ""}M${x.toFixed(1)} ${y.toFixed(1)}h${width.toFixed(1)}v${height.toFixed(1)}h${(-width).toFixed(1)}z`);
    }
    const corner = place({ i: 0, j: 0 });
    const step = place({ i: 1, j: 1 });
    const [wide, tall] = [step.x - corner.x, step.y - corner.y];
    const [across, down] = ["i", "j"].map((axis) => 1 + cells.reduce((last, cell) => Math.max(last, cell[axis]), 0));
    const under = (event) => {
      const { left, top, width, height } = sheet.getBoundingClientRect();
      const [i, j] = [Math.floor(((event.clientX - left) / width) * across), Math.floor(((event.clientY - top) / height) * down)];
      return at.get(`${i} ${j}`);
    };
    const on = (act) => (event) => under(event) && act(under(event), event);
    const sheet = s("rect", { class: "sheet-over", x: corner.x, y: corner.y, width: wide * across, height: tall * down, pointermove: on(read), click: on(open) });
    const drawn = [...paths].map(([key, d]) => {
      const [kind, shade] = key.split(" ");
      return s("path", { class: kind, d, "fill-opacity": shade && (0.04 + (0.96 * shade) / 40).toFixed(3) });
    });
    return [drawn, sheet];
  }

  /**
   * A heat map, layers from left to right. `cell(column, row)` gives { value, text, href } or null for a blank.
   * Strength is opacity, so that it reads on light and dark; negative values take the second colour. With `root`, it is
   * the square root of the value, for counts.
   */
  function heat({ title, meaning, columns, rows, across, down, cell, root = false }) {
    const size = Math.max(5, Math.min(20, 560 / columns.length));
    const tall = Math.max(5, Math.min(16, 300 / rows.length));
    const [left, top] = [44, 4];
    const [width, height] = [left + size * columns.length + 4, top + tall * rows.length + 20];
    const cells = columns.flatMap((column, i) => rows.map((row, j) => ({ i, j, ...cell(column, row, i, j) })));
    const most = Math.max(...cells.map(({ value }) => Math.abs(value ?? 0))) || 1;
    const rest = `0 to ${number(most, Number.isInteger(most) ? "int" : "float")}`;
    const reading = h("output", {}, rest);
    let armed = null;
    const strength = root ? Math.sqrt : (share) => share;
    const placeOf = ({ i, j }) => ({ x: left + i * size, y: top + j * tall, width: size - 1, height: tall - 1 });
    const large = () =>
      sheetOf(cells, placeOf, strength, most, {
        read: ({ text }) => (reading.textContent = text),
        open({ text, href }, event) {
          const first = event.pointerType === "touch" && armed !== text; // the first tap reads
          armed = text;
          reading.textContent = text;
          if (!first && href) location.hash = href;
        },
      });
    const draw = ({ i, j, value, text, href }) => {
      if (text === undefined) return null;
      const place = placeOf({ i, j });
      const box =
        value === null
          ? s("rect", { ...place, class: "blank" })
          : s("rect", {
              ...place,
              class: value < 0 ? "cold" : "hot",
              "fill-opacity": (0.04 + 0.96 * strength(Math.abs(value) / most)).toFixed(3),
            });
      const read = () => (reading.textContent = text);
      const tap = (event) => {
        if (event.pointerType === "touch" && armed !== text) event.preventDefault(); // the first tap reads
        armed = text;
        read();
      };
      return s("a", { href, tabindex: -1, "aria-label": text, pointerenter: read, focus: read, click: tap }, box);
    };
    const [xEvery, yEvery] = [Math.ceil(22 / size), Math.ceil(13 / tall)];
    const svg = s(
      "svg",
      {
        viewBox: `0 0 ${width} ${height}`,
        class: "heat",
        role: "group",
        "aria-label": `${title}: ${across} by ${down}`,
        pointerleave: () => (reading.textContent = rest),
      },
      columns.map(
        (column, i) =>
          i % xEvery === 0 &&
          s(
            "text",
            { class: "tick", x: left + (i + 0.5) * size, y: height - 6, "text-anchor": "middle" },
            String(column),
          ),
      ),
      rows.map(
        (row, j) =>
          j % yEvery === 0 &&
          s("text", { class: "tick", x: left - 6, y: top + (j + 0.5) * tall + 4, "text-anchor": "end" }, String(row)),
      ),
      cells.length > MANY ? large() : cells.map(draw),
    );
    const where = h("span", { class: "where" }, `${across} → · ${down} ↓`);
    const caption = h("figcaption", {}, h("b", { title: meaning }, title), where, save.svg(), reading);
    const figure = h("figure", {}, caption, svg);
    const texts = cells.map(({ text }) => text ?? "");
    const longest = texts.reduce((a, b) => (b.length > a.length ? b : a), "");
    reserve(caption, () => (reading.textContent = longest), () => (reading.textContent = rest));
    svg.style.maxWidth = `${width}px`; // not as an attribute: the policy of a single page forbids those
    figure.style.maxWidth = `${Math.max(width, 320)}px`;
    return figure;
  }

  /** A histogram of values in a line of text, with a mark at one of them; `like` are values whose scale it shares. */
  function strip(values, value, { like = null, bins = 40 } = {}) {
    const known = values.filter((v) => v !== null);
    if (!known.length) return null;
    let [low, high] = [Infinity, -Infinity];
    for (const v of like ? [...known, ...like.filter((v) => v !== null)] : known) [low, high] = [Math.min(low, v), Math.max(high, v)];
    const place = (v) => (high > low ? (v - low) / (high - low) : 0.5);
    const counts = new Array(bins).fill(0);
    for (const v of known) counts[Math.min(bins - 1, Math.floor(place(v) * bins))]++;
    const most = Math.max(...counts);
    return s(
      "svg",
      { viewBox: "0 0 164 18", class: "strip", role: "img", "aria-label": `from ${number(low)} to ${number(high)}` },
      s("title", {}, `${number(low)} to ${number(high)}`),
      counts.map(
        (n, k) =>
          n > 0 &&
          s("rect", { x: 2 + k * 4, width: 3.4, y: 17 - 15 * Math.sqrt(n / most), height: 15 * Math.sqrt(n / most) }),
      ),
      value !== null &&
        s("line", { class: "mark", x1: 2 + place(value) * 160, x2: 2 + place(value) * 160, y1: 0, y2: 18 }),
    );
  }

  /** A line over layers in a line of text, with a mark at one of them. */
  function spark(values, at, like = null) {
    const known = values.filter((v) => v !== null);
    if (!known.length) return null;
    const { y } = scale(like ? [...known, ...like.filter((v) => v !== null)] : known, 2, 16);
    const x = (i) => 3 + (values.length > 1 ? (i / (values.length - 1)) * 158 : 79);
    return s(
      "svg",
      { viewBox: "0 0 164 18", class: "spark", role: "img", "aria-label": "all layers, this one marked" },
      s("path", { d: path(values, x, y) }),
      values[at] !== null && s("circle", { cx: x(at), cy: y(values[at]), r: 2.6 }),
    );
  }

  /** Counts in bins, whose edges need not be even: bars of one width, as high as the square root of the count. */
  function bars({ title, edges, counts, meaning, noun = "tokens", axis = "activation", signed = true }) {
    const [width, height, left, right, top, bottom] = [420, 130, 8, 412, 8, 108];
    const known = counts.map((n, k) => [n, k]).filter(([n]) => n > 0).map(([, k]) => k);
    if (!known.length) return null;
    const [first, last] = [Math.max(0, known[0] - 1), Math.min(counts.length - 1, known.at(-1) + 1)];
    const step = (right - left) / (last - first + 1);
    const most = Math.sqrt(Math.max(...counts));
    const total = counts.reduce((sum, n) => sum + n, 0);
    const rest = `${total.toLocaleString("en-US")} ${noun}, square root scale`;
    const reading = h("output", {}, rest);
    const x = (k) => left + (k - first) * step;
    const range = (k) => (signed && k === 0 ? `below ${short(edges[1])}` : signed && k === counts.length - 1 ? `${short(edges[k])} or more` : `${short(edges[k])} to ${short(edges[k + 1])}`);
    const bar = (n, k) => {
      const tall = (Math.sqrt(n) / most) * (bottom - top);
      const show = () => (reading.textContent = `${range(k)}: ${n.toLocaleString("en-US")}`);
      return [
        s("rect", { x: x(k), y: bottom - tall, width: step - 1, height: tall, class: edges[k] < 0 && edges[k + 1] <= 0 ? "cold" : "hot" }),
        s("rect", { x: x(k), y: top, width: step, height: bottom - top, class: "over", pointerenter: show }),
      ];
    };
    const every = Math.ceil((last - first + 1) / 9);
    const svg = s(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, class: "bars", role: "img", "aria-label": `${title}: ${rest}`, pointerleave: () => (reading.textContent = rest) },
      s("line", { class: "grid", x1: left, x2: right, y1: bottom, y2: bottom }),
      counts.map((n, k) => k >= first && k <= last && bar(n, k)),
      edges.map((edge, k) => k > first && k <= last && (k - first) % every === 0 && s("text", { class: "tick", x: x(k), y: height - 6, "text-anchor": "middle" }, short(Number(edge.toPrecision(2))))),
    );
    return h("figure", {}, h("figcaption", {}, h("b", { title: meaning }, title), h("span", { class: "where" }, `${axis} → · ${noun} ↑`), save.svg(), reading), svg);
  }

  Object.assign(atlas, { chart: { lines, heat, strip, spark, bars } });
})(window.atlas);
