"""Which texts tokie encodes as `tokenizers` does: shown by enumeration, not by luck.

Both split a text into pre-tokens and merge bytes within each. `benchmarks/neighbourhoods.py` lays every code point, and
every Unicode category and white space beside every alternative of a pre-tokenizer's pattern, before both and compares
where they cut. What it finds, for tokie 0.1.4:

- characters that tokie takes for letters, or does not take for white space: UNSURE;
- `\\t's`, `\\t're` and their like under GPT-2's pattern;
- under Llama 3's and Qwen's: a tab before punctuation before a letter, white space between two line ends, a white space
  beyond ASCII before anything else, and the long s, which is an s of a contraction to `tokenizers` alone;
- tokie does not cut between a tab and what is no white space (under Llama 3's and Qwen's: punctuation), nor, under
  GPT-2's, between an apostrophe and a letter. That changes no id where no token joins these two, which is looked up in
  the vocabulary.

A text with any of these is encoded by `tokenizers`, whole. Every other text is cut alike by both.
"""

import re
import unicodedata
from importlib.metadata import version

import numpy as np
import orjson

SHOWN_FOR = "0.1.4"  # of tokie: another one is not used before the enumeration was run with it
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {
    "llama3": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen3.5": CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
GPT2_KINDS = ("gpt2", "smollm2")
GPT2_UNSURE = r"\t'(?:[stmd]|ll|re|ve)"
SPLIT_UNSURE = (
    "\t[^ \t\n\r\x0b\x0cA-Za-z0-9][A-Za-z\x80-\U0010ffff]|\t[\x80-\U0010ffff]"
    "|[\r\n][ \t\x0b\x0c\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+[\r\n]"
    "|[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000][^ \t\n\r]|\u017f"
)
# Letters to tokie and not to `tokenizers`, or the other way round: letter numbers (Roman numerals, the Chinese zero),
# letters in circles and squares, what Unicode 16 and 17 added; the last one is of planes without a character yet.
UNSURE = [
    (0x88F, 0x88F), (0x897, 0x897), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0x16EE, 0x16F0), (0x2160, 0x2182),
    (0x2185, 0x2188), (0x24B6, 0x24E9), (0x3007, 0x3007), (0x3021, 0x3029), (0x3038, 0x303A), (0xA6E6, 0xA6EF),
    (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10140, 0x10174), (0x10341, 0x10341),
    (0x1034A, 0x1034A), (0x103D1, 0x103D5), (0x10940, 0x10959), (0x10D69, 0x10D69), (0x10EC5, 0x10EFC),
    (0x113B8, 0x113CD), (0x11B60, 0x11B67), (0x11DB0, 0x11DE9), (0x12400, 0x1246E), (0x1611E, 0x1612E),
    (0x16EA0, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18DF2), (0x1E6C0, 0x1E6FF),
    (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD),
    (0x323B0, 0xDFFFF),
]  # fmt: skip


class Unshown(Exception):
    """tokie was not shown to agree on this tokenizer; the message says why."""


class Agreement:
    """Tells a text that tokie may encode otherwise than this tokenizer.

    Args:
        backend: `tokenizers`' own.

    Raises:
        Unshown: Nothing is shown for its pre-tokenizer, normalizer or model, or for the tokie that is installed.
    """

    def __init__(self, backend):
        spec = orjson.loads(backend.to_str())
        self.kind = pre_tokenizer_kind(spec)
        _check_model(spec)
        self._nfc = spec["normalizer"] is not None
        vocabulary = spec["model"]["vocab"]
        missing = _missing_bytes(vocabulary)
        self._needles = ["\x0b", "\x0c", *(chr(byte) for byte in missing if byte < 0x80)]
        for token in spec["added_tokens"]:
            if not token["special"]:  # cut out before anything else; a special one's text is text
                self._needles += {token["content"], unicodedata.normalize("NFC", token["content"])}
        self._pattern = re.compile(
            (GPT2_UNSURE if self.kind in GPT2_KINDS else SPLIT_UNSURE) + joined_in(vocabulary, self.kind)
        )
        self._missing = missing
        self._marks = None

    def is_unsure(self, text: str) -> bool:
        if any(needle in text for needle in self._needles) or self._pattern.search(text):
            return True
        if text.isascii():
            return False
        if self._nfc and not unicodedata.is_normalized("NFC", text):
            return True
        if self._marks is None:
            self._marks = _marks(self._missing, self._nfc)
            self._lowest = int(self._marks.argmax())
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        return bool(self._marks[codes[codes >= self._lowest]].any())


