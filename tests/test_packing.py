"""Ids to blocks, and attention that stays inside a document: literal rows, brute force, and a real tiny Llama."""

import os
import pickle
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, modeling_flash_attention_utils

from smolpretrain.data.collator import PackedCollator
from smolpretrain.data.pack import packing
from smolpretrain.data.pack.packing import BestFitPacker, Packer, best_fit, make_packer, pack_blocks

EOS = 0
ids_lists = st.lists(st.lists(st.integers(1, 9), max_size=9).map(lambda ids: [*ids, EOS]), max_size=12)


def features(*rows) -> list[dict]:
    return [{"input_ids": np.array(row, dtype=np.uint16)} for row in rows]


def flat(documents: list) -> tuple:
    """Documents end to end, and their lengths."""
    ids = np.array([token for document in documents for token in document], dtype=np.uint16)
    return ids, np.array([len(document) for document in documents], dtype=np.int64)


def lists(batch: dict) -> dict:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


# Packing


def test_documents_lie_end_to_end_and_only_the_last_unfilled_row_is_dropped():
    documents = [[5, 6, 7, EOS], [8, 9, EOS], [4, EOS]]
    assert pack_blocks(documents, 4).tolist() == [[5, 6, 7, EOS], [8, 9, EOS, 4]]
    assert pack_blocks(documents, 3).tolist() == [[5, 6, 7], [EOS, 8, 9], [EOS, 4, EOS]]


@settings(deadline=None)
@given(ids_lists, ids_lists, st.integers(2, 12))
def test_tokens_in_are_tokens_in_blocks_and_remainder_however_they_come(first, second, block_size):
    packer = Packer(block_size)
    rows = np.concatenate([packer.add(*flat(part)) for part in (first, [], second)]).reshape(-1).tolist()
    stream = [token for document in first + second for token in document]
    assert packer.tokens == len(stream) == packer.blocks * block_size + packer.remainder
    assert packer.remainder < block_size
    assert rows == stream[: packer.blocks * block_size]  # in order, nothing padded, nothing lost


def test_large_ids_survive_the_packer():
    documents = [np.array([70_000, EOS], dtype=np.uint32), np.array([70_001, EOS], dtype=np.uint32)]
    assert pack_blocks(documents, 3).tolist() == [[70_000, EOS, 70_001]]


def test_fewer_tokens_than_a_block_and_bad_choices_are_refused():
    with pytest.raises(
        ValueError, match="One block needs 8 tokens, the documents hold 3; give more or lower block_size"
    ):
        pack_blocks([[1, 2, EOS]], 8)
    with pytest.raises(ValueError, match=r"block_size must be at least 2 .*, got 1"):
        Packer(1)
    with pytest.raises(ValueError, match="packing must be one of concat, best_fit, got 'worst'"):
        make_packer(8, "worst", EOS)
    assert isinstance(make_packer(8, "best_fit", EOS), BestFitPacker)


