/* Relations between words that heads compute: their list, the page of each, and what the page of a head says of them. */
"use strict";

(function (atlas) {
  const { h, number, count, plural, token, href, paths, chart, Problem } = atlas;
  const KINDS = ["maps", "suppress"];

  const link = (name) => h("a", { href: href(paths.relation(name)) }, name);

  /** Whether a column of the heads is of a relation, which has a page of its own. */
  const ofRelation = (name) => /^((maps|suppress)_.|successor$)/.test(name);

  /** The columns of the heads that are of a relation: what it is called there, by what it is called here. */
  function columnsOf(heads, name) {
    const own = name === "successor" ? { maps: "successor" } : { maps: `maps_${name}`, suppress: `suppress_${name}` };
    const found = Object.entries(own).flatMap(([kind, column]) => [[kind, column], [`${kind}_shuffled`, `${column}_shuffled`]]);
    return found.filter(([, column]) => heads.has(column));
  }

  /** The heads with the columns of one relation alone. */
  function headsOf(heads, name) {
    const own = columnsOf(heads, name);
    const keep = [...heads.keys, ...(heads.has(atlas.names.COLUMN) ? [atlas.names.COLUMN] : [])];
    const types = Object.fromEntries([...keep.map((key) => [key, heads.types[key]]), ...own.map(([short]) => [short, "float"])]);
    const columns = Object.fromEntries([...keep.map((key) => [key, heads.columns[key]]), ...own.map(([short, column]) => [short, heads.columns[column]])]);
    const described = Object.fromEntries(own.map(([short, column]) => [short, { ...heads.described[column], control: KINDS.includes(short) ? `${short}_shuffled` : "" }]));
    return new atlas.Table("heads", { rows: heads.length, types, columns }, described);
  }

  /** The relations of an atlas with the head that maps each best. */
  function all(manifest, heads) {
    return Object.keys(manifest.relations || {}).map((name) => {
      const table = headsOf(heads, name);
      const [best] = table.sorted(table.rows((row) => table.value("maps", row) !== null), "maps", true);
      return { name, table, best, pairs: manifest.relations[name].length };
    });
  }

  /** A table of the relations, one row each. */
  function relationsTable(manifest, heads) {
    const line = ({ name, table, best, pairs }) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, link(name)),
        h("td", { class: "int" }, count(pairs)),
        h("td", {}, best !== undefined && h("a", { href: href(table.path(best)) }, table.address(best))),
        h("td", { class: "float" }, best === undefined ? "–" : number(table.value("maps", best))),
        h("td", { class: "float" }, best === undefined ? "–" : number(table.value("maps_shuffled", best))),
        h("td", {}, (manifest.relations[name] || []).slice(0, 2).map(([from, to]) => [token(from), " → ", token(to), " "])),
      );
    const heads_ = ["relation", "pairs", "best head", "maps", "shuffled", "such as"].map((words, i) => h("th", { scope: "col", class: [1, 3, 4].includes(i) ? "float" : null }, words));
    const own = h("table", { class: "groups" }, h("thead", {}, h("tr", {}, heads_)), h("tbody", {}, all(manifest, heads).map(line)));
    return [h("div", { class: "scroll", tabindex: 0 }, own), h("p", { class: "saves left" }, atlas.save.csvOf("relations", own))];
  }

  const MEANING = "By their weights alone: of the pairs of words of each relation, the share whose second word is among those that the head would raise most had it attended to the first; shuffled: the second words exchanged.";

  async function relationsPage() {
    const { manifest, tables } = await atlas.data.model();
    if (!manifest.relations) throw new Problem("No relation was measured in this atlas: `microtome atlas --add head_functions` adds them.");
    return { title: "Relations", content: [h("h1", { tabindex: -1 }, "Relations that heads compute"), h("p", { class: "note" }, MEANING), relationsTable(manifest, tables.heads)] };
  }

  /** The part of the overview that is of relations; null where none was measured. */
  function relationsSection(manifest, heads) {
    if (!manifest.relations) return null;
    return h("section", {}, h("h2", {}, h("a", { href: href("/relations") }, "Relations that heads compute")), relationsTable(manifest, heads), h("p", { class: "note" }, MEANING));
  }

  /** The share of pairs that each head maps, as a map of layers and heads. */
  function map(table, name) {
    const distinct = (key) => [...new Set(table.columns[key])].sort((a, b) => a - b);
    const rowOf = new Map(table.rows().map((row) => [table.address(row), row]));
    return chart.heat({
      title: `Maps ${name}`, meaning: table.meaning("maps"), columns: distinct("layer"), rows: distinct("head"), across: "layer", down: "head",
      cell(layer, head) {
        const row = rowOf.get(`${layer}.${head}`);
        if (row === undefined) return {};
        const text = `${layer}.${head}: ${number(table.value("maps", row))}, shuffled ${number(table.value("maps_shuffled", row))}`;
        return { value: table.value("maps", row), text, href: href(table.path(row)) };
      },
    });
  }

  async function relationPage(route) {
    const { manifest, tables } = await atlas.data.model();
    const names = Object.keys(manifest.relations || {});
    const name = atlas.nameOf(route.parts[1]);
    const here = names.indexOf(name);
    if (here < 0) {
      const what = names.length ? `its relations are ${names.join(", ")}` : "`microtome atlas --add head_functions` measures them";
      throw new Problem(`This atlas has no relation "${name}": ${what}.`);
    }
    const table = headsOf(tables.heads, name);
    const pairs = manifest.relations[name];
    const next = (step) => names[here + step] && paths.relation(names[here + step]);
    return {
      title: `Relation ${name}`,
      content: [
        atlas.top(`Relation ${name}`, null, next(-1), next(1), h("a", { href: href("/relations") }, "all relations")),
        h("p", { class: "note" }, MEANING),
        h("section", {}, h("h2", {}, `${plural(pairs.length, "pair")} of words`),
          h("ul", { class: "word-pairs" }, pairs.map(([from, to]) => h("li", {}, token(from), " → ", token(to))))),
        h("section", {}, h("h2", {}, "The heads"), h("div", { class: "maps" }, map(table, name)),
          atlas.list({ table, route, sort: "maps", example: "12.*   maps>0.5   maps_shuffled<0.1" })),
      ],
    };
  }

  const MOST = 8; // relations on the page of a head

  /** The relations that a head maps, those first that it maps most above their controls; null where none was measured. */
  function relationsOfHead(manifest, heads, row) {
    if (!manifest.relations) return null;
    const found = Object.keys(manifest.relations).map((name) => {
      const value = (of) => Object.fromEntries(columnsOf(heads, name))[of];
      const [maps, shuffled, suppress] = ["maps", "maps_shuffled", "suppress"].map((of) => heads.value(value(of) ?? "", row));
      return { name, maps, shuffled, suppress };
    });
    const known = found.filter(({ maps }) => maps !== null).sort((a, b) => b.maps - b.shuffled - (a.maps - a.shuffled)).slice(0, MOST);
    if (!known.length) return null;
    const line = ({ name, maps, shuffled, suppress }) =>
      h("tr", {}, h("th", { scope: "row" }, link(name)), [maps, shuffled, suppress].map((value) => h("td", { class: "float" }, number(value))));
    const heads_ = ["relation", "maps", "shuffled", "suppresses"].map((words, i) => h("th", { scope: "col", class: i ? "float" : null }, words));
    const own = h("table", { class: "groups" }, h("thead", {}, h("tr", {}, heads_)), h("tbody", {}, known.map(line)));
    return h("section", {}, h("h2", {}, "Relations, by its weights ", atlas.save.csvOf("relations", own)), h("div", { class: "scroll" }, own));
  }

  atlas.moreRoutes.push({ fits: ({ path }) => path === "/relations", page: relationsPage }, atlas.named("relation", relationPage));
  Object.assign(atlas, { ofRelation, relationsSection, relationsOfHead });
})(window.atlas);
