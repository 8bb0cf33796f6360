"""What a prompt may be, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tests import families
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerFast

import microtome as mt
from microtome.run import Batch

NEAR = {"rtol": 1e-4, "atol": 2e-5}


class Words:
    """A tokenizer of letters, from 5 on."""

    pad_token_id = 0
    eos_token_id = 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [5 + ord(c) - ord("a") for c in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(max(int(i) - 5, 0) % 26 + ord("a")) for i in ids)


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.open(families.build("llama-gqa"), tokenizer=Words(), prove=False)


ROWS = [[7, 8, 9, 10], [20, 21]]
RIGHT = {"input_ids": [[7, 8, 9, 10], [20, 21, 0, 0]], "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]]}
LEFT = {"input_ids": [[7, 8, 9, 10], [0, 0, 20, 21]], "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1]]}


@pytest.mark.parametrize("made", [list, torch.tensor, np.array])
@pytest.mark.parametrize("given", [RIGHT, LEFT])
@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_what_a_tokenizer_gives_is_read(model: mt.Model, kind: Any, given: dict[str, Any], made: Any) -> None:
    prompt = kind({key: made(value) for key, value in given.items()})
    for padding in ("left", "right"):
        run, expected = model.run(prompt, padding=padding), model.run(ROWS, padding=padding)
        assert run.batch.spans == expected.batch.spans
        assert torch.equal(run.logits, expected.logits)


def test_one_row_or_no_mask(model: mt.Model) -> None:
    for prompt in ({"input_ids": [7, 8]}, {"input_ids": [7, 8], "attention_mask": [1, 1]}, {"input_ids": [[7, 8]]}):
        assert model.to_tokens(prompt).tolist() == [[7, 8]]
    assert model.to_tokens({"input_ids": [7, 8], "token_type_ids": [0, 0]}).tolist() == [[7, 8]]
    for ids in ((7, 8), [(7, 8)], torch.tensor([7, 8]), torch.tensor([[7, 8]], dtype=torch.int32)):
        assert model.to_tokens(ids).tolist() == [[7, 8]]


@pytest.mark.parametrize(("first", "family"), [(0, "llama-gqa"), (1, "roberta")])
def test_positions_that_count_the_tokens_are_those_of_a_run(first: int, family: str) -> None:
    model = mt.open(families.build(family), prove=False)
    assert model.anatomy.first_position == first
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]]) + first
    given = model.run(LEFT | {"position_ids": positions}, padding="left")
    tensors = {k: torch.tensor(v) for k, v in LEFT.items()} | {"position_ids": positions}
    with torch.no_grad():
        expected = model.hf(**tensors).logits
    for row, (pads, n) in enumerate(given.batch.spans):
        torch.testing.assert_close(given.logits[row, pads:][:n], expected[row, pads:][:n], **NEAR)
    assert torch.equal(model.run(LEFT | {"position_ids": positions}).logits, model.run(ROWS).logits)
    more = {"special_tokens_mask": [[0, 0]], "offset_mapping": [[(0, 1), (1, 2)]], "position_ids": [first, first + 1]}
    assert model.to_tokens({"input_ids": [[7, 8]]} | more).tolist() == [[7, 8]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_a_prompt_and_keeps_its_padding(model: mt.Model, side: Literal["left", "right"]) -> None:
    batch = model.to_batch(ROWS, side)
    run = model.run(batch, "1.attn.z@-1")
    expected = model.run(ROWS, "1.attn.z@-1", padding=side)
    assert run.batch.spans == expected.batch.spans == batch.spans
    assert torch.equal(run["1.attn.z@-1"], expected["1.attn.z@-1"])
    assert torch.equal(run.logits, expected.logits)
    assert [row.tolist() for row in batch.rows] == ROWS
    cells = [mt.edit.Zero("0.mlp_out@0"), mt.edit.Zero("1.attn.z[1]@-1")]
    metric = mt.metric.LogProbability(7)
    whole = model.sweep(ROWS, cells, metric, prompts=[1, 0]).run()
    torch.testing.assert_close(model.sweep(batch, cells, metric, prompts=[1, 0]).run().values, whole.values, **NEAR)
    assert model.generate(batch, max_new_tokens=3) == model.generate(ROWS, max_new_tokens=3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_edges_of_a_padded_batch_are_those_of_its_rows(model: mt.Model, side: Literal["left", "right"]) -> None:
    edge = mt.sweep.Edge("0.mlp_out", "1.mlp.in", change=torch.ones(2, families.D_MODEL))
    metric = mt.metric.LogProbability(7)
    batch = model.to_batch(ROWS, side)
    found, alone = (model.sweep(p, [edge], metric, prompts=n).run() for p, n in ((batch, [1]), (ROWS[1:], None)))
    assert alone.effects.abs().max() > 1e-3
    torch.testing.assert_close(found.values, alone.values, **NEAR)


def test_a_run_keeps_the_tokens_that_it_was_given(model: mt.Model) -> None:
    tokens = torch.tensor([[7, 8, 9]])
    run = model.run(tokens)
    tokens[0, 0] = 30
    assert run.tokens.tolist() == [[7, 8, 9]]


@pytest.mark.parametrize(("lengths", "pads"), [((2, 2), (0, 0)), ((3,), (0,)), ((2,), (1,)), ((2,), ()), ((1,), (-1,))])
def test_a_batch_whose_rows_do_not_fit_is_refused(lengths: tuple[int, ...], pads: tuple[int, ...]) -> None:
    with pytest.raises(mt.errors.PromptError, match=r"lengths and pads of a batch do not fit its tokens; got lengths"):
        Batch(torch.tensor([[7, 8]]), lengths, pads)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ({"attention_mask": [1]}, "holds no input_ids; got attention_mask"),
        ({"input_ids": [[7, 8, 9]], "attention_mask": [[1, 0, 1]]}, "hides tokens inside row 0"),
        ({"input_ids": [[7, 8, 9]], "attention_mask": [[1, 1]]}, "attention_mask does not fit its input_ids"),
        ({"input_ids": [[7, 8]], "attention_mask": [[0, 0]]}, "the prompt is empty"),
        ({"input_ids": [[7, 8]], "token_type_ids": [[0, 1]]}, "has a second segment"),
        ([[7, 101]], "a token id lies outside the vocabulary; got 101; allowed: 0 to 100"),
        ([7, -1], "a token id lies outside the vocabulary; got -1"),
        (torch.tensor([2**40]), "a token id lies outside the vocabulary"),
        ([7, 2**70], "a token id lies outside the vocabulary; got 1180591620717411303424"),
        ([torch.tensor([7]), torch.tensor([8, 101])], "a token id lies outside the vocabulary; got 101"),
        ([torch.tensor([7.0])], "must hold integer token ids"),
        (Batch(torch.tensor([[7, 101]]), (2,), (0,)), "a token id lies outside the vocabulary; got 101"),
        (Batch(torch.tensor([[7, 8]]), (0,), (0,)), "the prompt is empty"),
        (
            {"input_ids": [[7, 8]], "inputs_embeds": 0},
            "a run cannot use the inputs_embeds of a prompt; allowed: input_ids",
        ),
        ({"input_ids": [[7, 8]], "labels": [[7, 8]]}, "a run cannot use the labels of a prompt"),
        (
            {"input_ids": [[7, 8]], "position_ids": [[1, 2]]},
            "cannot use the position_ids of row 0; got \\[1, 2\\]; allowed: 0",
        ),
        (
            RIGHT | {"position_ids": [[0, 1, 2, 3], [2, 3, 0, 0]]},
            "cannot use the position_ids of row 1; got \\[2, 3\\]",
        ),
        ({"input_ids": [[7, 8]], "position_ids": [[0, 1, 2]]}, "the prompt's position_ids does not fit its input_ids"),
        ({"input_ids": [[7.5]]}, "a token id must be an integer; got 7.5"),
        ({"input_ids": [["a"]]}, "a token id must be an integer; got 'a'"),
        ({"input_ids": [7, "a"]}, "cannot read the prompt"),
        ({"input_ids": [None]}, "a token id must be an integer; got None"),
        (torch.tensor([True]), "must hold integer token ids"),
        (torch.tensor([0.5]), "must hold integer token ids"),
        (torch.tensor(7), "must hold integer token ids"),
        (torch.zeros(0, 3, dtype=torch.long), "the prompt is empty"),
        (torch.zeros(2, 0, dtype=torch.long), "row 0 of the prompt is empty"),
        ([], "the prompt is empty"),
        ("", "the prompt is empty"),
        ([[7], []], "row 1 of the prompt is empty"),
        ([5] * 65, "longer than the model's context; got 65 tokens; allowed: at most 64"),
    ],
)
def test_what_is_no_prompt_is_refused(model: mt.Model, prompt: Any, text: str) -> None:
    for use in (model.run, model.to_tokens, model.plan):
        with pytest.raises(mt.errors.PromptError, match=text) as caught:
            use(prompt)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wanted", [-1, 0])
def test_a_generation_adds_tokens(model: mt.Model, wanted: int) -> None:
    with pytest.raises(mt.errors.PromptError, match=f"a generation must add tokens; got max_new_tokens={wanted}"):
        model.generate("abc", max_new_tokens=wanted)


@pytest.mark.parametrize("name", ["return_dict_in_generate", "output_scores"])
def test_a_generation_gives_texts_alone(model: mt.Model, name: str) -> None:
    with pytest.raises(
        mt.errors.PromptError, match=f"returns texts and nothing else; got {name}=True.*model.hf.generate"
    ):
        model.generate("abc", **{name: True})


def test_what_a_models_own_settings_ask_of_a_generation_is_left_out() -> None:
    hf = families.build("llama-gqa")
    expected = mt.open(hf, tokenizer=Words(), prove=False).generate("abc", max_new_tokens=3)
    hf.generation_config.return_dict_in_generate = True
    assert mt.open(hf, tokenizer=Words(), prove=False).generate("abc", max_new_tokens=3) == expected


@pytest.mark.parametrize("pad", [families.VOCAB, -1])
@pytest.mark.parametrize("eos", [2, families.VOCAB + 1])
def test_a_pad_outside_the_embedding_is_not_used(model: mt.Model, pad: int, eos: int) -> None:
    class Odd(Words):
        pad_token_id = pad
        eos_token_id = eos

    odd = mt.open(families.build("llama-gqa"), tokenizer=Odd(), prove=False)
    got, expected = odd.run(ROWS), model.run(ROWS)
    assert torch.equal(got.logits[got.mask], expected.logits[expected.mask])
    assert odd.generate(["abc", "d"], max_new_tokens=3) == model.generate(["abc", "d"], max_new_tokens=3)


def test_a_generation_ends_with_the_context(model: mt.Model) -> None:
    with pytest.raises(mt.errors.PromptError, match="too little room .*; got 62 new tokens; allowed: 61"):
        model.generate("abc", max_new_tokens=62)
    assert isinstance(model.generate("abc", max_new_tokens=61), str)
    assert len(model.generate(["abc", "d"], max_new_tokens=3)) == 2


def test_a_generation_needs_a_causal_model() -> None:
    masked = mt.open(families.build("bert"), tokenizer=Words(), prove=False)
    with pytest.raises(mt.errors.PromptError, match="attends in both directions and cannot continue a text"):
        masked.generate("abc")


def test_options_that_are_none_are_refused(model: mt.Model) -> None:
    with pytest.raises(mt.errors.PromptError, match="transformers cannot generate this way; got .*tempratur"):
        model.generate("abc", tempratur=0.5)


def test_mistakes_inside_a_generation_stay_what_they_are(model: mt.Model) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), model.editing(mt.edit.Apply("1.mlp_out", fail)):
        model.generate("abc")


# ------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models

    path = tmp_path_factory.mktemp("model")
    families.build("llama-gqa").save_pretrained(path)
    letters = {chr(97 + i): i for i in range(26)} | {"[UNK]": 26}
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(letters, unk_token="[UNK]")))
    plain.save_pretrained(path)
    return path


def test_a_model_without_a_tokenizer_takes_ids(folder: Path, tmp_path: Path) -> None:
    assert mt.open(folder).tokenizer is not None
    for file in folder.iterdir():
        if "token" not in file.name and "special" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    model = mt.open(tmp_path)
    assert model.tokenizer is None
    assert model.run([7, 8]).logits.isfinite().all()
    with pytest.raises(mt.errors.PromptError, match="opened without a tokenizer"):
        model.run("a")


@pytest.mark.parametrize("damage", ["{", "", "[]", '{"version": "1.0", "model": {"type": "WordLevel"}}'])
def test_a_damaged_tokenizer_is_said_to_be(folder: Path, tmp_path: Path, damage: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(Exception):  # noqa: B017, PT011 (of whatever library)
        AutoTokenizer.from_pretrained(tmp_path)
    text = "the tokenizer of .* cannot be read.*copy its files again"
    with pytest.raises(mt.errors.ModelBroken, match=text) as caught:
        mt.open(tmp_path)
    assert "\n" not in str(caught.value)
    given = mt.open(tmp_path, tokenizer=Words())  # another one is as good
    assert given.run("abc").logits.isfinite().all()


def test_what_is_none_in_a_mapping_is_not_there(model: mt.Model) -> None:
    ids = [[3, 5, 8]]
    given = {"input_ids": ids, "attention_mask": None, "inputs_embeds": None}
    assert torch.equal(model.run(given).logits, model.run(ids).logits)  # pyright: ignore[reportArgumentType]
