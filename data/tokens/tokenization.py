"""Text to ids: load a tokenizer or train one on the corpus, and encode documents so that each ends in EOS."""

import hashlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:  # half a second to import, which a --help has no use for
    from transformers import PreTrainedTokenizerFast

# SmolLM2's, in its order: their ids are 0 to 16. Source: HuggingFaceTB/SmolLM2-135M, tokenizer.json.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<repo_name>",
    "<reponame>",
    "<file_sep>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<jupyter_script>",
    "<empty_output>",
]
RUN = 1000  # characters of a word that a tokenizer is trained on at once
LONG_RUN = re.compile(rf"\S{{{RUN + 1},}}")
MODEL_MAX_LENGTH = 8192  # SmolLM2's; a bound for warnings only, nothing here truncates


def cut_runs(text: str) -> list[str]:
    """Cut what runs on without white space into pieces of RUN: of 3 MB in one word, training would take hours."""
    at, found = 0, []
    for run in LONG_RUN.finditer(text):
        found += [text[at : run.start()], *(run[0][cut : cut + RUN] for cut in range(0, len(run[0]), RUN))]
        at = run.end()
    return [piece for piece in [*found, text[at:]] if piece]


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer with SmolLM2's pipeline and special tokens.

    Args:
        documents: Texts, read once.
        vocab_size: Tokens wanted, special tokens (17) and bytes (256) included.

    Returns:
        Tokenizer with bos = eos = unk = pad = <|endoftext|> (id 0), the same for the same text. A text too small for
        vocab_size gives fewer tokens: `len(tokenizer)` is what it has.

    Raises:
        ValueError: vocab_size is below 273, or there is no text.

    Source: HuggingFaceTB/SmolLM2-135M, tokenizer.json (digits alone, then GPT-2's byte-level split).
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size must be at least {smallest} ({len(SPECIAL_TOKENS)} special tokens and {len(alphabet)} bytes), "
            f"got {vocab_size}."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    documents = (piece for document in documents for piece in cut_runs(document))
    first = next(documents, None)
    if first is None:
        raise ValueError("There is no text to train a tokenizer on; the corpus holds no document.")
    backend.train_from_iterator(itertools.chain([first], documents), trainer)
    end = SPECIAL_TOKENS[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        additional_special_tokens=SPECIAL_TOKENS,
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL_MAX_LENGTH,
    )


def load_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerFast":
    """Load a tokenizer from the Hub or a local directory; code from there is never run.

    Its tokenizer.json is taken as it stands. AutoTokenizer rebuilds it from the class named beside it instead, and
    transformers 5.23 so drops SmolLM2's Digits step ("2024" becomes other ids than the authors').

    Args:
        name: Hub id or directory.
        revision: Branch, tag or commit, for a Hub id.

    Raises:
        ValueError: Nothing there, no fast tokenizer, or no EOS token.
    """
    from transformers import PreTrainedTokenizerFast

    directory = os.path.expanduser(name)
    local = os.path.isdir(directory)
    if not local and (directory.startswith((".", "/")) or directory.count("/") > 1 or os.path.exists(directory)):
        raise ValueError(f"tokenizer_name: {name} is not a directory; give one with a tokenizer.json, or a Hub id.")
    source = directory if local else name
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, revision=revision or "main")
    except Exception:  # no tokenizer.json there: its own class may still make a fast one from its vocabulary files
        tokenizer = _from_vocabulary_files(source, revision, local)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer_name: {name} has only a slow tokenizer; choose one that has a tokenizer.json.")
    if tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False) < 2:  # its files were not there
        raise ValueError(f"tokenizer_name: {name} holds no vocabulary; give one with a tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer_name: {name} has no EOS token, so documents would run together; "
            "set eos_token in its tokenizer_config.json or choose another."
        )
    return tokenizer


def _from_vocabulary_files(source: str, revision: str | None, local: bool):
    from transformers import AutoTokenizer  # which imports torch

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        where = "the directory holds no fast tokenizer" if local else "the Hub gives no fast tokenizer of that name"
        remedy = "give one with a tokenizer.json" if local else "check the name, the network and `hf auth login`"
        raise ValueError(f"tokenizer_name: {source} cannot be loaded: {where} ({reason}); {remedy}.") from error


def _backend(tokenizer: "PreTrainedTokenizerFast") -> Tokenizer:
    """Copy the backend without truncation and padding, which calls on the tokenizer leave behind."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def plain_backend(tokenizer: "PreTrainedTokenizerFast") -> Tokenizer:
    """Copy the backend as documents need it: the text of a special token inside one is text, not a boundary."""
    backend = _backend(tokenizer)
    backend.encode_special_tokens = True
    return backend


def tokenizer_hash(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the sha256 of what decides a text's ids: the backend's JSON; the same after saving and loading."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:
        backend = _backend(tokenizer)
    return hashlib.sha256(backend.to_str().encode("utf-8")).hexdigest()


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the smallest vocabulary that holds every id, which is above len(tokenizer) where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1  # the added tokens among them


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest type that holds ids below vocab_size: 2 bytes up to 65536, else 4."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def document_encoder(tokenizer: "PreTrainedTokenizerFast") -> Callable[[list[str]], list[np.ndarray]]:
    """Return a function from texts to ids, made once for a whole corpus; see `encode_documents`."""
    backend = plain_backend(tokenizer)
    end = [tokenizer.eos_token_id]
    dtype = token_dtype(vocabulary_size(tokenizer))

    def encode(texts: list[str]) -> list[np.ndarray]:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids + end, dtype=dtype) for encoding in encodings]

    return encode


def encode_documents(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]) -> list[np.ndarray]:
    """Turn documents into ids, each ending in EOS.

    Args:
        tokenizer: Left as it is; its own truncation, padding and post-processing are not applied.
        texts: Documents. The text of a special token inside one is encoded as plain text.

    Returns:
        One array of uint16 (uint32 above 65536 tokens) a document, its length in tokens plus one.
    """
    return document_encoder(tokenizer)(list(texts))
