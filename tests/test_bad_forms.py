"""Each form of text, damaged: one line with file and row before anything long starts, and what can be kept is kept."""

import bz2
import errno
import functools
import gzip
import json
import lzma
import multiprocessing
import os
import signal
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from smolpretrain.core import files as core_files
from smolpretrain.data.pack import workers
from smolpretrain.data.prepare import main
from smolpretrain.data.read import readers
from smolpretrain.data.read.corpus import read_documents

OPENED = r"row \d+ cannot be read \(it is cut off: its"
PAST = r"cannot be read past row \d+ \(it is cut off: "
COMPRESS = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": lambda data: bz2.compress(data, 1),
}
TEXTS = [f"document {number} " + os.urandom(300).hex() for number in range(400)]  # that no compression makes short
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def parquet(texts) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue().to_pybytes()


def arrow(texts) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.table({"text": texts})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return sink.getvalue().to_pybytes()


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


BAD = {
    **{f"cut.jsonl{end}": (cut(pack(LINES)), rf"{OPENED} \{end} data") for end, pack in COMPRESS.items()},
    **{f"cut.txt{end}": (cut(pack(LINES)), rf"{PAST}its \{end} data end too early") for end, pack in COMPRESS.items()},
    "cut.csv.gz": (cut(gzip.compress(b"text\n" + LINES.replace(b'"', b""))), f"{PAST}its .gz data"),
    "cut.json": (cut(b"[" + LINES[:-1].replace(b"\n", b",\n") + b"]"), PAST),
    "cut.parquet": (cut(parquet(TEXTS)), r"cut\.parquet: cannot be read as parquet \("),
    "cut.arrow": (cut(arrow(TEXTS)), r"cut\.arrow: cannot be read past row \d+ \("),
    "plain.jsonl.gz": (LINES, r"its name says \.gz, but it begins with b'{.te.*, which no \.gz file does: rename it"),
    "packed.jsonl": (gzip.compress(LINES), r"it begins as \.gz files do: name it with \.gz at its end"),
    "packed.txt": (zstandard.compress(LINES), r"it begins as \.zst files do: name it with \.zst"),
    "named.parquet": (LINES, r"named\.parquet: cannot be read as parquet \(.*magic"),
    "named.arrow": (LINES, r"named\.arrow: cannot be read as arrow \("),
    "latin.jsonl": ('{"text": "caf\u00e9"}\n'.encode("latin-1"), r"row 1 cannot be read \(.*another encoding= is"),
    "latin.csv": ("text\none\ncaf\u00e9\n".encode("latin-1"), r"row 2 cannot be read \(its byte 0xe9 .* encoding="),
    "latin.txt": ("caf\u00e9".encode("latin-1"), r"row 1 cannot be read \('utf-8' .*, unless another encoding= is set"),
    "wide.txt": ("caf\u00e9".encode("utf-16"), r"it begins as UTF-16 does: set encoding=utf-16"),
    "ragged.csv": (b'text,n\na,1\nb\n', r"row 2 cannot be read \(it has 1 fields, the header 2\)"),
    "quoted.csv": (b'text,n\na,1\n"b,1\n', r"row 2 cannot be read \(unexpected end of data\)"),
    "bare.csv": (b"A document whose words go on and on, without a header, over all of a line\nanother\n",
                 r"no column 'text'; set text_column to one of its columns, or give it a header: its first row \('A d"),
    "broken.json": (b'{"a": 1,\n "text": nothing}\n' + b" " * 99, r"row 1 cannot be read \(Expecting value"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_one_line_with_its_name_and_row(tmp_path, name):
    data, sentence = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=sentence) as error:
        list(read_documents(data_files=str(tmp_path / name)))
    assert name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", [name for name in BAD if name != "bare.csv"])
def test_among_others_it_is_passed_over_where_asked_and_counted(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name][0])
    (tmp_path / "zz.txt").write_text("good")
    documents = read_documents(data_files=str(tmp_path / "*.*"), bad_rows="skip")
    assert list(documents)[-1] == "good"
    assert documents.tally.bad == 1 and documents.tally.first_bad.startswith(f"{name}: row ")


