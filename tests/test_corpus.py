"""Where text comes from: the built-in sample, local files, and what is said when they cannot be read."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolpretrain.data.read import documents as documents_module
from smolpretrain.data.read import readers
from smolpretrain.data.read.corpus import builtin_documents, describe_source, is_validation, read_documents
from smolpretrain.data.read.documents import Tally

HASH_OF_BUILTIN = (
    "import hashlib; from smolpretrain.data.read.corpus import builtin_documents;"
    "print(hashlib.sha256(repr(builtin_documents()).encode()).hexdigest())"
)


def jsonl(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_builtin_text_is_about_2_mb_of_500_distinct_documents():
    documents = builtin_documents()
    assert len(documents) > 500 and len(set(documents)) > 0.99 * len(documents)
    assert 1.5e6 < sum(len(text.encode("utf-8")) for text in documents) < 3.5e6
    assert any(text.startswith("json.decoder\n\nImplementation of JSONDecoder\n\n") for text in documents)
    assert any("JSONDecoder.decode\n\nReturn the Python representation" in text for text in documents)
    assert sum("statement" in text for text in documents) > 30  # the language reference is in it


def test_the_builtin_text_is_the_same_in_every_process():
    runs = [
        subprocess.run(
            [sys.executable, "-c", HASH_OF_BUILTIN], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) == 65, runs[0].stderr


def test_the_builtin_text_imports_no_library_module():
    code = "import sys; from smolpretrain.data.read.corpus import *; builtin_documents()"
    code += "; assert 'turtle' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_kind_of_file_is_read_kind_after_kind_in_sorted_order(tmp_path):
    jsonl(tmp_path / "b.jsonl", {"text": "b1", "other": 1}, {"text": "b2", "other": "x"})
    jsonl(tmp_path / "a [1].jsonl", {"text": "a1"})
    (tmp_path / "c.json").write_text('[{"text": "c1"}, {"text": "c2"}]')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "d1"}\n'))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(b'[{"text": "e1"}]'))
    (tmp_path / "f.csv").write_text('text,n\n"f1, quoted",1\nNA,2\n12,3\n')
    (tmp_path / "g.txt").write_text("g1 line one\n\nline two\n")
    pq.write_table(pa.table({"text": ["h1"], "n": [1]}), tmp_path / "h.parquet")
    (tmp_path / "f2.csv").write_text("text\n13\n")
    for name in ("empty.jsonl", "empty.csv", "empty.txt", "empty.parquet"):
        (tmp_path / name).write_text("")
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    files = [str(tmp_path / "*.*"), str(tmp_path / "b.jsonl")]  # given twice, read once
    csv, parquet, text = ["f1, quoted", "NA", "12", "13"], ["h1"], ["g1 line one\n\nline two\n"]
    assert list(read_documents(data_files=files)) == [*csv, "a1", "b1", "b2", "c1", "c2", "d1", "e1", *parquet, *text]


def test_a_single_path_and_another_column_are_taken(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"body": "x"})
    assert list(read_documents(data_files=path, text_column="body")) == ["x"]


def test_null_empty_and_blank_rows_are_skipped_and_counted(tmp_path):
    rows = [{"text": text} for text in ("one", None, "", " \n\t", "two")]
    documents = read_documents(data_files=[jsonl(tmp_path / "a.jsonl", *rows, {"other": 1})])
    assert list(documents) == ["one", "two"]
    assert (documents.documents, documents.skipped) == (2, 4)


def test_a_local_directory_is_a_dataset_name(tmp_path):
    jsonl(tmp_path / "train.jsonl", {"text": "x"})
    jsonl(tmp_path / "test.jsonl", {"text": "y"})
    assert list(read_documents(dataset_name=str(tmp_path))) == ["x"]
    assert list(read_documents(dataset_name=str(tmp_path), dataset_split="test")) == ["y"]
    with pytest.raises(ValueError, match="there is no split 'dev'; set dataset_split to one of train, test"):
        read_documents(dataset_name=str(tmp_path), dataset_split="dev")
    with pytest.raises(ValueError, match="no column 'body'; set text_column to one of text"):
        read_documents(dataset_name=str(tmp_path), text_column="body")


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("none.jsonl", r"no file matches .*none\.jsonl; check the path\."),
        ("*.json", r"no file matches .*\*\.json; check the path\."),
        ("a.docx", r"a\.docx is not of a kind that can be read; it must end in \.jsonl, .*\.bz2 behind it\."),
        ("a.jsonl", r"a\.jsonl: no column 'text'; set text_column to one of body, n\."),
        ("a.csv", r"a\.csv: no column 'text'; set text_column to one of body, n\."),
        ("broken.parquet", r"broken\.parquet: cannot be read as parquet \(.*\); repair it or leave it out\."),
        ("broken.jsonl", r"broken\.jsonl: row 2 cannot be read \(.*\); repair it \(bad_rows=skip passes"),
        (
            "cut.jsonl.gz",
            r"cut\.jsonl\.gz: row 51 cannot be read \(it is cut off: its \.gz data end too early\); repair it",
        ),
    ],
)
def test_files_that_cannot_serve_are_refused_before_anything_is_read(tmp_path, pattern, sentence):
    jsonl(tmp_path / "a.jsonl", {"body": "x", "n": 1})
    (tmp_path / "a.csv").write_text("body,n\nx,1\n")
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "broken.parquet").write_text("PAR0")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{broken\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "d1"}\n' * 50)[:40])
    with pytest.raises(ValueError, match=sentence) as error:
        read_documents(data_files=[str(tmp_path / pattern)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([None, 2, 3], r"a\.parquet: row 2 is int '2', not text; name another text_column or convert"),
        ([b"ab", None], "row 1 is bytes \"b'ab'\", not text"),
        ([[1]], "row 1 is list "),
    ],
    ids=["numbers", "bytes", "lists"],
)
def test_a_row_that_is_not_text_is_named(tmp_path, values, sentence):
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=sentence):
        list(read_documents(data_files=str(tmp_path / "a.parquet")))


def test_a_number_among_texts_is_named_by_its_row(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": None}, {"text": 3})
    with pytest.raises(ValueError, match=r"a\.jsonl: row 3 is int '3', not text; name another text_column"):
        list(read_documents(data_files=path))


def test_bad_rows_are_passed_over_counted_and_the_first_one_named_where_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "one"}',
        b"",
        b'{"text": 3}',
        b"{cut",
        b'{"text": "\\ud800"}',
        b"[1]",
        b'{"text": "two", "n": NaN}',
    ]
    path.write_bytes(b"\n".join([b'{"text": "first"}'] * 90_000 + lines))  # past what is parsed at the start
    documents = read_documents(data_files=str(path), bad_rows="skip")
    assert list(documents) == ["first"] * 90_000 + ["one", "two"]
    assert documents.tally.bad == 4 and documents.tally.first_bad.startswith("a.jsonl: row 90002 is int '3', not text")
    with pytest.raises(ValueError, match="bad_rows must be one of error, skip, got 'drop'"):
        read_documents(bad_rows="drop")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "csv", "directory"])
def test_parts_and_positions_give_every_document_once_in_order(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(readers, "READ_BYTES", 500)
    monkeypatch.setattr(documents_module, "PART_BYTES", 2_000)
    texts = [f"document {number} \u20ac" + "x" * (number % 37) for number in range(300)]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(lines, encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=70)
    elif kind == "csv":
        path.write_text("text\n" + "\n".join(texts), encoding="utf-8")
    else:
        for number in range(3):
            block = lines.splitlines(keepends=True)[number * 100 :][:100]
            (tmp_path / f"train-{number}.jsonl").write_text("".join(block), encoding="utf-8")
    source = {"dataset_name": str(tmp_path)} if kind == "directory" else {"data_files": [str(path)]}
    parts = read_documents(**source).parts()
    assert len(parts) > 1 or kind in ("jsonl.gz", "csv")
    batches = [[json.loads(json.dumps([b.texts, b.position])) for b in p.batches(None, Tally())] for p in parts]
    assert [text for part in batches for texts_, _ in part for text in texts_] == texts
    for part, seen in zip(parts, batches, strict=True):
        for number, (_, position) in enumerate(seen):
            rest = [text for batch in part.batches(position, Tally()) for text in batch.texts]
            assert rest == [text for later, _ in seen[number + 1 :] for text in later]


def test_a_lone_surrogate_is_refused_in_a_sentence(tmp_path):
    plain = jsonl(tmp_path / "a.jsonl", {"text": "ok"}, {"text": "\ud800"})
    with pytest.raises(ValueError, match=r"a\.jsonl: row 2 holds the lone surrogate '.+ud800' at"):
        list(read_documents(data_files=plain))
    mixed = jsonl(tmp_path / "b.jsonl", {"text": 1}, {"text": "x \udc00"})
    with pytest.raises(ValueError, match=r"b\.jsonl"):
        list(read_documents(data_files=mixed))


def test_damage_further_on_is_told_with_the_row_reached(tmp_path):
    line = json.dumps({"text": "x" * 1000}) + "\n"
    path = tmp_path / "a.jsonl"
    path.write_text(line * 12_000 + "{broken\n")  # past datasets' first read of 10 MiB
    documents = read_documents(data_files=str(path))
    with pytest.raises(
        ValueError, match=r"a\.jsonl: row 12001 cannot be read \(.*\); repair it \(bad_rows=skip passes such rows over"
    ):
        list(documents)


def test_a_column_is_missed_before_any_text_is_downloaded(tmp_path, monkeypatch):
    import datasets

    jsonl(tmp_path / "train.jsonl", {"text": "x"})
    features, splits = (
        "  features:\n  - name: text\n    dtype: string\n",
        "  splits:\n  - name: train\n    num_examples: 1\n",
    )
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n{features}{splits}---\n")
    assert list(read_documents(dataset_name=str(tmp_path))) == ["x"]
    monkeypatch.setattr(datasets, "load_dataset", None)  # what would download it
    with pytest.raises(ValueError, match="no column 'body'; set text_column to one of text"):
        read_documents(dataset_name=str(tmp_path), text_column="body")


def test_a_dataset_out_of_reach_is_one_sentence_with_a_remedy(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nobody/none'\non the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(
        ValueError, match=r"dataset_name 'nobody/none' \(en\) cannot be loaded .*`hf auth login`"
    ) as error:
        read_documents(dataset_name="nobody/none", dataset_config_name="en")
    assert "\n" not in str(error.value)


def test_two_sources_at_once_are_refused():
    with pytest.raises(ValueError, match="are both given; keep one"):
        read_documents(dataset_name="a/b", data_files=["c.jsonl"])


def test_a_source_is_described_without_absolute_paths(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "x"})
    described = describe_source(data_files=[path])
    assert described["data_files"][0]["name"] == "a.jsonl" and described["data_files"][0]["bytes"] == 14
    assert len(described["data_files"][0]["sha256"]) == 64
    directory = describe_source(dataset_name=str(tmp_path))
    assert directory["files"] == described["data_files"] and directory["dataset_name"] == tmp_path.name
    for source in (described, directory, describe_source()):
        assert str(tmp_path.parent) not in json.dumps(source)


def test_another_text_in_the_same_file_is_another_source(tmp_path):
    before = describe_source(data_files=[jsonl(tmp_path / "a.jsonl", {"text": "x"})])
    assert describe_source(data_files=[jsonl(tmp_path / "a.jsonl", {"text": "y"})]) != before


def test_about_the_fraction_asked_for_is_held_out():
    texts = [f"document {number}" for number in range(20_000)]
    assert sum(is_validation(text, 0.1) for text in texts) == pytest.approx(2000, abs=150)
    assert not any(is_validation(text, 0.0) for text in texts)
    tenth = {text for text in texts if is_validation(text, 0.1)}
    assert tenth < {text for text in texts if is_validation(text, 0.2)}  # a larger fraction keeps the smaller one's


def test_a_line_that_ends_just_where_a_part_ends_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "12345"}\n' * 40)  # 18 bytes a line
    for size in range(1, 80):
        monkeypatch.setattr(documents_module, "PART_BYTES", size)
        parts = read_documents(data_files=str(path)).parts()
        assert sum(len(batch.texts) for part in parts for batch in part.batches(None, Tally())) == 40, size


def test_a_slice_of_a_stream_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"a stream has no slices; name a whole split and set max_documents"):
        read_documents(dataset_name=str(tmp_path), dataset_split="train[:1]", streaming=True)
