"""A prepared set: whole or absent, the same bytes for the same text, refused when it is another or damaged."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from smolpretrain.data.pack import assemble, shards
from smolpretrain.data.pack.manifest import Manifest, verify
from smolpretrain.data.pack.progress import Progress
from smolpretrain.data.preparation import prepare
from smolpretrain.data.prepared import load_blocks, load_unigram_counts, load_validation_documents
from smolpretrain.data.read import documents as documents_module
from smolpretrain.data.read import readers
from smolpretrain.data.read.corpus import describe_source, is_validation, read_documents
from smolpretrain.data.tokens.tokenization import encode_documents, train_tokenizer

TEXTS = [f"Document {number} says that the {word} sat on the mat.\n\u2028\u20ac" for number in range(60)
         for word in ("cat", "dog", "<|endoftext|>")]  # fmt: skip
SOURCE = {"data_files": [{"name": "a.jsonl", "bytes": 1, "sha256": "0" * 64}], "text_column": "text"}
TOKENIZER = train_tokenizer(TEXTS, 320)


def prepared(
    directory, texts=TEXTS, tokenizer=TOKENIZER, block_size=16, source=SOURCE, validation_fraction=0.1, **more
):
    return prepare(iter(texts), tokenizer, block_size, directory, source, validation_fraction, progress=False, **more)


def edit(directory, change) -> None:
    path = directory / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def left(directory) -> list:
    """Return what stands in a directory, but for the log."""
    return sorted(path.name for path in directory.iterdir() if path.name != "data_preparation_log.md")


def files(directory) -> dict:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_blocks_are_the_training_documents_end_to_end(tmp_path):
    manifest = prepared(tmp_path / "set")
    for split, held in (("train", False), ("validation", True)):
        texts = [text for text in TEXTS if is_validation(text, 0.1) == held]
        stream = np.concatenate(encode_documents(TOKENIZER, texts))
        blocks = load_blocks(tmp_path / "set", split)
        entry = manifest.splits[split]
        rows = np.stack(list(blocks["input_ids"]))
        assert rows.reshape(-1).tolist() == stream[: entry["blocks"] * 16].tolist()
        assert len(blocks) == entry["blocks"] == len(stream) // 16
        assert entry["tokens"] == len(stream) == entry["blocks"] * 16 + entry["remainder_tokens"]
        assert entry["documents"] == len(texts) and entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert (stream == 0).sum() == len(texts)  # one EOS a document, though some hold its text


def test_a_token_takes_two_bytes_and_rows_are_memory_mapped(tmp_path):
    prepared(tmp_path / "set")
    dataset = Dataset.from_file(str(tmp_path / "set" / "train-00000-00000.arrow"))
    assert str(dataset.features["input_ids"]) == "List(Value('uint16'), length=16)"
    assert load_blocks(tmp_path / "set", "train").cache_files[0]["filename"].endswith("train-00000-00000.arrow")


def test_identical_documents_never_stand_on_both_sides(tmp_path):
    manifest = prepared(tmp_path / "set", TEXTS * 3)
    held = list(load_validation_documents(tmp_path / "set"))
    assert len(held) == manifest.splits["validation"]["documents"] == 3 * len(set(held))
    assert manifest.splits["train"]["documents"] == 3 * len(set(TEXTS) - set(held))


def test_held_out_text_comes_back_as_it_was(tmp_path):
    prepared(tmp_path / "set")
    held = [text for text in TEXTS if is_validation(text, 0.1)]
    assert list(load_validation_documents(tmp_path / "set")) == held
    again = read_documents(data_files=str(tmp_path / "set" / "validation_documents-00000-00000.jsonl"))
    assert list(again) == held  # and it is a data file like any other


def test_unigram_counts_are_those_of_the_training_documents(tmp_path):
    manifest = prepared(tmp_path / "set")
    counts = load_unigram_counts(tmp_path / "set")
    assert counts.shape == (manifest.vocab_size,) and counts.dtype == np.int64
    train = [text for text in TEXTS if not is_validation(text, 0.1)]
    ids = np.concatenate(encode_documents(TOKENIZER, train))
    assert counts.tolist() == np.bincount(ids, minlength=len(TOKENIZER)).tolist()


def test_two_preparations_are_the_same_bytes_whatever_the_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RECORD_BATCH_TOKENS", 160)
    first = prepared(tmp_path / "a")
    monkeypatch.setattr(readers, "READ_BYTES", 400)
    assert prepared(tmp_path / "b").fingerprint == first.fingerprint
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_many_record_batches_are_one_dataset(tmp_path, monkeypatch):
    prepared(tmp_path / "a")
    monkeypatch.setattr(shards, "RECORD_BATCH_TOKENS", 48)
    prepared(tmp_path / "b")
    for split in ("train", "validation"):
        a, b = (np.stack(list(load_blocks(tmp_path / name, split)["input_ids"])) for name in "ab")
        assert np.array_equal(a, b)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")).filter(str.strip), min_size=12, max_size=30), st.integers(2, 9))
def test_no_token_of_any_text_is_lost(tmp_path_factory, texts, block_size):
    directory = tmp_path_factory.mktemp("any") / "set"
    manifest = prepared(directory, texts, block_size=block_size, validation_fraction=0)
    stream = np.concatenate(encode_documents(TOKENIZER, texts))
    rows = np.stack(list(load_blocks(directory, "train")["input_ids"]))
    assert rows.reshape(-1).tolist() == stream[: rows.size].tolist()
    assert len(stream) - rows.size == manifest.splits["train"]["remainder_tokens"] < block_size


def test_a_set_of_the_same_identity_is_used_as_it_is(tmp_path):
    first = prepared(tmp_path / "set")
    before = files(tmp_path / "set")

    def unread():
        raise AssertionError("the documents were read")
        yield

    again = prepared(tmp_path / "set", unread())
    assert again.reused and not first.reused
    assert again == first and again.fingerprint == first.fingerprint and files(tmp_path / "set") == before


def test_a_finished_set_is_taken_as_it_is_where_no_text_is_named(tmp_path):
    made = prepared(tmp_path / "set", max_documents=100)
    found = prepared(tmp_path / "set", texts=[], source=None)
    assert found.reused and found.fingerprint == made.fingerprint
    with pytest.raises(ValueError, match="was prepared with block_size 16, but 32 is asked for"):
        prepared(tmp_path / "set", texts=[], source=None, block_size=32)
    with pytest.raises(ValueError, match="was prepared with max_documents 100, but 99 is asked for"):
        prepared(tmp_path / "set", texts=[], source=None, max_documents=99)
    with pytest.raises(ValueError, match="none is not a prepared set; name the text to prepare it from"):
        prepared(tmp_path / "none", source=None)


def test_a_moved_branch_of_the_hub_is_recorded_but_does_not_part_sets(tmp_path):
    source = {"dataset_name": "a/b", "dataset_revision": None, "text_column": "text"}
    assert prepared(tmp_path / "set", source=source | {"dataset_commit": "1"}).source["dataset_commit"] == "1"
    assert prepared(tmp_path / "set", source=source | {"dataset_commit": None}).reused


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"block_size": 32}, "was prepared with block_size 16, but 32 is asked for; give another prepared_dir"),
        ({"validation_fraction": 0.2}, "validation_fraction 0.1, but 0.2 is asked for"),
        ({"tokenizer": train_tokenizer(TEXTS, 300)}, r'tokenizer_hash "\w{64}", but "\w{64}" is asked for'),
        ({"source": SOURCE | {"text_column": "body"}}, 'source.text_column "text", but "body" is asked for'),
        ({"source": {"builtin": "x"}}, 'source.builtin null, but "x" is asked for'),
        (
            {"source": SOURCE | {"data_files": [{"name": "b.jsonl", "bytes": 2, "sha256": "1" * 64}]}},
            r'source.data_files \{"bytes": 1, "name": "a.jsonl", .*\}, but \{.*"b.jsonl".*\} is asked for',
        ),
    ],
    ids=["block_size", "validation_fraction", "tokenizer", "column", "another source", "another file"],
)
def test_a_set_of_another_identity_is_refused_naming_both(tmp_path, change, sentence):
    prepared(tmp_path / "set")
    before = files(tmp_path / "set")
    with pytest.raises(ValueError, match=sentence):
        prepared(tmp_path / "set", **change)
    assert files(tmp_path / "set") == before


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda d: (d / "train-00000-00000.arrow").unlink(),
            r"train-.*arrow is missing from the prepared set; delete .*set and",
        ),
        (
            lambda d: os.truncate(d / "train-00000-00000.arrow", 100),
            r"train-.*arrow is damaged: it holds 100 bytes, its .* says",
        ),
        (
            lambda d: os.truncate(d / "manifest.json", 90),
            r"manifest\.json is damaged \(.*\); delete .* prepare it again",
        ),
        (
            lambda d: edit(d, lambda m: m["splits"]["train"].update(files=[])),
            r"manifest\.json is damaged \(fingerprint",
        ),
        (
            lambda d: edit(d, lambda m: m["files"].pop("validation-00000-00000.arrow")),
            r"manifest\.json is damaged \(fingerprint",
        ),
        (lambda d: edit(d, lambda m: m.update(format_version=99)), "has format_version 99, this version reads 2"),
        (lambda d: (d / "manifest.json").unlink(), r"is not a prepared set \(it has no manifest\.json\)"),
    ],
    ids=["missing", "truncated", "manifest cut", "split list", "fewer files", "format", "no manifest"],
)
def test_a_damaged_set_is_refused_naming_the_file(tmp_path, damage, sentence):
    prepared(tmp_path / "set")
    damage(tmp_path / "set")
    for use in (verify, prepared, lambda set_: load_blocks(set_, "train"), load_unigram_counts):
        with pytest.raises(ValueError, match=sentence):
            use(tmp_path / "set")


def test_a_flipped_byte_is_found_by_sha256(tmp_path):
    prepared(tmp_path / "set")
    path = tmp_path / "set" / "train-00000-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    verify(tmp_path / "set")  # sizes agree
    for use in (lambda set_: verify(set_, sha256=True), prepared):  # a set that is there is used only whole
        with pytest.raises(
            ValueError, match=r"train-.*arrow is damaged: its sha256 is [0-9a-f]{16}, its manifest says"
        ):
            use(tmp_path / "set")


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"is not a prepared set \(it has no manifest\.json\)"):
        prepared(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "set").mkdir()
    assert prepared(tmp_path / "set") == verify(tmp_path / "set", sha256=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"texts": []}, r"The corpus is empty; give a dataset or files with text in text_column 'text'\."),
        ({"block_size": 10**6}, r"One block needs 1000000 tokens, the training documents hold \d+; give more text or"),
        (
            {"texts": TEXTS[:1]},
            r"validation_fraction 0\.1 cannot hold out a document of a corpus that has one: set it to 0",
        ),
        ({"validation_fraction": 1.0}, r"validation_fraction must be at least 0 and below 1, got 1\.0\."),
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"packing": "worst"}, "packing must be one of concat, best_fit, got 'worst'"),
    ],
    ids=["empty", "short", "one", "fraction", "block_size", "packing"],
)
def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepared(tmp_path / "set", **options)
    assert left(tmp_path) == []


def test_a_corpus_of_blank_rows_says_how_many(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(ValueError, match=r"The corpus is empty \(2 of 2 rows have no text: 2 null or blank\)"):
        prepare(read_documents(data_files=str(tmp_path / "a.jsonl")), TOKENIZER, 16, tmp_path / "set", SOURCE)


def test_skipped_rows_stand_in_the_manifest(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "", None]))
    documents = read_documents(data_files=str(tmp_path / "a.jsonl"))
    prepare(documents, TOKENIZER, 16, tmp_path / "set", SOURCE, 0.1, progress=False)
    assert Manifest.load(tmp_path / "set").skipped_rows == 2


def test_a_validation_split_shorter_than_a_block_has_no_blocks(tmp_path):
    manifest = prepared(tmp_path / "set", block_size=500, validation_fraction=0.02)
    entry = manifest.splits["validation"]
    assert entry["documents"] > 0 and entry["blocks"] == 0 and entry["tokens"] == entry["remainder_tokens"] < 500
    assert len(load_blocks(tmp_path / "set", "validation")) == 0


def test_no_validation_fraction_holds_nothing_out(tmp_path):
    manifest = prepared(tmp_path / "set", validation_fraction=0)
    assert manifest.splits["validation"]["documents"] == 0 == len(load_blocks(tmp_path / "set", "validation"))
    assert list(load_validation_documents(tmp_path / "set")) == []


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    def failing():
        yield from TEXTS
        raise OSError("No space left on device")

    with pytest.raises(ValueError, match="cannot be read past row 0 .No space left"):
        prepared(tmp_path / "set", failing())
    assert left(tmp_path) == []
    assert "not finished: documents: cannot be read past row 0" in (tmp_path / "data_preparation_log.md").read_text()


def test_a_kill_in_the_middle_leaves_no_set_and_the_next_run_is_undisturbed(tmp_path):
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2]); import test_prepare as t\n"
        "def killed():\n    yield from t.TEXTS\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.readers.READ_BYTES = 100; t.prepared(sys.argv[1], killed())"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "set"), os.path.dirname(__file__)]
    assert subprocess.run(arguments, capture_output=True).returncode == -9
    assert left(tmp_path) == [".set.partial"]  # the partial one, named so
    prepared(tmp_path / "set")
    prepared(tmp_path / "undisturbed")
    assert files(tmp_path / "set") == files(tmp_path / "undisturbed")


def test_a_second_process_at_the_same_set_is_refused_and_the_first_one_ends_whole(tmp_path):
    def overtaken():
        yield TEXTS[0]
        with pytest.raises(ValueError, match=r"part 0 of .*set\.partial is being prepared by another process"):
            prepared(tmp_path / "set", **fraction)
        yield from TEXTS[1:]

    fraction = {"validation_fraction": 0}  # else the first documents are looked at before the set is anyone's
    assert prepared(tmp_path / "set", overtaken(), **fraction) == prepared(tmp_path / "other", **fraction)
    assert left(tmp_path) == ["other", "set"]


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(readers, "READ_BYTES", 2**16)
    monkeypatch.setattr(shards, "RECORD_BATCH_TOKENS", 2**14)
    peaks = []
    for number in (1_000, 10_000):
        tracemalloc.start()
        prepared(tmp_path / str(number), (f"{n} " + TEXTS[n % 9] * 4 for n in range(number)), block_size=128)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


KILLED = """
import os, signal, sys; sys.path.insert(0, sys.argv[1]); import test_prepare as t
t.prepare_corpus(sys.argv[2], sys.argv[3], kill_after=int(sys.argv[4]), packing=sys.argv[5])
"""


def kill_at_batch(patch, number):
    """End this process as SIGKILL does once so many batches are written; returns the list of those that were."""
    seen, tick = [], Progress.tick

    def count(self, batch):
        tick(self, batch)
        seen.append(batch)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(Progress, "tick", count)
    return seen


def prepare_corpus(path, directory, kill_after=None, packing="concat", **more):
    """Prepare a file in parts of 2,000 bytes and shards of 500; kill this process when so many batches were written."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (readers, "READ_BYTES", 200), (documents_module, "PART_BYTES", 2_000), (shards, "SHARD_BYTES", 500),
        ):  # fmt: skip
            patch.setattr(module, name, value)
        seen = kill_at_batch(patch, kill_after)
        source = {"data_files": [str(path)]}
        made = prepare(
            read_documents(**source), TOKENIZER, 16, directory, describe_source(**source), 0.1, packing,
            progress=False, **more,
        )  # fmt: skip
        return made, len(seen)


