"""The forms that text comes in: the same documents whatever holds them, each once, in their order."""

import bz2
import functools
import gzip
import json
import lzma
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from smolpretrain.data.arguments import CorpusArguments
from smolpretrain.data.read import documents as documents_module
from smolpretrain.data.read import files, held_out, readers
from smolpretrain.data.read.corpus import describe_source, read_documents
from smolpretrain.data.read.documents import Tally

TEXTS = ["one", "two \u20ac\nlines", "\u00e9t\u00e9", "4", "NA"]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def lines(texts=TEXTS, **more) -> bytes:
    return "".join(json.dumps({"text": text, **more}, ensure_ascii=False) + "\n" for text in texts).encode()


def written(path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def csv_of(texts=TEXTS, delimiter=",") -> bytes:
    return ("text" + delimiter + "n\n" + "".join(f'"{text}"{delimiter}1\n' for text in texts)).encode()


@pytest.mark.parametrize("end", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv", ".txt", ".md"])
def test_every_form_is_read_under_every_compression_with_and_without_bom(tmp_path, kind, end):
    one = {".csv": csv_of(), ".tsv": csv_of(delimiter="\t"), ".txt": TEXTS[1].encode(), ".md": TEXTS[1].encode()}
    data, expected = one.get(kind, lines()), TEXTS[1:2] if kind in (".txt", ".md") else TEXTS
    for bom in (b"", b"\xef\xbb\xbf"):
        path = written(tmp_path / f"a{kind}{end}", COMPRESS[end](bom + data))
        assert list(read_documents(data_files=path)) == expected


@pytest.mark.parametrize("end", [".gz", ".zst", ".xz", ".bz2"])
def test_streams_one_after_another_in_a_file_are_all_read(tmp_path, end):
    path = written(tmp_path / f"a.jsonl{end}", COMPRESS[end](lines(TEXTS[:2])) + COMPRESS[end](lines(TEXTS[2:])))
    assert list(read_documents(data_files=path)) == TEXTS


@pytest.mark.parametrize(
    "data",
    [
        json.dumps([{"text": text} for text in TEXTS]).encode(),
        json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
        "\n".join(json.dumps({"text": text}, indent=2) for text in TEXTS).encode(),
        b"\n\n" + lines(),
        lines()[:-1],
        lines().replace(b"\n", b"\r\n"),
    ],
    ids=["array", "indented array", "indented objects", "blank lines before", "no last line end", "CRLF"],
)
def test_json_is_told_by_what_stands_there(tmp_path, data, monkeypatch):
    for size in (readers.READ_BYTES, 7):
        monkeypatch.setattr(readers, "READ_BYTES", size)
        for name in ("a.json", "b.jsonl", "c.json.gz"):
            path = written(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
            assert list(read_documents(data_files=path)) == TEXTS


def test_another_field_may_change_its_type_on_the_way(tmp_path):
    data = lines(["a"] * 6000, id=1) + lines(["b"], id="x") + lines(["c"], id=None) + lines(["d"], id={"deep": [1]})
    for name in ("a.json", "a.jsonl", "a.json.gz"):
        path = written(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
        assert list(read_documents(data_files=path))[-4:] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_another_encoding_is_read_where_it_is_named(tmp_path, encoding):
    texts = ["plain", "\u00e9t\u00e9 \u00fc"]
    paths = {
        "a.jsonl": lines(texts).decode().encode(encoding),
        "b.csv.gz": gzip.compress(csv_of(texts).decode().encode(encoding)),
        "c.txt": texts[1].encode(encoding),
    }
    found = [written(tmp_path / name, data) for name, data in paths.items()]
    assert list(read_documents(data_files=found, encoding=encoding)) == [*texts, *texts, texts[1]]
    assert describe_source(data_files=found, encoding=encoding)["encoding"] == encoding
    assert "encoding" not in describe_source(data_files=found)  # a set of before is the same set


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("ab<|\n", max_size=8), max_size=12), st.integers(1, 40), st.sampled_from(["<|>", "\n\n\n", "a"])
)
def test_a_separator_cuts_a_file_the_same_way_whatever_is_read_at_once(tmp_path_factory, parts, size, separator):
    text = separator.join(parts)
    path = written(tmp_path_factory.mktemp("s") / "a.txt", text.encode())
    expected = [stripped for part in text.split(separator) if (stripped := part.strip("\n")).strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", size)
        patch.setattr(documents_module, "PART_BYTES", size)
        whole = read_documents(data_files=path, document_separator=separator)
        found = [[text for batch in part.batches(None, Tally()) for text in batch.texts] for part in whole.parts()]
        assert [text for part in found for text in part] == expected == list(whole)
        for part, mine in zip(whole.parts(), found, strict=True):
            seen = 0
            for batch in part.batches(None, Tally()):
                seen += len(batch.texts)
                rest = [text for more in part.batches(batch.position, Tally()) for text in more.texts]
                assert rest == mine[seen:]


def test_a_separator_is_said_on_a_command_line_and_meets_windows_line_ends(tmp_path):
    path = written(tmp_path / "a.txt", b"one\r\n\r\n\r\ntwo\nline\r\n\r\n\r\n\r\nthree\r\n")
    assert list(read_documents(data_files=path, document_separator="\\n\\n\\n")) == ["one", "two\nline", "three"]
    assert describe_source(data_files=path, document_separator="\\n")["document_separator"] == "\n"


def test_a_file_of_stories_gives_its_documents_and_no_marker(tmp_path):
    path = written(tmp_path / "stories.txt.zst", zstandard.compress(b"Once.\n<|endoftext|>\nTwice.\n<|endoftext|>\n"))
    assert list(read_documents(data_files=path, document_separator="<|endoftext|>")) == ["Once.", "Twice."]


def test_a_folder_of_texts_is_one_document_a_file_by_either_name(tmp_path):
    for number in range(5):
        written(tmp_path / "texts" / f"{number}.txt", f"{number} line\nanother\n".encode())
    expected = [f"{number} line\nanother\n" for number in range(5)]
    assert list(read_documents(dataset_name=str(tmp_path / "texts"))) == expected
    assert list(read_documents(data_files=str(tmp_path / "texts"))) == expected


def test_a_directory_is_taken_with_all_below_it_and_it_is_said(tmp_path):
    written(tmp_path / "d" / "b.jsonl", lines(["b"]))
    written(tmp_path / "d" / "deep" / "a.jsonl.zst", zstandard.compress(lines(["a"])))
    for name in (".git/config.json", ".hidden.jsonl", "README.md", "picture.png", "dataset_infos.json"):
        written(tmp_path / "d" / name, b"{}")
    os.symlink(tmp_path / "d", tmp_path / "d" / "deep" / "again")  # a circle
    documents = read_documents(data_files=str(tmp_path / "d"))
    assert list(documents) == ["b", "a"]
    assert documents.said == [
        f"data_files: of {tmp_path / 'd'} taken 2 .jsonl; left out 1 .json, 1 .png, 1 README.md; 2 hidden."
    ]


def test_source_code_is_a_document_a_file(tmp_path):
    for name in ("a.py", "b/c.rs", "b/d.cpp", "README.md"):
        written(tmp_path / name, name.encode())
    assert sorted(read_documents(data_files=str(tmp_path))) == ["README.md", "a.py", "b/c.rs", "b/d.cpp"]


def test_one_file_under_many_names_is_read_once_and_it_is_said(tmp_path, monkeypatch):
    path = written(tmp_path / "a.jsonl", lines())
    monkeypatch.chdir(tmp_path)
    os.symlink(path, "b.jsonl")
    os.link(path, "c.jsonl")
    documents = read_documents(data_files=["a.jsonl", path, "b.jsonl", "./c.jsonl"])
    assert list(documents) == TEXTS
    assert documents.said == [f"data_files: {path} is the same file as a.jsonl, and 2 more: read once."]
    assert len(describe_source(data_files=["a.jsonl", "b.jsonl"])["data_files"]) == 1


@pytest.mark.parametrize("given", ["dataset_name", "data_files"])
def test_what_datasets_saved_to_disk_is_read(tmp_path, given, monkeypatch):
    monkeypatch.setattr(readers, "READ_BYTES", 10)
    whole = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(5))})
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "two")
    source = {given: str(tmp_path / "two")}
    assert list(read_documents(**{given: str(tmp_path / "one")})) == list(read_documents(**source)) == TEXTS
    assert list(read_documents(**source, dataset_split="test")) == TEXTS[1:2]
    with pytest.raises(ValueError, match="there is no split 'dev'; set dataset_split to one of train, test"):
        read_documents(**source, dataset_split="dev")


