"""Which attention kernel a run takes: what the machine truly has, in the order that measuring gave (docs, one H100).

Two of them are made known to transformers here, and need no package. `varlen` is torch's own flash-attention 2 over
documents of different lengths (torch 2.11 and later). `sdpa_documents` is torch's causal attention, for which Hopper
has cuDNN's kernel, with each document's number in more dimensions of query and key. Neither name is written into a
saved config: transformers leaves the attention out.
"""

import inspect
from contextlib import contextmanager
from functools import partial

import torch
from transformers import AttentionInterface, utils

from smolpretrain.core import upstream

ORDER = ("flash_attention_4", "flash_attention_3", "varlen", "flash_attention_2", "sdpa", "eager")
FLASH = {  # compute capabilities, whether transformers finds it, and what would install it
    "flash_attention_4": ((9, 10), utils.is_flash_attn_4_available, "pip install --pre flash-attn-4"),
    "flash_attention_3": ((9,), utils.is_flash_attn_3_available, "built from flash-attention's folder hopper"),
    "flash_attention_2": (range(8, 99), utils.is_flash_attn_2_available, "pip install --no-build-isolation flash-attn"),
}
APART = 32.0  # a code's entries: documents that differ in one bit lose 2 x 32^2 of q k, 256 at heads of 64
CODE_MULTIPLE, PAD_VALUE = 8, False  # what query and key grow by, and whether value grows with them
CUDNN_SPOILS = 64  # S % 128 at which cuDNN's masked backward gives NaN on Hopper (pytorch#196678)


def takes_bounds(name):
    """Whether a kernel must be told where documents begin (cu_seq_lens): side by side it looks at no position_ids."""
    return name == "varlen" or name.startswith("flash_attention")


def _kernel():
    """torch's varlen_attn with what makes it causal; None where this torch has none.

    torch 2.11 to 2.13 say causal by window_size=(-1, 0), and take fewer KV heads as they are unless the signature
    has enable_gqa.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return (
        partial(varlen_attn, **{"enable_gqa": True} if "enable_gqa" in known else {})
        if "window_size" in known
        else None
    )


def varlen(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs):
    """Attention inside each document, as transformers' AttentionInterface asks for it.

    Args:
        query, key, value: [B, heads, S, head size]; under autocast rotary embedding leaves query and key in float32,
            which the kernel does not take.
        cu_seq_lens_q: int32, where documents begin in the flattened B * S, as PackedCollator gives it.
        max_length_q: Tokens of the longest document, or more.

    Returns:
        ([B, S, heads, head size], None).

    Raises:
        ValueError: No boundaries, without which documents side by side would see one another; or the model asks for
            what the kernel does not do.
    """
    if cu_seq_lens_q is None:
        raise ValueError("attn_implementation = varlen needs cu_seq_lens_q and max_length_q from the collator.")
    if beyond := [name for name in ("softcap", "s_aux", "sliding_window") if kwargs.get(name) is not None]:
        raise ValueError(f"attn_implementation = varlen has no {beyond[0]}, which this model asks for: set it to auto.")
    batch, heads, length, size = query.shape
    flat = [x.transpose(1, 2).reshape(batch * length, x.shape[1], size).to(value.dtype) for x in (query, key, value)]
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    out = _kernel()(*flat, *bounds, scale=scaling, window_size=(-1, 0))
    return out.view(batch, length, heads, size), None


def document_codes(position_ids, dtype):
    """Codes whose product is 0 inside a document and at most -2 APART^2 between two: ([B, 1, S, C], [B, 1, S, C]).

    A document's number in the row in bits of +-1, and one entry that takes their count off again; C is a multiple of
    CODE_MULTIPLE.
    """
    number = (position_ids == 0).cumsum(1)
    bits = position_ids.shape[1].bit_length()
    entry = torch.arange(-(-(bits + 1) // CODE_MULTIPLE) * CODE_MULTIPLE, device=position_ids.device)
    code = (((number[:, None, :, None] >> entry.clamp(max=bits)) & 1) * 2 - 1) * APART
    query = torch.where(entry < bits, code, torch.where(entry == bits, APART, 0.0))
    key = torch.where(entry < bits, code, torch.where(entry == bits, -bits * APART, 0.0))
    return query.to(dtype), key.to(dtype)


def sdpa_documents(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """Causal attention inside each document without a mask: what crosses a boundary scores 256 too low to count.

    Args:
        query, key, value: [B, heads, S, head size].
        position_ids: [B or 1, S], 0 at the first token of each document.

    Returns:
        ([B, S, heads, head size], None).

    Raises:
        ValueError: No positions, or a cache.
    """
    batch, _, length, size = query.shape
    if position_ids is None or key.shape[2] != length:
        raise ValueError("attn_implementation = sdpa_documents needs position_ids of whole rows, and no cache.")
    codes = document_codes(position_ids.expand(batch, -1), value.dtype)
    query, key = (
        torch.cat((x.to(value.dtype), code.expand(-1, x.shape[1], -1, -1)), dim=-1)
        for x, code in zip((query, key), codes, strict=True)
    )
    if PAD_VALUE:
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - size))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=size**-0.5 if scaling is None else scaling, enable_gqa=True
    )
    return out[..., :size].transpose(1, 2), None


AttentionInterface.register("varlen", varlen)
AttentionInterface.register("sdpa_documents", sdpa_documents)


def missing(name, device, config, half=True):
    """Why an attention cannot be had here, in words; None where it can.

    Args:
        half: Whether the run computes in 16 bits, which every flash kernel asks for.
    """
    network = upstream.model_class(config)
    kinds = upstream.attention_kinds(network)
    kind = "any" if name in ("varlen", "sdpa_documents") else name if name in kinds else "flash"
    if not kinds[kind]:
        return f"{network.__name__} does not have it"
    if name in ("sdpa", "eager"):
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if name == "flex_attention":
        return None
    if name == "sdpa_documents":
        return _beyond(config) if half else "it computes in 16 bits, and bf16 = false"
    capability = torch.cuda.get_device_capability(device)
    allowed, installed, how = FLASH.get(name, (range(8, 99), lambda: _kernel() is not None, "pip install torch>=2.11"))
    if not installed():
        return f"{name.replace('_attention_', '-attn ')} is not installed ({how})"
    if capability[0] not in allowed:
        return f"this device's compute capability is {capability[0]}.{capability[1]}"
    if not half:
        return "it computes in 16 bits, and bf16 = false"
    return _beyond(config) if name == "varlen" else None


def _beyond(config):
    """What of an architecture the two kernels of this file do not do, in words, or None."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if size % 8 or size > 256:
        return f"its heads of {size} are no multiple of 8 up to 256"
    if getattr(text, "attention_dropout", 0.0):
        return f"it has no dropout, and attention_dropout = {text.attention_dropout}"
    for name in ("attn_logit_softcapping", "v_head_dim", "qk_nope_head_dim", "sliding_window"):
        if getattr(text, name, None):
            return f"it does not do the architecture's {name}"
    return None