def write_corpus(path, texts=TEXTS) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_killed_anywhere_it_goes_on_from_the_last_finished_shard_to_the_same_bytes(tmp_path, packing):
    path = write_corpus(tmp_path / "a.jsonl")
    manifest, batches = prepare_corpus(path, tmp_path / "undisturbed", packing=packing)
    assert batches > 20 and len(manifest.files) > 10
    for kill_after in (2, batches // 2):
        target = tmp_path / f"killed-{kill_after}"
        words = [os.path.dirname(__file__), path, str(target), str(kill_after), packing]
        assert subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True).returncode == -9
        assert not target.exists()
        finished = len(list(tmp_path.glob(f".{target.name}.partial/shard-*.json")))
        _, again = prepare_corpus(path, target, packing=packing)
        assert again < batches or finished == 0
        assert files(target) == files(tmp_path / "undisturbed")
    assert finished > 3


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=120), min_size=40, max_size=80),
    st.integers(1, 5),
    st.sampled_from(["concat", "best_fit"]),
)
def test_the_set_is_the_same_for_any_number_of_machines(tmp_path_factory, texts, machines, packing):
    directory = tmp_path_factory.mktemp("machines")
    path = write_corpus(directory / "a.jsonl", [*texts, *TEXTS])
    alone, _ = prepare_corpus(path, directory / "alone", packing=packing)
    for index in reversed(range(machines)):
        made, _ = prepare_corpus(path, directory / "many", packing=packing, shard_index=index, num_shards=machines)
    if machines > 1:
        assert made is None
        with_one = prepare_corpus(path, directory / "many", packing=packing)[0]  # nothing left but the joining
        assert with_one == alone
    assert files(directory / "many") == files(directory / "alone")
    for split in alone.splits.values():
        held = split["tokens"] + split["padding_tokens"]
        assert held == split["blocks"] * 16 + split["remainder_tokens"]
        assert split["remainder_tokens"] < 16 and (packing == "concat" or split["remainder_tokens"] == 0)
    stream = np.concatenate(encode_documents(TOKENIZER, [text for text in [*texts, *TEXTS] if text.strip()]))
    assert sum(split["tokens"] for split in alone.splits.values()) == len(stream)


