"""Reading an atlas: its tables, SQL over them, its units with their examples, and what stands out on a prompt.

    atlas = mt.atlas.open("atlas")
    atlas.where("induction > 0.5")                 # the rows of a table, here of its heads
    atlas.sql("SELECT layer, avg(max) FROM neurons GROUP BY layer")
    atlas.neuron(12, 431).examples()               # words with activations
    atlas.on("The capital of France is", model)    # units that are far from what is usual for them

Tables that SQL sees: those of the folder (`layers`, `heads`, `neurons`, `groups`, `group_layers`, `damage` and
`relations`), `model` (one row: what is of the whole model), `examples` (one row per example of a neuron),
`group_neurons` (one row per neuron and group of the text, where groups were compared), `tokens` (the text that was
read) and `labels` (what users wrote).

Cost:  tables are read when they are first needed; SQL reads only the columns it names.
Check: tests/laws/test_atlas_read.py: rows, words and examples equal those that a run of the model gives.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from microtome.atlas._format import FORMAT, KIND, TEXT_FILE
from microtome.atlas._labels import Labels
from microtome.errors import DataError, SiteError, error, nearest
from microtome.shown import brief, shown

if TYPE_CHECKING:
    import pandas as pd

    from microtome.model import Model

SITE_OF = {"neuron": "{0}.mlp.post[{1}]", "head": "{0}.attn.z[{1}]", "layer": "{0}.resid_post"}
"""The site by which a unit of each kind is addressed."""

TABLE_OF = {"neuron": "neurons", "head": "heads", "layer": "layers"}
_WORD = re.compile(r"'[^']*'|\b[A-Za-z_][A-Za-z0-9_]*\b")
_EXAMPLES = """
    SELECT layer, neuron, '{kind}' AS kind, unnest(range(len({of}_value))) AS rank, unnest({of}_value) AS value,
           unnest({of}_index) AS token, unnest({of}_start) AS start, unnest({of}_around) AS around FROM neurons
