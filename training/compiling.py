"""What makes a step fast on a GPU and changes nothing else: each layer compiled, the residual stream in 16 bits.

Layers are compiled one by one: they share one graph, so that the first step comes 13 s later and not 80 (SmolLM2-135M
on an H100). The whole model, by torch_compile=true, was not timed beside them in one run.
"""

import os
import shutil
import sys
from contextlib import nullcontext

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from smolpretrain.core import upstream

from . import attention, experts, loss


def settle(network, args, data_args, zero3, refused):
    """Give a network its loss and, on CUDA, what makes it fast; all before Trainer takes it.

    Args:
        refused: Why the loss in chunks cannot be had, or None.

    Returns:
        Sentences that say what was chosen.

    Raises:
        ValueError: See loss.choose.
    """
    cuda, kernel = args.device.type == "cuda", upstream.attention_of(network.config)
    compiled, why = choose(args.torch_compile, args.device, network, zero3)
    inside = compiled or bool(args.torch_compile and cuda)
    said = [
        attention.settle(kernel, args.device, data_args.block_size, data_args.intra_document_masking),
        loss.choose(network, args.loss_chunk_tokens, args.z_loss, refused, args.device, inside),
    ]
    if compiled:
        compile_layers(network)
    if cuda:
        said.append(f"compiled: {'yes' if compiled else 'no'} ({why}).")
    if cuda and args.bf16 and not args.deepspeed and not experts.Experts.of(network):
        half_stream(network)
    return [sentence for sentence in said if sentence]


def layers_of(network):
    """Modules that are compiled one by one: transformers' decoder layers, and the norm after them."""
    base = getattr(network, network.base_model_prefix, network)
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    return layers + [norm for norm in (getattr(base, "norm", None),) if layers and norm is not None]


def choose(asked, device, network, zero3):
    """Whether layers are compiled one by one, and the reason in words.

    Args:
        asked: torch_compile: None decides here; true has Trainer compile the whole model, false nothing.
    """
    if asked is not None:
        return False, "the whole model is, as asked" if asked else "as asked"
    if device.type != "cuda":
        return False, f"device {device.type}"
    if zero3:
        return False, "ZeRO-3 gathers each layer's weights as it runs"
    if not (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        return False, "there is no C compiler, which torch's kernels are bound with"
    if not upstream.has_triton():
        return False, "triton does not work here"
    if not layers_of(network):
        return False, f"{type(network).__name__} has no layers that transformers knows"
    return True, "each layer by itself; torch_compile=false leaves it out"


def compile_layers(network):
    """Compile each layer in place: names of weights, checkpoints and hooks stay as they are."""
    for module in layers_of(network):
        module.compile()


def mark_lengths(inputs):
    """Tell the compiler that the number of documents changes from batch to batch, or it would compile a second time."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in inputs:
            upstream.mark_dynamic(inputs[name], 0)


def eager():
    """A context in which nothing is compiled: for shapes that come once, as in evaluations and samples."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def half_stream(network):
    """Under autocast, begin the residual stream in its dtype: float32 weights would keep it, and each sum, in float32.

    With DeepSpeed the weights are bfloat16 and so is the stream. A mixture's router keeps what it has.
    """

    def cast(module, args, output):
        device = output.device.type
        return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output

    network.get_input_embeddings().register_forward_hook(cast)
