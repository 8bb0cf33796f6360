/* What a head attends to in a short passage: a map of all tokens, and the passage itself, read token by token.
 *
 * The token under the pointer, or the one that keys or a tap chose, is the query: the tokens that it attends to are
 * shaded, each with its weight. Shades are square roots of weights, so that small ones show beside a large one.
 */
"use strict";

(function (atlas) {
  const { h, s, alone, inText, href, paths, plural } = atlas;
  const LEVELS = 255; // the byte of a weight of 1
  const SHADES = 24;
  const CELL = 10;
  const NAMED = 5; // weights in words
  const LEAST = 0.005; // that a token says below it

  /** A weight in per cent; what is below the steps of its byte is said to be so. */
  function percent(byte) {
    if (byte === 0) return "under 0.2 %";
    const share = (100 * byte) / LEVELS;
    return `${share < 9.95 ? share.toFixed(1) : Math.round(share)} %`;
  }

  /** The rows of one head: `weight(query, key)` is a byte. */
  const headOf = (bytes, head, n) => (query, key) => bytes[(head * n + query) * n + key];

  /** The cells of a map by shade, each shade one path. */
  function shades(weight, n, size) {
    const found = new Map();
    for (let query = 0; query < n; query++)
      for (let key = 0; key < n; key++) {
        const shade = Math.round(SHADES * Math.sqrt(weight(query, key) / LEVELS));
        if (shade) found.set(shade, `${found.get(shade) || ""}M${key * size} ${query * size}h${size}v${size}h-${size}z`);
      }
    return [...found].map(([shade, d]) => s("path", { class: "hot", d, "fill-opacity": (shade / SHADES).toFixed(3) }));
  }

  /** The token whose pattern is shown first: the one that attends most to anything but itself and the first token. */
  function tellingToken(weight, n) {
    let [best, most] = [n - 1, 0];
    for (let query = 2; query < n; query++)
      for (let key = 1; key < query; key++) if (weight(query, key) > most) [best, most] = [query, weight(query, key)];
    return best;
  }

  const cut = (text) => ([...text].length > 9 ? `${[...text].slice(0, 8).join("")}…` : text);

  /** The map of queries by keys, with the names of both; `at(query)` marks a row, `pick(event)` gives its query. */
  function map(weight, tokens, label) {
    const n = tokens.length;
    const [left, below] = [62, 62];
    const side = n * CELL;
    const row = s("rect", { class: "at", x: -0.5, width: side + 1, height: CELL, visibility: "hidden" });
    const name = (text, i, place) => s("text", { class: "word-tick", ...place }, cut(alone(text)));
    const svg = s(
      "svg",
      { viewBox: `${-left} -2 ${left + side + 3} ${side + below + 4}`, class: "attention-map", role: "img", "aria-label": label },
      s("rect", { class: "sheet", x: 0, y: 0, width: side, height: side }),
      shades(weight, n, CELL),
      tokens.map((text, i) => name(text, i, { x: -4, y: (i + 0.75) * CELL, "text-anchor": "end" })),
      tokens.map((text, i) => name(text, i, { transform: `translate(${(i + 0.75) * CELL} ${side + 4}) rotate(-90)`, "text-anchor": "end" })),
      row,
    );
    const box = () => svg.querySelector(".sheet").getBoundingClientRect();
    return {
      svg,
      at(query) {
        row.setAttribute("visibility", query === null ? "hidden" : "visible");
        if (query !== null) row.setAttribute("y", query * CELL);
      },
      pick(event) {
        const { top, height, left: from, width } = box();
        const query = Math.floor(((event.clientY - top) / height) * n);
        const inside = event.clientX >= from && event.clientX <= from + width && query >= 0 && query < n;
        return inside ? query : null;
      },
    };
  }

  /** One passage as its map and its tokens, of which one at a time is the query. */
  function reader(weight, { tokens, title }, name) {
    const n = tokens.length;
    const reading = h("p", { class: "reading", role: "status" });
    const back = h("p", { class: "reading note" });
    const amounts = tokens.map(() => h("span", { class: "weight" }));
    let chosen = tellingToken(weight, n);
    const words = tokens.map((text, i) =>
      h(
        "button",
        { type: "button", class: "word-button", "data-at": i, pointerenter: (e) => e.pointerType !== "touch" && show(i), focus: () => choose(i), click: () => choose(i) },
        h("span", { class: "word-text" }, alone(text)),
        amounts[i],
      ),
    );
    const picture = map(weight, tokens, `${name}, ${title}: what each token attends to`);

    function show(query) {
      picture.at(query);
      const order = tokens.map((_, key) => key).sort((a, b) => weight(query, b) - weight(query, a) || a - b);
      words.forEach((word, key) => {
        const byte = weight(query, key);
        word.style.setProperty("--share", `${Math.round(78 * Math.sqrt(byte / LEVELS))}%`);
        word.classList.toggle("query", key === query);
        word.classList.toggle("unseen", key > query && byte === 0);
        amounts[key].textContent = byte / LEVELS >= LEAST ? percent(byte).replace(" %", "") : "";
      });
      const named = order.filter((key) => weight(query, key) > 0).slice(0, NAMED);
      reading.replaceChildren(
        h("b", {}, alone(tokens[query])), ` (token ${query}) attends to `,
        ...said(named, (key) => weight(query, key), query),
      );
      const later = tokens.map((_, other) => other).filter((other) => other !== query && weight(other, query) > 0);
      later.sort((a, b) => weight(b, query) - weight(a, query) || a - b);
      back.replaceChildren(...(later.length ? ["It is attended to by ", ...said(later.slice(0, NAMED), (other) => weight(other, query), query)] : ["No other token attends to it."]));
    }

    /** Tokens with weights, in words. */
    function said(list, of, query) {
      return list.flatMap((at, i) => [i ? ", " : "", h("code", { class: "token" }, alone(tokens[at])), at === query ? " itself" : "", ` ${percent(of(at))}`]);
    }

    function choose(query) {
      chosen = query;
      words.forEach((word, i) => word.setAttribute("tabindex", i === query ? 0 : -1));
      show(query);
    }

    function press(event) {
      const to = { ArrowLeft: chosen - 1, ArrowRight: chosen + 1, ArrowUp: chosen - 1, ArrowDown: chosen + 1, Home: 0, End: n - 1 }[event.key];
      if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      words[Math.max(0, Math.min(n - 1, to))].focus();
    }

    const follow = (event) => show(picture.pick(event) ?? chosen);
    const rest = () => show(chosen);
    for (const kind of ["pointermove", "pointerdown"]) picture.svg.addEventListener(kind, follow);
    picture.svg.addEventListener("click", (event) => choose(picture.pick(event) ?? chosen));
    picture.svg.addEventListener("pointerleave", rest);
    choose(chosen);
    const passage = h("div", { class: "word-line", role: "group", "aria-label": `${title}; arrow keys move from token to token`, keydown: press, pointerleave: rest }, words);
    const caption = h("figcaption", {}, h("b", {}, "All tokens"), h("span", { class: "where" }, "attending ↓ · attended to →"), atlas.save.svg());
    return h("div", { class: "attention" }, h("div", {}, passage, reading, back), h("figure", { class: "attention-figure", "data-name": `${name} ${title}` }, caption, picture.svg));
  }

  const NOTE =
    "Point at a token, tap it or move to it with the arrow keys: what it attends to is shaded, and the numbers are per cent. " +
    "Shades are square roots of weights, which are known to within 0.2 %.";

  /** The section of a head's page; nothing where the atlas holds no patterns. */
  async function ofHead(layer, head) {
    const { patterns } = await atlas.data.model();
    if (!patterns) return null;
    const heading = h("h2", {}, "What it attends to, token by token");
    if (!(layer in patterns.heads)) return h("section", {}, heading, h("p", { class: "note" }, `No patterns of layer ${layer}: ${patterns.missing[layer] ?? "none was kept"}.`));
    const bytes = await atlas.data.patterns(layer);
    const place = h("div", {});
    const draw = (i) => {
      const { tokens } = patterns.passages[i];
      place.replaceChildren(reader(headOf(bytes[i], head, tokens.length), patterns.passages[i], `Head ${layer}.${head}`));
    };
    const choice = patterns.passages.map(({ title, meaning }, i) =>
      h("label", { title: meaning }, h("input", { type: "radio", name: "passage", checked: i === 0, change: () => draw(i) }), title),
    );
    draw(0);
    return h("section", {}, heading, patterns.passages.length > 1 && h("div", { class: "choice" }, choice), place, h("p", { class: "note" }, NOTE));
  }

  /** The heads of a layer as small maps of the first passage, each a link; nothing where there are none. */
  async function ofLayer(layer) {
    const { patterns } = await atlas.data.model();
    if (!patterns || !(layer in patterns.heads)) return null;
    const [{ title, meaning, tokens }] = patterns.passages;
    const [bytes] = await atlas.data.patterns(layer);
    const n = tokens.length;
    const one = (head) =>
      h(
        "a",
        { href: href(paths.head(layer, head)), class: "small-map" },
        s(
          "svg",
          { viewBox: `-0.5 -0.5 ${n * 3 + 1} ${n * 3 + 1}`, role: "img", "aria-label": `pattern of head ${layer}.${head}` },
          s("rect", { class: "sheet", x: 0, y: 0, width: n * 3, height: n * 3 }),
          shades(headOf(bytes, head, n), n, 3),
        ),
        h("span", {}, `${layer}.${head}`),
      );
    const heads = Array.from({ length: patterns.heads[layer] }, (_, head) => one(head));
    return [
      h("div", { class: "small-maps" }, heads),
      h("p", { class: "note", title: meaning }, `What each of the ${plural(n, "token")} of one passage (${title}) attends to: rows attend, columns are attended to. A click opens the head.`),
      h("p", { class: "note passage" }, tokens.map(inText).join("")),
    ];
  }

  Object.assign(atlas, { patterns: { ofHead, ofLayer } });
})(window.atlas);