@pytest.mark.parametrize("name", [f"a.jsonl{end}" for end in COMPRESS] + ["a.txt.gz", "a.json", "a.arrow"])
def test_what_stands_before_the_damage_is_kept(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "READ_BYTES", 5000)
    if name == "a.json":
        data = cut(b"[" + LINES[:-1].replace(b"\n", b",\n") + b"]")
    elif name == "a.arrow":
        data = cut(arrow(TEXTS))
    else:
        data = cut(COMPRESS[os.path.splitext(name)[1]](LINES))
    (tmp_path / name).write_bytes(data)
    how = {"document_separator": "\n"} if name == "a.txt.gz" else {}
    documents = read_documents(data_files=str(tmp_path / name), bad_rows="skip", **how)
    texts = list(documents)
    wanted = [line.decode() for line in LINES.splitlines()] if how else TEXTS
    assert texts == wanted[: len(texts)] and 100 < len(texts) < 390
    assert documents.tally.bad == 1 and documents.tally.rows == len(texts) + 1
    (entry,) = documents.tally.passed
    assert (
        entry["file"] == name and entry["row"] == len(texts) + 1 and "what comes behind it is left out" in entry["why"]
    )


@functools.cache
def zeros(end) -> bytes:
    return COMPRESS[end](b"0" * 2**27)


