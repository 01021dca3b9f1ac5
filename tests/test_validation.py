"""Held-out text of one's own: whole and by name in the set, out of training, refused where it cannot serve."""

import json

import numpy as np
import pytest
from test_prepare import TOKENIZER, files

from smolpretrain.data.arguments import CorpusArguments
from smolpretrain.data.pack import shards
from smolpretrain.data.pack.manifest import Manifest
from smolpretrain.data.pack.progress import Progress
from smolpretrain.data.preparation import prepare
from smolpretrain.data.prepared import load_blocks, load_unigram_counts, load_validation_documents
from smolpretrain.data.read import corpus, readers
from smolpretrain.data.read import documents as documents_module
from smolpretrain.data.stream import open_stream
from smolpretrain.data.tokens.tokenization import encode_documents

TRAIN = [f"{number} cats sat on {number} mats and ate." for number in range(400)]
WIKI = [f"The {number}. article on dogs." for number in range(40)]
CODE = [f"def dog{number}():\n    return {number}" for number in range(30)]


@pytest.fixture
def texts(tmp_path):
    """Training text that holds 3 of the held-out documents, one of them twice."""
    lines = [*TRAIN[:100], WIKI[3], *TRAIN[100:], CODE[2], WIKI[3], WIKI[0]]
    for name, rows in {"train": lines, "wiki": WIKI, "code": CODE}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return tmp_path


def arguments(texts, **more):
    both = {"wiki": str(texts / "wiki.jsonl"), "code": [str(texts / "code.jsonl")]}
    given = {"data_files": [str(texts / "train.jsonl")], "validation_files": both, "block_size": 16}
    return CorpusArguments(**given | more)


def make(texts, directory, *, shards_of=1, **more):
    args, made = arguments(texts, **more), None
    for share in range(shards_of):
        made = prepare(
            corpus.read_documents(**args.reading), TOKENIZER, args.block_size, directory,
            corpus.describe_source(**args.source), progress=False, shard_index=share, num_shards=shards_of,
            **args.preparing,
        )  # fmt: skip
    return made


def stream(rows):
    return np.concatenate(encode_documents(TOKENIZER, rows))


def rows_of(directory, split):
    return np.concatenate(list(load_blocks(directory, split)["input_ids"])).tolist()


