"""Cleaning leaves out what it is asked to, says how much, and is the same after a kill."""

import json
import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import TEXTS, TOKENIZER, files, kill_at_batch

from smolpretrain.arguments import DataArguments
from smolpretrain.data.pack import shards
from smolpretrain.data.preparation import prepare
from smolpretrain.data.prepared import load_validation_documents
from smolpretrain.data.read import cleaning as cleaning_module
from smolpretrain.data.read import readers
from smolpretrain.data.read.cleaning import NGRAM_WORDS, WORD, Cleaner, Cleaning, Decontaminator, Seen
from smolpretrain.data.read.corpus import describe_source, read_documents


def clean(directory, texts, kill_after=None, validation_fraction=0, **cleaning):
    """Prepare texts from a file, in small batches and shards; kill this process after so many batches."""
    path = directory.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", 200)
        patch.setattr(shards, "SHARD_BYTES", 500)
        kill_at_batch(patch, kill_after)
        source = {"data_files": [str(path)]}
        return prepare(
            read_documents(**source), TOKENIZER, 16, directory, describe_source(**source), validation_fraction,
            progress=False, cleaning=cleaning,
        )  # fmt: skip


def documents(manifest):
    return sum(split["documents"] for split in manifest.splits.values())


def test_short_and_long_documents_are_left_out_and_counted(tmp_path):
    texts = ["x" * size for size in (1, 9, 10, 11, 100, 101)] * 3
    manifest = clean(tmp_path / "set", texts, min_characters=10, max_characters=100)
    assert documents(manifest) == 9 and manifest.filtered == {"min_characters": 6, "max_characters": 3}
    assert manifest.options == {"min_characters": 10, "max_characters": 100}


def test_the_first_of_like_documents_stays(tmp_path):
    texts = [*TEXTS, "A caf\u00e9  here", "a CAFE\u0301 here", "A caf\u00e9 here.", *TEXTS[:5], "Ex\uff41ct", "exact"]
    manifest = clean(tmp_path / "set", texts, deduplicate=True, validation_fraction=0.1)
    assert manifest.filtered == {"deduplicate": 7} and documents(manifest) == len(texts) - 7
    held = list(load_validation_documents(tmp_path / "set"))
    assert len(held) == len(set(held))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["a b", "A  B", "a b\n", "c", "C", "d", "\u017f", "S", "s"]), min_size=1, max_size=40))
def test_no_two_kept_documents_are_alike_and_none_is_lost(tmp_path_factory, texts):
    seen = Seen(tmp_path_factory.mktemp("seen") / "seen.sqlite", 0)
    plain = [" ".join(text.casefold().split()) for text in texts]
    kept = [key for text, key in zip(texts, plain, strict=True) if seen.is_new(text)]
    assert kept == list(dict.fromkeys(plain))


def test_what_a_cut_off_shard_had_seen_is_forgotten(tmp_path):
    seen = Seen(tmp_path / "seen.sqlite", 0)
    assert seen.is_new("one") and not seen.is_new("one")
    seen.end_shard()
    assert seen.is_new("two")
    seen.close()  # shard 1 was never ended
    seen = Seen(tmp_path / "seen.sqlite", 1)
    assert seen.is_new("two") and not seen.is_new("one")
    seen.end_shard()
    seen.close()  # its record was not written
    assert Seen(tmp_path / "seen.sqlite", 1).is_new("two")


def evaluation(directory, *texts):
    path = directory / "evaluation.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(path)]


QUESTION = "What is the capital of the country in which the river Loire meets the open sea at last?"


