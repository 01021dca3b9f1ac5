"""Bytes a device holds while it trains: states to the byte, activations by formula, and the fullest moment.

States follow DeepSpeed 0.19.8, bitsandbytes 0.50.2 and training/trainer.py's groups, activations the tensors that
transformers 5.23's Llama saves for its backward; the tests walk the real ones. T stands for tokens of a micro-batch.
"""

from dataclasses import dataclass
from math import ceil

from smolpretrain.core import architectures

from . import counting

CHUNK_LOGITS, GPU_SHARE = 2**25, 40  # as training/loss.py fills a chunk, and its share of a GPU's memory
BLOCK, SMALLEST_8BIT = 256, 4096  # bitsandbytes: elements an absmax, elements below which the state stays 32-bit
QMAP = 256 * 4  # its tables of quantized values, one of signed and one of unsigned ones, held once
# What a CPU run holds besides, measured by benchmarks/plan_memory.py: the libraries' own pools and the data's buffers,
# and the float32 copies that bitsandbytes' CPU step makes of what it steps: both states, gradient, denominator and
# the quantizer's for 8 bits, gradient, denominator, its root and the update for 32. Its CUDA kernels make none.
RUNTIME, COPIES = 110 * 2**20, {8: 5, 32: 4}
MUON = "muon"
# {optim: (states an element, bits)}; a torch.optim state has a 4-byte step counter a tensor besides.
OPTIMIZERS = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), (2, 8)),
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "paged_adamw"), (2, 32)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), (1, 8)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb_32bit"), (1, 32)),
    "ademamix_8bit": (3, 8),
    "sgd": (0, 32),
    MUON: (1, 32),  # of its matrices; the rest is AdamW's
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), (2, 32)),
}


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a rank, and what it sends.

    Attributes:
        config: The model's config as a dict.
        micro_batch, accumulation, ranks: Rows a forward, forwards a step, devices.
        stage: ZeRO's, or None without DeepSpeed.
        offload: Whether master weights and optimizer state live in the host's memory.
        bucket: Elements of DeepSpeed's reduction buffer; overlap: whether there are two.
        persistent: ZeRO-3 shares out no tensor of up to so many elements.
        checkpointing: Whether layers are computed again in the backward.
        attention: sdpa, eager, or a kernel that takes documents' boundaries and needs no mask.
        packed: Whether attention stays inside a document, which costs sdpa and eager a mask.
        loss: plain, chunked or liger; chunk: tokens of a chunk.
        cuda: A GPU's allocator holds whole buffers; a CPU holds the pages that were written. It also says NCCL or gloo.
        gradient_bytes: Of a gradient on the wire.
        all_reduce: Whether ZeRO-1 and -2 reduce every gradient to all ranks, as DeepSpeed does unless told otherwise.
        reuse: Parameters ahead within which ZeRO-3 keeps what it has gathered.
    """

    config: dict
    block_size: int
    micro_batch: int = 1
    accumulation: int = 1
    ranks: int = 1
    stage: int | None = 2
    offload: bool = False
    bucket: int = 500_000_000
    overlap: bool = True
    persistent: int = 100_000
    optim: str = "adamw_bnb_8bit"
    bf16: bool = True
    checkpointing: bool = True
    attention: str = "sdpa"
    packed: bool = True
    loss: str = "chunked"
    chunk: int | None = None
    cuda: bool = True
    gradient_bytes: int = 2
    all_reduce: bool = True
    reuse: int = 10**9


def groups(setup):
    """{name: (tensors, bits of their state)} as the optimizer holds them."""
    _, bits = OPTIMIZERS.get(setup.optim, (2, 32))
    apart = ("embedding", "head") if setup.optim == MUON else ("embedding",) if bits == 8 else ()
    found = {"matrices": [], "embeddings": [], "norms": []}
    for tensor in counting.weights(setup.config):
        kind = "embeddings" if tensor.part in apart else "matrices" if tensor.decayed else "norms"
        found[kind].append(tensor)
    return {name: (tensors, bits if name == "matrices" else 32) for name, tensors in found.items() if tensors}


def partition(tensors, ranks):
    """Elements of a rank's share of a flat ZeRO-1 or ZeRO-2 group: padded so that each share is even."""
    return ceil(sum(t.numel * t.count for t in tensors) / (2 * ranks)) * 2


def shared_out(tensors, ranks):
    """Elements of a rank's shares of a ZeRO-3 group: each tensor is split by itself."""
    return sum(ceil(t.numel / ranks) * t.count for t in tensors)


def _state_bytes(optim, numel, bits):
    """Optimizer state of one tensor of numel elements, without what is held once."""
    states, _ = OPTIMIZERS[optim]
    if bits == 8 and numel >= SMALLEST_8BIT:
        return states * (numel + 4 * ceil(numel / BLOCK))
    counter = 4 if optim.startswith("adamw_torch") else 0
    return states * 4 * numel + counter