def test_processes_of_one_machine_make_the_same_set(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "PART_BYTES", 2_000)
    source = {"data_files": [write_corpus(tmp_path / "a.jsonl")]}
    for number in (1, 2):
        documents = read_documents(**source)
        prepare(documents, TOKENIZER, 16, tmp_path / str(number), SOURCE, 0.1, progress=False, num_proc=number)
    assert files(tmp_path / "1") == files(tmp_path / "2") and len(files(tmp_path / "1")) > 9


def test_an_unfinished_set_of_another_identity_is_refused(tmp_path):
    path = write_corpus(tmp_path / "a.jsonl")
    prepare_corpus(path, tmp_path / "set", shard_index=0, num_shards=2)
    with pytest.raises(
        ValueError, match=r"\.set\.partial was prepared with packing \"concat\", but \"best_fit\" is asked"
    ):
        prepare_corpus(path, tmp_path / "set", packing="best_fit")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2_000), st.sampled_from([None, 7]))
def test_a_subset_has_exactly_the_tokens_asked_for(tmp_path_factory, max_tokens, max_documents):
    directory = tmp_path_factory.mktemp("subset") / "set"
    try:
        manifest = prepared(directory, validation_fraction=0, max_tokens=max_tokens, max_documents=max_documents)
    except ValueError as error:
        assert "One block needs 16 tokens" in str(error) and max_tokens < 16
        return
    lengths = [len(ids) for ids in encode_documents(TOKENIZER, TEXTS[:max_documents])]
    assert manifest.splits["train"]["tokens"] == min(max_tokens, sum(lengths))
    stream = np.concatenate(encode_documents(TOKENIZER, TEXTS))
    rows = np.concatenate(list(load_blocks(directory, "train")["input_ids"]))
    assert (rows[:-1] == stream[: len(rows) - 1]).all()