def test_documents_that_share_13_words_with_an_evaluation_text_are_left_out_and_named(tmp_path):
    words = QUESTION.split()
    shared, near = " ".join(words[2:15]), " ".join(words[2:14])
    texts = [*TEXTS, f"Quiz: {shared.upper().replace(' ', ', ')}!", f"Quiz: {near}, or so."]
    manifest = clean(tmp_path / "set", texts, decontaminate=evaluation(tmp_path, QUESTION, "too short"))
    assert manifest.filtered == {"decontaminate": 1} and documents(manifest) == len(texts) - 1
    (name,) = manifest.decontaminated
    (row,) = [json.loads(line) for line in (tmp_path / "set" / name).read_text().splitlines()]
    assert row["opening"] == texts[-2] and row["evaluation_file"] == "evaluation.jsonl"
    assert row["shared_words"] == shared.lower() and name in manifest.files
    assert manifest.options["decontaminate"][0]["name"] == "evaluation.jsonl"


def test_evaluation_texts_too_short_to_be_found_are_refused(tmp_path):
    files = evaluation(tmp_path, "too short", " ".join(QUESTION.split()[:12]))
    with pytest.raises(ValueError, match=r"decontaminate: none of the texts in .*evaluation\.jsonl has 13 words"):
        clean(tmp_path / "set", TEXTS, decontaminate=files)
    assert Decontaminator(evaluation(tmp_path, QUESTION, "too short")).too_short == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_contamination_is_what_a_walk_over_the_words_finds(tmp_path_factory, data):
    word = st.sampled_from(["a", "b", "Cc", "d,", "e\u0301", "7"])
    held, text = (" ".join(data.draw(st.lists(word, min_size=size, max_size=45))) for size in (NGRAM_WORDS, 0))
    if data.draw(st.booleans()):
        text += " " + held[data.draw(st.integers(0, len(held))) :]
    found = Decontaminator(evaluation(tmp_path_factory.mktemp("e"), held)).find(text)

    def grams(some):
        words = WORD.findall(some.lower())
        return {tuple(words[at : at + NGRAM_WORDS]) for at in range(len(words) - NGRAM_WORDS + 1)}

    assert bool(found) == bool(grams(held) & grams(text))
    assert found is None or tuple(found[1].split()) in grams(held)


def test_a_hash_that_two_runs_of_words_share_leaves_nothing_out(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning_module, "_mixed", lambda ids: ids[: len(ids) - NGRAM_WORDS + 1] * 0)
    finder = Decontaminator(evaluation(tmp_path, QUESTION))
    assert finder.find(" ".join(["other"] * 20)) is None and finder.find(QUESTION)


def test_datatrove_s_filters_judge_and_change_documents(tmp_path):
    pytest.importorskip("datatrove")
    bad = ["javascript must be enabled {here} in all browsers of this kind. lorem ipsum"]
    texts = [*TEXTS, *bad * 3]
    manifest = clean(tmp_path / "set", texts, filters=[{"RegexFilter": {"regex_exp": "javascript"}}])
    assert manifest.filtered == {"RegexFilter": 3} and documents(manifest) == len(TEXTS)
    assert manifest.options == {"filters": [{"RegexFilter": {"regex_exp": "javascript"}}]}


def test_a_filter_s_own_change_to_the_text_is_kept(tmp_path):
    pytest.importorskip("spacy")
    text = "".join(f"The cat of number {number} sat on the mat.[{number}]\n" for number in range(6)) + "a short line"
    cleaner = cleaning_module.Cleaner(cleaning_module.Cleaning(filters=["C4QualityFilter"]))
    (kept,), _ = cleaner([text], {})
    assert "[3]" not in kept and "a short line" not in kept and "number 3 sat" in kept


@pytest.mark.parametrize(
    ("filters", "sentence"),
    [
        (["NoFilter"], "filters: NoFilter is not one of datatrove's: C4BadWordsFilter, "),
        ([{"RegexFilter": {}}], r"filters: RegexFilter with \{\} cannot be made: .*regex_exp"),
        ([{"A": {}, "B": {}}], r"filters: \{.*\} must be a name, or one name with its options"),
    ],
)
def test_a_filter_that_cannot_be_is_refused_before_anything_is_written(tmp_path, filters, sentence):
    pytest.importorskip("datatrove")
    with pytest.raises(ValueError, match=sentence):
        clean(tmp_path / "set", TEXTS, filters=filters)
    assert [path.name for path in tmp_path.iterdir()] == ["set.jsonl"]


