"""Heads as parsers: hand-made patterns, arcs of files and of templates, and a choice on one half of the texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import families, tokenizers
from tests.scripts import script
from torch import Tensor

import microtome as mt
from microtome.measurements import Sentence, arc_scores, dependency_heads, read_conllu, template_sentences
from microtome.measurements._dependencies import _on_the_other_half, attended

configs = script("tools/family_configs.py")
WORDS = ["Today", "the", "cat", "saw", "the", "dog"]
ARCS = [(1, 2, "det"), (2, 3, "nsubj"), (4, 5, "det"), (5, 3, "obj")]


def looking(width: int, *at: tuple[int, int]) -> Tensor:
    """A pattern [q, k] that looks at the first token but for some queries."""
    x = torch.zeros(width, width)
    x[:, 0] = 0.9
    for q, k in at:
        x[q, k] = 0.05
    return x


def test_a_word_is_the_sum_of_its_tokens_as_a_key_and_their_mean_as_a_query() -> None:
    spans = [(0, 1), (1, 3), (3, 4), (4, 6)]  # the second and the last word have two tokens
    pattern = torch.zeros(6, 6)
    pattern[4, 1], pattern[4, 2], pattern[4, 3] = 0.15, 0.15, 0.2  # 0.3 to the second word, 0.2 to the third
    pattern[5, 3], pattern[5, 4] = 0.3, 0.7  # and 0.3 more from the other token; itself does not count
    assert attended(pattern[None, None], spans)[0, 0].tolist() == [-1, -1, -1, 2]
    pattern[5, 3] = 0.05
    assert attended(pattern[None, None], spans)[0, 0].tolist() == [-1, -1, -1, 1]
    pattern[2, 4] = 1.0  # a causal model's word sees those before it alone
    assert attended(pattern[None, None], spans)[0, 0, 1] == -1
    assert attended(pattern[None, None], spans, causal=False)[0, 0, 1] == 3


def test_accuracy_is_the_share_of_arcs_that_a_head_hits_and_offsets_are_counted() -> None:
    spans = [(i, i + 1) for i in range(6)]
    one = looking(6, (2, 1), (3, 2), (5, 4))  # every arc but the object
    two = looking(6, (5, 3))
    pattern = torch.stack([one, two])[None]
    texts = [Sentence(WORDS, ARCS)] * 4
    data = arc_scores(texts, [(pattern, spans)] * 4)
    assert data["relation"].values.tolist() == ["det", "nsubj", "obj"]
    assert data["accuracy"].values[:, 0].tolist() == [[1, 0], [1, 0], [0, 1]]
    assert data["offset"].values.tolist() == [-1, -1, -2]
    assert data["offset_accuracy"].values.tolist() == [1, 1, 1]
    assert data["arcs"].values.tolist() == [8, 4, 4]
    assert data["best_head"].values.tolist() == [0, 0, 1]
    both = arc_scores(texts, [(pattern, spans)] * 4, causal=False)  # now each dependent looks at its head
    assert both["offset"].values.tolist() == [1, 1, -2]
    assert both["accuracy"].values[:, 0].tolist() == [[0, 0], [0, 0], [0, 1]]
    nothing = arc_scores([Sentence(WORDS, [(0, 1, "x")])], [(pattern, spans)])  # the text's first token is no key
    assert nothing["arcs"].values.tolist() == [0]
    assert np.isnan(nothing["best"].values).all()


def test_a_choice_among_many_wins_nothing_on_the_other_half() -> None:
    hits = torch.rand(40, 500, generator=torch.Generator().manual_seed(0)).round().double()
    assert float(hits.mean(0).max()) > 0.65
    assert float(_on_the_other_half(hits).mean()) < 0.6
    hits[:, 7] = 1
    assert float(_on_the_other_half(hits).mean()) == 1


def test_arcs_of_templates_join_what_they_say() -> None:
    texts = template_sentences(40)
    assert [t.text for t in texts] == [t.text for t in template_sentences(40)]
    assert len({t.text for t in texts}) == 40
    far: dict[str, set[int]] = {}
    for text in texts:
        assert text.text.startswith("Today the ")
        assert text.text.endswith(".")
        for a, b, name in text.arcs:
            far.setdefault(name, set()).add(abs(a - b))
            assert text.words[a] == "the" if name == "det" else text.words[a] not in ("the", ".")
        verb = {b for _, b, name in text.arcs if name in ("nsubj", "obj")}
        assert len(verb) == 1
    assert far["nsubj"] >= {1, 4, 5}  # what stands between makes the offsets differ
    assert far["det"] == {1, 2, 3}


CONLLU = """# text = The cats don't sleep.
1\tThe\tthe\tDET\t_\t_\t2\tdet\t_\t_
2\tcats\tcat\tNOUN\t_\t_\t5\tnsubj:pass\t_\t_
3-4\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
3\tdo\tdo\tAUX\t_\t_\t5\taux\t_\tSpaceAfter=No
4\tn't\tnot\tPART\t_\t_\t5\tadvmod\t_\t_
5\tsleep\tsleep\tVERB\t_\t_\t0\troot\t_\tSpaceAfter=No
6\t.\t.\tPUNCT\t_\t_\t5\tpunct\t_\t_
"""


def test_conllu_is_read_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.conllu"
    file.write_text(CONLLU + "\n" + CONLLU)
    one, two = read_conllu(file)
    assert one == two
    assert one.text == "The cats don't sleep."
    assert one.arcs == [(0, 1, "det"), (1, 4, "nsubj"), (2, 4, "aux"), (3, 4, "advmod")]
    assert [one.text[a:b] for a, b in one.places()] == ["The", "cats", "do", "n't", "sleep", "."]
    file.write_text(CONLLU.replace("\tdet\t_\t_", "\tdet\t_"))
    with pytest.raises(mt.errors.DataError, match=r'line 2 of ".*a.conllu" is none of CoNLL-U; got 9 columns'):
        read_conllu(file)
    file.write_text(CONLLU.replace("\t2\tdet", "\t9\tdet"))
    with pytest.raises(mt.errors.DataError, match="has a word without a head; got head 9 of The"):
        read_conllu(file)
    file.write_text("# nothing\n")
    with pytest.raises(mt.errors.DataError, match="has no sentences"):
        read_conllu(file)
    with pytest.raises(mt.errors.DataError, match="cannot read"):
        read_conllu(tmp_path / "none")


def conllu(*rows: tuple[str, str, int, str, str]) -> str:
    """Rows of (number, form, head, relation, MISC)."""
    return "".join(f"{n}\t{form}\t_\t_\t_\t_\t{head}\t{name}\t_\t{misc}\n" for n, form, head, name, misc in rows)


def test_the_space_behind_a_multiword_token_is_its_own(tmp_path: Path) -> None:
    file = tmp_path / "a.conllu"
    rows = [("1-2", "Don't", 0, "_", "SpaceAfter=No"), ("1", "Do", 3, "aux", "_"), ("2", "n't", 3, "advmod", "_"),
            ("3", "!", 0, "root", "_"), ("4-5", "can't", 0, "_", "_"), ("4", "ca", 3, "aux", "_"),
            ("5", "n't", 3, "advmod", "SpaceAfter=No"), ("6", "go", 3, "xcomp", "_")]  # fmt: skip
    file.write_text(conllu(*rows))
    (one,) = read_conllu(file)
    assert one.text == "Don't! can't go"
    assert [one.text[a:b] for a, b in one.places()] == ["Do", "n't", "!", "ca", "n't", "go"]


def test_a_multiword_token_of_another_form_is_one_word(tmp_path: Path) -> None:
    file = tmp_path / "a.conllu"
    rows = [("1", "Fils", 0, "root", "_"), ("2-3", "du", 0, "_", "_"), ("2", "de", 4, "case", "_"),
            ("3", "le", 4, "det", "_"), ("4", "roi", 1, "nmod", "_"), ("5-6", "aux", 0, "_", "SpaceAfter=No"),
            ("5", "à", 1, "case", "_"), ("6", "les", 5, "det", "_")]  # fmt: skip
    file.write_text(conllu(*rows))
    (one,) = read_conllu(file)
    assert one.text == "Fils du roi aux"
    assert list(one.words) == ["Fils", "du", "roi", "aux"]
    assert one.arcs == [(1, 2, "case"), (1, 2, "det"), (2, 0, "nmod"), (3, 0, "case")]  # none within "aux"
    for wrong in ("3-4", "2-9", "2-x", "2-3-4"):
        file.write_text(conllu(*rows[:1], (wrong, *rows[1][1:]), *rows[2:]))
        with pytest.raises(mt.errors.DataError, match=f"a multiword token of other words; got {wrong} du"):
            read_conllu(file)


@pytest.fixture
def speaking() -> Callable[[str], mt.Model]:
    def opened(name: str) -> mt.Model:
        hf, tokenizer = families.build(name), tokenizers.build("bpe-bos")
        hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return mt.open(hf, tokenizer=tokenizer, prove=False)

    return opened


def test_a_models_heads_are_scored_by_its_patterns(speaking: Callable[[str], mt.Model]) -> None:
    model, texts = speaking("llama-gqa"), template_sentences(6)
    data = dependency_heads(model, texts)
    assert data["accuracy"].shape == (4, 3, 4)
    text, hits, count = texts[0], 0, 0
    for text in texts:
        run = model.run(text.text, capture="1.attn.pattern")
        spans = [model.encodings(text.text)[0].tokens_at(*place) for place in text.places()]
        looks = attended(run["1.attn.pattern"], spans)[0, 2]
        hits += sum(int(looks[b] == a) for a, b, name in text.arcs if name == "nsubj")
        count += sum(name == "nsubj" for *_, name in text.arcs)
    assert float(data["accuracy"].sel(relation="nsubj", layer=1, head=2)) == pytest.approx(hits / count)
    with pytest.raises(mt.errors.ArgumentError, match="names no two words; got \\(0, 9, 'x'\\)"):
        dependency_heads(model, [Sentence(WORDS, [(0, 9, "x")])])
    with pytest.raises(mt.errors.ArgumentError, match='"Today .* dog" needs one entry of spaces .*; got 2; allowed: 6'):
        dependency_heads(model, [Sentence(WORDS, ARCS, [True, False])])
    with pytest.raises(mt.errors.ArgumentError, match="there is no sentence"):
        dependency_heads(model, [])
    with pytest.raises(mt.errors.PromptError, match="without a tokenizer"):
        dependency_heads(mt.open(families.build("gpt2"), prove=False), texts)


def test_the_best_layer_is_a_number_of_a_layer() -> None:
    hf, tokenizer = configs.build("lfm2"), tokenizers.build("bpe-bos")  # attention in layer 1 alone
    hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    data = dependency_heads(mt.open(hf, tokenizer=tokenizer, prove=False), template_sentences(6))
    assert data["layer"].values.tolist() == [1]
    assert data["best_layer"].values.tolist() == [1] * 4
    at = data.sel(relation="det")
    best = at["accuracy"].sel(layer=int(at["best_layer"]), head=int(at["best_head"]))
    assert float(best) == float(at["accuracy"].max())
