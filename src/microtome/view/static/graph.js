/* A circuit: nodes by layer and head, edges as lines; a slider sets how many, and a click follows a node. */
"use strict";

(function (atlas) {
  const { h, s, number, count, plural, alone, save } = atlas;
  const [WIDE, TALL, LEFT, TOP] = [44, 22, 70, 16];

  function graph(part) {
    const { nodes, edges, size } = part;
    const [low, high] = [Math.min(...nodes.map((n) => n[1])), Math.max(...nodes.map((n) => n[1]))];
    const columns = Math.max(...nodes.map((n) => n[2]));
    const at = nodes.map(([, layer, column]) => [LEFT + column * WIDE, TOP + (high - layer) * TALL]);
    const most = Math.max(...edges.map((edge) => Math.abs(edge[3]))) || 1;
    const known = edges.some((edge) => edge[4] !== null);
    const into = ([, v, slot]) => (slot === "in" ? nodes[v][0] : `${nodes[v][0]} ${slot}`);
    const named = (edge) => `${alone(nodes[edge[0]][0])} → ${alone(into(edge))}`;
    let shown = Math.min(edges.length, 100);
    let followed = null; // the node that is followed, and all that it reaches or that reaches it
    const [lines, dots] = [s("g", {}), s("g", {})];
    const tally = h("p", { class: "note", role: "status" });
    const body = h("tbody", {});

    /** The edges on ways through a node, both ways along those that are shown. */
    function ways(node, list) {
      const found = new Set();
      for (const [from, to] of [[0, 1], [1, 0]]) {
        const seen = new Set([node]);
        const left = [node];
        while (left.length) {
          const here = left.pop();
          for (const edge of list) {
            if (edge[from] !== here) continue;
            found.add(edge);
            if (!seen.has(edge[to])) left.push(edge[to]);
            seen.add(edge[to]);
          }
        }
      }
      return found;
    }

    function draw() {
      const list = edges.slice(0, shown);
      const followable = followed === null ? null : ways(followed, list);
      const chosen = followable === null ? list : list.filter((edge) => followable.has(edge));
      const inside = new Set(chosen.flatMap(([u, v]) => [u, v]));
      lines.replaceChildren(
        ...chosen.map((edge) => {
          const [[x1, y1], [x2, y2]] = [at[edge[0]], at[edge[1]]];
          const share = 0.15 + (0.85 * Math.abs(edge[3])) / most;
          const bow = x1 === x2 ? 14 + 0.12 * Math.abs(y2 - y1) : 0; // edges of one column stand beside each other
          const d = `M${x1} ${y1}Q${(x1 + x2) / 2 + bow} ${(y1 + y2) / 2} ${x2} ${y2}`;
          const place = { class: edge[3] < 0 ? "edge cold" : "edge hot", d, "stroke-opacity": share.toFixed(3) };
          const told = `${named(edge)}: ${number(edge[3])} ${part.unit}${edge[4] === null ? "" : `, exact ${number(edge[4])}`}`;
          return s("path", place, s("title", {}, told));
        }),
      );
      dots.replaceChildren(
        ...nodes.map(([name], i) => {
          const kind = `node${inside.has(i) ? "" : " out"}${followed === i ? " at" : ""}`;
          const follow = () => ((followed = followed === i ? null : i), draw());
          const press = (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), follow());
          const place = { class: kind, cx: at[i][0], cy: at[i][1], r: 5, tabindex: inside.has(i) ? 0 : -1, role: "button" };
          return s("circle", { ...place, "aria-label": name, click: follow, keydown: press }, s("title", {}, name));
        }),
      );
      const smallest = list.length ? ` of at least ${number(Math.abs(list[list.length - 1][3]))} ${part.unit}` : "";
      tally.textContent =
        `the ${count(shown)} strongest of ${plural(size, "edge")}${smallest}` +
        (followed === null ? "" : `; ${plural(chosen.length, "edge")} on ways through ${nodes[followed][0]}`);
      body.replaceChildren(
        ...chosen.slice(0, 200).map((edge) =>
          h(
            "tr",
            {},
            h("td", { class: "site" }, h("button", { type: "button", title: "follow what it reads", click: () => ((followed = edge[1]), draw()) }, named(edge))),
            h("td", { class: "float" }, number(edge[3])),
            known && h("td", { class: "float" }, number(edge[4])),
          ),
        ),
      );
    }

    const slider = h("input", {
      type: "range", min: 0, max: 1000, value: Math.round(1000 * (Math.log(shown) / (Math.log(edges.length) || 1))),
      "aria-label": "how many edges are shown",
      input: () => {
        shown = Math.max(1, Math.round(Math.exp((slider.value / 1000) * Math.log(edges.length))));
        draw();
      },
    });
    const layers = [];
    for (let layer = low; layer <= high; layer += 1) {
      const name = layer < 0 ? "embedding" : layer === high && nodes.some(([n, l]) => l === high && n === "final") ? "logits" : `layer ${layer}`;
      layers.push(s("text", { class: "tick", x: 4, y: TOP + (high - layer) * TALL + 4 }, name));
    }
    const picture = s(
      "svg",
      { class: "circuit", width: LEFT + columns * WIDE + 70, height: 2 * TOP + (high - low) * TALL, role: "group", "aria-label": part.title },
      layers,
      lines,
      dots,
    );
    const content = () => ({
      heads: ["sender", "receiver", save.withUnit(part.name, part.unit), ...(known ? ["exact"] : [])],
      rows: edges.slice(0, shown).map((edge) => [nodes[edge[0]][0], into(edge), edge[3], ...(known ? [edge[4]] : [])]),
    });
    const head = ["edge", part.unit || "value", ...(known ? ["exact"] : [])];
    draw();
    return h(
      "section",
      { class: "strongest graph" },
      h("h2", {}, part.title, " ", save.csv(part.name, content)),
      h("div", { class: "filter" }, h("label", {}, "edges ", slider), tally),
      h("p", { class: "note" }, "Heads from left to right, the MLP last. Click a node to follow it, once more to let it go."),
      h(
        "div",
        { class: "beside-list" },
        h("div", { class: "scroll", tabindex: 0 }, picture),
        h("div", { class: "scroll short", tabindex: 0 }, h("table", {}, h("thead", {}, h("tr", {}, head.map((name, i) => h("th", { scope: "col", class: i ? "float" : null }, name)))), body)),
      ),
    );
  }

  Object.assign(atlas, { graph });
})(window.atlas);
