"""Held-out loss as bits per byte: the bytes that each token stands for."""

import torch


def bytes_per_token(tokenizer, texts):
    """Count the UTF-8 bytes of each token, if that can be trusted: it must add up on every one of some texts.

    Args:
        texts: Texts to try it on; of held-out ones a few dozen will do.

    Returns:
        int64 [len(tokenizer)], 0 for special tokens; None for a tokenizer whose tokens do not add up to the text, such
        as one that normalizes it or puts a space before it.
    """
    names, special = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), set(tokenizer.all_special_ids)
    ways = (
        len,  # byte-level BPE: one character of its alphabet is one byte
        lambda name: 1 if name.startswith("<0x") and len(name) == 6 else len(name.replace("\u2581", " ").encode()),
    )
    texts = [text for text in texts if text]
    for way in ways:
        sizes = torch.tensor([0 if n in special else way(name) for n, name in enumerate(names)])
        encoded = (tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts)
        if texts and all(
            sizes[ids].sum() == len(text.encode()) for ids, text in zip(encoded, texts, strict=True) if ids
        ):
            return sizes
    return None
