"""Which attention a run takes, and torch's varlen kernel inside documents: on the CPU with a stand-in kernel."""

import json

import numpy as np
import pytest
import torch
from test_packing import EOS, ROWS, features, forward, largest_leak, tiny_llama
from transformers import BloomConfig, Gemma2Config, LlamaConfig

from smolpretrain.data.collator import PackedCollator
from smolpretrain.training import attention, compiling, loss, model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BOUNDS = PackedCollator(EOS, cu_seq_lens=True)


def kernel(query, key, value, bounds, _, longest, __, *, scale, window_size):
    """torch.nn.attention.varlen.varlen_attn on [tokens, heads, size], without a GPU."""
    assert window_size == (-1, 0) and bounds.dtype == torch.int32 and query.dtype == key.dtype == value.dtype
    at = torch.arange(query.shape[0])
    document = torch.bucketize(at, bounds, right=True)
    seen = (document[:, None] == document) & (at[:, None] >= at)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@pytest.fixture
def varlen(monkeypatch):
    """A tiny Llama that attends by `varlen`."""
    monkeypatch.setattr(attention, "_kernel", lambda: kernel)
    network = tiny_llama("sdpa")
    network.config._attn_implementation = "varlen"
    return network


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one row", "two rows"])
def test_varlen_stays_inside_documents_and_has_the_logits_of_eager(varlen, rows):
    expected = forward(tiny_llama("eager"), PackedCollator(EOS), rows).logits
    torch.testing.assert_close(forward(varlen, BOUNDS, rows).logits, expected, atol=1e-4, rtol=1e-4)
    leak, effect = largest_leak(varlen, BOUNDS, rows)
    assert leak < 1e-5 and effect > 0.5


def test_varlen_without_masking_is_plain_causal_and_keeps_rows_apart(varlen):
    plain = PackedCollator(EOS, intra_document_masking=False)
    bounded = PackedCollator(EOS, intra_document_masking=False, cu_seq_lens=True)
    expected = forward(tiny_llama("eager"), plain, ROWS).logits
    torch.testing.assert_close(forward(varlen, bounded, ROWS).logits, expected, atol=1e-4, rtol=1e-4)


def test_varlen_under_autocast_takes_query_and_key_in_the_values_dtype(varlen):
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(varlen, BOUNDS, ROWS).logits.isfinite().all()  # the kernel above asserts one dtype


def test_varlen_without_boundaries_is_refused_not_run_across_documents(varlen):
    with pytest.raises(ValueError, match="varlen needs cu_seq_lens_q"):
        forward(varlen, PackedCollator(EOS), ROWS)


def test_a_softcap_that_the_kernel_does_not_do_is_refused(varlen):
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="varlen has no softcap"):
        attention.varlen(None, x, x, x, None, cu_seq_lens_q=torch.tensor([0, 2]), max_length_q=2, softcap=30.0)


def test_the_probes_and_a_generation_run_on_what_every_device_has(varlen, monkeypatch):
    monkeypatch.setattr(attention, "_kernel", lambda: pytest.fail("the kernel takes no CPU tensor"))
    model.check_masking(varlen)
    assert loss.install_chunked_loss(varlen, 16) is None
    with attention.portable(varlen):
        assert varlen.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
    assert varlen.config._attn_implementation == "varlen"


def test_a_saved_config_names_no_attention(varlen, tmp_path):
    varlen.save_pretrained(tmp_path)
    assert not [value for value in json.loads((tmp_path / "config.json").read_text()).values() if value == "varlen"]


def test_documents_of_other_lengths_compile_no_second_graph(varlen):
    """The layers of a model on the varlen path, compiled one by one, on batches with 5 to 9 documents."""
    torch._dynamo.reset()
    from torch._dynamo.utils import counters

    counters.clear()
    for module in compiling.layers_of(varlen):
        module.compile(backend="aot_eager")
    reference, seen = tiny_llama("eager"), []
    for documents in (5, 6, 7, 9):
        row = np.ones(32, dtype=np.int64)
        row[np.linspace(2, 31, documents - 1).astype(int)] = EOS
        batch = BOUNDS(features(row, row[::-1].copy()))
        compiling.mark_lengths(batch)
        logits = varlen(**batch, use_cache=False).logits
        expected = reference(**PackedCollator(EOS)(features(row, row[::-1].copy())), use_cache=False).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        seen.append(counters["stats"]["unique_graphs"])
    assert seen == [2] * 4 and not counters["graph_break"], (seen, counters["graph_break"])  # a layer's and the norm's
    with compiling.eager(), torch.no_grad():
        varlen(**BOUNDS(features(np.ones(48, dtype=np.int64))), use_cache=False)
    assert counters["stats"]["unique_graphs"] == 2


