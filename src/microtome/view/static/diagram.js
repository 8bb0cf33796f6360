/* The model as a drawing: a residual stream that attention and MLP read from and add to. */
"use strict";

(function (atlas) {
  const { s, count } = atlas;
  const STREAM = 96; // where the residual stream runs, from the top
  const TALL = 52; // a branch

  const label = (x, y, text, kind = "part-note", anchor = "start") =>
    s("text", { class: kind, x, y, "text-anchor": anchor }, text);

  const arrow = (d) => s("path", { class: "wire", d, "marker-end": "url(#tip)" });

  /** A part with its name and a note of its sizes, centred. */
  function box(x, y, width, height, name, note) {
    const [middle, base] = [x + width / 2, y + height / 2 + (note ? -3 : 4)];
    return [
      s("rect", { class: "part", x, y, width, height, rx: 3 }),
      label(middle, base, name, "part-name", "middle"),
      note && label(middle, base + 16, note, "part-note", "middle"),
    ];
  }

  /** A part that reads from the stream at its left and adds to it at its right, above the stream or below it. */
  function branch(x, y, width, name, note) {
    const above = y < STREAM;
    const [edge, sum] = [above ? y + TALL : y, x + width - 16];
    return [
      arrow(`M${x + 16} ${STREAM}V${edge}`),
      arrow(`M${sum} ${edge}V${STREAM + (above ? -9 : 9)}`),
      s("circle", { class: "sum", cx: sum, cy: STREAM, r: 7 }),
      s("path", { class: "wire", d: `M${sum - 4} ${STREAM}h8m-4 -4v8` }),
      box(x, y, width, TALL, name, note),
    ];
  }

  const tip = () =>
    s(
      "marker",
      { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto" },
      s("path", { class: "tip", d: "M0 0L8 4L0 8Z" }),
    );

  /** The drawing, from the sizes in the manifest; `model.parallel` puts both branches at the same place. */
  function diagram(model) {
    const [width, vocab, hidden] = [model.d_model, model.d_vocab, model.d_mlp].map(count);
    const grouped = model.n_kv_heads && model.n_kv_heads !== model.n_heads;
    const heads = `${count(model.n_heads)} heads of ${count(model.d_head)}`;
    return s(
      "svg",
      {
        viewBox: "0 0 1080 190",
        class: "diagram",
        role: "img",
        "aria-label": `${model.name}: embedding, ${model.n_layers} blocks of attention and MLP, norm, unembedding`,
      },
      s("defs", {}, tip()),
      s("rect", { class: "blocks", x: 246, y: 4, width: 510, height: 182, rx: 5 }),
      label(744, 24, `× ${count(model.n_layers)} blocks`, "part-name", "end"),
      s("path", { class: "stream", d: `M48 ${STREAM}H1070` }),
      s("path", { class: "stream-tip", d: `M1066 ${STREAM - 6}l12 6l-12 6z` }),
      label(0, STREAM + 4, "tokens"),
      box(72, STREAM - 28, 130, 56, "embedding", `${vocab} × ${width}`),
      branch(270, 16, 210, "attention", grouped ? `${heads}, ${count(model.n_kv_heads)} key/value` : heads),
      branch(
        model.parallel ? 270 : 500,
        122,
        210,
        model.gated ? "gated MLP" : "MLP",
        `${width} → ${hidden} → ${width}`,
      ),
      label(488, STREAM - 8, `residual stream, ${width}`),
      box(776, STREAM - 28, 70, 56, "norm"),
      box(880, STREAM - 28, 130, 56, "unembedding", `${width} × ${vocab}`),
      label(1076, STREAM - 10, "logits", "part-note", "end"),
    );
  }

  Object.assign(atlas, { diagram });
})(window.atlas);
