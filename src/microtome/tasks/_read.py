"""Pairs of your own, from a CSV or a JSON lines file."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microtome.errors import DataError, error
from microtome.files import PAIRS, whole_file
from microtome.tasks._pair import Answers, Draft, Pair, pair_of
from microtome.tasks._task import Task
from microtome.tasks._tokens import Misfit, Tokens

REQUIRED, OPTIONAL = ("clean", "corrupt", "answer", "foil"), ("subject", "group")


def read(path: str | os.PathLike[str], source: Any, *, answers: Answers = "one") -> Task:
    """A task from a file of pairs.

    Columns (of a `.csv`) or fields (of the object on each line of a `.jsonl`): `clean`, `corrupt`, `answer`, `foil`,
    and if you like `subject` and `group`. An answer is what follows the prompt, letter by letter: with its leading
    space, if it has one. A subject is looked for in the clean prompt, and its first occurrence counts, as a word of its
    own before one inside a longer word; in the corrupt prompt the same token positions are its span. Nothing is left
    out: a row that does not fit is an error.

    Args:
        path: the file, in UTF-8.
        source: an open model, or a tokenizer of `transformers`.
        answers: "one" asks that answer and foil are one token each; "first" reads the first token of each.

    Returns:
        A `Task` with the name of the file.

    Raises:
        DataError: the file is missing, empty, of another type or without a column; or a row does not fit: its number,
            what is wrong, and for prompts that do not align both lengths and the first difference.
        PromptError: the model has no tokenizer.
    """
    path = Path(path)
    tokens = Tokens.of(source)
    tokens.require(path.stem)
    pairs = tuple(_pair(tokens, row, where, answers) for where, row in _rows(path))
    if not pairs:
        raise error(DataError, f'"{path}" has no pairs', do=f"write one per line, with {', '.join(REQUIRED)}")
    return Task(path.stem, f"pairs of {path.name}", pairs, {"source": path.name, "answers": answers})


def _rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of a file, each with where it stands."""
    whole_file(path, PAIRS, "as pairs")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as cause:
        raise error(DataError, f'cannot read "{path}"', got=str(cause), do="save it as UTF-8") from cause
    if path.suffix.lower() == ".csv":
        return _table(text, path)
    rows: list[tuple[str, Mapping[str, Any]]] = []
    # Other ends of lines, such as U+2028, may stand in a JSON string as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f'"{path}" line {number}'
            rows.append((where, _object(line, where)))
            _require(list(rows[-1][1]), where, "fields")
    return rows


def _table(text: str, path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of a CSV file; only newlines and carriage returns end one."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows: list[tuple[str, Mapping[str, Any]]] = []
    try:
        _require(list(reader.fieldnames or []), f'"{path}"', "columns")
        for row in reader:
            rows.append((f'"{path}" row {len(rows) + 1}', row))
    except csv.Error as cause:
        where = f'"{path}" row {len(rows) + 1}'
        raise error(DataError, f"{where} is not CSV", got=str(cause), do="correct it, or close its quotes") from cause
    return rows


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as cause:
        raise error(DataError, f"{where} is not JSON", got=str(cause), allowed="one object per line") from cause
    if not isinstance(value, dict):
        raise error(DataError, f"{where} is not a JSON object", got=type(value).__name__, allowed="one object per line")
    return value  # pyright: ignore[reportUnknownVariableType]


def _require(there: list[str], where: str, what: str) -> None:
    if not there:
        raise error(DataError, f"{where} is empty", do=f"write the {what} {', '.join(REQUIRED)}")
    if missing := [name for name in REQUIRED if name not in there]:
        got, allowed = ", ".join(there), ", ".join((*REQUIRED, *OPTIONAL))
        raise error(DataError, f"{where} lacks the {what} {', '.join(missing)}", got=got, allowed=allowed)


def _pair(tokens: Tokens, row: Mapping[str, Any], where: str, answers: Answers) -> Pair:
    for name in REQUIRED:
        if not isinstance(row[name], str) or not row[name]:
            raise error(DataError, f"{where}: {name} is not text", got=repr(row[name]), do="fill it in")
        try:
            row[name].encode()
        except UnicodeEncodeError as cause:
            what = f"{where}: {name} has half a surrogate pair at character {cause.start}"
            raise error(DataError, what, got=ascii(row[name]), do="write the character itself") from None
    group = row.get("group") or ""
    if not isinstance(group, str):
        raise error(DataError, f"{where}: the group is not text", got=repr(group), do="write it as text")
    clean, subject = row["clean"], row.get("subject") or None
    if subject is not None and (not isinstance(subject, str) or not tokens.codec.encode(clean).find(subject)):
        raise error(
            DataError, f"{where}: the subject is not in the clean prompt", got=repr(subject), allowed=repr(clean)
        )
    _require_space(clean, row["answer"], row["foil"], where)
    try:
        found = Draft(clean, row["corrupt"], (row["answer"],), (row["foil"],), {}, group)
        pair = pair_of(tokens, found, answers)
        return pair if subject is None else _with_subject(tokens, pair, subject)
    except Misfit as why:
        raise error(DataError, f"{where}: {why.kind}", got=why.got, do=why.do) from why


def _with_subject(tokens: Tokens, pair: Pair, subject: str) -> Pair:
    from dataclasses import replace

    from microtome.tasks._pair import with_places

    encoding = tokens.codec.encode(pair.clean)
    places = encoding.find(subject)
    at = next((place for place in places if encoding.stands_alone(*place)), places[0])
    spans = tokens.spans(pair.clean, {"subject": at})
    return replace(pair, spans=with_places(spans, len(pair.clean_tokens)))


def _require_space(clean: str, answer: str, foil: str, where: str) -> None:
    """Letters of a script with spaces that meet letters would continue the last word, which is seldom meant."""
    for text in (answer, foil):
        if all(c.isalpha() and c.lower() != c.upper() for c in (clean[-1], text[0])):
            got = repr(clean.split()[-1] + text)
            do = f"begin it with a space, {' ' + text!r}, or end the prompt in one"
            raise error(DataError, f"{where}: {text!r} would continue the last word of the prompt", got=got, do=do)