@settings(deadline=None)
@given(ids_lists, ids_lists, st.integers(2, 12), st.integers(1, 40))
def test_best_fit_cuts_no_short_document_and_drops_nothing(first, second, block_size, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_TOKENS", window)
        packer, whole = BestFitPacker(block_size, EOS), BestFitPacker(block_size, EOS)
        parts = [packer.add(*flat(first)), packer.add(*flat([])), packer.add(*flat(second)), packer.finish()]
        at_once = np.concatenate([whole.add(*flat(first + second)), whole.finish()])
    rows = np.concatenate(parts)
    assert np.array_equal(rows, at_once)  # wherever the batches end
    pieces = [
        tuple(document[at : at + block_size])
        for document in first + second
        for at in range(0, len(document), block_size)
    ]
    found = []
    for row in rows.tolist():
        while row:
            length = row.index(EOS) + 1 if EOS in row else len(row)
            found.append(tuple(row[:length]))
            row = row[length:]
    padding = rows.size - sum(map(len, pieces))
    for piece in [*pieces, *[(EOS,)] * padding]:
        found.remove(piece)  # each piece lies in one row, whole
    assert found == [] and packer.padding_tokens == padding and packer.blocks == len(rows)
    assert packer.tokens + padding == rows.size
    assert packer.documents_cut == sum(len(document) > block_size for document in first + second)


def test_best_fit_leaves_the_least_room():
    assert best_fit([5, 3, 6, 2], 8) == [[0, 1], [2, 3]]
    assert best_fit([4, 4, 4, 3, 1], 8) == [[0, 1], [2, 3, 4]]


def test_the_padding_of_best_fit_is_no_target_and_no_context():
    packer = BestFitPacker(8, EOS)
    packer.add(*flat([[5, 6, EOS], [7, 8, EOS]]))
    (row,) = packer.finish()
    assert row.tolist() == [5, 6, EOS, 7, 8, EOS, EOS, EOS]
    batch = PackedCollator(EOS)(features(row))
    assert lists(batch)["labels"] == [[-100, 6, 0, -100, 8, 0, -100, -100]]
    assert lists(batch)["position_ids"] == [[0, 1, 2, 0, 1, 2, 0, 0]]
    plain = PackedCollator(EOS, intra_document_masking=False)(features(row))
    assert lists(plain)["labels"] == [[-100, 6, 0, 7, 8, 0, -100, -100]]


# The collator


def test_the_collator_restarts_positions_and_leaves_first_tokens_out():
    batch = PackedCollator(EOS, cu_seq_lens=True)(features([5, 6, 7, EOS, 8, 9], [EOS, 4, EOS, EOS, 3, 2]))
    assert lists(batch) == {
        "input_ids": [[5, 6, 7, 0, 8, 9], [0, 4, 0, 0, 3, 2]],
        "labels": [[-100, 6, 7, 0, -100, 9], [-100, -100, 0, -100, -100, 2]],
        "position_ids": [[0, 1, 2, 3, 0, 1], [0, 0, 1, 0, 0, 1]],
        "cu_seq_lens_q": [0, 4, 6, 7, 9, 10, 12],
        "cu_seq_lens_k": [0, 4, 6, 7, 9, 10, 12],
        "max_length_q": 6,
        "max_length_k": 6,
    }
    assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and type(batch["max_length_q"]) is int


def test_without_intra_document_masking_rows_are_plain_causal():
    batch = PackedCollator(EOS, intra_document_masking=False)(features([5, EOS, 8, 9]))
    assert lists(batch) == {"input_ids": [[5, 0, 8, 9]], "labels": [[-100, 0, 8, 9]]}


def test_eos_is_a_training_target():
    labels = PackedCollator(EOS)(features([5, 6, EOS, 8, EOS, 7]))["labels"][0]
    assert labels[2] == EOS and labels[4] == EOS


@pytest.mark.parametrize("masking", [True, False])
def test_the_collator_never_emits_an_attention_mask(masking):
    assert "attention_mask" not in PackedCollator(EOS, masking, cu_seq_lens=True)(features([5, EOS, 6, 7]))


@settings(deadline=None)
@given(st.integers(1, 3).flatmap(lambda b: st.integers(2, 9).map(lambda s: (b, s))), st.data())
def test_boundaries_agree_with_a_walk_over_the_tokens(shape, data):
    rows = [[data.draw(st.integers(0, 2)) for _ in range(shape[1])] for _ in range(shape[0])]
    batch = lists(PackedCollator(EOS, cu_seq_lens=True)(features(*rows)))
    bounds, positions = [], []
    for row in rows:
        for column, _ in enumerate(row):
            if column == 0 or row[column - 1] == EOS:
                bounds.append(len(positions))
            positions.append(len(positions) - bounds[-1])
    bounds.append(len(positions))
    assert np.ravel(batch["position_ids"]).tolist() == positions
    assert batch["cu_seq_lens_q"] == batch["cu_seq_lens_k"] == bounds
    assert batch["max_length_q"] == batch["max_length_k"] == shape[1] > max(positions)
    flat = zip(np.ravel(rows).tolist(), positions, strict=True)
    assert np.ravel(batch["labels"]).tolist() == [token if position else -100 for token, position in flat]


def test_the_collator_takes_lists_arrays_and_tensors_and_pickles():
    collator = pickle.loads(pickle.dumps(PackedCollator(EOS, cu_seq_lens=True)))
    rows = [[5, 6, EOS, 8], [4, EOS, 3, 2]]
    kinds = [rows, [np.array(row) for row in rows], [torch.tensor(row) for row in rows]]
    batches = [lists(collator([{"input_ids": row} for row in kind])) for kind in kinds]
    assert batches[0] == batches[1] == batches[2]


def test_a_worker_outlives_the_launchers_signals():
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    rows = features(*[[5, 6, EOS, 8]] * 64)
    loader = iter(DataLoader(rows, num_workers=1, collate_fn=PackedCollator(EOS)))
    next(loader)
    for number in signals:
        os.kill(loader._workers[0].pid, number)
    assert sum(1 for _ in loader) == 63
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # the trainer's own process is left alone
    assert signal.getsignal(signal.SIGTERM) is before


# Attention


DOCUMENTS = [[5, 6, 7, 8, 9, EOS], [10, 11, 12, EOS], [13, 14, 15, 16, 17, EOS], [18, 19, 20, 21, 22, 23, 24, EOS]]
DOCUMENTS += [[25, 26, EOS], [27, 28, 29, 30, EOS]]
ROWS = pack_blocks(DOCUMENTS, 16)  # two rows, a document's end at the end of each
COLLATORS = {"positions": PackedCollator(EOS), "and cu_seq_lens": PackedCollator(EOS, cu_seq_lens=True)}


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return tiny_llama(request.param)


def tiny_llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,  # attention far from uniform, so a leak is large
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


def forward(model, collator, rows):
    return model(**collator(features(*rows)), use_cache=False)


def largest_leak(model, collator, rows) -> tuple[float, float]:
    """Change one document's ids; return the largest change of another's logits, and of its own."""
    logits = forward(model, collator, rows).logits
    leak, effect = 0.0, 0.0
    starts = PackedCollator(EOS)(features(*rows))["position_ids"] == 0
    document = starts.flatten().cumsum(0).reshape(starts.shape)
    for number in document.unique():
        inside = document == number
        changed = np.where(inside.numpy() & (rows != EOS), 47 - rows, rows)
        difference = (forward(model, collator, changed).logits - logits).abs().amax(-1)
        leak = max(leak, difference[~inside].max().item())
        effect = max(effect, difference[inside].max().item())
    return leak, effect


@pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS)
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one row", "two rows"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training with checkpointing"])
def test_changing_one_document_moves_no_logit_of_another(model, rows, training, collator):
    if training:
        model.train()
        model.gradient_checkpointing_enable()
    leak, effect = largest_leak(model, collator, rows)
    assert leak < 1e-5 and effect > 0.5


