"""What share of its peak this CPU reaches with a model: the parts of a step, measured at the model's own shapes.

A small model's step is not bound by matrix products, so one share for all sizes would be wrong by a factor of three
(benchmarks/plan_time.py): attention, the loss and the norms have rates of their own, and the products' depend on
their shapes. One thread measures, in seconds of the CPU: shares are wanted, not rates, and on the clock of the wall
several threads stall each other for tenths of a second where other programs want the same cores.
"""

import contextlib
import time

from . import counting, hardware

ENOUGH, CALLS = 0.04, 5  # seconds of repetitions for a part, and the fewest of them on a busy machine
PRODUCTS, LOGITS = 2**32, 2**24  # at one time: 3 ms at 2.6 TFLOPS; 64 MiB, which glibc maps anew as it does a chunk
# A real step over the sum of its parts: rotary embeddings, casts, residuals, dispatch and Trainer are in no part.
# Lowest, taken by default, highest: 1.37 to 1.59 from 1M to 44M parameters, one thread of an Intel Xeon with AMX
# (benchmarks/plan_time.py).
OVERHEAD = (1.3, 1.5, 1.7)


def utilization(config, setup):
    """(lowest, default, highest, source) of the model FLOPs utilization on this CPU.

    Args:
        config: The model's config as a dict.
        setup: memory.Setup of the run.
    """
    reached = of_parts(config, setup)
    low, middle, high = (reached / overhead for overhead in reversed(OVERHEAD))
    source = f"{reached:.1%} by the parts of a step, measured here at the model's shapes; a real step took "
    return low, middle, high, source + f"{OVERHEAD[0]:g} to {OVERHEAD[2]:g} times as long (benchmarks/plan_time.py)"


def of_parts(config, setup):
    """Utilization of a step that has nothing but its parts."""
    with _one_thread():
        work = counting.flops_per_token(config, setup.block_size) * _tokens(setup)
        return work / hardware.product_rate(0.1, time.process_time) / sum(parts(config, setup).values())


@contextlib.contextmanager
def _one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tokens(setup):
    return setup.micro_batch * setup.block_size


def parts(config, setup):
    """{part: seconds} of a micro-batch's forward and backward, and of its share of the optimizer's step."""
    import torch

    dtype = torch.bfloat16 if setup.bf16 else torch.float32
    layers, (heads, _, size) = config["num_hidden_layers"], counting.heads_of(config)
    tokens, hidden = _tokens(setup), config["hidden_size"]
    forwards = 2 if setup.checkpointing else 1
    _, used, _, _ = counting.experts_of(config)
    found = {"products": 0.0}
    for tensor in counting.weights(config):
        if len(tensor.shape) > 1 and tensor.part not in ("embedding", "head"):
            each = used if tensor.part == "experts" else 1  # [experts, out, in]: a token passes through `used` of them
            found["products"] += each * tensor.count * _products(torch, dtype, tokens, tensor.shape[-2:], forwards)
    inner = config["intermediate_size"] * max(1, used)
    return found | {
        "attention": layers * setup.micro_batch * _attention(torch, dtype, heads, setup.block_size, size, forwards),
        "loss": _loss(torch, dtype, tokens, hidden, config["vocab_size"], setup.loss == "plain"),
        "norms": (2 * layers * (1 + forwards) / 2 + 1) * _norm(torch, tokens, hidden),
        "activation": layers * (1 + forwards) / 2 * _activation(torch, dtype, tokens, inner),
        "optimizer": _optimizer(torch, counting.count(config).total) / setup.accumulation,
    }


def _best(work):
    """Seconds of the fastest of several calls, the first left out."""
    work()
    seconds, began = [], time.process_time()
    while (spent := time.process_time() - began) < ENOUGH or (len(seconds) < CALLS and spent < CALLS * ENOUGH):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def _products(torch, dtype, tokens, shape, forwards):
    """A linear layer's output, and the gradients of its input and its weight."""
    few = max(1, min(tokens, PRODUCTS // (shape[0] * shape[1])))
    weight = torch.randn(shape, dtype=dtype)
    rows, grads = torch.randn(few, shape[1], dtype=dtype), torch.randn(few, shape[0], dtype=dtype)
    forward, inputs = _best(lambda: rows @ weight.T), _best(lambda: grads @ weight)
    return tokens / few * (forwards * forward + inputs + _best(lambda: grads.T @ rows))


def _attention(torch, dtype, heads, block, size, forwards):
    """One row, under a mask, as packed rows have it."""
    shape = (1, heads, block, size)
    query, key, value = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3))
    mask, grad = torch.ones(1, 1, block, block, dtype=torch.bool).tril(), torch.ones(shape, dtype=dtype)

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    both = _best(lambda: forward().backward(grad))
    return both + (_best(forward) if forwards > 1 else 0)


def _loss(torch, dtype, tokens, hidden, vocabulary, plain):
    """The head and its cross-entropy in float32, forward and backward: the model's own, or as the loss in chunks."""
    few = max(1, min(tokens, LOGITS // vocabulary))
    rows = torch.randn(few, hidden, dtype=dtype).requires_grad_(plain)
    weight = torch.randn(vocabulary, hidden, dtype=dtype) * hidden**-0.5  # larger logits' exponentials are denormal
    weight.requires_grad_(plain)
    targets = torch.zeros(few, dtype=torch.long)

    def own():
        logits = torch.nn.functional.linear(rows, weight).float()
        torch.nn.functional.cross_entropy(logits, targets).backward()

    def in_a_chunk():
        logits = torch.nn.functional.linear(rows, weight).float()
        logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
        grad = logits.mul_(1 / logits.sum(dim=1, keepdim=True)).to(dtype)
        return grad @ weight, grad.T @ rows

    return tokens / few * _best(own if plain else in_a_chunk)


def _norm(torch, tokens, hidden):
    rows, weight = torch.randn(tokens, hidden).requires_grad_(), torch.ones(hidden).requires_grad_()
    grad = torch.ones(tokens, hidden)
    return _best(lambda: (weight * (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-5))).backward(grad))


def _activation(torch, dtype, tokens, inner):
    gate, up = (torch.randn(tokens, inner, dtype=dtype).requires_grad_() for _ in range(2))
    grad = torch.ones(tokens, inner, dtype=dtype)
    return _best(lambda: (torch.nn.functional.silu(gate) * up).backward(grad))


def _optimizer(torch, parameters):
    few = min(parameters, LOGITS // 4)
    weight = torch.nn.Parameter(torch.zeros(few))
    weight.grad = torch.zeros(few)
    return parameters / few * _best(torch.optim.AdamW([weight], fused=True).step)
