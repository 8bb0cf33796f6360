"""The papers that methods name: each whole, and each number of arXiv the number of one paper, of about its year."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import microtome as mt
from microtome.method import Source

ELSEWHERE = {
    "A Context Maintenance and Retrieval Model of Organizational Processes in Free Recall",
    "A Mathematical Framework for Transformer Circuits",
    "A Mathematical Theory of Communication",
    "An Improved Data Stream Summary: The Count-Min Sketch and its Applications",
    "On a Test of Whether one of Two Random Variables is Stochastically Larger than the Other",
    "Privileged Bases in the Transformer Residual Stream",
    "The Effective Rank: A Measure of Effective Dimensionality",
    "interpreting GPT: the logit lens",
}
"""Papers and posts that arXiv has not."""


def test_every_source_is_whole_and_every_number_is_that_of_one_paper_of_about_its_year() -> None:
    sources: list[Source] = [source for method in mt.methods().values() for source in method.source]
    assert len(sources) > 50
    by_number: dict[str, set[tuple[str, str]]] = {}
    for source in sources:
        assert source.authors.strip(), source
        assert source.title.strip(), source
        assert 1900 < source.year <= datetime.now(tz=UTC).year, source
        if source.arxiv is None:
            assert source.title in ELSEWHERE, f"{source} has no number"
            continue
        assert re.fullmatch(r"\d{2}(0[1-9]|1[0-2])\.\d{5}", source.arxiv), source
        assert source.year - (2000 + int(source.arxiv[:2])) in (0, 1), f"{source}: the number is of another year"
        by_number.setdefault(source.arxiv, set()).add((source.authors, source.title))
    several = {number: papers for number, papers in by_number.items() if len(papers) > 1}
    assert not several
    titles = [title for papers in by_number.values() for _, title in papers]
    assert len(titles) == len(set(titles)), "one paper under two numbers"