def test_each_named_set_has_its_rows_and_documents_and_none_of_them_is_trained_on(texts):
    manifest = make(texts, texts / "set")
    assert list(Manifest.load(texts / "set").held_out.items()) == [
        ("code", "validation_code"),
        ("wiki", "validation_wiki"),
    ]
    for split, rows in {"train": TRAIN, "validation_wiki": WIKI, "validation_code": CODE}.items():
        ids, entry = stream(rows).tolist(), manifest.splits[split]
        assert rows_of(texts / "set", split) == ids[: len(ids) // 16 * 16]
        assert entry["documents"] == len(rows) and entry["tokens"] == len(ids)
        if split != "train":
            assert list(load_validation_documents(texts / "set", split)) == rows
    assert manifest.filtered == {"held_out": 4} and manifest.validation_fraction == 0
    assert load_unigram_counts(texts / "set").tolist() == np.bincount(stream(TRAIN), minlength=len(TOKENIZER)).tolist()


def test_one_set_without_a_name_is_the_split_that_a_fraction_gives(texts):
    manifest = make(texts, texts / "set", validation_files=[str(texts / "wiki.jsonl")])
    assert list(manifest.splits) == ["train", "validation"] and manifest.held_out == {"": "validation"}
    assert list(load_validation_documents(texts / "set")) == WIKI
    assert manifest.splits["train"]["documents"] == len(TRAIN) + 1  # what stands in `code` is no matter here


@pytest.mark.parametrize("num_proc, shards_of", [pytest.param(2, 1, marks=pytest.mark.slow), (1, 2)])
def test_processes_and_machines_make_the_same_bytes(texts, monkeypatch, num_proc, shards_of):
    monkeypatch.setattr(documents_module, "PART_BYTES", 2_000)
    one = make(texts, texts / "one")
    make(texts, texts / "more", num_proc=num_proc, shards_of=shards_of)
    if shards_of > 1:
        args = arguments(texts)
        read = corpus.read_documents(**args.reading), TOKENIZER, 16, texts / "more"
        prepare(*read, corpus.describe_source(**args.source), progress=False, only_merge=True, **args.preparing)
    assert Manifest.load(texts / "more").fingerprint == one.fingerprint
    assert files(texts / "one") == files(texts / "more")


def test_a_kill_between_shards_ends_in_the_same_bytes(texts, monkeypatch):
    class Cut(BaseException):
        pass

    monkeypatch.setattr(readers, "READ_BYTES", 500)
    monkeypatch.setattr(shards, "SHARD_BYTES", 900)
    make(texts, texts / "whole")
    tick, seen = Progress.tick, []

    def cut(self, batch):
        tick(self, batch)
        seen.append(batch)
        if len(seen) % 7 == 0:
            raise Cut

    monkeypatch.setattr(Progress, "tick", cut)
    for _ in range(60):
        try:
            make(texts, texts / "cut")
            break
        except Cut:
            pass
    assert len(seen) > 14, "it was cut twice"
    assert Manifest.load(texts / "cut").fingerprint == Manifest.load(texts / "whole").fingerprint


def test_cleaning_and_limits_are_the_training_text_s(texts):
    manifest = make(texts, texts / "set", max_documents=50, min_characters=27)
    assert manifest.splits["validation_wiki"]["documents"] == len(WIKI)
    assert manifest.splits["train"]["documents"] == 50 and "held_out" in manifest.filtered


def test_another_held_out_text_is_another_set(texts):
    make(texts, texts / "set")
    with open(texts / "wiki.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"prepared with validation wiki\.data_files .*, but .* is asked for"):
        make(texts, texts / "set")
    with pytest.raises(ValueError, match=r"prepared with validation_fraction 0\.0, but 0\.1 is asked for"):
        make(texts, texts / "set", validation_files=None, validation_fraction=0.1)


def test_a_stream_leaves_held_out_documents_out(texts):
    args = arguments(texts)
    opened = open_stream(
        corpus.read_documents(**args.reading), TOKENIZER, 16, validation=args.validation, packing="concat", length=200,
        micro_batch=1, rank=0, world_size=1, validation_fraction=0, seed=0,
    )  # fmt: skip
    rows = len(stream(TRAIN)) // 16
    found = sorted(tuple(opened[index]["input_ids"].tolist()) for index in range(rows))
    assert found == sorted(map(tuple, stream(TRAIN)[: rows * 16].reshape(-1, 16).tolist()))


def test_splits_of_a_dataset_are_held_out_under_a_name_or_none(texts, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for split, name in {"train": "train", "validation": "wiki", "test": "code"}.items():
        (folder / f"{split}.jsonl").write_bytes((texts / f"{name}.jsonl").read_bytes())
    usual = {"data_files": None, "validation_files": None, "dataset_name": str(folder)}
    one = make(texts, texts / "one", **usual, validation_split="validation")
    assert list(load_validation_documents(texts / "one")) == WIKI and one.filtered == {"held_out": 3}
    two = make(texts, texts / "two", **usual, validation_split={"seen": "validation", "unseen": "test"})
    assert two.held_out == {"seen": "validation_seen", "unseen": "validation_unseen"}
    with pytest.raises(
        ValueError, match=r"validation_split: .*no split 'dev'; set validation_split to one of train, validation, test"
    ):
        make(texts, texts / "three", **usual, validation_split="dev")
    assert not (texts / "three").exists()


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"validation_fraction": 0.1},
            r"^validation_fraction = 0\.1 and validation_files = .* are both given: keep one",
        ),
        ({"validation_files": {"a-b": "x"}}, r"^validation_files: 'a-b' is no name for a set: letters"),
        ({"validation_files": {"Wiki": "x", "wiki": "y"}}, r"^validation_files: Wiki and wiki are one name twice"),
        ({"validation_files": {}}, r"^validation_files is empty: name at least one"),
        ({"validation_files": {"wiki": []}}, r"^validation_files: wiki is empty: name its text"),
        ({"validation_files": {"wiki": {"file": "x"}}}, r"^validation_files: file is not a key of a source; there are"),
        ({"validation_split": "dev"}, r"^validation_files = .* and validation_split = dev are both given: keep one"),
        ({"validation_files": None, "validation_split": "dev"}, r"is a split of dataset_name, which is not given"),
        (
            {"validation_files": None, "validation_split": "train", "dataset_name": "x", "data_files": None},
            r"^validation_split = train is trained on: it is dataset_split too",
        ),
    ],
)
def test_what_cannot_be_meant_is_said_by_its_key(texts, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        arguments(texts, **change)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", r"^the held-out set wiki holds no text: name other files"),
        (
            '{"text": " "}\n{"text": null}\n',
            r"^the held-out set wiki holds no text \(2 of 2 rows have no text: 2 null or blank\)",
        ),
        (
            '{"text": "a dog"}\n',
            r"^the held-out set wiki holds \d+ tokens, a row takes block_size = 16: give more text",
        ),
        ('{"txt": "a dog"}\n', r"^validation_files: wiki: .*no column 'text'; set text_column to one of txt"),
        ('{"text": "a"}\n{"text": 3}\n', r"wiki\.jsonl: row 2 is int '3', not text"),
    ],
)
def test_a_set_that_cannot_serve_is_said_before_anything_is_encoded(texts, monkeypatch, text, sentence):
    (texts / "wiki.jsonl").write_text(text)
    monkeypatch.setattr("smolpretrain.data.preparation.write_parts", None)
    with pytest.raises(ValueError, match=sentence):
        make(texts, texts / "set")
    assert not list(texts.glob(".set*"))