def states(setup):
    """{part: bytes} of weights, master weights, gradients and optimizer state of one rank.

    gradients are those in the compute dtype, gradients_fp32 what a step makes of them: DeepSpeed takes one group
    after the other, so the largest group's. Without DeepSpeed all are float32, and bf16 is autocast's.

    Raises:
        ValueError: An optimizer whose state is not known here.
    """
    if setup.optim not in OPTIMIZERS:
        raise ValueError(f"optim = {setup.optim}: its state is not counted; counted are {', '.join(OPTIMIZERS)}.")
    ranks, stage, grouped = setup.ranks, setup.stage, groups(setup)
    total = counting.count(setup.config).total
    if stage is None:
        each = [(t.numel, t.count, bits, name) for name, (tensors, bits) in grouped.items() for t in tensors]
    else:
        share = shared_out if stage == 3 else partition
        each = [(share(tensors, ranks), 1, bits, name) for name, (tensors, bits) in grouped.items()]
    optimizer = sum(
        _state_bytes("adamw_torch" if setup.optim == MUON and name != "matrices" else setup.optim, numel, bits) * count
        for numel, count, bits, name in each
    )
    count, bits = OPTIMIZERS[setup.optim]
    optimizer += QMAP * min(2, count) if bits == 8 else 0
    mine = sum(numel * count for numel, count, *_ in each)
    largest = max(numel * count for numel, count, *_ in each)
    if stage is None:
        return {"weights": 4 * total, "master": 0, "gradients": 4 * total, "gradients_fp32": 0, "optimizer": optimizer}
    element, whole = (2 if setup.bf16 else 4), mine * ranks
    if stage == 3:
        small = (t.numel * t.count for t in counting.weights(setup.config) if t.numel <= setup.persistent)
        whole = mine + (sum(small) if ranks > 1 else 0)
    return {
        "weights": element * whole,
        "master": 4 * mine,
        "gradients": element * (total if stage == 1 else mine),
        "gradients_fp32": 4 * largest,
        "optimizer": optimizer,
    }


def gathered(setup):
    """Whole weights that ZeRO-3 holds while it computes: a layer's, the next one's, and the embedding or the head."""
    counted, element = counting.count(setup.config), 2 if setup.bf16 else 4
    layer = counted.non_embedding // setup.config["num_hidden_layers"]
    return element * (2 * layer + counted.parts["embedding"]) if setup.ranks > 1 else 0


def step_copies(setup):
    """Bytes that the optimizer's step on a CPU holds for a moment: of the largest tensor, or ZeRO's largest share."""
    if setup.cuda or OPTIMIZERS[setup.optim][1] == 32:
        return 0
    sizes = []
    for tensors, bits in groups(setup).values():
        if setup.stage is None:
            sizes += [(t.numel, bits if t.numel >= SMALLEST_8BIT else 32) for t in tensors]
        else:
            sizes.append(((shared_out if setup.stage == 3 else partition)(tensors, setup.ranks), bits))
    return max(4 * numel * COPIES[bits] for numel, bits in sizes)


def buckets(setup):
    """DeepSpeed's reduction buffers: whole ones on a GPU, on a CPU what gradients are written into them."""
    if setup.stage is None:
        return 0
    if setup.cuda:
        return 2 * setup.bucket * (2 if setup.overlap else 1)
    return 2 * min(setup.bucket, counting.count(setup.config).total)


def layer_activations(setup):
    """Bytes that one layer saves for its backward.

    With H hidden, Q = heads * head size, I the MLP's width, e bytes an element of the compute dtype and T tokens:
    the MLP 4eTI; two norms their float input and their normalized input; each linear layer its input; attention its
    queries, keys, values and result. Autocast (no DeepSpeed) keeps the residual stream in float32 and casts a linear
    layer's input once for each, and the weights once. A mask costs 2 S^2 a row, eager attention its probabilities.
    """
    config, tokens = setup.config, setup.micro_batch * setup.block_size
    heads, kv_heads, size = counting.heads_of(config)
    hidden, wide, narrow = config["hidden_size"], heads * size, kv_heads * size
    element, autocast = (2 if setup.bf16 else 4), bool(_cast_weights(setup))
    squares = setup.micro_batch * setup.block_size**2
    inner = _inner(config)
    if setup.loss == "liger":  # its norm keeps its input, its SwiGLU recomputes the activation
        saved, mlp = 4 * element * tokens * hidden, 3 * element * tokens * inner
    else:
        norms = 2 * (4 + 4) if autocast else 2 * (4 + element)
        inputs = 5 * element if autocast else 2 * element
        saved, mlp = (norms + inputs) * tokens * hidden + 8 * tokens, 4 * element * tokens * inner
    saved += mlp + 4 * tokens * heads
    masked = setup.packed and setup.attention in ("sdpa", "eager")
    saved += element * tokens * (4 * wide if masked or setup.attention == "eager" else 2 * wide + 2 * narrow)
    if setup.attention == "eager":
        saved += (4 + element) * heads * squares
    elif masked:
        saved += element * squares
    return saved + _cast_weights(setup) // config["num_hidden_layers"]


