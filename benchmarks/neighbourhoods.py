"""Where tokie cuts a text otherwise than `tokenizers`: by enumeration, for each pre-tokenizer that we trust it with.

    python benchmarks/neighbourhoods.py [--kinds smollm2 gpt2 llama3 qwen2 qwen3.5] [--length 3] [--code_points]

Ids differ only where the pre-tokens do, or where one pre-token is merged otherwise. Where each engine cuts is read off
its ids, through vocabularies that give it away. `tokenizers`: WordPiece over bytes, one token for a byte that begins a
pre-token, another one for a byte inside. tokie, by its own byte-level BPE: 16 vocabularies, each of which joins every
byte that has a bit set with every byte that has not (or the other way round), and one that joins runs of one byte, up
to 7. Two bytes that such a vocabulary would join, and that come as two tokens, have a cut between them.

Strings of up to --length characters are made of REPRESENTATIVES: every white space, every Unicode category at every
length of UTF-8, every character that the patterns name. --code_points puts each code point by itself beside the
alternatives of the patterns. Printed are what differs, and what of it `agreement` would have let through: must be 0.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson
import tokie
from tokenizers import Tokenizer

from smolpretrain.data.tokens.agreement import GPT2_KINDS, SPLITS, UNSURE, Agreement, byte_names

WHITE = [*" \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"]
LETTERS = [*"aAstmdlrveSTLREDVM\u00e9\u0416\u4f60\u02b0\u01c5\u017f\u212a\U0001d518"]
DIGITS = [*"9\u0663\u00bd\uff10\u2168\U0001d7d7"]
OTHERS = [*"'._/$\x00\x7f\x80\u201c\u2019\u00a9\u24b6\u0301\u20dd\u093e\u200d\ufeff\ue000\u0378\U0001f600"]
REPRESENTATIVES = LETTERS + DIGITS + WHITE + OTHERS
FEWER = [*"asrelSLE\u00e9\u4f60\U0001d5189\uff10\u00bd \t\n\r\x85\xa0\u3000'._\x1c\u2019\U0001f600\u0301"]
CONTEXTS = ["aCa", "\u00e9C\u00e9", "9C9", ".C.", "CC", " C ", "C's", "  C  a", "\tCa", "'Ca"]
KINDS = [*GPT2_KINDS, *SPLITS]
INSIDE = "\u4e00"  # before a byte inside a pre-token; no byte's name
AT_ONCE = 100_000  # strings compared together


def byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def pre_tokenizer(kind: str) -> dict:
    if kind == "gpt2":
        return byte_level(True)
    first = {"type": "Digits", "individual_digits": True}
    if kind in SPLITS:
        first = {"type": "Split", "pattern": {"Regex": SPLITS[kind]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, byte_level(kind not in SPLITS)]}


def tokenizer_json(kind: str, model: dict) -> str:
    """Return a tokenizer.json with a kind's pre-tokenizer."""
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    spec = {"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer(kind), **nothing}
    return orjson.dumps(spec | {"decoder": byte_level(True), "model": model}).decode()


def bpe(merges: list[tuple[int, int]], ignore_merges: bool = False) -> dict:
    """Return a byte-level BPE model: bytes have the ids 0 to 255, each merge makes the next one."""
    names = byte_names()
    for left, right in merges:
        names.append(names[left] + names[right])
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges}
    vocabulary = {name: number for number, name in enumerate(names)}
    return model | {"vocab": vocabulary, "merges": [[names[left], names[right]] for left, right in merges]}


def load_tokie(kind: str, merges: list[tuple[int, int]]):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tokenizer.json")
        path.write_text(tokenizer_json(kind, bpe(merges)), encoding="utf-8")
        return tokie.Tokenizer.from_json(str(path))