def test_an_arrow_file_is_read_from_where_it_stood(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READ_BYTES", 10)
    table = pa.table({"text": TEXTS * 4})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    documents = read_documents(data_files=str(tmp_path / "a.arrow"))
    batches = [json.loads(json.dumps([batch.texts, batch.position])) for batch in documents.batches(None, Tally())]
    assert [text for texts, _ in batches for text in texts] == TEXTS * 4 and len(batches) > 3
    for number, (_, position) in enumerate(batches):
        rest = [text for batch in documents.batches(position, Tally()) for text in batch.texts]
        assert rest == [text for texts, _ in batches[number + 1 :] for text in texts]


ROWS = [
    {"meta": {"text": "a", "n": 1}, "title": "A", "body": "first", "parts": ["x", "y"]},
    {"meta": {"text": "b", "n": 2}, "title": None, "body": "second", "parts": ["z"]},
    {"meta": {"text": None, "n": 3}, "title": None, "body": "", "parts": []},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"text_column": "meta.text"}, ["a", "b"]),
        ({"text_template": "{title}\n\n{body}"}, ["A\n\nfirst", "second"]),
        ({"text_template": "{meta.n}: {body} {{x}}"}, ["1: first {x}", "2: second {x}", "3:  {x}"]),
        ({"text_column": "parts"}, ["x\n\ny", "z"]),
    ],
    ids=["nested", "template", "nested in a template", "list"],
)
def test_a_document_may_be_nested_of_several_columns_or_a_list(tmp_path, kind, how, expected):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "arrow":
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text(json.dumps(ROWS) if kind == "json" else "".join(json.dumps(row) + "\n" for row in ROWS))
    documents = read_documents(data_files=str(path), **how)
    assert list(documents) == expected and documents.skipped == 3 - len(expected)
    name = "text_column" if "text_column" in how else "text_template"
    assert describe_source(data_files=str(path), **how)[name] == how[name]