def test_without_masking_a_document_does_leak_into_the_next(model):
    leak, _ = largest_leak(model, PackedCollator(EOS, intra_document_masking=False), ROWS)
    assert leak > 0.5


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training with checkpointing"])
def test_packed_loss_is_the_documents_own(model, training):
    if training:
        model.train()
        model.gradient_checkpointing_enable()
    labels = PackedCollator(EOS)(features(*ROWS))["labels"]
    packed = forward(model, PackedCollator(EOS), ROWS).loss * (labels != -100).sum()
    own = 0.0
    for document in DOCUMENTS:
        ids = torch.tensor([document])
        own += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * (len(document) - 1)
    assert packed.item() == pytest.approx(own, rel=1e-5)
    unmasked = forward(model, PackedCollator(EOS, intra_document_masking=False), ROWS).loss * (ROWS.size - len(ROWS))
    assert abs(unmasked.item() - own) > 1


def causal_attention(query, key, value, scale):
    """Causal attention over [S, heads, head size]; the reference for the emulated kernels."""
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@pytest.fixture
def flash_attention_2(monkeypatch):
    """A tiny Llama on transformers' real flash-attention 2 path, its two kernels emulated; and their calls by name."""
    calls = []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
    ):
        calls.append("rows")
        assert causal
        return torch.stack([causal_attention(*row, softmax_scale) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        calls.append("varlen")
        assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q)
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) <= max_seqlen_q == max_seqlen_k and type(max_seqlen_q) is int
        documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*document, softmax_scale) for document in documents])

    utils = modeling_flash_attention_utils
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(utils, name, None)  # given back after the test
    kernels = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: kernels)
    model = tiny_llama("sdpa")
    model.config._attn_implementation = "flash_attention_2"  # past the check that the package is installed
    return model, calls


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one row", "two rows"])
def test_flash_attention_2_takes_the_varlen_path_and_stays_inside_documents(flash_attention_2, rows):
    model, calls = flash_attention_2
    collator = PackedCollator(EOS, cu_seq_lens=True)
    logits = forward(model, collator, rows).logits
    assert calls == ["varlen"] * 2  # once a layer
    torch.testing.assert_close(
        logits, forward(tiny_llama("eager"), PackedCollator(EOS), rows).logits, atol=1e-4, rtol=1e-4
    )
    leak, effect = largest_leak(model, collator, rows)
    assert leak < 1e-5 and effect > 0.5 and set(calls) == {"varlen"}


def test_flash_attention_2_leaks_with_position_ids_alone(flash_attention_2):
    model, calls = flash_attention_2
    leak, _ = largest_leak(model, PackedCollator(EOS), ROWS)  # why cu_seq_lens exists
    assert leak > 0.5 and set(calls) == {"rows"}


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 46), min_size=1, max_size=12).map(lambda ids: [*ids, EOS]), min_size=4, max_size=9)
)
def test_random_documents_keep_to_themselves(documents):
    rows = pack_blocks([*documents, [1] * 8], 8)
    with torch.no_grad():
        leak, _ = largest_leak(tiny_llama("sdpa"), PackedCollator(EOS), rows)
    assert leak < 1e-5
