"""The collator: rows to a batch whose attention stays inside a document."""

import signal
from dataclasses import dataclass

import numpy as np

from .pack.packing import IGNORED_LABEL, document_starts


@dataclass
class PackedCollator:
    """Make a batch of packed rows, with the boundaries of their documents.

    Never emits attention_mask: with one, or with a cache (model.config.use_cache must be False), transformers does not
    look at position_ids and attention silently runs across documents.

    Args:
        eos_token_id: The last token of every document; it stays a target.
        intra_document_masking: Keep attention inside a document. False: plain causal rows, no position_ids.
        cu_seq_lens: Also emit what the flash kernels need; with rows side by side (B > 1) they do not look at
            position_ids. sdpa and eager pay it no heed. Masking off: each row is one document to them.

    Returns (called on a list of {"input_ids": [S]}):
        input_ids, labels: int64 [B, S]. labels repeat input_ids (the model shifts them), but are -100 on the first
            token of each document, which nothing before it can foretell (masking off: on the first of the row).
        position_ids: int64 [B, S], 0 at the first token of each document and of each row.
        cu_seq_lens_q, cu_seq_lens_k: int32 [documents + 1], boundaries in the flattened B * S, from 0 to B * S.
        max_length_q, max_length_k: int, S: the longest document's tokens would have a compiled model compiled anew.

    Source: transformers 5.23, masking_utils.find_packed_sequence_indices, modeling_flash_attention_utils.
    """

    eos_token_id: int
    intra_document_masking: bool = True
    cu_seq_lens: bool = False

    def __call__(self, features: list[dict]) -> dict:
        import torch

        _leave_signals_to_trainer()
        input_ids = np.stack([np.asarray(feature["input_ids"]) for feature in features]).astype(np.int64)
        if not self.intra_document_masking:
            labels = input_ids.copy()
            labels[:, 0] = IGNORED_LABEL
            padding = (input_ids[:, 1:] == self.eos_token_id) & (input_ids[:, :-1] == self.eos_token_id)
            labels[:, 1:][padding] = IGNORED_LABEL  # best_fit's; no document is empty
            batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
            return batch | self._bounds(np.arange(0, input_ids.size, input_ids.shape[1]), input_ids.shape)
        starts = document_starts(input_ids, self.eos_token_id)
        column = np.arange(input_ids.shape[1])
        positions = column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)
        labels = np.where(starts, IGNORED_LABEL, input_ids)
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
        batch = {name: torch.from_numpy(values) for name, values in batch.items()}
        return batch | self._bounds(np.flatnonzero(starts), starts.shape)

    def _bounds(self, starts, shape):
        """What the flash kernels take, where they are asked for: starts in the flattened rows, with their end."""
        if not self.cu_seq_lens:
            return {}
        import torch

        bounds, length = torch.from_numpy(np.append(starts, shape[0] * shape[1]).astype(np.int32)), int(shape[1])
        return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}


def _leave_signals_to_trainer() -> None:
    """In a DataLoader worker, ignore SIGTERM, SIGINT and SIGUSR1.

    A launcher that stops a run signals the workers too, and a worker killed while the trainer saves its last
    checkpoint takes that checkpoint with it. Workers end with their parent in any case.
    """
    from torch.utils.data import get_worker_info

    if get_worker_info() is not None and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