def test_rows_without_the_column_are_told_from_blank_ones(tmp_path):
    path = written(tmp_path / "a.jsonl", lines(["one", None, " "]) + b'{"other": 1}\n' * 3)
    documents = read_documents(data_files=path)
    assert list(documents) == ["one"]
    assert documents.tally.words == "5 of 6 rows have no text: 3 without the column, 2 null or blank"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A directory behind a real HTTP server on loopback; returns both."""
    directory = tmp_path_factory.mktemp("served")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    handler = functools.partial(quiet, directory=str(directory))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield directory, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_address_is_read_and_described_without_its_secrets(served):
    directory, top = served
    written(directory / "a.jsonl.gz", gzip.compress(lines()))
    written(directory / "b.txt", b"a page")
    address = f"{top.replace('//', '//user:secret@')}/a.jsonl.gz?token=secret"
    assert list(read_documents(data_files=[f"{top}/a.jsonl.gz?token=secret", f"{top}/b.txt"])) == [*TEXTS, "a page"]
    described = json.dumps(describe_source(data_files=[address]))
    assert "/a.jsonl.gz" in described and "secret" not in described
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be reached \(.*\); check it and the network"):
        read_documents(data_files=f"{top}/none.jsonl")
    with pytest.raises(ValueError, match="nosuch://a.jsonl: Protocol not known: nosuch; there are hf://"):
        read_documents(data_files="nosuch://a.jsonl")


READS_THE_HUB = """
import json, sys
from smolpretrain.data.read.corpus import describe_source, read_documents
from smolpretrain.data.read import documents as documents_module
from smolpretrain.data.read.documents import Tally