class Probe:
    """Tells where both engines cut, for one kind of pre-tokenizer.

    Args:
        used: The bytes that texts will hold; fewer make it faster.
    """

    def __init__(self, kind: str, used: bytes | None = None):
        self.kind = kind
        used = sorted(set(used or bytes({*range(256)} - {0xC0, 0xC1, *range(0xF5, 256)})))
        names = byte_names()
        words = {name: byte for byte, name in enumerate(names)} | {"[UNK]": 512}
        words |= {INSIDE + name: 256 + byte for byte, name in enumerate(names)}
        model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": INSIDE, "vocab": words}
        self._truth = Tokenizer.from_str(tokenizer_json(kind, model | {"max_input_chars_per_word": 10**9}))
        self.agreement = Agreement(Tokenizer.from_str(tokenizer_json(kind, bpe([]))))
        self._tables = []
        for bit, value in itertools.product(range(8), (0, 1)):
            left = [byte for byte in used if byte >> bit & 1 == value]
            merges = list(itertools.product(left, sorted({*used} - {*left})))
            if merges:
                self._tables.append((load_tokie(kind, merges), bit, value))
        two, four, three = (dict(zip(used, itertools.count(256 + at * len(used)), strict=False)) for at in range(3))
        runs = [(byte, byte) for byte in used] + [(two[byte], two[byte]) for byte in used]
        runs += [(two[byte], byte) for byte in used] + [(four[byte], byte) for byte in used]
        runs += [(four[byte], two[byte]) for byte in used] + [(four[byte], three[byte]) for byte in used]
        self._runs = load_tokie(kind, runs)
        self._run_lengths = np.repeat([1, 2, 4, 3, 5, 6, 7], [256] + [len(used)] * 6)

    def cuts_of_tokenizers(self, texts: list[str]) -> np.ndarray:
        """Tell for each byte of all texts, end to end, whether a pre-token begins there: bool [bytes]."""
        encodings = self._truth.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids) < 256 for encoding in encodings])

    def cuts_of_tokie(self, texts: list[str]) -> np.ndarray:
        raw = np.frombuffer("".join(texts).encode(), np.uint8)
        before = np.concatenate([raw[:1] * 0, raw[:-1]])
        cuts, same = np.zeros(len(raw), dtype=bool), before == raw
        for table, bit, value in self._tables:
            pair = (before >> bit & 1 == value) & (raw >> bit & 1 != value)
            ids, _ = table.encode_batch_flat(texts, add_special_tokens=False)
            cuts[pair] = _starts(np.where(ids < 256, 1, 2), len(raw))[pair]
        ids, _ = self._runs.encode_batch_flat(texts, add_special_tokens=False)
        cuts[same] = _starts(self._run_lengths[ids], len(raw))[same]
        cuts[_begins(texts)] = True
        return cuts

    def differing(self, texts: list[str]) -> list[str]:
        """Return the texts that could come out with other ids, whatever the vocabulary that `agreement` lets pass."""
        if not texts:
            return []
        truth = self.cuts_of_tokenizers(texts)
        differ = truth != self.cuts_of_tokie(texts)
        begins = _begins(texts)
        differ[self._unseen("".join(texts).encode(), begins, differ & truth)] = False
        return [texts[number] for number in np.nonzero(np.add.reduceat(differ.astype(int), begins))[0]]

    def _unseen(self, raw: bytes, begins: np.ndarray, uncut: np.ndarray) -> list[int]:
        """Return cuts that tokie lacks and that no id shows, as no token joins what they part: see `joined_in`."""
        ends, found, gpt2 = {*begins.tolist(), len(raw)}, [], self.kind in GPT2_KINDS
        for at in np.nonzero(uncut)[0].tolist():
            before, behind = raw[at - 1 : at], raw[at : at + 1 if at + 1 in ends else at + 2]
            contraction = behind[:1] in b"stmd" or behind in (b"ll", b"re", b"ve")
            tab = before == b"\t" and behind[:1] not in b" \t\n\r\x0b\x0c" and (gpt2 or behind[0] < 0x80)
            if tab or (gpt2 and before == b"'" and not contraction):
                found.append(at)
        return found


def _begins(texts: list[str]) -> np.ndarray:
    return np.cumsum([0, *(len(text.encode()) for text in texts[:-1])])


def _starts(lengths: np.ndarray, size: int) -> np.ndarray:
    """Mark where tokens of these lengths begin. Raises ValueError unless they cover size bytes."""
    starts = np.cumsum(lengths) - lengths
    if int(lengths.sum()) != size:
        raise ValueError(f"tokie's tokens cover {int(lengths.sum())} of {size} bytes.")
    marks = np.zeros(size, dtype=bool)
    marks[starts] = True
    return marks


def strings(characters: list[str], length: int):
    """Yield every string of this length, AT_ONCE together."""
    made = map("".join, itertools.product(characters, repeat=length))
    while batch := list(itertools.islice(made, AT_ONCE)):
        yield batch


def enumerate_strings(probe: Probe, characters: list[str], length: int) -> tuple[int, int, list[str]]:
    """Return how many strings of 1 to length characters there are, how many differ, and those that pass as safe."""
    count = differ = 0
    passed = []
    for size in range(1, length + 1):
        for batch in strings(characters, size):
            found = probe.differing(batch)
            count, differ = count + len(batch), differ + len(found)
            passed += [text for text in found if not probe.agreement.is_unsure(text)]
    return count, differ, passed


def enumerate_code_points(probe: Probe, code_points: list[int]) -> tuple[int, int, list[str]]:
    """The same for each code point in CONTEXTS, one text each."""
    texts = ["\n".join(CONTEXTS).replace("C", chr(code)) for code in code_points]
    differ = [text for at in range(0, len(texts), AT_ONCE) for text in probe.differing(texts[at : at + AT_ONCE])]
    return len(texts), len(differ), [text for text in differ if not probe.agreement.is_unsure(text)]


def code_points() -> list[int]:
    """All of the planes that hold characters, and every 64th of the others, surrogates left out."""
    last = UNSURE[-1][0]
    known = [*range(0xD800), *range(0xE000, last), *range(0xE0000, 0xE0200)]
    return [*known, *range(last, 0xE0000, 64), *range(0xE0200, 0x110000, 64)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--length", type=int, default=3)
    parser.add_argument("--fewer", action="store_true", help="28 characters instead of 68, for length 4")
    parser.add_argument("--code_points", action="store_true", help="every code point too")
    args = parser.parse_args()
    characters = FEWER if args.fewer else REPRESENTATIVES
    print("| pre-tokenizer | | texts | cut otherwise by tokie | of these let through | seconds |")
    print("|---|---|---:|---:|---:|---:|")
    failed = []
    for kind in args.kinds:
        began, probe = time.monotonic(), Probe(kind, None if args.code_points else "".join(characters).encode())
        rows = {f"up to {args.length} of {len(characters)}": enumerate_strings(probe, characters, args.length)}
        if args.code_points:
            rows["every code point"] = enumerate_code_points(probe, code_points())
        for name, (count, differ, passed) in rows.items():
            seconds = time.monotonic() - began
            print(f"| {kind} | {name} | {count:,} | {differ:,} | {len(passed):,} | {seconds:.0f} |", flush=True)
            failed += passed
    for text in failed[:20]:
        print(ascii(text))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
