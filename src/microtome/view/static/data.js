/* The data files, which load when a page first needs them, and the tables in them.
 *
 * A page opened from disk may not fetch, so a data file is a script: `atlas.receive(name, value)`.
 */
"use strict";

(function (atlas) {
  const { Problem } = atlas;
  const wanted = new Map(); // name of a data file -> { promise, resolve }

  /** The value of the data file `name`, loaded once. */
  function load(name) {
    if (wanted.has(name)) return wanted.get(name).promise;
    const entry = {};
    entry.promise = new Promise((resolve, reject) => {
      const file = `assets/data/${name}.js`;
      const fail = (what) => {
        wanted.delete(name); // so that coming back to the page tries again
        reject(new Problem(`The file ${file} ${what}. Write the atlas again, or copy its folder whole.`));
      };
      const script = document.createElement("script");
      script.src = file;
      script.onerror = () => fail("is missing or cannot be read");
      script.onload = () => (entry.done ? script.remove() : fail("is damaged"));
      entry.resolve = resolve;
      wanted.set(name, entry);
      document.head.append(script);
    });
    return entry.promise;
  }

  /** What every data file calls. */
  function receive(name, value) {
    const entry = wanted.get(name);
    if (!entry) return;
    entry.done = true;
    entry.resolve(value);
  }

  /** Rows of layers, heads or neurons, as columns, with what the manifest says of each column. */
  class Table {
    constructor(kind, { rows, types, columns }, described) {
      Object.assign(this, { kind, length: rows, types, columns, described: described || {} });
      this.keys = ["layer", "head", "neuron"].filter((key) => key in types);
      this.unit = kind.replace(/s$/, "");
      const isEnd = (name) => /_(lo|hi)$/.test(name) && name.replace(/_(lo|hi)$/, "") in types;
      this.names = Object.keys(types).filter(
        (name) => types[name] !== "list" && !this.keys.includes(name) && !isEnd(name),
      );
      this.lists = Object.keys(types).filter((name) => types[name] === "list");
    }

    /** One table of the rows of several. */
    static join(parts) {
      const [first] = parts;
      const columns = {};
      for (const name of Object.keys(first.types)) columns[name] = parts.flatMap((part) => part.columns[name]);
      const rows = parts.reduce((total, part) => total + part.length, 0);
      return new Table(first.kind, { rows, types: first.types, columns }, first.described);
    }

    has(name) {
      return name in this.types;
    }

    /** Whether a column is an amount that can be ranked and drawn; whole numbers are names: a dimension. */
    isQuantity(name) {
      return this.types[name] === "float";
    }

    /** The column that a column is to be compared with, as the manifest says; null where there is none. */
    controlOf(name) {
      const control = this.described[name]?.control;
      return control && this.isQuantity(control) ? control : null;
    }

    /** The column that is a column minus its control; null where there is none. */
    differenceOf(name) {
      const difference = `${name}_diff`;
      return this.controlOf(name) && this.isQuantity(difference) ? difference : null;
    }

    /** The columns that are drawn for themselves: amounts that are no control of another, nor the difference from one. */
    quantities() {
      const beside = new Set(this.names.flatMap((name) => [this.controlOf(name), this.differenceOf(name)]));
      return this.names.filter((name) => this.isQuantity(name) && !beside.has(name));
    }

    value(name, row) {
      return this.has(name) ? this.columns[name][row] : null;
    }

    hasInterval(name) {
      return this.has(`${name}_lo`) && this.has(`${name}_hi`);
    }

    /** The ends of the interval of a value, or null where the column has none. */
    bounds(name, row) {
      return this.hasInterval(name) ? { lo: this.value(`${name}_lo`, row), hi: this.value(`${name}_hi`, row) } : null;
    }

    /** The row of a layer, or of a unit of a layer; -1 if there is none. */
    find(layer, unit) {
      const layers = this.columns.layer;
      const units = unit === undefined ? null : this.columns[this.keys[1]];
      return layers.findIndex((value, row) => value === layer && (units === null || units[row] === unit));
    }

    /** The rows for which a test holds. */
    rows(test = () => true) {
      const found = [];
      for (let row = 0; row < this.length; row++) if (test(row)) found.push(row);
      return found;
    }

    address(row) {
      return this.keys.map((key) => this.columns[key][row]).join(".");
    }

    path(row) {
      return atlas.paths[this.unit](...this.keys.map((key) => this.columns[key][row]));
    }

    /** What a column means, with its unit, as a heading's tooltip. */
    meaning(name) {
      const { meaning, unit } = this.described[name] || {};
      return [atlas.plainly(meaning) || name.replaceAll("_", " "), unit && `(${unit})`].filter(Boolean).join(" ");
    }

    /** Rows by the values of a column; what was not measured comes last either way. */
    sorted(rows, name, descending) {
      const values = this.columns[name];
      const sign = descending ? -1 : 1;
      const text = this.types[name] === "text";
      return [...rows].sort((a, b) => {
        const [x, y] = [values[a], values[b]];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return sign * (text ? x.localeCompare(y) : x - y) || a - b;
      });
    }
  }

  /** What every page needs: the manifest, the layer and head tables, and which layers have neurons. */
  async function model() {
    const raw = await load("model");
    if (!raw.tables) {
      const described = (kind) => raw.manifest.tables?.[kind]?.columns;
      atlas.data.manifest = raw.manifest;
      await atlas.names.load();
      raw.tables = {
        layers: new Table("layers", atlas.names.labelled("layers", raw.layers), described("layers")),
        heads: new Table("heads", atlas.names.labelled("heads", raw.heads), described("heads")),
      };
    }
    return raw;
  }

  /** The neurons of one layer. */
  async function neurons(layer) {
    const { manifest } = await model();
    return new Table("neurons", atlas.names.labelled("neurons", await load(`neurons/${layer}`)), manifest.tables?.neurons?.columns);
  }

  let everyNeuron = null;

  /** The neurons of all layers; `progress(done, all)` is called as their files arrive. */
  async function allNeurons(progress) {
    if (everyNeuron) return everyNeuron;
    const layers = (await model()).neurons.map(({ layer }) => layer);
    if (!layers.length) throw new Problem("No neuron was measured in this atlas.");
    let done = 0;
    const parts = await Promise.all(
      layers.map(async (layer) => {
        const part = await neurons(layer);
        progress(++done, layers.length);
        return part;
      }),
    );
    everyNeuron = Table.join(parts);
    return everyNeuron;
  }

  /** The lists of values that only the page of one neuron needs, as columns of all neurons of a layer. */
  async function details(layer) {
    const { part, neurons: counts } = await model();
    const { rows } = counts.find((one) => one.layer === layer);
    const numbers = Array.from({ length: Math.ceil(rows / part) }, (_, number) => number);
    const parts = await Promise.all(numbers.map((number) => load(`details/${layer}/${number}`)));
    const names = Object.keys(parts[0].columns);
    return Object.fromEntries(names.map((name) => [name, parts.flatMap((one) => one.columns[name])]));
  }

  /** The same of one row, { columns, strings }: each column with that row alone, and the strings of its tokens by number. */
  async function detailsOf(layer, row) {
    const { part } = await model();
    const number = Math.floor(row / part);
    const { columns, strings } = await load(`details/${layer}/${number}`);
    const own = Object.entries(columns).map(([name, values]) => [name, { [row]: values[row - number * part] }]);
    return { columns: Object.fromEntries(own), strings };
  }

  const vocab = () => load("vocab");

  /** What the heads of one layer attend to: for each passage the bytes [head, query, key]. */
  const patterns = async (layer) => (await load(`patterns/${layer}`)).map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));

  /** The tokens of the text from one place up to another, or to its end. */
  async function text(from, upTo) {
    const { strings, chunk, tokens } = await load("text");
    const to = Math.min(upTo, tokens);
    const numbers = [];
    for (let number = Math.floor(from / chunk); number * chunk < to; number++) numbers.push(number);
    const chunks = await Promise.all(numbers.map((number) => load(`text/${number}`)));
    const found = [];
    for (let place = from; place < to; place++) {
      found.push(strings[chunks[Math.floor(place / chunk) - numbers[0]][place % chunk]]);
    }
    return found;
  }

  /** What words are searched in beside the lists: what neurons of some layers suppress, their examples, the text. */
  async function words(layers) {
    const parts = await Promise.all(layers.map(details));
    const columns = {};
    for (const name of ["suppressed", "example_index", "example_start"])
      if (parts.every((part) => name in part)) columns[name] = parts.flatMap((part) => part[name]);
    const tokens = await text(0, Infinity);
    const lower = tokens.map((token) => token.toLowerCase());
    const offsets = [];
    let end = 0;
    for (const token of lower) {
      offsets.push(end);
      end += token.length;
    }
    return { columns, tokens, lower, offsets, joined: lower.join("") };
  }

  Object.assign(atlas, { receive, Table, data: { load, model, neurons, allNeurons, details, detailsOf, vocab, text, words, patterns } });
})(window.atlas);
