/* What is typed into the filter of a list: its terms, each read as an address, a comparison or words.
 *
 * What cannot be read is never dropped: it is a Problem, whose message the list shows.
 */
"use strict";

(function (atlas) {
  const { Problem } = atlas;
  const BEFORE = 16; // tokens of context before the peak of an example
  const AFTER = 8;

  const COMPARE = {
    "<": (a, b) => a < b,
    "<=": (a, b) => a <= b,
    ">": (a, b) => a > b,
    ">=": (a, b) => a >= b,
    "=": (a, b) => a === b,
  };
  const SIGN = /<=|>=|==|!=|<|>|=/;

  /** The terms of a query: text in quotes stays whole and is words; spaces around < > = do not matter. */
  function terms(query) {
    if ((query.match(/"/g) || []).length % 2) throw new Problem("A quotation mark is not closed.");
    return query
      .split(/("[^"]*")/)
      .flatMap((part) =>
        /^"/.test(part)
          ? [{ text: part.slice(1, -1), quoted: true }]
          : part
              .replace(/\s*(<=|>=|==|!=|<|>|=)\s*/g, "$1")
              .split(/\s+/)
              .map((text) => ({ text, quoted: false })),
      )
      .filter(({ text }) => text);
  }

  const isSite = (text) => /^(\d+)\.(?:(\d+)|[a-z_.]+\[(\d+)\]|\*?)$/i.exec(text);
  const isWords = (table) => ({ text, quoted }) =>
    quoted || !(SIGN.test(text) || isSite(text) || (table.keys.length === 1 && /^\d+$/.test(text)));

  /** Whether a query has words in it, which are searched for in more than the list itself; false if it is unreadable. */
  function hasWords(table, query) {
    try {
      return terms(query).some(isWords(table));
    } catch {
      return false;
    }
  }

  function comparison(table, term) {
    const parts = /^([a-z]\w*)(<=|>=|<|>|=)(.*)$/i.exec(term);
    const quote = "To search for these characters, put them in quotes.";
    if (!parts)
      throw new Problem(`Cannot read "${term}": write a column, one of < <= > >= =, and a number, as in max>5. ${quote}`);
    const [, typed, sign, limit] = parts;
    const name = table.has(typed) ? typed : typed.toLowerCase();
    if (!table.has(name) || table.types[name] === "list")
      throw new Problem(`No column "${typed}" here. Columns: ${[...table.keys, ...table.names].join(", ")}.`);
    if (table.types[name] === "text")
      throw new Problem(`The column "${name}" holds words, not numbers: type the words alone.`);
    if (!/^[-\u2212]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(limit))
      throw new Problem(`Cannot read the number "${limit}" of "${term}"; write it like 5, 0.01 or 1e-3. ${quote}`);
    const [values, number] = [table.columns[name], Number(limit.replace("\u2212", "-"))];
    return { passes: (row) => values[row] !== null && COMPARE[sign](Number(values[row]), number) };
  }

  function address(table, term, site) {
    const units = table.columns[table.keys[1]];
    const layer = parseInt(term, 10);
    const unit = site ? (site[2] ?? site[3]) : undefined;
    if (unit !== undefined && !units) throw new Problem(`Layers have no units to name: write ${layer} instead of ${term}.`);
    const passes = (row) => table.columns.layer[row] === layer && (unit === undefined || units[row] === Number(unit));
    if (!table.rows(passes).length) throw new Problem(`There is no ${term} in this list.`);
    return { passes };
  }

  /** Where words stand in the text: the first and the last token of each occurrence, in order. */
  function occurrences({ lower, offsets, joined }, text) {
    const found = [];
    const at = (place) => {
      let [low, high] = [0, lower.length - 1];
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (offsets[middle] <= place) low = middle;
        else high = middle - 1;
      }
      return low;
    };
    for (let place = joined.indexOf(text); place >= 0; place = joined.indexOf(text, place + 1))
      found.push([at(place), at(place + text.length - 1)]);
    return found;
  }

  /** The tokens of an example that its page shows: from the first up to the one before the last. */
  function window(place, start, length) {
    const end = length && start !== null ? start + length : place + 1; // without a length, nothing after the peak
    return [Math.max(start ?? place, place - BEFORE), Math.min(end, place + AFTER + 1)];
  }

  /** The number of the first occurrence that begins at a token or later; how many there are if none does. */
  function firstFrom(found, from) {
    let [low, high] = [0, found.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (found[middle][0] >= from) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /**
   * An example of a row that shows one of some occurrences: { first, last, peak }, its tokens and whether the peak is
   * among them. One at a peak is preferred; null if no example shows any.
   */
  function exampleWith(words, row, found, length) {
    let best = null;
    for (const [i, place] of (words.columns.example_index?.[row] || []).entries()) {
      const [from, to] = window(place, words.columns.example_start?.[row]?.[i] ?? null, length);
      for (let k = firstFrom(found, from); k < found.length && found[k][0] < to; k++) {
        const [first, last] = found[k];
        if (last >= to) continue;
        if (first <= place && place <= last) return { first, last, peak: true };
        best ??= { first, last, peak: false };
      }
    }
    return best;
  }

  /** Words: in the tokens that a neuron promotes or suppresses, in its examples, and in columns of text. */
  function words(list, term, told) {
    const { table, vocab, words: more, length } = list;
    const text = term.text.toLowerCase();
    const named = table.names.filter((name) => table.types[name] === "text");
    const column = [...table.names, ...table.keys].find((name) => name === text || name.replaceAll("_", " ") === text);
    if (column) told.columns.add(column);
    const places = vocab || named.length;
    if (!places && (column || atlas.names.find(list.manifest, term.text).length)) return { passes: () => true };
    if (!places)
      throw new Problem(
        `Cannot read "${term.text}": this list has no words. Write an address, or a column with a number: ` +
          `${list.example}.`,
      );
    const matching = new Set();
    (vocab || []).forEach((string, id) => string.toLowerCase().includes(text) && matching.add(id));
    for (const id of matching) told.tokens.add(id);
    const found = more ? occurrences(more, text) : [];
    const among = (ids) => Boolean(ids?.some((id) => matching.has(id)));
    function where(row) {
      const name = named.find((own) => table.columns[own][row]?.toLowerCase().includes(text));
      return {
        promotes: among(table.columns.promoted?.[row]),
        suppresses: more?.columns.suppressed?.[row]?.filter((id) => matching.has(id)) || [],
        example: more ? exampleWith(more, row, found, length) : null,
        name: name ?? null,
      };
    }
    const passes = (row) => {
      const { promotes, suppresses, example, name } = where(row);
      return promotes || suppresses.length > 0 || example !== null || name !== null;
    };
    return { passes, where };
  }

  /**
   * The rows that pass every term: an address (12.431, 12.*), a comparison (max>5), or words.
   * Gives the rows; the tokens that were named; the columns that were; for the words, where a row has them; and the rows
   * that have one of them where they are strongest.
   */
  function search(list, query) {
    const { table } = list;
    const told = { tokens: new Set(), columns: new Set() };
    const tests = terms(query).map((term) => {
      if (isWords(table)(term)) return words(list, term, told);
      const site = isSite(term.text);
      return SIGN.test(term.text) ? comparison(table, term.text) : address(table, term.text, site);
    });
    const places = tests.map(({ where }) => where).filter(Boolean);
    const rows = table.rows((row) => tests.every(({ passes }) => passes(row)));
    const atPeak = new Set(rows.filter((row) => places.some((where) => where(row).example?.peak)));
    return { rows, places, atPeak, ...told };
  }

  Object.assign(atlas, { query: { search, hasWords, window } });
})(window.atlas);
