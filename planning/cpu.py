"""What share of its peak this CPU reaches with a model: a step's parts, timed at the model's own shapes.

A small model's step is not bound by matrix products, so one share for all sizes would be wrong by a factor of three
(benchmarks/plan_time.py). A real model of one layer and one of two are trained for a moment: their difference is a
layer, what is left of the first is what surrounds the layers (embedding, mask, rotary tables). One thread measures, in
seconds of the CPU: shares are wanted, not rates, and on the clock of the wall several threads stall each other for
tenths of a second where other programs want the same cores.
"""

import contextlib
import time

from smolpretrain.core.upstream import model_class, set_attention

from . import counting, hardware

ENOUGH, CALLS = 0.1, 5  # seconds of repetitions for a part, and the fewest of them on a busy machine
LAYER, LOGITS = 2**38, 2**24  # FLOPs at one time: 0.2 s at 1.3 TFLOPS; 64 MiB, which glibc maps anew as it does a chunk
VOCABULARY = 1024  # of the timed models: the head and its loss are timed apart
# A real step over the sum of its parts: loading rows, dispatch, the loss's summing, Trainer and its callbacks are in
# none. Lowest, taken by default, highest: 0.86 to 1.35 from 1M to 44M parameters, one thread of an Intel Xeon with AMX
# (benchmarks/plan_time.py).
OVERHEAD = (0.85, 1.1, 1.35)


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
    with _no_trace():
        work = counting.flops_per_token(config, setup.block_size) * _tokens(setup)
        return work / hardware.product_rate(0.1, time.process_time) / sum(parts(config, setup).values())


@contextlib.contextmanager
def _no_trace():
    """One thread; threads and random numbers are given back as they were: a run has seeded them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def _tokens(setup):
    return setup.micro_batch * setup.block_size


def parts(config, setup):
    """{part: seconds} of a micro-batch's forward and backward, and of its share of the optimizer's step."""
    import torch

    dtype = torch.bfloat16 if setup.bf16 else torch.float32
    tokens, rows = _tokens(setup), setup.micro_batch
    layer = counting.flops_per_token(config, setup.block_size) / config["num_hidden_layers"]  # with the head: an excess
    block = max(1, min(setup.block_size, int(LAYER / layer)))
    rows = max(1, min(setup.micro_batch, int(LAYER / layer / block)))
    one, two = (_best(_layers(torch, config, setup, number, rows, block)) for number in (1, 2))
    share = tokens / (rows * block)
    return {
        "layers": config["num_hidden_layers"] * share * max(0.0, two - one),
        "around": share * max(0.0, 2 * one - two),
        "loss": _loss(torch, dtype, tokens, config["hidden_size"], config["vocab_size"], setup.loss == "plain"),
        "optimizer": _optimizer(torch, counting.count(config).total) / setup.accumulation,
    }


def _layers(torch, config, setup, layers, rows, block):
    """What trains a model of so many layers, its head left out, on `rows` packed rows of `block` tokens."""
    from transformers import AutoConfig

    fields = {name: value for name, value in config.items() if name != "layer_types"}  # it has an entry a layer
    made = AutoConfig.for_model(**fields | {"num_hidden_layers": layers, "vocab_size": VOCABULARY, "use_cache": False})
    set_attention(made, "eager" if setup.attention == "eager" else "sdpa")
    network = model_class(made)(made).train()  # not shared out under ZeRO-3
    if setup.checkpointing:
        network.activation_checkpointing_enable()
    if setup.bf16 and setup.stage is not None:
        network.bfloat16()  # DeepSpeed's weights; Trainer alone casts float32 ones
    autocast = setup.bf16 and setup.stage is None
    ids = torch.arange(rows * block).view(rows, block) % VOCABULARY
    positions = torch.arange(block).expand(rows, block) % max(1, block // 2)  # two documents a row
    positions = {"position_ids": positions} if setup.packed else {}

    def train():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = network.base_model(input_ids=ids, **positions).last_hidden_state
        hidden.backward(torch.ones_like(hidden))

    return train


def _best(work):
    """Seconds of the fastest of several calls, the first left out."""
    work()
    seconds, began = [], time.process_time()
    while (spent := time.process_time() - began) < ENOUGH or (len(seconds) < CALLS and spent < CALLS * ENOUGH):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


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


def _optimizer(torch, parameters):
    """The update with what Trainer does around it: clipping, and gradients that are made anew."""
    few = min(parameters, LOGITS // 4)
    weight = torch.nn.Parameter(torch.zeros(few))
    optimizer = torch.optim.AdamW([weight], fused=True)

    def update():
        weight.grad = torch.zeros(few)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()

    return parameters / few * _best(update)
