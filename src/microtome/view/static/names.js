/* What things are called: the labels of the user, which are no part of what was measured, and groups and relations.
 *
 * Every name becomes a text node or an encoded part of an address, so none can become markup or another address.
 */
"use strict";

(function (atlas) {
  const { h, href, paths } = atlas;
  const COLUMN = "your_label"; // in lists, beside what was measured
  const SITES = {
    layers: (layer) => `${layer}.resid_post`,
    heads: (layer, head) => `${layer}.attn.z[${head}]`,
    neurons: (layer, neuron) => `${layer}.mlp.post[${neuron}]`,
  };
  const FORMS = [
    [/^(\d+)\.mlp\.post\[(\d+)\]$/, "neuron"],
    [/^(\d+)\.attn\.z\[(\d+)\]$/, "head"],
    [/^(\d+)\.resid_post$/, "layer"],
  ];

  paths.group = (name) => `/group/${encodeURIComponent(name)}`;
  paths.relation = (name) => `/relation/${encodeURIComponent(name)}`;

  let labels = new Map(); // site -> { label, note }

  /** Read the labels, once; an atlas without the file has none. */
  async function load() {
    const found = await atlas.data.load("labels").catch(() => ({}));
    labels = new Map(Object.entries(found));
  }

  /** The label of a unit, or undefined. */
  const labelOf = (kind, ...place) => labels.get(SITES[kind](...place));

  /** The columns of a table with the user's labels as one of them, where a unit of its kind has one. */
  function labelled(kind, raw) {
    const pattern = FORMS.find(([, unit]) => `${unit}s` === kind)?.[0];
    if (!pattern || ![...labels.keys()].some((site) => pattern.test(site))) return raw;
    const unit = raw.columns[kind.replace(/s$/, "")];
    const values = raw.columns.layer.map((layer, row) => labelOf(kind, layer, unit[row])?.label ?? "");
    return { ...raw, types: { [COLUMN]: "text", ...raw.types }, columns: { [COLUMN]: values, ...raw.columns } };
  }

  /** What a user called a unit, for the head of its page. */
  function banner(kind, ...place) {
    const found = labelOf(kind, ...place);
    if (!found) return null;
    return h(
      "p",
      { class: "your-label" },
      h("span", { class: "note" }, "Your label "),
      h("b", {}, found.label),
      found.note && h("span", { class: "note" }, ` ${found.note}`),
    );
  }

  /** The page of a labelled unit; null for another site, which has none. */
  function pageOf(site) {
    for (const [pattern, unit] of FORMS) {
      const found = pattern.exec(site);
      if (found) return { path: paths[unit](...found.slice(1)), title: `${unit} ${found.slice(1).join(".")}` };
    }
    return null;
  }

  /** The pages whose name has some words: groups, relations, and units by their labels. */
  function find(manifest, words) {
    const text = words.replaceAll('"', "").trim().toLowerCase();
    if (text.length < 2) return [];
    const has = (name) => name.toLowerCase().includes(text);
    const named = (names, kind) => names.filter(has).map((name) => ({ kind, name, path: paths[kind](name) }));
    const own = [...labels]
      .filter(([, { label, note }]) => has(label) || has(note))
      .flatMap(([site, { label }]) => (pageOf(site) ? [{ kind: pageOf(site).title, name: label, path: pageOf(site).path }] : []));
    const groups = manifest.text?.groups || [];
    return [...named(groups.length > 1 ? groups : [], "group"), ...named(Object.keys(manifest.relations || {}), "relation"), ...own];
  }

  const MOST = 8;

  /** Those pages as links. */
  function links(manifest, words) {
    const found = find(manifest, words);
    if (!found.length) return null;
    const more = found.length > MOST && ` and ${found.length - MOST} more`;
    return h(
      "span",
      { class: "named", role: "status" },
      "By that name: ",
      found.slice(0, MOST).map(({ kind, name, path }, i) => [i > 0 && ", ", `${kind} `, h("a", { href: href(path) }, name)]),
      more,
    );
  }

  /** The list of everything that a user labelled. */
  function labelsList() {
    if (!labels.size) return null;
    const line = ([site, { label, note }]) => {
      const page = pageOf(site);
      const name = page ? h("a", { href: href(page.path) }, page.title) : h("code", {}, site);
      return h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, label), h("td", { class: "note" }, note));
    };
    return h(
      "section",
      {},
      h("h2", {}, "Your labels"),
      h("div", { class: "scroll" }, h("table", { class: "labels" }, h("tbody", {}, [...labels].map(line)))),
      h("p", { class: "note" }, "Yours, and no part of what was measured: they are kept apart, and stand in the next atlas of this model too."),
    );
  }

  /** The rooms of the atlas that not every one has, in the line of the others. */
  function rooms(manifest) {
    const nav = document.querySelector("header nav");
    const there = { groups: manifest?.text?.groups?.length > 1, relations: Object.keys(manifest?.relations || {}).length > 0 };
    for (const [room, has] of Object.entries(there))
      if (has && !nav.querySelector(`[href="#/${room}"]`))
        nav.append(h("a", { href: `#/${room}` }, room[0].toUpperCase() + room.slice(1)));
  }

  Object.assign(atlas, { names: { COLUMN, load, labelled, banner, links, find, labelsList, rooms } });
})(window.atlas);
