"""Texts to one run of ids, EOS after each, by the model's own tokenizer or by a faster one that is seen to agree.

The model's tokenizer (`tokenizers`) is the truth. tokie (Rust, about 10 times as fast) is trusted only where it gives
the same ids: on texts made to hurt and on the corpus's first 256 kB before anything is written, then on a slice of
every batch.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orjson
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..read.long_text import LongText
from . import BACKENDS
from .tokenization import plain_backend, token_dtype

CHECKED_FIRST = 2**18  # characters of the corpus compared before anything is written
CHECKED_SLICE = 2**14  # characters compared of every batch
LONG = 2**22  # a longer document is encoded in pieces, so that memory stays bounded
# Unicode's letter numbers (Roman numerals, the Chinese zero): digits to `tokenizers`, not to tokie 0.1.4.
LETTER_NUMBERS = [
    (0x16EE, 0x16F0), (0x2160, 0x2182), (0x2185, 0x2188), (0x3007, 0x3007), (0x3021, 0x3029), (0x3038, 0x303A),
    (0xA6E6, 0xA6EF), (0x10140, 0x10174), (0x10341, 0x10341), (0x1034A, 0x1034A), (0x103D1, 0x103D5),
    (0x12400, 0x1246E),
]  # fmt: skip
WORD_ENDS = re.compile(r"[^\W\d_](?=\s)")
HURTFUL = [
    "0123456789" * 30 + " 3.14159e-10 1,000,000 \u0661\u0662\u0663 \u00bd \u2167",
    " " * 200 + "a" + " " * 33 + "\n" * 40 + "\t\t \r\n\r \u00a0\u2003\u3000\u200b.",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1eb\U0001f1f7 \u263a\ufe0f \U0001f44d\U0001f3fd",
    "e\u0301\u0301 \ufb01 \u5b89\u3007\u4e94 \u2163.",
    "na\u00efve \u4f60\u597d\u3053\u3093\uc548 \u0939\u093f\u0928\u094d\u0926\u0940 \u0639\u0631\u0628\u064a",
    "\u0e44\u0e17\u0e22 \u0440\u0443\u0441 \u03b5\u03bb \U00010330\U0001d518 \ufeff\ufffd\x00\x01\x7f\x85\u2028",
    "don't WE'LL they've I'd 'tis ''s \u2019s x=1;if(a[0]!=b){c+=\"\\n\";}//__init__ #!$%^&*()",
    "aA" * 500 + "supercalifragilisticexpialidocious" * 20 + "=" * 300 + "-" * 77 + "..." * 50,
]


class Disagreement(Exception):
    """tokie gave other ids than the model's tokenizer, in the middle of a corpus."""


def check_backend(backend: str) -> None:
    """Raise ValueError unless backend is one that exists."""
    if backend not in BACKENDS:
        raise ValueError(f"tokenizer_backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")