@pytest.mark.parametrize("end", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv"])
def test_a_bomb_takes_no_memory(tmp_path, end, kind):
    """128 MB of one line from a few kB, with room for 1 MB."""
    path = tmp_path / f"a.{kind}{end}"
    path.write_bytes((COMPRESS[end](b"text\n") if kind == "csv" else b"") + zeros(end))
    assert path.stat().st_size < 2**18
    tracemalloc.start()
    with pytest.raises(ValueError, match="longer than max_document_bytes = 1,000,000"):
        list(read_documents(data_files=str(path), max_document_bytes=1_000_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80 * 2**20


def test_a_long_line_among_others_is_one_bad_row(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "' + "x" * 500 + '"}\n{"text": "two"}\n')
    for size in (20, 64, 10_000):
        monkeypatch.setattr(readers, "READ_BYTES", size)
        documents = read_documents(data_files=str(tmp_path / "a.jsonl"), bad_rows="skip", max_document_bytes=100)
        assert list(documents) == ["one", "two"] and documents.tally.bad == 1
        assert documents.tally.first_bad.startswith("a.jsonl: row 2 cannot be read (it is longer than max_document_by")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a.warc.gz", r"\.warc is not read here: turn it into JSON lines with datatrove's WarcReader"),
        ("a.wet", "datatrove's WarcReader"),
        ("dump.xml.bz2", r"\.xml is not read here: .* datatrove's BaseDiskReader"),
        ("a.pdf", r"\.pdf is not read here: .* datatrove's BaseDiskReader with pypdf"),
        ("a.parquet.gz", r"\.parquet is compressed inside; unpack it first"),
        ("fifo.jsonl", r"fifo\.jsonl is a FIFO: a text is read more than once; write it to a file first"),
        ("gone.jsonl", r"gone\.jsonl: No such file or directory"),
        ("nothing", r"nothing holds nothing that can be read \(.*\); left out 1 \.png; 1 hidden\."),
        ("both", r"both holds rows \(1 \.jsonl\) and whole texts \(2 \.py\); say which: .*/\*\*/\*\.jsonl or"),
    ],
)
def test_what_is_no_text_is_refused_by_what_it_is(tmp_path, name, sentence):
    for made in ("a.warc.gz", "a.wet", "dump.xml.bz2", "a.pdf", "a.parquet.gz"):
        (tmp_path / made).write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo.jsonl")
    os.symlink(tmp_path / "nowhere", tmp_path / "gone.jsonl")
    for made in ("nothing/a.png", "nothing/.hidden.jsonl", "both/a.jsonl", "both/b.py", "both/c.py"):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        (tmp_path / made).write_text("x")
    with pytest.raises(ValueError, match=sentence) as error:
        read_documents(data_files=str(tmp_path / name))
    assert "\n" not in str(error.value)


WORDS = ["vocab_size=300", "block_size=16", "prepared_dir=set"]


def refused(words, capsys, status=2) -> str:
    with pytest.raises(SystemExit) as end:
        main([*WORDS, *words])
    error = capsys.readouterr().err
    assert end.value.code == status and error.count("\n") == 1 and error.startswith("prepare.py: error: ")
    return error


def test_the_command_counts_what_it_passed_over_and_names_it_in_the_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text" if number % 2 else "other": f"document {number} says so"}) for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, "{cut", '{"text": null}']))
    main([*WORDS, "data_files=a.jsonl", "bad_rows=skip", "validation_fraction=0.1"])
    out = capsys.readouterr().out
    assert "102 of 202 rows have no text: 100 without the column, 1 null or blank, 1 bad (a.jsonl: row 201 " in out
    assert "they are named in set/skipped_rows.jsonl" in out
    entries = [json.loads(line) for line in (tmp_path / "set" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in entries] == [*range(1, 201, 2), 201, 202]
    assert {entry["why"][:10] for entry in entries} == {"has not th", "cannot be ", "is null or"}
    main(["--verify", "set"])
    (tmp_path / "b.jsonl").write_text('{"txt": "x"}\n{"text": null}\n' * 30)
    error = refused(["data_files=b.jsonl", "prepared_dir=other", "tokenizer_name=set/tokenizer"], capsys)
    assert "The corpus is empty (60 of 60 rows have no text: 30 without the column, 30 null or blank)" in error


def test_one_document_is_refused_before_it_is_encoded_and_two_hold_out_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("word " * 400 + "\n===\n" + "other words " * 400)
    error = refused(["data_files=a.txt"], capsys)
    assert "validation_fraction 0.005 cannot hold out a document of a corpus that has one" in error
    assert "document_separator" in error and sorted(os.listdir(tmp_path)) == ["a.txt"]
    main([*WORDS, "data_files=a.txt", "document_separator===="])
    out = capsys.readouterr().out
    assert "validation_fraction 0.005 would hold out no document: it is raised to hold out one." in out
    assert "train: 1 documents" in out and "validation: 1 documents" in out


@pytest.mark.slow
def test_a_full_disk_is_status_5_with_the_directory(tmp_path, launch, corpus_file):
    """A limit on a file's size is what a test may set; the kernel says it where a disk is full alike."""
    prepare = (
        f"python data/prepare.py data_files={corpus_file} vocab_size=400 block_size=64 prepared_dir={tmp_path}/set"
    )
    done = launch("bash", "-c", f"ulimit -f 30; exec {prepare}", expect=5)
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"prepare.py: error: {tmp_path}/set: File too large: make room, and start again to go on" in done.stderr


def test_storage_without_locks_is_gone_on_with_and_said(tmp_path, monkeypatch, capsys):
    def none(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(core_files.fcntl, "flock", none)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {n} says so"}) + "\n" for n in range(50)))
    main([*WORDS, "data_files=a.jsonl", "validation_fraction=0.1"])
    assert (
        ".set.partial: its storage has no locks: nothing keeps a second process away from it" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("code", "killed", "sentence"),
    [
        (3, False, "ended by itself with exit status 3 after 7 documents; what it said stands above"),
        (-signal.SIGKILL, False, "was ended from outside by SIGKILL after 7 documents: start again to go on"),
        (-signal.SIGKILL, True, "was killed by the kernel for want of memory after 7 documents: .* num_proc below 2"),
        (-signal.SIGXCPU, False, "was ended from outside by SIGXCPU"),
    ],
)
def test_a_worker_s_end_is_said_as_it_was(code, killed, sentence):
    context = multiprocessing.get_context("fork")
    end = (os._exit, (code,)) if code >= 0 else (signal.raise_signal, (-code,))
    ended = context.Process(target=end[0], args=end[1])
    other = context.Process(target=signal.raise_signal, args=(signal.SIGTERM,))  # as the pool ends the others
    for process in (other, ended):
        process.start()
        process.join()
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(workers._what_ended([other, ended], killed, 7, 2))


def test_more_processes_than_parts_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {n} says so"}) + "\n" for n in range(50)))
    main([*WORDS, "data_files=a.jsonl", "validation_fraction=0.1", "num_proc=8"])
    assert "num_proc = 8: this text has 1 part to share out" in capsys.readouterr().out
