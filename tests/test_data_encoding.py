"""The faster tokenizer gives the model's own ids, or is not used."""

import builtins
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from smolpretrain.data import preparation
from smolpretrain.data.read.corpus import read_documents
from smolpretrain.data.tokens import encoding
from smolpretrain.data.tokens.encoding import HURTFUL, Encoder
from smolpretrain.data.tokens.tokenization import SPECIAL_TOKENS, encode_documents, load_tokenizer, train_tokenizer

TEXTS = [f"Document {number} of 2024 says na\u00efve <|endoftext|> things.\n" * 3 for number in range(200)]
TOKENIZER = train_tokenizer(TEXTS, 320)
SMOLLM2 = Path(__file__).parents[2] / "shared/data/smollm2-tokenizer"
TOKENIZERS = {"trained": TOKENIZER}
if SMOLLM2.is_dir():
    TOKENIZERS["smollm2"] = load_tokenizer(str(SMOLLM2))
pytest.importorskip("tokie")


def assert_agrees(encode, tokenizer, texts):
    ids, lengths = encode(texts)
    truth = encode_documents(tokenizer, texts)
    assert lengths.tolist() == [len(document) for document in truth]
    assert np.array_equal(ids, np.concatenate(truth)) and ids.dtype == truth[0].dtype


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_tokenizers_on_the_builtin_text_and_on_text_made_to_hurt(name):
    encode = Encoder(TOKENIZERS[name], "tokie")
    assert_agrees(encode, TOKENIZERS[name], list(read_documents())[:300])
    assert_agrees(encode, TOKENIZERS[name], [*HURTFUL, *SPECIAL_TOKENS, "".join(SPECIAL_TOKENS)])
    assert encode.backend == "tokie"


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(st.lists(st.text(st.characters(codec="utf-8") | st.sampled_from(" \x0b\x1d\n\u21680\u3007<|>")), min_size=1))
def test_ids_are_those_of_tokenizers_on_any_text(name, texts):
    assert_agrees(_encoders(name), TOKENIZERS[name], texts)


@functools.cache
def _encoders(name):
    return Encoder(TOKENIZERS[name], "tokie")


@pytest.mark.parametrize("backend", ["tokie", "tokenizers"])
def test_a_long_document_is_encoded_in_pieces_to_the_same_ids(monkeypatch, backend):
    monkeypatch.setattr(encoding, "LONG", 500)
    encode = Encoder(TOKENIZER, backend)
    assert_agrees(encode, TOKENIZER, ["short one", " ".join(TEXTS), "x" * 2_000, "short two"])
    assert encode._cuttable and len(list(encode._pieces(" ".join(TEXTS)))) > 20


def test_no_texts_are_no_ids():
    ids, lengths = Encoder(TOKENIZER)([])
    assert ids.shape == lengths.shape == (0,)


class Wrong:
    """A tokie that errs on texts that hold a word."""

    def __init__(self, right, word):
        self.right, self.word = right, word

    def encode_batch_flat(self, texts, add_special_tokens):
        ids, lengths = self.right.encode_batch_flat(texts, add_special_tokens=add_special_tokens)
        if any(self.word in text for text in texts):
            ids = ids.copy()
            ids[-1] ^= 1
        return ids, lengths


def err_on(monkeypatch, word):
    right = encoding.load_tokie
    monkeypatch.setattr(encoding, "load_tokie", lambda backend: Wrong(right(backend), word))


def test_a_disagreement_at_the_start_falls_back_and_says_so(monkeypatch):
    err_on(monkeypatch, "Document 1 ")
    said = []
    encode = Encoder(TOKENIZER, "auto", said.append)
    assert_agrees(encode, TOKENIZER, TEXTS)
    assert encode.backend == "tokenizers"
    assert "not the faster tokie: it gives other ids than `tokenizers`" in said[0]
    with pytest.raises(ValueError, match="tokenizer_backend tokie cannot serve: it gives other ids .*set it to auto"):
        Encoder(TOKENIZER, "tokie")(TEXTS)


def test_a_disagreement_on_the_way_starts_again_with_tokenizers(monkeypatch, tmp_path):
    from smolpretrain.data.pack import shards
    from smolpretrain.data.read import readers

    monkeypatch.setattr(readers, "READ_BYTES", 400)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1_000)
    monkeypatch.setattr(encoding, "CHECKED_FIRST", 100)
    plain = preparation.prepare(iter(TEXTS), TOKENIZER, 16, tmp_path / "a", {}, progress=False,
                            tokenizer_backend="tokenizers", validation_fraction=0)  # fmt: skip
    err_on(monkeypatch, "Document 150 ")
    monkeypatch.setattr(Encoder, "_check", finding_it_in_batch_30)
    said = []
    made = preparation.prepare(TEXTS, TOKENIZER, 16, tmp_path / "b", {}, progress=False, validation_fraction=0,
                           say=said.append)  # fmt: skip
    assert made == plain and "from the start again with `tokenizers` itself" in said[0]
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }


def finding_it_in_batch_30(self, texts, check=Encoder._check):
    check(self, TEXTS[150:151] if self._batches == 30 else TEXTS[:2])


def test_without_tokie_or_with_a_tokenizer_that_it_refuses_tokenizers_serves(monkeypatch, tmp_path):
    said = []
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: _no_tokie(real, name, *a, **k))
    assert_agrees(Encoder(TOKENIZER, "auto", said.append), TOKENIZER, TEXTS[:5])
    monkeypatch.setattr(builtins, "__import__", real)

    def refuse(backend):
        raise RuntimeError("unsupported model")

    monkeypatch.setattr(encoding, "load_tokie", refuse)
    assert_agrees(Encoder(TOKENIZER, "auto", said.append), TOKENIZER, TEXTS[:5])
    assert "it is not installed (pip install tokie)" in said[0]
    assert "it does not take this tokenizer (unsupported model)" in said[1]
    with pytest.raises(ValueError, match="tokenizer_backend must be one of auto, tokenizers, tokie, got 'fast'"):
        Encoder(TOKENIZER, "fast")


def _no_tokie(real, name, *args, **kwargs):
    if name == "tokie":
        raise ImportError(name)
    return real(name, *args, **kwargs)


def test_an_ordinary_added_token_is_encoded_as_tokenizers_does(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"].append(
        {"id": len(TOKENIZER), "content": "na\u00efve", "special": False, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
    )  # fmt: skip
    path.write_text(json.dumps(values))
    added = load_tokenizer(str(tmp_path))
    assert_agrees(Encoder(added), added, TEXTS[:9])
