"""Parameters and FLOPs of an architecture, counted from its config.

    count(config).total                    as sum(p.numel() for p in model.parameters())
    flops_per_token(config, block_size)    of one training token, forward and backward

Every figure follows from `weights(config)`, the list of a model's tensors, which the tests hold against the real
models on the meta device.
"""

from typing import NamedTuple

LLAMA_LIKE = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "olmo", "olmo2", "olmo3")
MIXTURES = ("mixtral", "olmoe", "qwen3_moe")
KNOWN = (*LLAMA_LIKE, *MIXTURES, "gpt_neox")


class Weight(NamedTuple):
    """Equal tensors of a model.

    Attributes:
        part: embedding, head, attention, mlp, experts, router or norms.
        shape: Of one of them.
        count: How many there are.
        decayed: Whether weight decay reaches them (Trainer leaves out norms and biases).
    """

    part: str
    shape: tuple[int, ...]
    count: int
    decayed: bool = True

    @property
    def numel(self):
        """Elements of one of them."""
        size = 1
        for length in self.shape:
            size *= length
        return size


class Count(NamedTuple):
    """Parameters of a model.

    Attributes:
        parts: {part: parameters}.
        total: All of them; a tied head is counted once, as the embedding.
        non_embedding: Without the embedding and an untied head.
        active: That one token passes through: of a mixture's experts only those it is sent to.
        multiplied: That multiply a token's hidden state: active, without the embedding's look-up and the norms, with
            the head, tied or not.
    """

    parts: dict[str, int]
    total: int
    non_embedding: int
    active: int
    multiplied: int


def heads_of(config):
    """(query heads, key-value heads, head size)."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return heads, kv_heads, config.get("head_dim") or config["hidden_size"] // heads


def experts_of(config):
    """(experts a layer, experts a token, size of one, layers that have them); zeros without."""
    kind, layers = config["model_type"], config["num_hidden_layers"]
    if kind not in MIXTURES:
        return 0, 0, 0, 0
    size = config.get("moe_intermediate_size") or config["intermediate_size"]
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    mixed = sum((layer + 1) % step == 0 and layer not in dense for layer in range(layers))
    return config.get("num_local_experts") or config["num_experts"], config["num_experts_per_tok"], size, mixed


def weights(config):
    """The tensors of a causal language model.

    Raises:
        ValueError: An architecture whose tensors are not known here.
    """
    kind = config["model_type"]
    if kind not in KNOWN:
        raise ValueError(f"model_type = {kind} is not counted; known are {', '.join(KNOWN)}.")
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    tensors = [Weight("embedding", (config["vocab_size"], hidden), 1)]
    if not config.get("tie_word_embeddings"):
        tensors.append(Weight("head", (config["vocab_size"], hidden), 1))
    tensors += _attention(config) + _feed_forward(config)
    norms = 0 if kind == "olmo" else 2 * layers + 1  # OLMo's norms have no weights
    if norms:
        tensors.append(Weight("norms", (hidden,), 2 * norms if kind == "gpt_neox" else norms, decayed=False))
    return [tensor for tensor in tensors if tensor.count]


def _attention(config):
    """Projections, their biases, and norms of queries and keys."""
    kind, hidden, layers = config["model_type"], config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads, size = heads_of(config)
    wide, narrow = heads * size, kv_heads * size
    bias = config.get("attention_bias", kind == "gpt_neox") or kind == "qwen2"
    if kind == "gpt_neox":
        tensors = [Weight("attention", (3 * wide, hidden), layers), Weight("attention", (hidden, wide), layers)]
        biases = [(3 * wide, 1), (hidden, 1)]
    else:
        tensors = [Weight("attention", (wide, hidden), layers), Weight("attention", (narrow, hidden), 2 * layers)]
        tensors.append(Weight("attention", (hidden, wide), layers))
        biases = [(wide, 1), (narrow, 2)] + ([(hidden, 1)] if kind != "qwen2" else [])
    if bias:
        tensors += [Weight("attention", (length,), count * layers, decayed=False) for length, count in biases]
    normed = {"qwen3": (size, size), "qwen3_moe": (size, size)}
    normed |= dict.fromkeys(("olmo2", "olmo3", "olmoe"), (wide, narrow))
    return tensors + [Weight("norms", (length,), layers, decayed=False) for length in normed.get(kind, ())]


def _feed_forward(config):
    """Dense MLPs, experts and routers."""
    kind, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    experts, _, size, mixed = experts_of(config)
    dense = config["num_hidden_layers"] - mixed
    if kind == "gpt_neox":
        tensors = [Weight("mlp", (inner, hidden), dense), Weight("mlp", (hidden, inner), dense)]
        return tensors + [Weight("mlp", (length,), dense, decayed=False) for length in (inner, hidden)]
    tensors = [Weight("mlp", (inner, hidden), 2 * dense), Weight("mlp", (hidden, inner), dense)]
    if config.get("mlp_bias"):
        tensors += [Weight("mlp", (inner,), 2 * dense, decayed=False), Weight("mlp", (hidden,), dense, decayed=False)]
    tensors += [
        Weight("experts", (experts, 2 * size, hidden), mixed),
        Weight("experts", (experts, hidden, size), mixed),
    ]
    return [*tensors, Weight("router", (experts, hidden), mixed)]


def count(config):
    """Parameters by part, see Count."""
    parts, biases = {}, 0
    for tensor in weights(config):
        parts[tensor.part] = parts.get(tensor.part, 0) + tensor.numel * tensor.count
        biases += tensor.numel * tensor.count * (len(tensor.shape) == 1)
    total = sum(parts.values())
    experts, used, *_ = experts_of(config)
    idle = parts.get("experts", 0) // experts * (experts - used) if experts else 0
    head = config["vocab_size"] * config["hidden_size"]
    return Count(
        parts=parts,
        total=total,
        non_embedding=total - parts["embedding"] - parts.get("head", 0),
        active=total - idle,
        multiplied=total - idle - parts["embedding"] - parts.get("head", 0) - biases + head,
    )


class Flops(NamedTuple):
    """FLOPs of one training token, a multiplication and an addition counted apart.

    Attributes:
        matrices: 6 for each parameter that multiplies it: 2 forward, 4 backward.
        attention: Scores and weighted values against block_size positions: 12 * layers * heads * head size * block.
        recompute: What activation checkpointing computes again: the forward of the layers, up to the last product
            whose result is needed (torch's non-reentrant checkpoint stops there; the head is outside). It is work, but
            no model FLOPs utilization counts it.
    """

    matrices: int
    attention: int
    recompute: int

    @property
    def model(self):
        """The numerator of model FLOPs utilization (MFU)."""
        return self.matrices + self.attention


def flops(config, block_size):
    """FLOPs of one training token, see Flops.

    Attention is counted as dense, as PaLM counts it (Chowdhery et al. 2022, appendix B): a causal kernel does half of
    it, and a kernel that knows the documents' bounds less.
    """
    heads, _, size = heads_of(config)
    layers, counted = config["num_hidden_layers"], count(config)
    forward = 4 * layers * heads * size * block_size
    head, last = config["vocab_size"] * config["hidden_size"], 0
    if config["model_type"] not in ("olmo2", "olmo3"):  # their norm after the MLP needs what the MLP gives
        last = (layers - experts_of(config)[3]) * config["intermediate_size"] * config["hidden_size"]
    return Flops(6 * counted.multiplied, 3 * forward, 2 * (counted.multiplied - head - last) + forward)


def flops_per_token(config, block_size):
    """Model FLOPs of one training token: tokens a second times this over the devices' peak is the MFU."""
    return flops(config, block_size).model
