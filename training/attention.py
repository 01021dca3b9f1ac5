"""Which attention kernel a run takes: what the machine truly has, in the order that measuring gave (docs, one H100).

`varlen` is torch's own flash-attention 2 over documents of different lengths (torch 2.11 and later, no package), made
known to transformers here. Its name is not written into a saved config: transformers leaves the attention out.
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


AttentionInterface.register("varlen", varlen)


def missing(name, device, config, half=True):
    """Why an attention cannot be had here, in words; None where it can.

    Args:
        half: Whether the run computes in 16 bits, which every flash kernel asks for.
    """
    network = upstream.model_class(config)
    kinds = upstream.attention_kinds(network)
    kind = "any" if name == "varlen" else name if name in kinds else "flash"
    if not kinds[kind]:
        return f"{network.__name__} does not have it"
    if name in ("sdpa", "eager"):
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if name == "flex_attention":
        return None
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
    """What of an architecture torch's varlen kernel does not do, in words, or None."""
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