"""
_OF_GROUP = "group_"
"""How columns of neurons begin that hold lists of one value a group."""

KEYS = ("relation", "neurons_of", "group_name", "layer", "head", "expert", "neuron")
"""Columns that name the rows of a table."""

MADE_BY = {
    "relations": ("head_functions", "which reads the weights alone"),
    "damage": ("damage", "which needs a text of several groups (--text several times, or --group-by)"),
}
"""Tables that not every atlas has: what `--add` makes them, and what to know of it."""


@shown
@dataclass(frozen=True)
class Example:
    """A passage of the text around a peak of a neuron.

    Attributes:
        kind: "top" of the rows where it peaks highest, "drawn" of a row drawn at random.
        value: the activation at the peak.
        words: the tokens of the passage.
        activations: of the neuron at each of them, to within 0.4 %.
        peak: which of the tokens has the peak.
        token: the peak's index in the text.
    """

    kind: str
    value: float
    words: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int
    token: int

    def __str__(self) -> str:
        words = [f"[{word}]" if i == self.peak else word for i, word in enumerate(self.words)]
        return f"{self.value:8.3g}  {''.join(words)}".replace("\n", "↵")


@dataclass(frozen=True, eq=False)
class Unit:
    """A layer, a head or a neuron of an atlas: `unit["max"]` is a column of its row.

    Attributes:
        atlas: that it is of.
        kind: "layer", "head" or "neuron".
        place: its layer, and its number there.
        site: its address, for captures and edits.
    """

    atlas: Atlas
    kind: str
    place: tuple[int, ...]

    @property
    def site(self) -> str:
        """Its address, for captures and edits."""
        return SITE_OF[self.kind].format(*self.place)

    @cached_property
    def values(self) -> dict[str, Any]:
        """Its row, by column.

        Raises:
            SiteError: the atlas has no such unit.
        """
        keys = ("layer", self.kind)[: len(self.place)]
        test = " AND ".join(f"{key} = {number}" for key, number in zip(keys, self.place, strict=True))
        rows = self.atlas.sql(f"SELECT * FROM {TABLE_OF[self.kind]} WHERE {test}").to_dict("records")
        if not rows:
            what = f"this atlas has no {self.kind} {'.'.join(map(str, self.place))}"
            raise error(SiteError, what, do=f'see atlas.table("{TABLE_OF[self.kind]}")')
        return {str(name): value for name, value in rows[0].items()}

    def __getitem__(self, column: str) -> Any:
        try:
            return self.values[column]
        except KeyError:
            near = nearest(column, list(self.values))
            raise error(DataError, f'a {self.kind} has no column "{column}".{near}', do="see unit.values") from None

    def examples(self, kind: str | None = None) -> list[Example]:
        """Passages around its peaks, strongest first: of the rows where it peaks highest, then of rows drawn at random.

        Args:
            kind: "top" or "drawn" alone.

        Raises:
            DataError: the atlas holds no examples, or this is no neuron.
        """
        if self.kind != "neuron" or "examples" not in self.atlas.views:
            why = "only neurons have examples" if self.kind != "neuron" else "this atlas holds none"
            raise error(DataError, f"no examples of {self.kind} {'.'.join(map(str, self.place))}", got=why)
        layer, neuron = self.place
        query = f"SELECT * FROM examples WHERE layer = {layer} AND neuron = {neuron} ORDER BY kind DESC, rank"
        rows = self.atlas.sql(query).to_dict("records")
        return [self.atlas.example(row) for row in rows if row["token"] >= 0 and kind in (None, row["kind"])]

    def label(self, text: str, note: str = "") -> None:
        """Give it a name, and a note if there is more to say; both survive a new atlas of the same model."""
        self.atlas.labels.write(self.site, text, note)

    def __repr__(self) -> str:
        named = self.atlas.labels.read().get(self.site, {}).get("label", "")
        called = f", {named!r}" if named else ""
        return f"{self.kind} {'.'.join(map(str, self.place))} of {self.atlas.manifest['model']['name']}{called}"


@shown
class Atlas:
    """An atlas that was written.

    Attributes:
        path: its folder.
        manifest: what was measured, on which model and text, at which cost; units and meanings of all columns.
        labels: names and notes that users gave to units of this model.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Use `open`, which checks what it reads."""
        self.path, self.manifest = path, manifest
        self.labels = Labels(manifest["model"]["fingerprint"], path)

    def _facts(self) -> dict[str, str]:
        """Of which model and text it is, and what it holds."""
        text = self.manifest["text"]
        tables = ", ".join(f"{told['rows']:,} {name}" for name, told in self.manifest["tables"].items())
        return {
            "path": brief(str(self.path)), "model": brief(self.manifest["model"]["name"]), "tables": tables,
            "text": f"{text['tokens']:,} tokens of {brief(text['source'])}",
        }  # fmt: skip

    @cached_property
    def views(self) -> dict[str, str]:
        """What SQL sees: each name with the query that makes it."""
        quoted = {name: str(self.path / f"{name}.parquet").replace("'", "''") for name in self.manifest["tables"]}
        found = {name: f"SELECT * FROM '{path}'" for name, path in quoted.items()}
        columns = self.manifest["tables"].get("neurons", {}).get("columns", {})
        kinds = [("top", "example"), ("drawn", "drawn")]
        parts = [_EXAMPLES.format(kind=kind, of=of) for kind, of in kinds if f"{of}_around" in columns]
        if parts:
            found["examples"] = " UNION ALL ".join(parts)
        if "group_selected" in columns:
            lists = [name for name in columns if name.startswith(_OF_GROUP)]
            values = ", ".join(f'unnest("{name}") AS "{name.removeprefix(_OF_GROUP)}"' for name in lists)
            names = ", ".join("'" + name.replace("'", "''") + "'" for name in self.manifest["text"]["groups"])
            found["group_neurons"] = f"SELECT layer, neuron, unnest([{names}]) AS group_name, {values} FROM neurons"
        text = str(self.path / TEXT_FILE).replace("'", "''")
        return found | {"tokens": f"SELECT row_number() OVER () - 1 AS token, word FROM '{text}'"}

    @cached_property
    def _database(self) -> Any:
        duckdb: Any = importlib.import_module("duckdb")
        database = duckdb.connect()
        for name, query in self.views.items():
            database.execute(f'CREATE VIEW "{name}" AS {query}')
        pd: Any = importlib.import_module("pandas")
        whole = {k: v for k, v in self.manifest.items() if isinstance(v, int | float | str)}
        database.register("model", pd.DataFrame([{**self.manifest["model"], **whole}]))
        database.register("labels", self.labels.frame())
        return database

    def sql(self, query: str) -> pd.DataFrame:
        """Run SQL (DuckDB's) over the tables of the atlas.

        Raises:
            DataError: the query cannot be run; says why, and which tables there are.
        """
        duckdb: Any = importlib.import_module("duckdb")
        try:
            return self._database.execute(query).df()
        except duckdb.Error as problem:
            first = str(problem).strip().splitlines()[0]
            tables = ", ".join((*self.views, "model", "labels"))
            absent = re.search(r"Table with name (\w+) does not exist", first)
            by, know = MADE_BY.get(absent[1] if absent else "", ("", ""))
            do = f"make it with `microtome atlas ... --add {by}`, {know}" if by else None
            what = "this query cannot be run"
            raise error(DataError, what, got=first, allowed=f"the tables {tables}", do=do) from problem

    def table(self, name: str) -> pd.DataFrame:
        """A table, indexed by layer and unit.

        Raises:
            DataError: there is no such table.
        """
        keys = self._keys(name)
        return self.sql(f"SELECT * FROM {name}").set_index(keys)

    def _keys(self, name: str) -> list[str]:
        """The columns that name the rows of a table.

        Raises:
            DataError: there is no such table; says what makes it, where something does.
        """
        told = self.manifest["tables"]
        if name in told:
            return [key for key in KEYS if key in told[name]["columns"]]
        what = f'this atlas has no table "{name}"'
        if name not in MADE_BY:
            raise error(DataError, what, allowed=", ".join(told))
        by, know = MADE_BY[name]
        do = f"make it with `microtome atlas ... --add {by}`, {know}"
        raise error(DataError, what, allowed=", ".join(told), do=do)

    def where(self, condition: str, table: str | None = None) -> pd.DataFrame:
        """The rows for which a condition holds, such as "induction > 0.5 AND layer < 20".

        Args:
            condition: what SQL allows behind WHERE.
            table: where to look; by default the one table that has all columns of the condition.

        Raises:
            DataError: no table has these columns, several have, or the condition cannot be read.
        """
        name = self._home(condition) if table is None else table
        return self.sql(f"SELECT * FROM {name} WHERE {condition}").set_index(self._keys(name))

    def _home(self, condition: str) -> str:
        """The one table whose columns a condition names."""
        told: Mapping[str, Any] = self.manifest["tables"]
        every = sorted({column for one in told.values() for column in one["columns"]})
        words = {w for w in _WORD.findall(condition) if not w.startswith("'")}
        named = {w for w in words if w in every}
        homes = [name for name, one in told.items() if named and named <= set(one["columns"])]
        homes = [name for name in homes if name in TABLE_OF.values()] or homes  # units come before groups of the text
        if len(homes) == 1:
            return homes[0]
        if homes:
            what = f"the columns of {condition!r} are in several tables"
            raise error(DataError, what, got=", ".join(homes), do="say which with table=")
        near = next((hint for w in sorted(words - named) if (hint := nearest(w, every))), "")
        raise error(DataError, f"no table has the columns of {condition!r}.{near}", do="see atlas.table(name).columns")

    def layer(self, layer: int) -> Unit:
        """A layer."""
        return self._there(Unit(self, "layer", (layer,)))

    def head(self, layer: int, head: int) -> Unit:
        """A head."""
        return self._there(Unit(self, "head", (layer, head)))

    def neuron(self, layer: int, neuron: int) -> Unit:
        """A neuron."""
        return self._there(Unit(self, "neuron", (layer, neuron)))

    def _there(self, unit: Unit) -> Unit:
        assert unit.values
        return unit

    @cached_property
    def words(self) -> Sequence[str]:
        """The tokens of the text that was read, in order."""
        return pq.read_table(self.path / TEXT_FILE).column("word").to_pylist()

    def example(self, row: Mapping[str, Any]) -> Example:
        """An example of a neuron, from a row of the table `examples`."""
        before = self.manifest["text"]["examples"][0]
        place, start = int(row["token"]), int(row["start"])
        around: list[float] = np.ma.filled(np.ma.asarray(row["around"], dtype=np.float64), np.nan).tolist()
        there = [i for i, value in enumerate(around) if value == value]  # NaN where the row ends
        first, last = (there[0], there[-1]) if there else (before, before)
        words = tuple(self.words[max(start, place - before + first) : place - before + last + 1])
        activations = tuple(around[first : last + 1])[-len(words) :]
        return Example(row["kind"], float(row["value"]), words, activations, before - first, place)

    def on(self, prompt: Any, model: Model, top: int = 20) -> pd.DataFrame:
        """The neurons and heads that are furthest, on a prompt, from what is usual for them; see `_standing_out`."""
        from microtome.atlas._prompt import standing_out

        return standing_out(self.manifest, self.table, prompt, model, top)


def open(path: str | Path) -> Atlas:
    """Open an atlas that was written.

    Args:
        path: its folder.

    Raises:
        DataError: there is no atlas, it is damaged, or a newer version wrote it.
    """
    folder = Path(path)
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        kind, version = manifest["kind"], int(manifest.get("format", 0))
    except (OSError, ValueError, TypeError, KeyError) as problem:
        do = "make one, with `microtome atlas` or write_atlas"
        raise error(DataError, f'no atlas in "{path}" ({type(problem).__name__})', do=do) from problem
    if kind != KIND:
        raise error(DataError, f'"{path}" holds no atlas', got=str(kind), allowed=KIND)
    if version != FORMAT:
        newer = version > FORMAT
        do = "install a newer Microtome" if newer else "make it again with this version"
        what = f'the atlas in "{path}" was written by {"a newer" if newer else "an older"} version'
        raise error(DataError, what, got=f"format {version}", allowed=f"format {FORMAT}", do=do)
    files = (*(f"{name}.parquet" for name in manifest["tables"]), TEXT_FILE)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        got = f"no {', '.join(missing)}"
        raise error(DataError, f'the atlas in "{path}" is not whole', got=got, do="write it again")
    for name, told in manifest["tables"].items():
        _require_whole(folder / f"{name}.parquet", int(told["rows"]))
    _require_whole(folder / TEXT_FILE, int(manifest["text"]["tokens"]))
    return Atlas(folder, manifest)


def _require_whole(file: Path, rows: int) -> None:
    """Refuse a table that was cut short or exchanged; reads the end of its file alone.

    Raises:
        DataError: it is damaged, or has other rows than the manifest says.
    """
    try:
        found = pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowException) as problem:
        first = str(problem).strip().splitlines()[0]
        what = f'the table "{file}" is damaged, perhaps cut short'
        raise error(DataError, what, got=first, do="copy it again, or write the atlas again") from problem
    if found != rows:
        what = f'the table "{file}" is not the one that the atlas was written with'
        do = "copy it again, or write the atlas again"
        raise error(DataError, what, got=f"{found:,} rows", allowed=f"{rows:,} rows", do=do)