def test_without_datatrove_its_filters_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.pipeline.filters", None)
    with pytest.raises(ValueError, match=r"filters: GopherQualityFilter needs datatrove .*pip install 'smolpretrain\["):
        clean(tmp_path / "set", TEXTS, filters=["GopherQualityFilter"])


def test_cleaning_that_leaves_nothing_says_what_it_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"Cleaning left none of 180 documents \(min_characters 180\)"):
        clean(tmp_path / "set", TEXTS, min_characters=10_000)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"min_characters": 0}, "min_characters must be at least 1, got 0"),
        ({"min_characters": 9, "max_characters": 8}, "min_characters = 9 is above max_characters = 8"),
        ({"filters": []}, "filters is an empty list"),
        ({"data_files": ["a"], "mixture": [{"weight": 1}]}, r"data_files = .* and mixture = .* are both given"),
        (
            {"deduplicate": True, "mixture": [{"weight": 1, "max_epochs": 2}]},
            "deduplicate = true would leave out all of a second pass, but mixture has max_epochs = 2",
        ),
    ],
)
def test_arguments_that_contradict_are_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataArguments(**words)


KILLED = """
import sys; sys.path.insert(0, sys.argv[1]); import test_cleaning as t; from pathlib import Path
t.clean(Path(sys.argv[2]), t.soiled(), int(sys.argv[3]), 0.1, **t.EVERYTHING(Path(sys.argv[2]).parent))
"""


def soiled():
    """Texts with repetitions, short ones and contaminated ones throughout."""
    chance = random.Random(0)
    texts = [text for text in TEXTS for _ in range(2)] + ["short"] * 20 + [f"{n} {QUESTION}" for n in range(30)]
    chance.shuffle(texts)
    return texts


def EVERYTHING(directory):
    return {"min_characters": 8, "deduplicate": True, "decontaminate": evaluation(directory, QUESTION)}


def test_killed_anywhere_a_cleaned_set_goes_on_to_the_same_bytes(tmp_path):
    manifest = clean(tmp_path / "undisturbed", soiled(), None, 0.1, **EVERYTHING(tmp_path))
    assert manifest.filtered == {"min_characters": 20, "deduplicate": 180, "decontaminate": 30}
    assert len(manifest.decontaminated) > 5
    for kill_after in (9, 60):
        words = [os.path.dirname(__file__), str(tmp_path / "killed"), str(kill_after)]
        assert subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True).returncode == -9
    assert len(list((tmp_path / ".killed.partial").glob("shard-*.json"))) > 5
    again = clean(tmp_path / "killed", soiled(), None, 0.1, **EVERYTHING(tmp_path))
    assert again.filtered == manifest.filtered
    mine, theirs = files(tmp_path / "killed"), files(tmp_path / "undisturbed")
    mine.pop("manifest.json"), theirs.pop("manifest.json")  # they name the two files
    assert mine == theirs


@pytest.mark.parametrize("theirs", ["body", "text"])
def test_evaluation_texts_stand_where_the_corpus_says_or_in_a_column_text(tmp_path, theirs):
    words = " ".join(f"word{number}" for number in range(NGRAM_WORDS))
    path = tmp_path / "evaluation.jsonl"
    path.write_text(json.dumps({theirs: words}) + "\n")
    cleaner = Cleaner(Cleaning(decontaminate=[str(path)], text_column="body"))
    assert cleaner([f"so {words} it goes", "another"], {})[0] == ["another"]
    cleaner = Cleaner(Cleaning(decontaminate=[str(path)], text_template=f"{{{theirs}}}"))
    assert cleaner([f"so {words} it goes", "another"], {})[0] == ["another"]
    path.write_text(json.dumps({"other": words}) + "\n")
    with pytest.raises(ValueError, match="no column 'text'; set text_column to one of other"):
        Cleaner(Cleaning(decontaminate=[str(path)], text_column="body"))
