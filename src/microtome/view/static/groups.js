/* The groups of the text, such as languages or domains: their list, the page of each, the damage matrix, and what the page
 * of a neuron says of them. */
"use strict";

(function (atlas) {
  const { h, number, count, plural, measured, href, paths, chart, Problem } = atlas;

  let held = null;

  /** The tables of groups, once. */
  async function tables() {
    if (held) return held;
    const { manifest } = await atlas.data.model();
    const raw = await atlas.data.load("groups");
    const table = (kind) => raw[kind] && new atlas.Table(kind, raw[kind], manifest.tables?.[kind]?.columns);
    held = { groups: table("groups"), layers: table("group_layers"), damage: table("damage") };
    return held;
  }

  const link = (name) => h("a", { href: href(paths.group(name)) }, name);

  /** The rows of a damage table by the two names of each. */
  function byNames(damage) {
    const { neurons_of: of, group_name: group } = damage.columns;
    const rows = new Map(damage.rows().map((row) => [JSON.stringify([of[row], group[row]]), row]));
    return (set, name) => rows.get(JSON.stringify([set, name]));
  }

  const within = (ends) => (ends && ends.lo !== null && ends.hi !== null ? ` [${number(ends.lo)}, ${number(ends.hi)}]` : "");

  /** What a group loses without a set of neurons, in words. */
  function told(damage, row, set, name) {
    const value = (column) => number(damage.value(column, row)) + within(damage.bounds(column, row));
    return `${name} without the ${count(damage.value("neurons", row))} neurons of ${set}: ${value("damage")} nats, ` +
      `without random ones ${value("damage_random")}, difference ${value("damage_diff")}`;
  }

  /** The damage matrix as a figure; null where it was not measured. */
  function matrix({ groups, damage }) {
    if (!damage || !damage.length) return null;
    const find = byNames(damage);
    const names = groups.columns.group_name;
    return chart.matrix({
      title: "Loss without the neurons of a group",
      meaning: damage.meaning("damage"),
      rows: names.filter((set) => damage.columns.neurons_of.includes(set)),
      columns: names.filter((name) => damage.columns.group_name.includes(name)),
      down: "without",
      across: "loss of",
      cell(set, name) {
        const row = find(set, name);
        if (row === undefined) return null;
        const control = damage.value("damage_random", row);
        return {
          value: damage.value("damage", row),
          below: control === null ? null : number(control),
          text: told(damage, row, set, name),
          href: href(paths.group(set)),
        };
      },
      note: "Increase of the mean loss in nats; small: the same without random neurons of the same layers and sizes. Framed: a " +
        "group without its own neurons.",
    });
  }

  /** A table of the groups, one row each. */
  function overviewTable(groups, here = null) {
    const names = groups.names.filter((name) => name !== "group_name");
    const head = (name) =>
      h("th", { scope: "col", title: groups.meaning(name), class: groups.types[name] }, groups.described[name]?.title || name.replaceAll("_", " "));
    const line = (row) =>
      h(
        "tr",
        { class: row === here ? "here" : null },
        h("th", { scope: "row" }, link(groups.columns.group_name[row])),
        names.map((name) => h("td", { class: groups.types[name] }, measured(groups.value(name, row), groups.types[name], groups.bounds(name, row)))),
      );
    const own = h("table", { class: "groups" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "group"), names.map(head))), h("tbody", {}, groups.rows().map(line)));
    const content = () => atlas.rowsOf({ table: groups, vocab: null }, groups.rows());
    return [h("div", { class: "scroll", tabindex: 0 }, own), h("p", { class: "saves left" }, atlas.save.csv("groups", content))];
  }

  /** What is said where a group has too few tokens. */
  const undecided = (groups, row) =>
    groups.names.some((name) => groups.isQuantity(name)) &&
    groups.names.filter((name) => groups.isQuantity(name)).every((name) => groups.value(name, row) === null) &&
    h("p", { class: "complaint", role: "note" }, `Undecided: ${plural(groups.value("tokens", row), "token")} of this group were read, too few to say anything of it.`);

  /** The list of the groups. */
  async function groupsPage() {
    const found = await tables();
    if (!found.groups) throw new Problem("This atlas knows no groups of its text.");
    return {
      title: "Groups",
      content: [
        h("h1", { tabindex: -1 }, "Groups of the text"),
        overviewTable(found.groups),
        found.groups.length < 2 && h("p", { class: "note" }, "The text has one group. Several texts (--text), or a column of a table (--group-by), are compared with one another."),
        h("section", {}, matrix(found) || missingDamage(found)),
      ],
    };
  }

  function missingDamage({ groups }) {
    if (groups.length < 2) return null;
    const why = atlas.data.manifest.left_out?.damage;
    const how = why ? [`${why.replace(/\.$/, "")}.`] : [h("code", {}, "microtome atlas --add damage"), " adds it."];
    return h("p", { class: "note" }, "What each group loses without the neurons of each was not measured: ", how);
  }

  /** The part of the overview that is of groups; null for one group. */
  async function groupsSection() {
    const found = await tables().catch(() => ({}));
    if (!found.groups || found.groups.length < 2) return null;
    return h(
      "section",
      {},
      h("h2", {}, h("a", { href: href("/groups") }, "Groups of the text")),
      overviewTable(found.groups),
      matrix(found),
      h("p", { class: "note" }, "A click opens the group."),
    );
  }

  /** One row or column of the damage matrix, as a table with what each is to be compared with. */
  function damageTable(damage, title, rows, name) {
    if (!rows.length) return null;
    const columns = ["damage", "damage_random", "damage_diff"];
    const heads = ["loss rises by", "by random neurons", "difference"];
    const cell = (column, row) => h("td", { class: "float" }, measured(damage.value(column, row), "float", damage.bounds(column, row)));
    return h(
      "div",
      {},
      h("h3", {}, `${title} `, atlas.save.csv(title, () => atlas.rowsOf({ table: damage, vocab: null }, rows))),
      h(
        "div",
        { class: "scroll" },
        h(
          "table",
          { class: "groups" },
          h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "group"), columns.map((column, i) => h("th", { scope: "col", class: "float", title: damage.meaning(column) }, heads[i])))),
          h("tbody", {}, rows.map((row) => h("tr", { class: damage.value("neurons_of", row) === damage.value("group_name", row) ? "here" : null },
            h("th", { scope: "row" }, link(damage.value(name, row))), columns.map((column) => cell(column, row))))),
        ),
      ),
    );
  }

  /** Each measure of layers for one group, beside that of the whole text. */
  function layerCharts(layers, name, whole) {
    if (!layers) return [];
    const rows = layers.rows((row) => layers.columns.group_name[row] === name);
    const of = (column) => rows.map((row) => layers.columns[column][row]);
    return layers.quantities().filter((column) => of(column).some((value) => value !== null)).map((column) => {
      const ends = layers.hasInterval(column) ? { lo: of(`${column}_lo`), hi: of(`${column}_hi`) } : {};
      const series = [{ name, title: layers.meaning(column), values: of(column), ...ends }];
      if (whole.has(column)) {
        const place = rows.map((row) => whole.find(layers.columns.layer[row]));
        series.push({ name: "whole text", title: "all groups together", values: place.map((row) => whole.value(column, row)), control: true });
      }
      const { title, unit, log } = layers.described[column] || {};
      const words = [layers.described[column]?.chart, title || column.replaceAll("_", " ")].filter(Boolean).join(": ");
      return chart.lines({ title: words.charAt(0).toUpperCase() + words.slice(1), log: Boolean(log), layers: of("layer"), series,
        open: (layer) => (location.hash = href(paths.layer(layer))), note: unit && unit !== "1" ? unit : "" });
    });
  }

  /** A part of an address as the name that it stands for. */
  function nameOf(part) {
    try {
      return decodeURIComponent(part);
    } catch {
      throw new Problem(`The address "${part}" is no name: a % in it stands for nothing.`);
    }
  }

  /** The neurons of a group as a list. */
  async function neuronList(route, number, manifest) {
    if (!manifest.tables?.neurons?.columns?.group_selected) return null;
    const raw = await atlas.data.load(`groups/${number}`);
    if (!raw.rows) return null;
    const table = new atlas.Table("neurons", atlas.names.labelled("neurons", raw), manifest.tables.neurons.columns);
    const chosen = raw.columns.chosen.filter(Boolean).length;
    return h(
      "section",
      {},
      h("h2", {}, "Its neurons"),
      h("p", { class: "note" }, `${plural(chosen, "neuron")} chosen for it (lowest entropy over groups first), and ${count(raw.rows - chosen)} that fire more in it than elsewhere.`),
      atlas.list({ table, route, sort: "rank", descending: false, example: "chosen=1   group_firing>0.5   12.*" }),
    );
  }

  async function groupPage(route) {
    const [{ manifest, tables: units }, found] = [await atlas.data.model(), await tables()];
    const name = nameOf(route.parts[1]);
    const names = found.groups?.columns.group_name || [];
    const row = names.indexOf(name);
    if (row < 0) throw new Problem(`This atlas has no group "${name}": its groups are ${names.join(", ") || "not known"}.`);
    const { groups, layers, damage } = found;
    const rows = (column) => (damage ? damage.rows((r) => damage.columns[column][r] === name) : []);
    const charts = layerCharts(layers, name, units.layers);
    const without = damageTable(damage, `Without the neurons of ${name}`, rows("neurons_of"), "group_name");
    const loses = damageTable(damage, `${name} without the neurons of others`, rows("group_name"), "neurons_of");
    return {
      title: `Group ${name}`,
      content: [
        atlas.top(`Group ${name}`, null, row > 0 && paths.group(names[row - 1]), row + 1 < names.length && paths.group(names[row + 1]),
          h("a", { href: href("/groups") }, "all groups")),
        undecided(groups, row),
        overviewTable(groups, row),
        (without || loses) ? h("section", {}, h("h2", {}, "Switching neurons off, in nats"), h("div", { class: "halves" }, without, loses)) : missingDamage(found),
        await neuronList(route, row, manifest),
        charts.length > 0 && h("section", {}, h("h2", {}, "Across the layers"), h("div", { class: "charts" }, charts)),
      ],
    };
  }

  const OF_NEURON = [
    ["group_firing", "fires"],
    ["group_firing_elsewhere", "elsewhere"],
    ["group_effect", "adds (norm)"],
    ["group_effect_elsewhere", "elsewhere"],
    ["group_ap", "tells the group (AP)"],
  ];

  /** What a neuron does in each group of the text; null where they were not compared. */
  async function groupsOfNeuron(table, row, columns) {
    if (!columns.group_firing?.[row]) return null;
    const { groups } = await tables();
    const of = (name, k) => columns[name]?.[row]?.[k] ?? null;
    const chosen = (k) => of("group_selected", k) === 1;
    const head = OF_NEURON.map(([name, words]) => h("th", { scope: "col", class: "float", title: table.meaning(name) }, words));
    const chance = (k) => groups.has("group_ap_chance") && groups.value("group_ap_chance", k);
    const line = (name, k) =>
      h(
        "tr",
        { class: chosen(k) ? "here" : null },
        h("th", { scope: "row" }, link(name)),
        OF_NEURON.map(([column]) => h("td", { class: "float" }, number(of(column, k)))),
        h("td", { class: "float" }, number(chance(k) ?? null)),
        h("td", {}, chosen(k) && "chosen for it"),
      );
    const own = h("table", { class: "groups" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "group"), head, h("th", { scope: "col", class: "float", title: groups.meaning("group_ap_chance") }, "by chance"), h("th", {}))),
      h("tbody", {}, groups.columns.group_name.map(line)));
    return h("section", {}, h("h2", {}, "In the groups of the text ", atlas.save.csvOf("groups", own)), h("div", { class: "scroll" }, own));
  }

  const named = (pattern, page) => ({ fits: ({ parts }) => parts.length === 2 && parts[0] === pattern, page });
  atlas.moreRoutes = [{ fits: ({ path }) => path === "/groups", page: groupsPage }, named("group", groupPage)];
  Object.assign(atlas, { groupsSection, groupsOfNeuron, nameOf, named });
})(window.atlas);
