"""Texts to one run of ids, EOS after each, by the model's own tokenizer or by a faster one where it is shown to agree.

The model's tokenizer (`tokenizers`) is the truth. tokie (Rust, about 10 times as fast) takes the texts of which
`agreement` shows that both encode them alike, and only after it gave the same ids for every token of the vocabulary,
texts made to hurt and the corpus's first 64 kB. What was written is compared once more, by sample: `pack.audit`.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orjson

from ..read.long_text import LongText
from . import BACKENDS
from .agreement import Agreement, Unshown, byte_names, pre_tokenizer_kind
from .tokenization import plain_backend, token_dtype

CHECKED_FIRST = 2**16  # characters of the corpus compared before anything is written
LONG = 2**22  # a longer document is encoded in pieces, so that memory stays bounded
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
    """tokie gave other ids than the model's tokenizer."""


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

    Attributes: backend, the one in use, and agreement, which tells its unsure texts, once a first batch was encoded.

    Called on texts, returns (ids, lengths): uint16 (uint32 above 65536 tokens) [tokens], and int64 [documents], EOS
    included.

    Raises:
        ValueError: backend is unknown, or is tokie and tokie cannot serve.
    """

    def __init__(self, tokenizer, backend: str = "auto", say: Callable[[str], None] = print):
        check_backend(backend)
        self.backend = backend
        self._say = say
        self._truth = plain_backend(tokenizer)
        self._tokie = self.agreement = None
        self._cuttable = None
        self._eos = tokenizer.eos_token_id
        self._vocabulary = tokenizer.get_vocab()
        self._dtype = token_dtype(max(self._vocabulary.values()) + 1)

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.backend == "auto" or (self.backend == "tokie" and self._tokie is None):
            self._choose(texts)
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
            import tokie  # noqa: F401 (before its version is asked for)

            self.agreement = Agreement(self._truth)
            self._tokie = load_tokie(self._truth)
            self._check([*plain_tokens(self._vocabulary), *HURTFUL, *_first(texts, CHECKED_FIRST)])
        except ImportError:
            reason = "it is not installed (pip install tokie)"
        except (Unshown, Disagreement) as error:
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
        for text, mine, own in zip(texts, _split(fast, lengths), _split(truth, wanted), strict=True):
            if not np.array_equal(mine, own):
                raise Disagreement(f"it gives other ids than `tokenizers` for {text[:60]!r}")

    def compare(self, texts: list[str], ids: list[np.ndarray], partial: list[bool]) -> None:
        """Raise Disagreement unless these are the model's own ids of these texts, EOS left out.

        Args:
            partial: Where a text's ids stop before its end, or go on behind it.
        """
        for text, mine, own, part in zip(texts, ids, _split(*self._encode_truth(texts)), partial, strict=True):
            both = min(len(mine), len(own)) if part else None
            if not np.array_equal(mine[:both], own[:both]):
                raise Disagreement(f"it gives other ids than `tokenizers` for {text[:60]!r}")

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._tokie is None:
            return self._encode_truth(texts)
        unsure = [number for number, text in enumerate(texts) if self.agreement.is_unsure(text)]
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

        Whether one of another kind does is seen once, on the first long text: cut at every such place, same ids.
        """
        if self._cuttable is None:
            with contextlib.suppress(Unshown):
                self._cuttable = bool(pre_tokenizer_kind(orjson.loads(self._truth.to_str())))
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


def load_tokie(backend):
    """Make tokie's tokenizer of a `tokenizers` one.

    Added tokens are left out: a special one's text inside a document is text (tokie has no encode_special_tokens), and
    a document with an ordinary one is encoded by `tokenizers`.

    Raises ImportError where tokie is not installed, and tokie's own where it does not take the tokenizer.
    """
    import tokie

    spec = orjson.loads(backend.to_str())
    spec["added_tokens"] = []
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tokenizer.json")
        path.write_bytes(orjson.dumps(spec))
        return tokie.Tokenizer.from_json(str(path))


def plain_tokens(vocabulary: dict[str, int]) -> list[str]:
    """Return the text of every token that is whole characters, and of the special ones.

    tokie takes a pre-token that is a token for that token; by its merges it may be another run of ids.
    """
    byte = {name: number for number, name in enumerate(byte_names())}
    texts = []
    for token in vocabulary:
        try:
            texts.append(bytes(map(byte.__getitem__, token)).decode())
        except KeyError:
            texts.append(token)
        except UnicodeDecodeError:
            continue
    return texts


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(lengths.astype(np.int64))[:-1]) if len(lengths) else []


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
