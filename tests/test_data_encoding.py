"""The faster tokenizer gives the model's own ids, or is not used."""

import builtins
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from smolpretrain.data import preparation
from smolpretrain.data.pack import audit
from smolpretrain.data.pack.audit import Audit
from smolpretrain.data.read import documents
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


def test_a_disagreement_found_late_has_that_part_done_again_by_tokenizers(monkeypatch, tmp_path):
    monkeypatch.setattr(documents, "PART_BYTES", 2_500)
    monkeypatch.setattr(encoding, "CHECKED_FIRST", 100)
    err_on(monkeypatch, "Document 150 ")
    made, said = prepared(tmp_path, "auto")
    plain, _ = prepared(tmp_path, "tokenizers")
    assert made == plain and made.fingerprint == plain.fingerprint
    assert [line for line in said if "again with `tokenizers` itself, not the faster tokie: it gives other ids" in line]
    assert len(said) == made.audit["disagreements"] == 1
    assert made.audit["documents"] == sum(made.audit["documents_of_shards"]) > 100
    assert made.audit["upper_bound"] == pytest.approx(3 / made.audit["documents"], rel=0.01) and plain.audit == {}
    whole = {path.name: path.read_bytes() for path in (tmp_path / "auto").iterdir() if path.name != "manifest.json"}
    assert whole == {name: (tmp_path / "tokenizers" / name).read_bytes() for name in whole} and len(whole) > 9
    with pytest.raises(ValueError, match="tokenizer_backend tokie cannot serve: it gives other ids .*set it to auto"):
        prepared(tmp_path, "tokie")


def prepared(directory, backend, num_proc=1):
    path = directory / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    said, source = [], {"data_files": [str(path)]}
    made = preparation.prepare(read_documents(**source), TOKENIZER, 16, directory / backend, source, 0, progress=False,
                               tokenizer_backend=backend, num_proc=num_proc, say=said.append)  # fmt: skip
    return made, said


ERRING_TOKIE = """
import importlib.machinery, importlib.util, sys
paths = [path for path in sys.path if path != {here!r}]
spec = importlib.machinery.PathFinder.find_spec("tokie", paths)
right = importlib.util.module_from_spec(spec)
sys.modules["tokie"] = right
spec.loader.exec_module(right)

class Wrong:
    def __init__(self, right):
        self.right = right

    def encode_batch_flat(self, texts, add_special_tokens):
        ids, lengths = self.right.encode_batch_flat(texts, add_special_tokens=add_special_tokens)
        if any("Document 150 " in text for text in texts):
            ids = ids.copy()
            ids[-1] ^= 1
        return ids, lengths

class Tokenizer:
    @staticmethod
    def from_json(path):
        return Wrong(right.Tokenizer.from_json(path))

this = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("tokie", None))
this.Tokenizer = Tokenizer
sys.modules["tokie"] = this
"""


@pytest.mark.slow
def test_a_disagreement_found_late_by_one_of_two_processes_ends_in_the_same_set(monkeypatch, tmp_path):
    monkeypatch.setattr(documents, "PART_BYTES", 2_500)
    plain, _ = prepared(tmp_path, "tokenizers")
    (tmp_path / "tokie.py").write_text(ERRING_TOKIE.format(here=str(tmp_path)))
    (tmp_path / "smolpretrain").symlink_to(ROOT)  # the processes' code is this clone's, whatever is installed
    monkeypatch.syspath_prepend(tmp_path)
    made, _ = prepared(tmp_path, "auto", num_proc=2)
    assert made.fingerprint == plain.fingerprint and made.audit["disagreements"] == 1


def test_the_audit_is_the_same_for_any_number_of_batches_and_compares_a_sample():
    encode = Encoder(TOKENIZER, "tokie")
    texts = [f"{number} {text}" for number, text in enumerate(TEXTS * 10)]
    ids, lengths = encode(texts)
    whole, apart = Audit(encode), Audit(encode)
    whole.add(texts, ids, lengths)
    ends = np.cumsum(lengths)
    for at in range(0, len(texts), 7):
        taken = slice(at, at + 7)
        apart.add(texts[taken], ids[ends[at] - lengths[at] : ends[taken][-1]], lengths[taken])
    assert 20 < whole.documents == apart.documents < len(texts)
    ids[: ends[0]] ^= 1
    with pytest.raises(encoding.Disagreement):
        Audit(encode).add(texts, ids, lengths)


def test_the_audit_compares_a_long_document_up_to_where_its_ids_are_cut(monkeypatch):
    monkeypatch.setattr(audit, "AUDITED_LENGTH", 1_000)
    encode, text = Encoder(TOKENIZER, "tokie"), " ".join(TEXTS)
    ids, lengths = encode([text])
    one = Audit(encode)
    one.add([text], ids, lengths)
    one.add([text], ids[:-50], lengths - 50, last_cut=True)  # by max_tokens
    assert one.documents == 2
    ids[100] ^= 1
    with pytest.raises(encoding.Disagreement):
        one.add([text], ids, lengths)


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