def test_layers_are_compiled_by_default_on_cuda_alone_and_where_they_can_be(monkeypatch, varlen):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert compiling.choose(None, CUDA, varlen, False)[0]
    for asked, device, zero3, why in (
        *((None, CPU, False, "device cpu"), (None, CUDA, True, "ZeRO-3 gathers each layer's weights as it runs")),
        *((False, CUDA, False, "as asked"), (True, CUDA, False, "the whole model is, as asked")),
    ):
        assert compiling.choose(asked, device, varlen, zero3) == (False, why)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in compiling.choose(None, CUDA, varlen, False)[1]


# The choice


@pytest.fixture
def device(monkeypatch):
    """A GPU with what is said to be installed; {name: bool} and its compute capability can be changed."""
    there = {"capability": (9, 0), "varlen": True}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: there["capability"])
    monkeypatch.setattr(attention, "_kernel", lambda: kernel if there["varlen"] else None)
    for name, (allowed, _, how) in attention.FLASH.items():
        entry = (allowed, lambda name=name: there.get(name, False), how)
        monkeypatch.setitem(attention.FLASH, name, entry)
    return there


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, "varlen"),
        ({"flash_attention_2": True}, "varlen"),
        ({"flash_attention_4": True}, "flash_attention_4"),  # alone it was taken for flash-attn 2, and died
        ({"flash_attention_3": True, "flash_attention_2": True}, "flash_attention_3"),
        ({"varlen": False, "flash_attention_2": True}, "flash_attention_2"),
        ({"varlen": False}, "sdpa"),
        ({"capability": (8, 0), "flash_attention_3": True, "flash_attention_4": True}, "varlen"),
        ({"capability": (7, 5), "flash_attention_2": True}, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_is_truly_there(device, there, expected):
    device |= there
    assert attention.choose("auto", CUDA, LlamaConfig())[0] == expected


def test_auto_asks_transformers_which_flash_attention_is_installed_not_find_spec():
    from transformers import utils

    for version in (2, 3, 4):
        asked = attention.FLASH[f"flash_attention_{version}"][1]
        assert asked is getattr(utils, f"is_flash_attn_{version}_available")


def test_auto_takes_no_kernel_that_the_architecture_or_the_dtype_forbids(device):
    assert attention.choose("auto", CUDA, LlamaConfig(), half=False)[0] == "sdpa"
    assert attention.choose("auto", CUDA, LlamaConfig(hidden_size=36, num_attention_heads=3))[0] == "sdpa"
    assert attention.choose("auto", CUDA, LlamaConfig(attention_dropout=0.1))[0] == "sdpa"
    assert attention.choose("auto", CUDA, BloomConfig())[0] == "eager"
    assert attention.choose("auto", CUDA, Gemma2Config())[0] == "eager"
    assert attention.choose("auto", CPU, LlamaConfig()) == ("sdpa", "device cpu")


@pytest.mark.parametrize(
    ("name", "there", "why"),
    [
        ("varlen", {"varlen": False}, r"varlen is not installed \(pip install torch>=2.11\)"),
        ("flash_attention_4", {}, r"flash-attn 4 is not installed \(pip install --pre flash-attn-4\)"),
        ("flash_attention_3", {"flash_attention_3": True, "capability": (8, 0)}, "compute capability is 8.0"),
        ("flash_attention_2", {"flash_attention_2": True, "capability": (7, 5)}, "compute capability is 7.5"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused_with_its_reason(device, name, there, why):
    device |= there
    with pytest.raises(ValueError, match=f"attn_implementation = {name} cannot be had: .*{why}.* Set it to auto"):
        attention.choose(name, CUDA, LlamaConfig())
    with pytest.raises(ValueError, match="needs a CUDA device, this is cpu"):
        attention.choose(name, CPU, LlamaConfig())


def test_cudnn_is_kept_from_rows_that_spoil_its_masked_backward(monkeypatch):
    said = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", said.append)
    assert "block_size = 576" in attention.settle("sdpa", CUDA, 576, True) and said == [False]
    for name, device, size, masked in (
        *(("varlen", CUDA, 576, True), ("sdpa", CPU, 576, True)),
        *(("sdpa", CUDA, 576, False), ("sdpa", CUDA, 640, True)),
    ):
        assert attention.settle(name, device, size, masked) is None
    assert said == [False]
