"""Which texts the faster tokenizer may encode: enumerated, not tried."""

import itertools
import json
import random
import runpy
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("tokie")
from smolpretrain.data.tokens import agreement
from smolpretrain.data.tokens.agreement import Agreement, Unshown
from smolpretrain.data.tokens.encoding import Encoder
from smolpretrain.data.tokens.tokenization import encode_documents, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FOUND = runpy.run_path(str(ROOT / "benchmarks" / "neighbourhoods.py"))
KINDS, Probe, FEWER = FOUND["KINDS"], FOUND["Probe"], FOUND["FEWER"]
TEXTS = [
    "It's what we've said: don't, I'LL, l'\u00e9t\u00e9 'quoted' rock'n'roll.\n\tif x:\n\t\treturn 'value'  # 2024\n",
    "  two  spaces\t\ttabs \n \n\r\n\u4f60\u597d\u3000\u4e16\u754c \u043f\u0440\u0438 \U0001f600 3.14\u00bd \u0660\n",
    "def f(a,b):\n    return a==b or 'no'\n/* c */ int main(void){\n\tputs(\"hi\");\n\t}\n\n\n$x->y; 'T was\tsaid",
] * 20


def trained(kind, texts=TEXTS, normalizer=None):
    """A tokenizer with this pre-tokenizer, trained on text that it can be wrong on."""
    backend = Tokenizer(models.BPE(ignore_merges=kind in ("llama3",)))
    backend.pre_tokenizer = Tokenizer.from_str(FOUND["tokenizer_json"](kind, FOUND["bpe"]([]))).pre_tokenizer
    backend.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<|end|>"], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_let_through_is_cut_alike(kind):
    probe = Probe(kind, "".join(FEWER).encode())
    texts, _, passed = FOUND["enumerate_strings"](probe, FEWER, 2)
    assert texts == len(FEWER) + len(FEWER) ** 2 and passed == []
    known = ["\t's", "\x0b", "a \x0c", "\u2168", "\u24b6's"] if kind in agreement.GPT2_KINDS else ["\n \n", "\t.a"]
    assert all(probe.agreement.is_unsure(text) for text in known)
    assert len(probe.differing(known)) >= 2  # it sees what it is there for
    chance = random.Random(0)
    inside = [
        ("ar" * 64)[:before] + "".join(chance.choices(FEWER, k=3)) + " as" * 50
        for before in range(64)
        for _ in range(20)
    ]  # tokie looks at 64 bytes at once
    assert not probe.differing([text for text in inside if not probe.agreement.is_unsure(text)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smollm2", "llama3"])  # the others' are the command's: a minute each
def test_what_is_let_through_is_cut_alike_over_every_code_point_and_three_characters(kind):
    probe = Probe(kind)
    for texts, differ, passed in (
        FOUND["enumerate_code_points"](probe, FOUND["code_points"]()),
        FOUND["enumerate_strings"](probe, FOUND["REPRESENTATIVES"], 3),
    ):
        assert texts > 200_000 and differ > 100 and passed == []


def random_texts(number, seed=0):
    chance = random.Random(seed)
    words = [
        *FEWER,
        "don't",
        "I'LL",
        "  ",
        "\n\n",
        "\t\t",
        "'s",
        "'re",
        "2024",
        "  \n",
        "the",
        "\u4f60\u597d",
        "/*",
        "'a",
    ]
    return ["".join(chance.choices(words, k=chance.randint(1, 120))) for _ in range(number)]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizers_for_every_kind_of_pre_tokenizer(kind):
    for normalizer in (None, normalizers.NFC()):
        tokenizer = trained(kind, normalizer=normalizer)
        encode = Encoder(tokenizer, "tokie")
        texts = [*TEXTS[:3], *random_texts(500, seed=sum(kind.encode())), "e\u0301 \u212b \u0958"]
        ids, lengths = encode(texts)
        truth = encode_documents(tokenizer, texts)
        assert np.array_equal(ids, np.concatenate(truth)) and lengths.tolist() == list(map(len, truth))
        assert any(not encode.agreement.is_unsure(text) for text in texts)


def unshown(backend):
    with pytest.raises(Unshown) as caught:
        Agreement(backend)
    said = []
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    assert Encoder(tokenizer, "auto", said.append)(["some text"])[1].tolist() == [
        len(tokenizer("some text").input_ids) + 1
    ]
    assert len(said) == 1 and str(caught.value) in said[0]
    return str(caught.value)


def test_a_tokenizer_of_another_kind_is_left_to_tokenizers_and_one_line_says_why(monkeypatch):
    backend = trained("gpt2").backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert "not shown to split texts as this tokenizer's pre_tokenizer does" in unshown(backend)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{L}+|\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    assert "not shown to split" in unshown(backend)
    backend = trained("gpt2").backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    assert "not shown to normalize" in unshown(backend)
    monkeypatch.setattr(agreement, "version", lambda name: "0.2.0")
    assert "shown to be right for version 0.1.4, installed is 0.2.0" in unshown(trained("gpt2").backend_tokenizer)


def test_a_token_that_joins_what_tokie_does_not_cut_makes_such_texts_unsure():
    plain = trained("gpt2", ["don't won't\tsaid " * 9])
    texts = {"\u0109r": "a\treturn", "'v": "a'value", "'a": "l'ami", "'\u00c3": "l'\u00e9t\u00e9"}
    assert not any(map(Agreement(plain.backend_tokenizer).is_unsure, texts.values()))
    for token, text in texts.items():
        values = json.loads(plain.backend_tokenizer.to_str())
        values["model"]["vocab"][token] = 5_000
        joined = Agreement(Tokenizer.from_str(json.dumps(values)))
        assert joined.is_unsure(text) and not joined.is_unsure("what is said\n\t")


def test_our_own_trained_tokenizers_and_their_texts_are_encoded_by_tokie():
    checker = Agreement(train_tokenizer(TEXTS, 500).backend_tokenizer)
    sure = [text for text in itertools.chain(TEXTS[:3], random_texts(300)) if not checker.is_unsure(text)]
    assert checker.kind == "smollm2" and TEXTS[1] in sure and len(sure) > 200
