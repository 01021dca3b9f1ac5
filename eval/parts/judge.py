"""How good a finished run is: held-out documents, shared out over its ranks, under its model and its yardsticks."""

import gc

import numpy as np
import torch
import torch.distributed as dist

from .. import perplexity
from . import intervals


def judge(models, unigram_counts, tokenizer, documents, window, progress=True):
    """Score documents with several models and with a unigram model.

    Args:
        models: {name: function that loads it}, one at a time in memory.
        unigram_counts: int64 [vocabulary], each token's count in the training text.
        documents: {set: all of its documents}, on every rank; each scores its share.

    Returns:
        {set: {name: intervals.measure's dict}}, "unigram" among them, the same on every rank; under "" over the
        documents of all sets together.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    flat = [(name, text) for name, texts in documents.items() for text in texts][rank::ranks]
    mine, found = [text for _, text in flat], {}
    for name, load in models.items():
        found[name] = perplexity.score_documents(
            load(), tokenizer, mine, window=window, progress=progress and rank == 0, each=True
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    found["unigram"] = perplexity.unigram_nll(unigram_counts, tokenizer, mine, each=True)
    sets = [name for name, _ in flat]
    gathered = [(sets, found)]
    if ranks > 1:
        gathered = [None] * ranks
        dist.all_gather_object(gathered, (sets, found))
    sets = np.array([name for names, _ in gathered for name in names])

    def measured(rows):
        return {
            name: intervals.measure(np.concatenate([part[name][0] for _, part in gathered])[rows], settings)
            for name, (_, settings) in found.items()
        }

    return {"": measured(slice(None))} | {name: measured(sets == name) for name in documents if name}
