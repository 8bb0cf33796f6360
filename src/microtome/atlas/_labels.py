"""Names and notes that users give to units of a model, kept apart from what was measured.

They stand in one JSON file per model, named after its fingerprint, where a user's data lie; an atlas that is written
again, elsewhere or in another way, finds them there. The pages of an atlas open from disk and can read no other folder:
they have a copy, which is written with the atlas and whenever a label is set through it, and which is no part of what
was measured.

Check: tests/laws/test_atlas_read.py.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from microtome.anatomy import parse
from microtome.atlas._format import LABELS_FILE
from microtome.errors import DataError, MicrotomeWarning, OutputError, error
from microtome.files import atomic
from microtome.view import write_labels

if TYPE_CHECKING:
    import pandas as pd


class Labels:
    """The labels of one model.

    Args:
        fingerprint: of the model.
        pages: the folder of an atlas whose pages show them, if any.
    """

    def __init__(self, fingerprint: str, pages: Path | None = None) -> None:
        self.pages = pages
        base = os.environ.get("MICROTOME_DATA") or platformdirs.user_data_dir("microtome", appauthor=False)
        self.path = Path(base) / "labels" / f"{fingerprint}.json"

    def __repr__(self) -> str:
        return f"Labels({len(self.read())} in {self.path})"

    def read(self) -> dict[str, dict[str, str]]:
        """By site: the label, the note and when they were written; empty where there are none.

        Raises:
            DataError: the file is damaged.
        """
        if not self.path.is_file():
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(site): {str(k): str(v) for k, v in told.items()} for site, told in found.items()}
        except (ValueError, AttributeError) as problem:
            do = "mend or remove the file"
            raise error(DataError, f'the labels in "{self.path}" are damaged', do=do) from problem

    def write(self, site: str, label: str, note: str = "") -> None:
        """Label a unit, in place of an earlier label; an empty label removes it.

        Args:
            site: its address, such as "12.mlp.post[431]".
            label: what to call it.
            note: what else there is to say.

        Raises:
            SiteError: the address cannot be read.
            OutputError: the file cannot be written.

        Warns:
            MicrotomeWarning: it is written, but the pages of the atlas, which show a copy, cannot be.
        """
        parse(site)
        found = self.read()
        if label:
            found[site] = {"label": label, "note": note, "written": datetime.now(UTC).isoformat(timespec="seconds")}
        else:
            found.pop(site, None)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(self.path, "the labels to") as partial:
            partial.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        self.show()

    def show(self) -> None:
        """Write them for the pages of the atlas, where there are pages.

        Warns:
            MicrotomeWarning: the pages cannot be written.
        """
        if self.pages is None or not (self.pages / LABELS_FILE).parent.is_dir():
            return
        try:
            write_labels(self.pages, self.read())
        except OutputError as problem:
            what = f'the pages in "{self.pages}" do not show the label, which is kept'
            told = error(
                OutputError, what, got=str(problem), do="make the folder writable, and call atlas.labels.show()"
            )
            warnings.warn(str(told), MicrotomeWarning, stacklevel=3)

    def frame(self) -> pd.DataFrame:
        """A table of them: site, label, note, written."""
        pd: Any = importlib.import_module("pandas")
        rows = [{"site": site} | told for site, told in self.read().items()]
        return pd.DataFrame(rows, columns=["site", "label", "note", "written"]).astype(str)
