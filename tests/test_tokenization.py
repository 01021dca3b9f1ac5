"""Text to ids: the trained tokenizer, the loaded one, and documents that end in EOS."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from smolpretrain.data.tokens.tokenization import (
    SPECIAL_TOKENS,
    cut_runs,
    encode_documents,
    load_tokenizer,
    token_dtype,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)

TEXTS = ["the cat sat on the mat, and the dog sat on the cat in 2024.\n", "a dog and a cat; the mat of the cat"]
SMOLLM2 = Path(__file__).parents[2] / "shared/data/smollm2-tokenizer"
HASH_OF_TRAINED = (
    "from smolpretrain.data.tokens.tokenization import train_tokenizer as t, tokenizer_hash as h;"
    "from pydoc_data.topics import topics; print(h(t([topics[k] for k in sorted(topics)], 1000)))"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_special_tokens_have_smollm2s_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(17))
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} == {0}
    assert tokenizer.is_fast and tokenizer.model_max_length == 8192


def test_digits_stand_alone_and_every_character_has_tokens(tokenizer):
    assert tokenizer.tokenize("in 2024")[-4:] == ["2", "0", "2", "4"]
    text = "\x00 na\u00efve \u4f60\u597d \U0001f600\r\n\t"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_text_too_small_gives_the_tokens_it_has():
    assert 273 < len(train_tokenizer(["the the cat"], 5000)) < 300


def test_a_vocabulary_below_bytes_and_special_tokens_is_refused():
    with pytest.raises(
        ValueError, match=r"vocab_size must be at least 273 \(17 special tokens and 256 bytes\), got 272\."
    ):
        train_tokenizer(TEXTS, 272)
    assert len(train_tokenizer(TEXTS, 273)) == 273


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="There is no text to train a tokenizer on"):
        train_tokenizer(iter([]), 300)


def test_training_gives_the_same_tokenizer_in_every_process():
    runs = [subprocess.run([sys.executable, "-c", HASH_OF_TRAINED], capture_output=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) == 65, runs[0].stderr


def test_saving_and_loading_changes_neither_hash_nor_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
        assert loaded("in 2024 <|endoftext|>")["input_ids"] == tokenizer("in 2024 <|endoftext|>")["input_ids"]
        assert loaded.eos_token_id == 0


def test_the_hash_tells_tokenizers_apart_but_not_their_use(tokenizer):
    before = tokenizer_hash(tokenizer)
    tokenizer(TEXTS, truncation=True, max_length=2, padding="max_length")  # leaves its mark on the backend
    assert tokenizer_hash(tokenizer) == before != tokenizer_hash(train_tokenizer(TEXTS, 280))


def test_each_document_ends_in_eos_and_nothing_else_is_added(tokenizer):
    tokenizer(TEXTS, truncation=True, max_length=2, padding="max_length")
    for text, ids in zip(TEXTS, encode_documents(tokenizer, TEXTS), strict=True):
        assert ids[-1] == 0 and not (ids[:-1] == 0).any() and ids.dtype == np.uint16
        assert tokenizer.decode(ids[:-1]) == text


@settings(deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "the cat", " ", "\n", "\u20ac"]), max_size=8).map("".join))
def test_special_tokens_in_a_document_stay_text(tokenizer, text):
    (ids,) = encode_documents(tokenizer, [text])
    assert ids[-1] == 0 and (ids[:-1] >= len(SPECIAL_TOKENS)).all()
    assert tokenizer.decode(ids[:-1]) == text


def test_encoding_leaves_the_tokenizer_as_it_was(tokenizer):
    tokenizer(TEXTS, truncation=True, max_length=2, padding="max_length")
    backend = tokenizer.backend_tokenizer
    before = backend.to_str(), backend.encode_special_tokens
    encode_documents(tokenizer, ["<|endoftext|>"])
    assert (backend.to_str(), backend.encode_special_tokens) == before
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]


def test_ids_take_two_bytes_up_to_65536_and_four_above():
    assert (token_dtype(49152), token_dtype(65536), token_dtype(65537)) == (np.uint16, np.uint16, np.uint32)


def test_the_vocabulary_holds_ids_beyond_a_gap(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["far"] = 70_000
    path.write_text(json.dumps(values))
    gapped = load_tokenizer(str(tmp_path))
    assert vocabulary_size(gapped) == 70_001 > len(gapped)
    assert encode_documents(gapped, ["cat"])[0].dtype == np.uint32


def test_a_tokenizer_json_is_taken_as_it_stands_whatever_class_is_named_beside_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == tokenizer_hash(tokenizer)


def test_a_tokenizer_without_eos_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    with pytest.raises(ValueError, match=r"has no EOS token, so documents would run together; set eos_token"):
        load_tokenizer(str(tmp_path))


def test_a_slow_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "canine"}')
    with pytest.raises(ValueError, match=r"has only a slow tokenizer; choose one that has a tokenizer\.json\."):
        load_tokenizer(str(tmp_path))


def test_a_directory_without_its_vocabulary_files_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}'
    )
    with pytest.raises(ValueError, match="holds no vocabulary; give one with a tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizers_own_code_is_never_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}')
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match=r"cannot be loaded: the directory holds no fast tokenizer"):
        load_tokenizer(str(tmp_path))
    assert not ran.exists()


def test_an_unreachable_tokenizer_is_one_sentence(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, sentence in [
        (str(tmp_path / "none"), r"none is not a directory; give one with a tokenizer\.json, or a Hub id\."),
        (str(tmp_path), r"the directory holds no fast tokenizer \(.*\); give one with a tokenizer\.json\."),
        ("nobody/none", r"tokenizer_name: nobody/none cannot be loaded: the Hub gives no .*`hf auth login`\."),
    ]:
        with pytest.raises(ValueError, match=sentence) as error:
            load_tokenizer(name)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2's own tokenizer is not beside the repository")
def test_smollm2s_own_tokenizer_keeps_its_digits_apart():
    tokenizer = load_tokenizer(str(SMOLLM2))
    ids = encode_documents(tokenizer, ["in 2024"])[0]
    assert [tokenizer.decode([number]) for number in ids] == ["in", " ", "2", "0", "2", "4", "<|endoftext|>"]
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(17))


def test_a_word_without_end_is_trained_on_in_pieces():
    chance = random.Random(0)
    runs = "".join(chance.choices("acgt", k=3500))
    cuts = [runs[at : at + 1000] for at in range(0, 3500, 1000)]
    assert cut_runs(f"a word {runs} after") == ["a word ", *cuts, " after"]
    for text in ("", "x " * 4000, "y" * 1000, "two\n\nlines"):
        assert "".join(cut_runs(text)) == text and len(cut_runs(text)) <= 1
    assert train_tokenizer([runs], 300).get_vocab() == train_tokenizer(cuts, 300).get_vocab()