def choose(asked, device, config, half=True):
    """The attention implementation and the reason, in words.

    Raises:
        ValueError: What is asked for cannot be had, here or with this architecture.
    """
    if asked != "auto":
        if why := missing(asked, device, config, half):
            raise ValueError(f"attn_implementation = {asked} cannot be had: {why}. Set it to auto.")
        return asked, "as asked"
    passed = []
    for name in ORDER:
        why = missing(name, device, config, half)
        if why is None:
            reason = f"no {passed[0]}" if len(passed) == 1 else "the fastest there is"
            return name, reason if device.type == "cuda" else f"device {device.type}"
        passed.append(f"{name}: {why}")
    raise AssertionError("eager can always be had")


def settle(name, device, block_size, masked):
    """Keep cuDNN from a backward that gives NaN: masked sdpa, rows of 64 more than a multiple of 128, on CUDA.

    Returns:
        A sentence where it was kept from it, else None.
    """
    if name != "sdpa" or device.type != "cuda" or not masked or block_size % 128 != CUDNN_SPOILS:
        return None
    torch.backends.cuda.enable_cudnn_sdp(False)
    return f"attention: cuDNN's is left out, whose backward gives NaN at block_size = {block_size} (pytorch#196678)."


@contextmanager
def portable(network):
    """Inside, the network attends by what every device and dtype has: the flash kernels take no CPU tensors, no fp32,
    and no generation with a cache."""
    kept = upstream.attention_of(network.config)
    if kept not in ("sdpa", "eager"):
        has_sdpa = upstream.attention_kinds(type(network))["sdpa"]
        upstream.set_attention(network.config, "sdpa" if has_sdpa else "eager")
    try:
        yield
    finally:
        upstream.set_attention(network.config, kept)