documents_module.PART_BYTES = 1  # a part of each file, however small
documents = read_documents(dataset_name="user/shards")
found = {"first": [next(documents) for _ in range(5)], "parts": len(documents.parts())}
if sys.argv[1] == "more":
    found["last"] = [text for batch in documents.parts()[3].batches(None, Tally()) for text in batch.texts]
    ways = [dict(dataset_data_dir="en"), dict(dataset_data_files="de/*.jsonl"), dict(dataset_data_files=["x.txt"])]
    found["ways"] = [list(read_documents(dataset_name="user/parts", **way)) for way in ways]
    found["hf"] = list(read_documents(data_files="hf://datasets/user/parts/de/*.jsonl"))
    found["described"] = describe_source(dataset_name="user/parts", dataset_data_dir="en")
print(json.dumps(found))
"""


@pytest.mark.slow
def test_of_the_hub_only_the_files_are_fetched_that_are_read(hub, launch, tmp_path):
    shards = {}
    for number in range(4):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": [f"{number}-{row}" for row in range(10)]}), sink)
        shards[f"data/train-{number:05d}-of-00004.parquet"] = sink.getvalue().to_pybytes()
    hub.add("dataset", "user/shards", shards)
    hub.add("dataset", "user/parts", {"en/a.jsonl": lines(["en"]), "de/b.jsonl": lines(["de"]), "x.txt": b"x\ny"})
    read, home = ("python", "-c", READS_THE_HUB), hub.environment(tmp_path / "home")
    found = json.loads(launch(*read, "first", **home).stdout)
    assert found == {"first": [f"0-{row}" for row in range(5)], "parts": 4}  # parts: what processes share out
    assert set(hub.downloads("user/shards")) == {"data/train-00000-of-00004.parquet"}
    found = json.loads(launch(*read, "more", **home).stdout)
    assert found["last"] == [f"3-{row}" for row in range(10)]
    assert found["ways"] == [["en"], ["de"], ["x\ny"]] and found["hf"] == ["de"]
    assert found["described"]["dataset_data_dir"] == "en"
    offline = launch(*read, "first", **home | {"HF_HUB_OFFLINE": "1"})
    assert json.loads(offline.stdout)["first"] == [f"0-{row}" for row in range(5)]


def test_at_least_one_document_of_two_is_held_out_whatever_the_fraction():
    texts, read = [f"document {number}" for number in range(1000)], []
    fraction = held_out.enough(texts[:3], 1e-9, list, 10**9, 10**9)
    assert sum(held_out.is_validation(text, fraction) for text in texts[:3]) == 1
    many = (read.append(text) or text for text in texts)
    assert held_out.enough(many, 0.05, list, 10**9, 10**9) == 0.05 and len(read) < 200  # it stops at the first
    few = held_out.enough(texts, 1e-9, list, 2, 10**9)  # max_documents = 2
    assert sum(held_out.is_validation(text, few) for text in texts[:2]) == 1
    with pytest.raises(ValueError, match="cannot hold out a document of a corpus that has one"):
        held_out.enough(["one", "one"], 0.1, list, 10**9, 10**9)


def test_very_many_files_are_described_by_their_sum(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MANY", 2)
    for number in range(3):
        written(tmp_path / f"{number}.txt", b"x")
    first = describe_source(data_files=str(tmp_path))["data_files"]
    assert first["files"] == first["bytes"] == 3
    written(tmp_path / "0.txt", b"y")
    assert describe_source(data_files=str(tmp_path))["data_files"] != first


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"text_template": "no name"}, "text_template 'no name' names no column"),
        ({"text_template": "{a"}, "text_template '{a': "),
        ({"text_template": "{a}", "text_column": "b"}, "text_template and text_column = 'b' are both given"),
        ({"document_separator": ""}, "separates nothing"),
        ({"encoding": "latin-9000"}, "encoding = 'latin-9000' is none that Python knows"),
        ({"dataset_data_dir": "en"}, "dataset_data_dir = 'en' is of a dataset: give dataset_name too"),
        ({"max_document_bytes": 0}, "max_document_bytes must be at least 1, got 0"),
    ],
)
def test_a_form_that_cannot_be_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        CorpusArguments(**given)
