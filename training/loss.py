"""The training loss without the full logits.

At vocabulary 49152 the logits are the largest activation of every SmolLM2: 8 x 512 tokens are 0.8 GB in fp32, and
the model's own loss holds them about four times. Here they live one chunk at a time, and because the loss is the last
operation, each chunk's gradient is computed with it, as Liger's fused linear cross-entropy does on CUDA (Hsu et al.
2024, arXiv 2410.10989); nothing is computed twice.
"""

from functools import cache

import torch
from torch.nn.functional import linear, pad

from . import attention, terms

IGNORE = -100
CHUNK_LOGITS = 2**25  # 128 MiB in fp32: small beside a model, large enough for a full-speed product
GPU_SHARE = 40  # a chunk takes a fortieth of a GPU's memory: 2 GB of 80, 10,000 tokens at SmolLM2's vocabulary
GPU_LOGIT_BYTES = 4  # the logit and its gradient, both bfloat16; what is between them stays in registers


def default_chunk(vocab_size, gpu_bytes=None):
    """Tokens a chunk: their logits fill CHUNK_LOGITS, or a GPU_SHARE of a GPU's memory, rounded to a power of two."""
    logits = CHUNK_LOGITS if gpu_bytes is None else gpu_bytes // GPU_SHARE // GPU_LOGIT_BYTES
    tokens = max(1, logits // vocab_size)
    return tokens if gpu_bytes is None else 2 ** (tokens.bit_length() - 1)


def _chunk_in_place(rows, weight, target, z_loss, need_gradient):
    """One chunk with one buffer of logits.

    Returns:
        Sum of the cross-entropies, sum of the squares of log Z, and the gradient of the logits in weight's dtype (None
        unless needed).
    """
    kept = target != IGNORE
    at = target.where(kept, 0).unsqueeze(1)
    logits = linear(rows, weight).float()  # [C, V], the only logits there are
    largest = logits.amax(dim=1, keepdim=True)
    picked = logits.gather(1, at) - largest
    logits.sub_(largest).exp_()
    normalizer = logits.sum(dim=1, keepdim=True)
    total = (normalizer.log() - picked).squeeze(1).where(kept, 0).sum()
    log_z = normalizer.log() + largest
    squares = log_z.square().squeeze(1).where(kept, 0).sum()
    if not need_gradient:
        return total, squares, None
    # softmax, its multiple for the z-loss (log Z's gradient is softmax), nothing where nothing is a target
    logits.mul_(kept.unsqueeze(1) * (1 + 2 * z_loss * log_z) / normalizer)
    logits.scatter_add_(1, at, -kept.unsqueeze(1).float())
    return total, squares, logits.to(weight.dtype)


def _chunk_out_of_place(rows, weight, target, z_loss):
    """The same to be compiled: two passes over 16-bit logits, between which nothing is written."""
    kept = target != IGNORE
    at = target.where(kept, 0).unsqueeze(1)
    logits = linear(rows, weight).float()
    log_z = logits.logsumexp(dim=1, keepdim=True)
    total = (log_z - logits.gather(1, at)).squeeze(1).where(kept, 0).sum()
    squares = log_z.square().squeeze(1).where(kept, 0).sum()
    hit = torch.arange(weight.shape[0], device=weight.device) == at
    gradient = (logits - log_z).exp() * (1 + 2 * z_loss * log_z) - hit.float()
    return total, squares, (gradient * kept.unsqueeze(1)).to(weight.dtype)


@cache
def _compiled_chunk():
    return torch.compile(_chunk_out_of_place, dynamic=False)  # here: it imports torch's compiler, a second


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of `hidden @ weight.T` against targets, in nats, and of the squares of log Z.

    The gradient is that of the first plus z_loss times the second.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_tokens, z_loss, compiled):
        # hidden [N, H] and weight [V, H] in the compute dtype, targets [N]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        need, size = need_hidden or need_weight, hidden.shape[0]
        total, squares = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2))
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        step = -(-size // -(-size // chunk_tokens))  # chunks of one size, or a compiled one would be compiled twice
        for start in range(0, size, step):
            rows, target = hidden[start : start + step], targets[start : start + step]
            if compiled and need:
                found = _compiled_chunk()(rows, weight, target, z_loss)
            else:
                found = _chunk_in_place(rows, weight, target, z_loss, need)
            total += found[0]
            squares += found[1]
            if need_hidden:
                grad_hidden[start : start + step] = found[2] @ weight
            if need_weight:
                grad_weight += found[2].T @ rows
            del found  # or the next chunk's logits would stand beside these: 200 MiB at vocabulary 49152
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(squares)
        return total, squares

    @staticmethod
    def backward(ctx, grad_total, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def linear_cross_entropy(
    hidden,
    weight,
    labels,
    chunk_tokens,
    num_items_in_batch=None,
    shift_labels=None,
    z_loss=0.0,
    note=None,
    compiled=False,
):
    """Next-token cross-entropy from the last hidden states.

    Args:
        hidden: [B, S, H].
        weight: [V, H], the head's.
        labels: [B, S], -100 where nothing is predicted; label s is the target of position s - 1.
        chunk_tokens: Positions whose logits exist at one time.
        num_items_in_batch: Targets over all micro-batches and ranks; None divides by the targets here.
        shift_labels: [B, S] targets already shifted, as some collators give them.
        z_loss: Coefficient of the square of log Z, Z the softmax's normalizer (PaLM, arXiv 2204.02311, section 5).
        note: Called with "z_loss" and that of these targets, normalized as the cross-entropy is.
        compiled: Compile the inside of a chunk, as CUDA runs do: two kernels where eager has a dozen.

    Returns:
        Scalar, nats: the sum over targets divided by num_items_in_batch. Equal to transformers' ForCausalLMLoss
        to 1e-5 relative in fp32. The z-loss is in its gradient and not in its value, which stays a cross-entropy.
    """
    targets = pad(labels, (0, 1), value=IGNORE)[..., 1:] if shift_labels is None else shift_labels
    device = hidden.device.type
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # or their gradients would be made, and thrown away
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        total, squares = _LinearCrossEntropy.apply(
            hidden.flatten(0, -2), weight, targets.flatten().to(hidden.device), chunk_tokens, z_loss, compiled
        )
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORE).sum()
    if note is not None and z_loss and torch.is_grad_enabled():
        note("z_loss", z_loss * squares / num_items_in_batch)
    return total / num_items_in_batch


def install_chunked_loss(model, chunk_tokens, z_loss=0.0, compiled=False):
    """Make model(labels=...) take its loss in chunks; without labels (generation) nothing changes.

    The head hands its input through, and the model's own loss_function receives hidden states. The loss on a few
    tokens is compared with the model's own before it is trusted: a model that scales, caps or biases its logits
    keeps its own loss.

    Returns:
        None where installed, with `model.terms`, which the z-loss is added to; else the reason why not, in words.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        return "its head is not a plain linear layer"
    probe = torch.arange(1, 9, device=head.weight.device).unsqueeze(0) % model.config.vocab_size
    probe = {"input_ids": probe, "labels": probe, "use_cache": False}
    was_training = model.training
    with torch.no_grad(), attention.portable(model):
        expected = model.eval()(**probe).loss
    model.terms = terms.Terms()
    plain_head, plain_loss, active = head.forward, model.loss_function, [False]

    def head_forward(hidden):
        return hidden if active[0] else plain_head(hidden)

    def loss_function(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **kwargs):
        if not active[0]:
            return plain_loss(logits, labels, vocab_size, num_items_in_batch, shift_labels=shift_labels, **kwargs)
        given = (num_items_in_batch, shift_labels, z_loss, model.terms.add, compiled)
        return linear_cross_entropy(logits, head.weight, labels, chunk_tokens, *given)

    def before(module, args, kwargs):
        active[0] = kwargs.get("labels") is not None

    def after(module, args, output):
        if active[0] and hasattr(output, "logits"):
            output.logits = None  # they were never built; hidden states must not pass for them
        active[0] = False

    hooks = model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)
    head.forward, model.loss_function = head_forward, loss_function
    with torch.no_grad(), attention.portable(model):
        found = model(**probe).loss
    model.train(was_training)
    if torch.allclose(found, expected, rtol=1e-4):
        return None
    for hook in hooks:
        hook.remove()
    head.forward, model.loss_function = plain_head, plain_loss
    return f"the loss in chunks is {found.item():.4f} and its own {expected.item():.4f}"


def choose(model, chunk_tokens, z_loss, refused, device=None, compiled=False):
    """Install the loss in chunks where it can be had, and return the sentence that says which loss it is.

    Args:
        chunk_tokens: None takes `default_chunk`, 0 asks for the model's own loss.
        refused: Why the loss in chunks cannot be had, or None.
        device: What it trains on; a GPU's memory sets the default chunk.
        compiled: See linear_cross_entropy.

    Raises:
        ValueError: z_loss is asked for, which the model's own loss has not.
    """
    gpu_bytes = torch.cuda.get_device_properties(device).total_memory if device and device.type == "cuda" else None
    chunk = default_chunk(model.config.vocab_size, gpu_bytes) if chunk_tokens is None else chunk_tokens
    refused = refused or ("as asked" if not chunk else install_chunked_loss(model, chunk, z_loss, compiled))
    if refused and z_loss:
        raise ValueError(f"z_loss = {z_loss} is part of the loss in chunks, which cannot be had: {refused}.")
    if refused:
        return f"loss: the model's own ({refused})."
    return f"loss: in chunks of {chunk} tokens{', compiled inside' if compiled else ''}."
