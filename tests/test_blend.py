"""Prepared sets blended while a run trains: each has its share of any prefix, in one order for whoever resumes."""

import json
import shutil

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import prepared
from test_run import TINY

from smolpretrain.arguments import DataArguments
from smolpretrain.data import blend as blend_module
from smolpretrain.data.arguments import read_entries
from smolpretrain.data.blend import Blend, BlendedRows, Order
from smolpretrain.data.prepared import load_validation_documents
from smolpretrain.hub import card, publish


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 300)), min_size=1, max_size=5),
    st.sampled_from([1, 0.1, 1 / 3, 0.001]),
    st.integers(7, 50),
)
def test_any_prefix_has_the_shares_within_two_rows_and_every_row_comes_in_its_turn(sets, unit, window):
    weights, rows = [weight * unit for weight, _ in sets], [count for _, count in sets]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_module, "WINDOW", window)
        order = Order(weights, rows)
        drawn = [order[index] for index in range(len(order))]
        taken = np.zeros(len(sets), dtype=int)
        shares = np.array(weights) / sum(weights)
        for count, (number, row) in enumerate(drawn, 1):
            assert row == taken[number]
            taken[number] += 1
            assert np.abs(taken - shares * count).max() <= 2
        assert (taken <= rows).all()
        number = min(range(len(sets)), key=lambda at: order.ends[at])
        assert taken[number] == rows[number], "it ends where a set does"
        for count in {0, len(order) // 3, len(order)}:
            assert order.taken(count) == [sum(one == at for one, _ in drawn[:count]) for at in range(len(sets))]
        fresh = Order(weights, rows)
        assert [fresh[index] for index in reversed(range(len(order)))] == drawn[::-1], "a row is found alone"


def test_a_row_far_on_is_found_at_once():
    order = Order([0.7, 0.2, 0.1], [10**12] * 3)
    number, row = order[10**11 + 3]
    assert abs(row - [0.7, 0.2, 0.1][number] * 10**11) < 3
    assert np.abs(np.array(order.taken(10**11)) - np.array([0.7, 0.2, 0.1]) * 10**11).max() <= 2


def rows_of(lengths, weights, epochs, seed=0):
    sets = [
        Dataset.from_dict({"input_ids": [[at, row] for row in range(count)]}).with_format("numpy")
        for at, count in enumerate(lengths)
    ]
    order = Order(weights, [count * times for count, times in zip(lengths, epochs, strict=True)])
    blended = BlendedRows(sets, order, seed)
    return [tuple(blended[index]["input_ids"].tolist()) for index in range(len(blended))]


def test_every_row_of_a_set_comes_once_an_epoch_in_an_order_of_its_own():
    rows = rows_of([40, 10], [0.8, 0.2], [3, 1])
    assert len(rows) == 52, "the small set ends it where its eleventh row is due"
    rows = rows_of([40, 10], [0.5, 0.5], [1, 4])
    small = [row for at, row in rows if at == 1]
    epochs = [small[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    assert sorted(row for at, row in rows if at == 0) == list(range(40))
    assert rows == rows_of([40, 10], [0.5, 0.5], [1, 4]) != rows_of([40, 10], [0.5, 0.5], [1, 4], seed=1)
    assert rows[:30] == rows_of([40, 10], [0.5, 0.5], [1, 5])[:30], "more epochs change nothing before"


@pytest.fixture
def sets(tmp_path):
    """Two sets of one tokenizer: 'a' with a held-out fraction, 'b' of other text."""
    prepared(tmp_path / "a", [f"Document {n} of the first set." for n in range(200)])
    prepared(tmp_path / "b", [f"The {n}. one of the second, about dogs." for n in range(60)])
    return tmp_path


def entry(path, **more):
    return {"prepared_dir": str(path), "weight": 1} | more


def test_a_blend_has_each_set_s_held_out_text_by_its_name_and_their_counts_by_weight(sets):
    made = Blend(read_entries([entry(sets / "a", weight=3), entry(sets / "b", name="dogs")]), seed=0)
    assert made.manifest.held_out == {"a": "validation_a", "dogs": "validation_dogs"}
    assert list(made.held_out_documents("dogs")) == list(load_validation_documents(sets / "b"))
    assert len(made.held_out_rows("a")) == made.manifest.splits["validation_a"]["blocks"] > 0
    ones = [np.load(sets / name / "unigram_counts.npy") for name in "ab"]
    expected = 0.75 * ones[0] / ones[0].sum() + 0.25 * ones[1] / ones[1].sum()
    counts = made.unigram_counts()
    assert counts.dtype == np.int64 and np.allclose(counts / counts.sum(), expected, atol=1e-3)
    other = Blend(read_entries([entry(sets / "a", weight=2), entry(sets / "b", name="dogs")]), seed=0)
    assert made.manifest.fingerprint != other.manifest.fingerprint, "other weights are other data to a resume"


def test_more_steps_than_the_sets_allow_are_refused_with_what_there_is(sets):
    made = Blend(read_entries([entry(sets / "a"), entry(sets / "b", max_epochs=2)]), seed=0)
    blocks = made.manifest.splits["train_b"]["blocks"]
    made.check_length(len(made.order) // 4, 4)
    with pytest.raises(ValueError) as refused:
        made.check_length(len(made.order) // 4 + 1, 4)
    said = str(refused.value)
    assert f"b ends first, {blocks:,} rows at max_epochs = 2. Raise that to 3" in said
    assert said.endswith(f"set max_steps to {len(made.order) // 4}.")
    raised = Blend(read_entries([entry(sets / "a"), entry(sets / "b", max_epochs=3)]), seed=0)
    raised.check_length(len(made.order) // 4 + 1, 4)


@pytest.mark.parametrize(
    "given_, sentence",
    [
        ([], r"^prepared_dir is an empty list"),
        ([{"prepared_dir": "a", "weight": 0}], r"^prepared_dir\[0\]: weight must be a number above 0, .*, got 0\."),
        ([{"prepared_dir": "a"}], r"^prepared_dir\[0\]: weight must be a number above 0, .*, got None\."),
        ([{"weight": 1}], r"^prepared_dir\[0\]: prepared_dir must be the directory of a prepared set, got None\."),
        (
            [entry("a", max_epochs=0)],
            r"^prepared_dir\[0\]: max_epochs must be a whole number of at least 1, got 0\.",
        ),
        ([entry("a", epochs=2)], r"^prepared_dir\[0\]: epochs is not a key of a set; there are prepared_dir, weight"),
        ([entry("a", name="x-y")], r"^prepared_dir\[0\]: name 'x-y' must be letters"),
        ([entry("x/a"), entry("y/a")], r"^prepared_dir: name a stands twice: give each a name of its own"),
        ([entry("a"), entry("./a", name="b")], r"^prepared_dir: prepared_dir a stands twice: name it once"),
    ],
)
def test_a_blend_that_cannot_be_meant_is_said(given_, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataArguments(prepared_dir=given_)


def test_what_prepares_a_set_has_no_place_beside_sets_that_are_prepared():
    for name, value in {"data_files": ["x"], "max_tokens": 5, "validation_files": ["x"], "streaming": True}.items():
        with pytest.raises(ValueError, match=f"^{name} = .* belongs to preparing a set"):
            DataArguments(prepared_dir=[entry("a")], **{name: value})


@pytest.fixture(scope="module")
def run(launch, corpus_file, tmp_path_factory):
    """Two prepared sets; ten steps of one process on a blend of them, whole, and gone on with from step 5."""
    where = tmp_path_factory.mktemp("blend")
    lines = corpus_file.read_text().splitlines(keepends=True)
    (where / "b.jsonl").write_text("".join(lines[:60]))
    usual = ["block_size=64", "validation_fraction=0.1"]
    launch("python", "data/prepare.py", f"data_files={corpus_file}", f"prepared_dir={where / 'a'}", "vocab_size=512",
           *usual)  # fmt: skip
    launch("python", "data/prepare.py", f"data_files={where / 'b.jsonl'}", f"prepared_dir={where / 'b'}",
           f"tokenizer_name={where / 'a' / 'tokenizer'}", *usual)  # fmt: skip
    sets = [entry(where / "a", weight=0.7), entry(where / "b", weight=0.3, max_epochs=4)]
    words = [word for word in TINY if not word.startswith(("eval_strategy", "tokenizer_name", "validation_fraction"))]
    words += [f"prepared_dir={json.dumps(sets)}", f"tokenizer_name={where / 'a' / 'tokenizer'}", "deepspeed=null",
              "max_steps=10", "save_steps=5", "eval_steps=5", "per_device_train_batch_size=2",
              "gradient_accumulation_steps=2", "optim=adamw_torch"]  # fmt: skip
    done = launch("python", "run_pretrain.py", *words, f"output_dir={where / 'run'}")
    shutil.copytree(where / "run" / "checkpoint-5", where / "again" / "checkpoint-5")
    launch("python", "run_pretrain.py", *words, f"output_dir={where / 'again'}")
    return where, words, done


@pytest.mark.slow
def test_a_run_on_a_blend_has_its_shares_its_sets_and_resumes_bitwise(run, launch):
    where, *_ = run
    record = json.loads((where / "run" / "run.json").read_text())
    shares = record["result"]["blend"]
    assert [(one["name"], one["weight"], one["rows"]) for one in shares] == [("a", 0.7, 28), ("b", 0.3, 12)]
    assert set(record["result"]["held_out_sets"]) == {"a", "b"}
    assert [one["weight"] for one in record["data"]["source"]["blend"]] == [0.7, 0.3]
    rows = [json.loads(line) for line in (where / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["eval_b_bits_per_byte"] > 0 for row in rows if "eval_loss" in row)
    report, text = (where / "run" / "report" / "report.csv").read_text(), card.make_card(where / "run", None, "mit")
    assert "share of the rows (b),0.3" in report and "held-out bits per byte (b)" in report
    assert "blended by weight" in text and "of each set its own (`a`, `b`)" in text
    assert publish.reproduce(where / "run", where / "run", record).startswith("held-out bits per byte")
    again = [json.loads(line) for line in (where / "again" / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row["loss"] for row in again if "loss" in row} == {
        row["step"]: row["loss"] for row in rows if "loss" in row and row["step"] > 5
    }
    weights = [(where / name / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_another_mixture_another_tokenizer_and_too_many_steps_are_one_line(run, launch):
    where, words, _ = run
    sets = [entry(where / "a", weight=0.6), entry(where / "b", weight=0.4)]
    changes = {
        f"prepared_dir={json.dumps(sets)}": "was trained with data = ",
        "max_steps=5000": "max_steps = 5000 takes 20,000 rows, prepared_dir gives",
        "block_size=32": "was prepared with block_size 64, but 32 is asked for",
    }
    for change, sentence in changes.items():
        done = launch("python", "run_pretrain.py", *words, f"output_dir={where / 'run'}", change, expect=2)
        lines = [line for line in done.stderr.splitlines() if line.startswith("run_pretrain.py: error")]
        assert len(lines) == 1 and sentence in lines[0], done.stderr