def pre_tokenizer_kind(spec: dict) -> str:
    """Name the pre-tokenizer of a tokenizer.json. Raises Unshown: it is not one that was enumerated."""
    steps = spec["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        first = steps[:-1]
        if last.get("use_regex", True):
            if not first:
                return "gpt2"
            if first == [{"type": "Digits", "individual_digits": True}]:
                return "smollm2"
        elif len(first) == 1 and first[0].get("type") == "Split":
            found = first[0]["pattern"].get("Regex")
            plain = first[0]["behavior"] == "Isolated" and not first[0]["invert"]
            for kind, pattern in SPLITS.items():
                if plain and found == pattern:
                    return kind
    raise Unshown("it is not shown to split texts as this tokenizer's pre_tokenizer does")


def _check_model(spec: dict) -> None:
    if (found := version("tokie")) != SHOWN_FOR:
        raise Unshown(f"its ids are shown to be right for version {SHOWN_FOR}, installed is {found}")
    if spec["normalizer"] not in (None, {"type": "NFC"}):
        raise Unshown("it is not shown to normalize texts as this tokenizer does")
    model = spec["model"]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(key) for key in odd):
        raise Unshown(f"it is not shown to merge as this tokenizer's model does ({model['type']})")


def byte_names() -> list[str]:
    """Return the character by which GPT-2 and all of its kind name each byte in a vocabulary."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in kept else chr(next(others)) for byte in range(256)]


def _missing_bytes(vocabulary: dict) -> list[int]:
    """Return bytes of UTF-8 without a token of their own: `tokenizers` drops them and merges their neighbours.

    SmolLM2's vocabulary lacks some control characters and the first bytes of unassigned planes.
    """
    never = {0xC0, 0xC1, *range(0xF5, 256)}
    missing = [byte for byte, name in enumerate(byte_names()) if name not in vocabulary and byte not in never]
    if len(missing) > 100:
        raise Unshown("this tokenizer's vocabulary is not of bytes")
    return missing


def joined_in(vocabulary: dict, kind: str) -> str:
    """Return what more is unsure because a token joins a tab, or an apostrophe, with what tokie leaves behind it."""
    names = byte_names()
    white = "".join(names[byte] for byte in b" \t\n\r\x0b\x0c")
    beyond = "".join(names[0x80:])
    tabs = [token for token in vocabulary if names[9] in token]
    if kind not in GPT2_KINDS:
        joins = any(re.search(f"{names[9]}[^a-zA-Z0-9{white}{re.escape(beyond)}]", token) for token in tabs)
        return r"|\t[^ \t\n\r\x0b\x0cA-Za-z0-9]" if joins else ""
    more = r"|\t[^ \t\n\r]" if any(re.search(f"{names[9]}[^{white}]", token) for token in tabs) else ""
    quotes = [token for token in vocabulary if "'" in token]
    quoted = {token for token in quotes if re.search(f"'[a-zA-Z{re.escape(beyond)}]", token)}
    quoted -= {"'s", "'t", "'m", "'d", "'ll", "'re", "'ve"}
    begun = {"'l": "'l(?!l)", "'r": "'r(?!e)", "'v": "'v(?!e)"}  # on the way to a contraction
    more += "".join("|" + text for token, text in begun.items() if token in quoted)
    return more + ("|'[a-zA-Z\x80-\U0010ffff]" if quoted - begun.keys() else "")


def _marks(missing: list[int], nfc: bool) -> np.ndarray:
    """Mark the characters beyond ASCII that make a text unsure, bool [0x110000]."""
    marks = np.zeros(0x110000, dtype=bool)
    if any(0x80 <= byte < 0xC0 for byte in missing):
        marks[0x80:] = True
    for start, end in [*UNSURE, *(lead_range(byte) for byte in missing if byte >= 0xC0)]:
        marks[start : end + 1] = True
    if nfc:  # normal form is stable only for characters that Python's own tables know
        marks |= np.array([unicodedata.category(chr(code)) == "Cn" for code in range(0x110000)])
    return marks


def lead_range(byte: int) -> tuple[int, int]:
    """Return the first and the last code point whose UTF-8 begins with this byte."""
    if byte < 0xE0:
        first, size = (byte & 0x1F) << 6, 2**6
    elif byte < 0xF0:
        first, size = (byte & 0x0F) << 12, 2**12
    else:
        first, size = (byte & 0x07) << 18, 2**18
    return max(first, 0x80), min(first + size, 0x110000) - 1