def _cast_weights(setup):
    """The layers' weights in bfloat16 that autocast keeps until the forward ends."""
    if not setup.bf16 or setup.stage is not None:
        return 0
    inside = (t for t in counting.weights(setup.config) if t.decayed and t.part not in ("embedding", "head"))
    return 2 * sum(t.numel * t.count for t in inside)


def _inner(config):
    """Width of the MLP a token passes: of a mixture, of the experts it is sent to."""
    experts, used, size, mixed = counting.experts_of(config)
    return used * size if experts and mixed else config["intermediate_size"]


def activations(setup):
    """Bytes saved by all layers and the final norm at the end of a forward."""
    layers, tokens = setup.config["num_hidden_layers"], setup.micro_batch * setup.block_size
    stream = 4 if setup.stage is None or not setup.bf16 else 2  # bytes of the residual stream
    last = (4 + stream) * tokens * setup.config["hidden_size"]
    if setup.checkpointing:
        return layers * stream * tokens * setup.config["hidden_size"] + _cast_weights(setup) + last
    return layers * layer_activations(setup) + last


def gpu_chunk(vocab_size, gpu_bytes):
    """Tokens of a chunk on a GPU, as training/loss.py's default_chunk; a logit and its gradient take four bytes."""
    return 2 ** (max(1, int(gpu_bytes) // GPU_SHARE // 4 // vocab_size).bit_length() - 1)


def chunk_tokens(setup):
    """Tokens whose logits exist at one time under the loss in chunks."""
    default = max(1, CHUNK_LOGITS // setup.config["vocab_size"])
    return min(setup.chunk or default, setup.micro_batch * setup.block_size)


def loss_bytes(setup):
    """The fullest moment of the loss: logits and their gradients, the head's gradient."""
    vocab, hidden = setup.config["vocab_size"], setup.config["hidden_size"]
    tokens, element = setup.micro_batch * setup.block_size, 2 if setup.bf16 else 4
    if setup.loss == "plain":
        # logits, their log-softmax in float32, its gradient, and that in the compute dtype
        return (2 * element + 8) * tokens * vocab
    # a chunk's logits in both dtypes, the head's gradient in float32 and one chunk's part of it, its weights cast
    head = (4 + element + (2 if _cast_weights(setup) else 0)) * vocab * hidden
    return (element + 4) * chunk_tokens(setup) * vocab + head + element * tokens * hidden


def peak(setup):
    """{part: bytes} of the fullest moment of a rank; their sum is what the device must hold.

    Three moments compete: the loss, when all activations live; the backward of the first layers, when the gradients
    do; the optimizer's step, with its float32 gradients.
    """
    held = states(setup)
    offloaded = setup.offload and setup.stage is not None
    parts = {"weights": held["weights"]}
    parts |= {} if offloaded else {"master": held["master"], "optimizer": held["optimizer"]}
    carried = held["gradients"] if setup.accumulation > 1 else 0
    working = layer_activations(setup) * 3 // 2  # a layer's own and the gradients that flow through it
    moments = {
        "loss": {"activations": activations(setup), "loss": loss_bytes(setup), "gradients": carried},
        "backward": {
            "activations": working if setup.checkpointing else layer_activations(setup),
            "gradients": held["gradients"] * (2 if carried and setup.stage == 2 else 1),
            "buckets": buckets(setup),
        },
        "step": {
            "gradients": held["gradients"] + (0 if offloaded else held["gradients_fp32"]),
            "step": step_copies(setup),
        },
    }
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    if setup.stage == 3:
        parts["gathered"] = gathered(setup)
    if not setup.cuda:
        parts["runtime"] = RUNTIME
    return {part: size for part, size in (parts | moments[name]).items() if size} | {"moment": name}


def checkpoint_bytes(setup):
    """A checkpoint on disk, all ranks' files, as the run reckons it before it starts."""
    parts = counting.count(setup.config)
    counted = architectures.Size(parts.total, parts.parts["embedding"], bool(setup.config.get("tie_word_embeddings")))
    return architectures.checkpoint_bytes(counted, optim=setup.optim, bf16=setup.bf16, zero_stage=setup.stage)[0]
