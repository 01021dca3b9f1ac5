"""Ready ids: a column of token ids is trained on as it stands, and is text wherever text is asked for."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from test_prepare import TEXTS, TOKENIZER

from smolpretrain.data import prepare as command
from smolpretrain.data.arguments import CorpusArguments
from smolpretrain.data.pack import shards, workers
from smolpretrain.data.pack.manifest import Manifest
from smolpretrain.data.preparation import prepare
from smolpretrain.data.prepared import load_blocks, load_validation_documents
from smolpretrain.data.read import corpus, readers
from smolpretrain.data.read import documents as documents_module
from smolpretrain.data.tokens.tokenization import encode_documents

IDS = [document.tolist() for document in encode_documents(TOKENIZER, TEXTS)]


def write(path, rows, column="input_ids"):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table({column: pa.array(rows, pa.list_(pa.int32()))}), path, row_group_size=50)
    else:
        path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return str(path)


def make(directory, **given):
    args = CorpusArguments(**{"block_size": 16, "validation_fraction": 0.1} | given)
    return prepare(
        corpus.read_documents(**args.reading), TOKENIZER, args.block_size, directory,
        corpus.describe_source(**args.source), progress=False, **args.preparing,
    )  # fmt: skip


def trained_on(directory, split="train"):
    return np.concatenate(list(load_blocks(directory, split)["input_ids"])).tolist()


@pytest.fixture
def from_text(tmp_path):
    write(tmp_path / "text.jsonl", TEXTS, "text")
    return make(tmp_path / "text", data_files=[str(tmp_path / "text.jsonl")])


@pytest.mark.parametrize("name", ["ids.jsonl", "ids.parquet"])
def test_ids_give_the_set_that_their_text_gives_and_nothing_is_encoded(tmp_path, from_text, monkeypatch, name):
    def encode(self, texts):
        raise AssertionError("encoded")

    monkeypatch.setattr(workers.Encoder, "__call__", encode)
    made = make(tmp_path / "ids", data_files=[write(tmp_path / name, IDS)], ids_column="input_ids")
    assert made.splits == from_text.splits and made.eos_appended == 0
    for kind in ("*.arrow", "validation_documents*", "unigram_counts.npy"):
        paths = sorted((tmp_path / "ids").glob(kind))
        assert paths and all(path.read_bytes() == (tmp_path / "text" / path.name).read_bytes() for path in paths)


def test_eos_is_appended_where_it_is_missing_and_counted(tmp_path, from_text):
    rows = [row[:-1] if number % 3 else row for number, row in enumerate(IDS)]
    made = make(tmp_path / "ids", data_files=[write(tmp_path / "ids.jsonl", rows)], ids_column="input_ids")
    assert made.splits == from_text.splits and Manifest.load(tmp_path / "ids").eos_appended == 120


@pytest.mark.parametrize("num_proc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_parts_shards_and_processes_lose_no_id(tmp_path, from_text, monkeypatch, num_proc):
    monkeypatch.setattr(documents_module, "PART_BYTES", 2_000)
    if num_proc == 1:
        monkeypatch.setattr(readers, "READ_BYTES", 500)
        monkeypatch.setattr(shards, "SHARD_BYTES", 900)
    path = write(tmp_path / "ids.parquet", [row[:-1] for row in IDS])
    made = make(tmp_path / "ids", data_files=[path], ids_column="input_ids", num_proc=num_proc)
    assert len(made.files) > 3 * len(from_text.files) / num_proc and made.eos_appended == len(IDS)
    assert list(load_validation_documents(tmp_path / "ids")) == list(load_validation_documents(tmp_path / "text"))
    counts = [(tmp_path / name / "unigram_counts.npy").read_bytes() for name in ("ids", "text")]
    assert counts[0] == counts[1]
    for split, entry in made.splits.items():
        assert [entry[key] for key in ("documents", "tokens", "bytes")] == [
            from_text.splits[split][key] for key in ("documents", "tokens", "bytes")
        ]


def test_held_out_sets_may_be_ids_or_text_and_stand_out_of_training(tmp_path):
    extra = [f"Held out is the {number}. dog." for number in range(20)]
    ids = [document.tolist() for document in encode_documents(TOKENIZER, extra)]
    sets = {
        "ids": write(tmp_path / "held.jsonl", [*ids, IDS[0]]),
        "text": {"data_files": write(tmp_path / "held_text.jsonl", [*extra, TEXTS[1]], "text"), "text_column": "text"},
    }
    made = make(
        tmp_path / "set", data_files=[write(tmp_path / "ids.jsonl", IDS)], ids_column="input_ids",
        validation_files=sets, validation_fraction=None,
    )  # fmt: skip
    assert made.filtered == {"held_out": 2}
    assert list(load_validation_documents(tmp_path / "set", "validation_ids")) == [*extra, TEXTS[0]]
    rows = [trained_on(tmp_path / "set", f"validation_{name}") for name in sets]
    assert rows[0][:200] == rows[1][:200] == [one for document in ids for one in document][:200]


@pytest.mark.parametrize(
    "row, reason",
    [
        ([1, 2, 320], r"id 320 at place 2 is not in the vocabulary of 312"),
        ([1, -2], r"id -2 at place 1 is not in the vocabulary"),
        ([1, 2.5], r"\[1, 2\.5\] is not a list of token ids"),
        ([[1], [2]], r"\[\[1\], \[2\]\] is not a list of token ids"),
        ("text", r"it is str 'text', not a list of token ids"),
        (7, r"it is int '7', not a list of token ids"),
    ],
)
def test_the_first_row_that_is_no_list_of_ids_is_named(tmp_path, row, reason):
    path = write(tmp_path / "ids.jsonl", [*IDS[:4], row, [999], *IDS[4:]])
    with pytest.raises(ValueError, match=rf"ids\.jsonl: row 5 .*{reason}"):
        make(tmp_path / "set", data_files=[path], ids_column="input_ids")
    made = make(tmp_path / "set", data_files=[path], ids_column="input_ids", bad_rows="skip")
    assert made.bad_rows["rows"] == 2 and "row 5" in made.bad_rows["first"]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"data_files": None}, r"^ids_column = input_ids: name the data_files or the dataset_name that has it"),
        ({"filters": ["X"]}, r"^ids_column = input_ids and filters = \['X'\] do not go together"),
        ({"text_column": "body"}, r"^ids_column = input_ids and text_column = body do not go together"),
        (
            {"data_files": None, "mixture": [{"data_files": "x", "weight": 1}]},
            r"^ids_column = input_ids and mixture = .* do not go together",
        ),
    ],
)
def test_what_does_not_go_with_ids_is_said(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        CorpusArguments(**{"data_files": ["x"], "ids_column": "input_ids"} | change)


def test_a_column_that_is_not_there_and_a_tokenizer_to_be_trained_are_one_line(tmp_path, capsys):
    path = write(tmp_path / "ids.jsonl", IDS)
    with pytest.raises(SystemExit):
        command.main([f"data_files={path}", "ids_column=input_ids", f"prepared_dir={tmp_path / 'set'}"])
    assert "ids_column = input_ids holds ids of a tokenizer: set tokenizer_name to it." in capsys.readouterr().err
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    words = [f"data_files={path}", f"prepared_dir={tmp_path / 'set'}", f"tokenizer_name={tmp_path / 'tokenizer'}"]
    with pytest.raises(SystemExit):
        command.main([*words, "ids_column=ids"])
    assert "no column 'ids'" in capsys.readouterr().err
    command.main([*words, "ids_column=input_ids", "block_size=16", "validation_fraction=0.1"])
    assert "train: " in capsys.readouterr().out
