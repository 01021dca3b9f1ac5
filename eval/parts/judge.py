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
        documents: All of them, on every rank; each scores its share.

    Returns:
        {name: intervals.measure's dict}, "unigram" among them, the same on every rank.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, found = documents[rank::ranks], {}
    for name, load in models.items():
        found[name] = perplexity.score_documents(
            load(), tokenizer, mine, window=window, progress=progress and rank == 0, each=True
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    found["unigram"] = perplexity.unigram_nll(unigram_counts, tokenizer, mine, each=True)
    gathered = [found]
    if ranks > 1:
        gathered = [None] * ranks
        dist.all_gather_object(gathered, found)
    return {
        name: intervals.measure(np.concatenate([part[name][0] for part in gathered]), settings)
        for name, (_, settings) in found.items()
    }
