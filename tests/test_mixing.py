"""A mixture: each source's share of the tokens, the same for a seed, exactly resumable."""

import json
import random

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_prepare import TOKENIZER, files

from smolpretrain.data.pack import shards
from smolpretrain.data.pack.progress import Progress
from smolpretrain.data.preparation import prepare
from smolpretrain.data.prepared import load_blocks
from smolpretrain.data.read import documents as documents_module
from smolpretrain.data.read import readers
from smolpretrain.data.read.corpus import describe_source, read_documents
from smolpretrain.data.tokens.tokenization import encode_documents


class Cut(BaseException):
    """Ends a preparation in the middle, as a kill does, but in this process."""


def write_source(path, name, documents, words=12):
    chance = random.Random(name)
    lines = [
        {"text": f"{name} {number} " + " ".join(chance.choices(["cat", "dog", "mat"], k=chance.randint(1, words)))}
        for number in range(documents)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [line["text"] for line in lines]


def prepare_mixture(directory, mixture, seed=0, cut_after=None, read_bytes=300, shard_bytes=1_500, **more):
    """Prepare in small batches and shards; cut it off after so many batches. Returns (manifest, batches)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", read_bytes)
        patch.setattr(shards, "SHARD_BYTES", shard_bytes)
        seen, tick = [], Progress.tick

        def count(self, batch):
            tick(self, batch)
            seen.append(batch)
            if len(seen) == cut_after:
                raise Cut

        patch.setattr(Progress, "tick", count)
        source = {"mixture": mixture, "mixture_seed": seed}
        more = {"validation_fraction": 0, **more}
        made = prepare(
            read_documents(**source), TOKENIZER, 16, directory, describe_source(**source), progress=False, **more
        )
    return made, len(seen)


def tokens(directory):
    return np.concatenate(list(load_blocks(directory, "train")["input_ids"])).tolist()


@pytest.fixture
def sources(tmp_path):
    texts = {name: write_source(tmp_path / f"{name}.jsonl", name, n) for name, n in (("a", 900), ("b", 200), ("c", 50))}
    return tmp_path, texts


def entries(directory, **weights):
    return [{"data_files": str(directory / f"{name}.jsonl"), "weight": weight} for name, weight in weights.items()]


def test_each_source_has_its_share_of_the_tokens_and_the_first_to_end_ends_it(sources, monkeypatch):
    monkeypatch.setattr(documents_module, "NOISE_TOKENS", 64)
    directory, texts = sources
    manifest, _ = prepare_mixture(directory / "set", entries(directory, a=6, b=3, c=1))
    rows = manifest.mixture
    assert [row["weight"] for row in rows] == [0.6, 0.3, 0.1]
    assert [row["realised"] for row in rows] == pytest.approx([0.6, 0.3, 0.1], abs=0.02)
    total = sum(row["tokens"] for row in rows)
    assert total == manifest.splits["train"]["tokens"]
    assert [row["realised"] for row in rows] == [round(row["tokens"] / total, 6) for row in rows]
    (ended,) = [row for row in rows if row.get("ended_the_mixture")]
    name = ended["source"].removesuffix(".jsonl")
    assert ended["documents"] == len(texts[name]) and ended["epochs_begun"] == 1
    stream = np.concatenate(encode_documents(TOKENIZER, texts[name]))
    assert ended["tokens"] == len(stream)


def test_every_source_comes_in_its_own_order_none_left_out(sources):
    directory, texts = sources
    prepare_mixture(directory / "set", entries(directory, a=1, b=1), shard_bytes=10**6)
    found = TOKENIZER.decode(tokens(directory / "set")).split("<|endoftext|>")
    for name in "ab":
        mine = [text for text in found if text.startswith(name)][:-1]
        assert mine == texts[name][: len(mine)] and len(mine) > 100


def test_a_seed_gives_its_order_again_and_another_seed_another(sources):
    directory, _ = sources
    mixture = entries(directory, a=1, b=1)
    first, _ = prepare_mixture(directory / "0", mixture)
    again, _ = prepare_mixture(directory / "again", mixture)
    other, _ = prepare_mixture(directory / "1", mixture, seed=1)
    assert files(directory / "0") == files(directory / "again") and first.fingerprint == again.fingerprint
    assert tokens(directory / "0")[:2000] != tokens(directory / "1")[:2000]
    assert other.mixture[0]["realised"] == pytest.approx(first.mixture[0]["realised"], abs=0.2)
    with pytest.raises(ValueError, match="mixture_seed 0, but 1 is asked for"):
        prepare_mixture(directory / "0", mixture, seed=1)


def test_the_order_does_not_hang_on_how_much_is_read_at_a_time(sources):
    directory, _ = sources
    mixture = entries(directory, a=2, b=1, c=1)
    prepare_mixture(directory / "small", mixture, shard_bytes=10**6)
    prepare_mixture(directory / "large", mixture, read_bytes=5_000, shard_bytes=10**6)
    assert tokens(directory / "small") == tokens(directory / "large")


def test_a_small_source_is_read_again_as_often_as_it_may(sources):
    directory, texts = sources
    mixture = entries(directory, a=1, c=1)
    mixture[1]["max_epochs"] = 3
    manifest, _ = prepare_mixture(directory / "set", mixture)
    row = manifest.mixture[1]
    assert row["documents"] == 3 * len(texts["c"]) and row["epochs_begun"] == 3 and row["ended_the_mixture"]
    assert manifest.mixture[0]["epochs_begun"] == 1


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=3),
    st.integers(0, 3),
    st.sampled_from(["concat", "best_fit"]),
    st.booleans(),
    st.sampled_from([None, 700]),
    st.floats(0.05, 0.95),
)
def test_cut_off_anywhere_it_goes_on_to_the_same_bytes(tmp_path_factory, weights, seed, packing, again, limit, where):
    directory = tmp_path_factory.mktemp("mixed")
    texts = [text for name in "abc" for text in write_source(directory / f"{name}.jsonl", name, 60)]
    known = [text for text in texts if len(text.split()) > 12]
    (directory / "evaluation.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in known))
    mixture = entries(directory, **dict(zip("abc", weights, strict=False)))
    mixture[0]["max_epochs"] = 2 if again else 1
    words = {"packing": packing, "max_tokens": limit, "validation_fraction": 0.1}
    words["cleaning"] = {"min_characters": 9, "deduplicate": not again}
    words["cleaning"]["decontaminate"] = [str(directory / "evaluation.jsonl")]
    made, batches = prepare_mixture(directory / "undisturbed", mixture, seed, **words)
    with pytest.raises(Cut):
        prepare_mixture(directory / "cut", mixture, seed, max(1, int(batches * where)), **words)
    assert not (directory / "cut").exists()
    prepare_mixture(directory / "cut", mixture, seed, **words)
    assert files(directory / "cut") == files(directory / "undisturbed")
    named = [line for name in made.decontaminated for line in (directory / "cut" / name).read_text().splitlines()]
    assert len(named) == made.filtered["decontaminate"] > 0


def test_max_tokens_is_met_to_the_token(sources):
    directory, _ = sources
    manifest, _ = prepare_mixture(directory / "set", entries(directory, a=1, b=3), max_tokens=1234)
    assert manifest.splits["train"]["tokens"] == 1234 == sum(row["tokens"] for row in manifest.mixture)


def test_a_tokenizer_is_trained_on_the_mixture_too(sources):
    directory, _ = sources
    texts = list(read_documents(mixture=entries(directory, a=1, b=1)))
    sizes = [sum(len(text) for text in texts if text.startswith(name)) for name in "ab"]
    assert abs(sizes[0] - sizes[1]) < 2 * documents_module.NOISE_TOKENS


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"data_files": "none.jsonl", "weight": 1}, r"mixture\[1\]: data_files: no file matches none.jsonl"),
        ({"wieght": 1}, r"mixture\[1\]: wieght is not a key of a source; there are dataset_name, .*weight, max_epochs"),
        ({}, r"mixture\[1\]: weight must be a number above 0, a share of the tokens, got None"),
        ({"weight": -1}, "weight must be a number above 0"),
        ({"weight": 1, "max_epochs": 0}, r"max_epochs must be a whole number of at least 1, got 0"),
    ],
)
def test_what_is_wrong_with_an_entry_names_its_place(sources, entry, sentence):
    directory, _ = sources
    with pytest.raises(ValueError, match=sentence):
        read_documents(mixture=[*entries(directory, a=1), entry])


def test_a_source_without_text_is_named(sources):
    directory, _ = sources
    (directory / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl gave no document"):
        prepare_mixture(directory / "set", entries(directory, b=1, a=1))