def test_a_subset_by_documents_takes_the_first_ones(tmp_path):
    manifest = prepared(tmp_path / "set", max_documents=50)
    assert sum(split["documents"] for split in manifest.splits.values()) == 50
    held = [text for text in TEXTS[:50] if is_validation(text, 0.1)]
    assert list(load_validation_documents(tmp_path / "set")) == held
    with pytest.raises(ValueError, match="max_tokens must be at least 1, or null to take everything, got 0"):
        prepared(tmp_path / "other", max_tokens=0)
    with pytest.raises(ValueError, match="look at one stream of documents: set num_shards to 1"):
        prepared(tmp_path / "other", max_tokens=9, num_shards=2)


def test_the_log_says_what_was_prepared_and_what_it_went_on_from(tmp_path):
    path = write_corpus(tmp_path / "a.jsonl", [*TEXTS, ""])
    manifest, _ = prepare_corpus(path, tmp_path / "set")
    log = (tmp_path / "data_preparation_log.md").read_text()
    train = manifest.splits["train"]
    row = f"| train | {train['documents']:,} | {train['tokens']:,} | {train['bytes']:,} | {train['blocks']:,} |"
    assert row in log and manifest.fingerprint in log and "null or blank 1" in log and "tokens/s" in log
    words = [os.path.dirname(__file__), path, str(tmp_path / "killed"), "15", "concat"]
    subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True)
    prepare_corpus(path, tmp_path / "killed")
    killed = (tmp_path / "data_preparation_log.md").read_text()
    assert killed.startswith(log) and "## killed, " in killed
    assert re.search(r"Went on from [1-9]\d* finished shards: rows of 16, concat", killed)