class Encoder:
    """Turn texts into ids; each document ends in EOS, and a special token's text inside one is plain text.

    Args:
        tokenizer: Left as it is; its own truncation, padding and post-processing are not applied.
        backend: auto (tokie where it is installed and agrees, else tokenizers), tokenizers, or tokie.
        say: Called with one sentence where auto falls back.

    Attributes: backend, the one in use, once a first batch was encoded.

    Called on texts, returns (ids, lengths): uint16 (uint32 above 65536 tokens) [tokens], and int64 [documents], EOS
    included.

    Raises:
        ValueError: backend is unknown, or is tokie and tokie cannot serve.
        Disagreement: On a later batch, with auto: what tokie has encoded so far is to be done again.
    """

    def __init__(self, tokenizer, backend: str = "auto", say: Callable[[str], None] = print):
        check_backend(backend)
        self.backend = backend
        self._say = say
        self._truth = plain_backend(tokenizer)
        self._tokie = None
        self._cuttable = None
        self._batches = 0
        self._eos = tokenizer.eos_token_id
        vocabulary = tokenizer.get_vocab()
        self._dtype = token_dtype(max(vocabulary.values()) + 1)
        self._unsure_ascii, self._unsure = unsure_characters(set(vocabulary))
        self._lowest_unsure = int(self._unsure.argmax())
        self._added = [token.content for token in tokenizer.added_tokens_decoder.values()]

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.backend == "auto" or (self.backend == "tokie" and self._tokie is None):
            self._choose(texts)
        elif self.backend == "tokie" and texts:
            self._batches += 1
            self._check([texts[self._batches * 7919 % len(texts)][:CHECKED_SLICE]])
        if len(texts) > 1 and max(map(len, texts)) <= LONG:
            return self._with_ends(*self._encode(texts))
        parts = list(self._one_by_one(texts))
        if len(parts) == 1:
            return parts[0]
        none = np.empty(0, dtype=self._dtype), np.empty(0, dtype=np.int64)
        return tuple(np.concatenate(arrays) for arrays in zip(none, *parts, strict=True))

    def _choose(self, texts: list[str]) -> None:
        """Take tokie if it can and agrees; otherwise say why not."""
        asked, self.backend = self.backend, "tokie"
        try:
            self._tokie = load_tokie(self._truth)
            self._check([*HURTFUL, " ".join(self._added), *self._added, *_first(texts, CHECKED_FIRST)])
        except ImportError:
            reason = "it is not installed (pip install tokie)"
        except Disagreement as error:
            reason = str(error)
        except Exception as error:  # tokie's own, of a kind that it does not promise
            reason = f"it does not take this tokenizer ({' '.join(str(error).split())[:200]})"
        else:
            return
        self.backend, self._tokie = "tokenizers", None
        if asked == "tokie":
            raise ValueError(f"tokenizer_backend tokie cannot serve: {reason}; set it to auto or tokenizers.")
        self._say(f"tokenizer: `tokenizers` itself, not the faster tokie: {reason}.")

    def _check(self, texts: list[str]) -> None:
        """Raise Disagreement unless tokie gives the truth's ids."""
        fast, lengths = self._encode(texts)
        truth, wanted = self._encode_truth(texts)
        if np.array_equal(fast, truth) and np.array_equal(lengths, wanted):
            return
        ends, right = np.cumsum(lengths), np.cumsum(wanted)
        for number, text in enumerate(texts):
            mine = fast[int(ends[number]) - int(lengths[number]) : int(ends[number])]
            if not np.array_equal(mine, truth[right[number] - wanted[number] : right[number]]):
                raise Disagreement(f"it gives other ids than `tokenizers` for {text[:60]!r}")
        raise Disagreement("it gives other ids than `tokenizers`")

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._tokie is None:
            return self._encode_truth(texts)
        unsure = [number for number, text in enumerate(texts) if self._is_unsure(text)]
        if not unsure:
            return self._tokie.encode_batch_flat(texts, add_special_tokens=False)
        blanked = list(texts)
        for number in unsure:
            blanked[number] = ""
        fast, lengths = self._tokie.encode_batch_flat(blanked, add_special_tokens=False)
        truth, wanted = self._encode_truth([texts[number] for number in unsure])
        where = np.repeat(np.cumsum(lengths.astype(np.int64))[unsure], wanted)
        lengths[unsure] = wanted
        return np.insert(fast, where, truth), lengths

    def _is_unsure(self, text: str) -> bool:
        """Tell whether a text holds what tokie is known to encode differently."""
        if any(character in text for character in self._unsure_ascii):
            return True
        if text.isascii():
            return False
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        return bool(self._unsure[codes[codes >= self._lowest_unsure]].any())

    def _encode_truth(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._truth.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        lengths = np.array(list(map(len, ids)), dtype=np.int64)
        return (np.concatenate(ids) if ids else np.empty(0, dtype=np.uint32)), lengths

    def _one_by_one(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Encode the short texts between long ones together, and each long one in pieces; EOS after each."""
        short = []
        for text in texts:
            if len(text) <= LONG:
                short.append(text)
                continue
            if short:
                yield self._with_ends(*self._encode(short))
                short = []
            pieces = [self._encode([piece])[0].astype(self._dtype) for piece in self._pieces(text)]
            ids = np.concatenate([*pieces, np.array([self._eos], dtype=self._dtype)])
            del pieces  # of a document of hundreds of megabytes
            yield ids, np.array([len(ids)])
        if short:
            yield self._with_ends(*self._encode(short))

    def _pieces(self, text: str | LongText) -> Iterator[str]:
        """Cut between a letter and white space, where every pre-tokenizer of GPT-2's kind cuts; whole where it fails.

        Whether this tokenizer does is seen once, on the first long text: cut at every such place, same ids.
        """
        if self._cuttable is None:
            sample = text[:CHECKED_FIRST]
            bits = [sample[start:end] for start, end in _cuts(sample, 64)]
            whole, _ = self._encode_truth([sample])
            self._cuttable = len(bits) > 1 and np.array_equal(self._encode_truth(bits)[0], whole)
        if not self._cuttable:
            yield str(text)
            return
        held = ""
        for piece in [text] if isinstance(text, str) else text.pieces():
            held += piece
            bounds = list(_cuts(held, LONG))
            for start, end in bounds[:-1]:
                yield held[start:end]
            held = held[bounds[-1][0] :]
        yield held

    def _with_ends(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put EOS after each document."""
        lengths = lengths.astype(np.int64)
        made = np.empty(len(ids) + len(lengths), dtype=self._dtype)
        ends = np.cumsum(lengths + 1) - 1
        text = np.ones(len(made), dtype=bool)
        text[ends] = False
        made[text] = ids
        made[ends] = self._eos
        return made, lengths + 1


def unsure_characters(vocabulary: set[str]) -> tuple[list[str], np.ndarray]:
    """Return what tokie is known to encode differently: ASCII characters, and a mark [0x110000] for each other one.

    A byte that has no token of its own (SmolLM2's vocabulary lacks some control characters and the lead bytes of
    unassigned planes) is dropped by `tokenizers`, and its neighbours are merged otherwise than by tokie.
    """
    named = bytes_to_unicode()
    missing = {byte for byte in range(256) if named[byte] not in vocabulary} - {0xC0, 0xC1, *range(0xF5, 256)}
    if len(missing) > 100:  # not a byte-level vocabulary: agreement is seen from the texts alone
        missing = set()
    ascii_ones = ["\x0b", *(chr(byte) for byte in sorted(missing) if byte < 0x80)]  # vertical tab: split otherwise
    marks = np.zeros(0x110000, dtype=bool)
    marks[0x80:] = any(0x80 <= byte < 0xC0 for byte in missing)
    for start, end in [*LETTER_NUMBERS, *(lead_range(byte) for byte in missing if byte >= 0xC0)]:
        marks[start : end + 1] = True
    return ascii_ones, marks


def lead_range(byte: int) -> tuple[int, int]:
    """Return the first and the last code point whose UTF-8 begins with this byte."""
    if byte < 0xE0:
        first, size = (byte & 0x1F) << 6, 2**6
    elif byte < 0xF0:
        first, size = (byte & 0x0F) << 12, 2**12
    else:
        first, size = (byte & 0x07) << 18, 2**18
    return max(first, 0x80), min(first + size, 0x110000) - 1


def load_tokie(backend):
    """Make tokie's tokenizer of a `tokenizers` one.

    Special tokens are left out, so that their text inside a document is text: tokie has no encode_special_tokens.

    Raises ImportError where tokie is not installed, and tokie's own where it does not take the tokenizer.
    """
    import tokie

    spec = orjson.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tokenizer.json")
        path.write_bytes(orjson.dumps(spec))
        return tokie.Tokenizer.from_json(str(path))


def _first(texts: list[str], characters: int) -> list[str]:
    taken = []
    for text in texts:
        if characters <= 0:
            break
        taken.append(text[:characters])
        characters -= len(text)
    return taken


def _cuts(text: str, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of pieces of at least `size` characters that end where a letter stands before white space."""
    start = 0
    while start < len(text):
        found = WORD_ENDS.search(text, start + size)
        end = found.end() if found else len(text)
        yield start, end
        start = end
