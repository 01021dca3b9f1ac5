"""A document of hundreds of megabytes is kept as UTF-8 and comes out as any other."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import SOURCE, TOKENIZER, files

from smolpretrain.data.preparation import prepare
from smolpretrain.data.read import long_text, readers
from smolpretrain.data.read.corpus import read_documents
from smolpretrain.data.read.documents import Tally
from smolpretrain.data.read.long_text import LongText
from smolpretrain.data.tokens import encoding

chance = random.Random(0)
WORDS = ["cat", "\u00e9t\u00e9", "\U0001f600", "2024", "\u4f60\u597d", "\n", '"quoted"', "\\", "\u2028", "x" * 40]
LONG = [" ".join(chance.choices(WORDS, k=k)) + " end" for k in (30, 200, 50, 400)]
TEXTS = ["short one", LONG[0], "another", "third", *LONG[1:], "last"]


@pytest.fixture
def all_are_long(monkeypatch):
    monkeypatch.setattr(long_text, "LONG_BYTES", 60)
    monkeypatch.setattr(readers, "READ_BYTES", 40)
    monkeypatch.setattr(long_text, "PIECE_BYTES", 16)
    monkeypatch.setattr(encoding, "LONG", 32)


def write(path, texts):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), path, row_group_size=5)
    elif path.suffix == ".txt":
        path.write_text(texts[1])
    else:
        lines = [json.dumps({"n": 1, "text": text, "z": [2]}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("backend", ["auto", "tokenizers"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_the_set_is_the_same(tmp_path, request, kind, backend):
    path = write(tmp_path / f"a.{kind}", TEXTS)
    for name in ("plain", "long"):
        if name == "long":
            request.getfixturevalue("all_are_long")
            held = [
                text for batch in read_documents(data_files=str(path)).batches(None, Tally()) for text in batch.texts
            ]
            assert sum(isinstance(text, LongText) for text in held) == (1 if kind == "txt" else 4)
        fraction = 0.4 if kind != "txt" else 0
        prepare(
            read_documents(data_files=str(path)), TOKENIZER, 8, tmp_path / name, SOURCE, fraction, progress=False,
            tokenizer_backend=backend,
        )  # fmt: skip
    assert files(tmp_path / "plain") == files(tmp_path / "long")
    if kind == "jsonl":
        assert any(len(line) > 60 for line in (tmp_path / "plain").glob("validation*.jsonl").__next__().open())


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1), st.integers(1, 40))
def test_pieces_and_openings_are_the_text_s(text, first):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "PIECE_BYTES", 5)
        kept = LongText(text.encode())
        assert "".join(kept.pieces()) == text == str(kept) and bytes(kept.encode()) == text.encode()
        assert kept[:first] == text[:first] and kept.is_blank == (not text.strip())


def test_a_tokenizer_is_trained_on_its_pieces(tmp_path, all_are_long):
    texts = list(read_documents(data_files=str(write(tmp_path / "a.jsonl", TEXTS))))
    assert "".join(texts) == "".join(TEXTS) and len(texts) > len(TEXTS)


def test_a_blank_one_is_skipped_and_a_bad_one_is_named(tmp_path, all_are_long):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": " \n" * 40}) + "\n" + json.dumps({"text": None, "other": "x" * 90}) + "\n")
    documents = read_documents(data_files=str(path))
    assert list(documents) == [] and documents.skipped == 2
    for value, sentence in (
        ('"' + "x" * 90 + '\\ud800"', "row 1 holds the lone surrogate"),
        ("[" + "1," * 60 + "1]", "row 1 is list"),
        ('"' + "x" * 90, "row 1 cannot be read"),
    ):
        path.write_text('{"text": ' + value + "}\n" + '{"text": "fine"}\n')
        with pytest.raises(ValueError, match=sentence):
            list(read_documents(data_files=str(path)))
    (tmp_path / "a.txt").write_bytes(b"x" * 90 + b"\xff")
    with pytest.raises(ValueError, match=r"a\.txt: row 1 cannot be read \(.*utf-8.*can't decode byte 0xff"):
        list(read_documents(data_files=str(tmp_path / "a.txt")))