def test_a_worker_that_is_killed_is_one_sentence_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "PART_BYTES", 2_000)
    source = {"data_files": [write_corpus(tmp_path / "a.jsonl")]}
    ended = []

    def killed(self, *counts):
        if not ended:
            ended.append(multiprocessing.active_children()[0])
            os.kill(ended[0].pid, signal.SIGKILL)

    monkeypatch.setattr(Progress, "reach", killed)
    with pytest.raises(
        ValueError, match="a process that prepared was ended from outside by SIGKILL after 0 documents: start again"
    ):
        prepare(read_documents(**source), TOKENIZER, 16, tmp_path / "set", SOURCE, 0.1, progress=False, num_proc=2)
    monkeypatch.undo()
    assert ended


def test_the_bar_moves_while_processes_prepare(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "PART_BYTES", 2_000)
    source = {"data_files": [write_corpus(tmp_path / "a.jsonl", TEXTS * 5)]}
    reached, reach = [], Progress.reach

    def watched(self, *counts):
        reach(self, *counts)
        reached.append((self.documents, self.bytes, self.tokens))

    monkeypatch.setattr(Progress, "reach", watched)
    made = prepare(read_documents(**source), TOKENIZER, 16, tmp_path / "set", SOURCE, 0, progress=False, num_proc=2)
    train = made.splits["train"]
    assert reached[-1][0] == train["documents"] == len(TEXTS) * 5 and reached[-1][2] == train["tokens"]
    assert reached == sorted(reached) and len(reached) > 2


def test_cut_off_anywhere_in_the_joining_it_goes_on_to_the_same_bytes(tmp_path):
    path = write_corpus(tmp_path / "a.jsonl")
    manifest, _ = prepare_corpus(path, tmp_path / "undisturbed")
    steps = ("sync", "describe_file", "check_splits")
    for step in steps:
        for number in range(1, 30):
            target, calls, real = tmp_path / f"{step}-{number}", [], getattr(assemble, step)

            def interrupted(*args, calls=calls, number=number, real=real):
                calls.append(args)
                if len(calls) == number:
                    raise KeyboardInterrupt  # leaves what a kill leaves: nothing catches it
                return real(*args)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(assemble, step, interrupted)
                try:
                    prepare_corpus(path, target)
                except KeyboardInterrupt:
                    cut = True
                else:
                    cut = False
            if not cut:
                break
            assert not target.exists() or verify(target, sha256=True) == manifest  # the rename is the last step but one
            prepare_corpus(path, target)
            assert files(target) == files(tmp_path / "undisturbed")
        assert number > 1
