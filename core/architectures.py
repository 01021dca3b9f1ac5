"""Architectures: a config by name and overrides, its network without a byte, and what a checkpoint of it takes.

    config = load_config("smollm2-135m", {"num_hidden_layers": 12})

The run and the plan ask here, so that they refuse the same and reckon the same. torch and transformers are imported
where they are needed: a plan of a budget needs neither.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .text import one_line
from .upstream import model_class

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

_TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
BUILT_IN = {name: _TABLE["shared"] | own for name, own in _TABLE["models"].items()}
SHARED_VOCABULARY = _TABLE["shared"]["vocab_size"]  # of those that have SmolLM2's tokenizer
BESIDES = 2**24  # tokenizer, schedule, random states and log of a checkpoint, in bytes: 16 MiB are plenty
_STATES = {"sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "adafactor": 1, "ademamix": 3}  # kept values; else two


def built_in(model_name: str) -> dict[str, Any] | None:
    """The config of a built-in model as plain values, or None."""
    own = BUILT_IN.get(model_name)
    return own and {"model_type": "llama", "num_key_value_heads": None} | own


def load_config(model_name: str, overrides: dict[str, Any] | None = None) -> "PretrainedConfig":
    """The architecture's configuration.

    Args:
        model_name: A built-in's name, a directory with config.json, or a Hub id.
        overrides: Fields to change; a field that the config does not have is refused.

    Raises:
        ValueError: The name leads nowhere, it is no causal language model, or a field cannot be so.
    """
    from transformers import AutoConfig

    overrides, path = overrides or {}, Path(model_name).expanduser()
    if model_name in BUILT_IN:
        config = AutoConfig.for_model(**{"model_type": "llama"} | BUILT_IN[model_name])
    elif model_name and path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model_name = {model_name} is a directory without config.json.")
        config = _read_config(model_name, path)
    elif model_name.count("/") != 1 or model_name.startswith((".", "/", "~")):
        raise ValueError(
            f"model_name = {model_name} is not a directory, a Hub id (user/name) or one of {', '.join(BUILT_IN)}."
        )
    else:
        try:
            config = _read_config(model_name, model_name)
        except OSError as error:
            raise ValueError(
                f"model_name = {model_name} cannot be had from the Hub: {str(error).splitlines()[0]} Is the name "
                "right, the network there, and, where it is gated, `hf auth login` done?"
            ) from None
    if model_class(config) is None:
        raise ValueError(f"model_name = {model_name} is a {config.model_type}, which is not a causal language model.")
    if overrides:
        config = _override(config, overrides)
    elif model_name in BUILT_IN:
        return config
    if (reason := _cannot_compute(config)) and not _cannot_compute(type(config)()):
        origin = f"config_overrides = {overrides} make" if overrides else f"model_name = {model_name} is"
        raise ValueError(f"{origin} a {type(config).__name__} that cannot compute: {reason}.")
    return config


def plain_config(model_name: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The same as plain values; a built-in as it is takes no second of imports."""
    return (not overrides and built_in(model_name)) or load_config(model_name, overrides).to_dict()


def _read_config(model_name, source):
    """AutoConfig's; code that comes with a config is never run, nor is it asked whether to run it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config.__dict__.pop("auto_map", None)  # or our export would ask for that code
        return config
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"model_name = {model_name} has a config.json that makes no model here: {one_line(error, 200)}"
        ) from None


def _cannot_compute(config):
    """Why 8 tokens do not pass through the architecture, as with 5 KV heads for 9 heads; None where they do.

    On the meta device nothing is allocated. Some architectures cannot be run there: it counts where their default can.
    """
    import torch

    fields = config.to_dict()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if isinstance(value := fields.get(name), int) and value < 1:
            return f"{name} must be at least 1, is {value}"
    try:
        network = on_meta(config)
        with torch.device("meta"):
            seen = torch.zeros(1, 1, 8, 8)  # a mask that is given is not built, which would need values
            network(input_ids=torch.zeros(1, 8, dtype=torch.long), attention_mask=seen, use_cache=False)
    except Exception as error:  # as many kinds as there are architectures
        return one_line(error, 200)
    return None


def _override(config, overrides):
    """The configuration made anew with other fields, so that what is derived from them follows."""
    fields = config.to_dict()
    for name in overrides:
        if name not in fields:
            raise ValueError(f"config_overrides: {name} is not a field of {type(config).__name__}.")
    heads, size = fields.get("num_attention_heads"), fields.get("hidden_size")
    if heads and size and fields.get("head_dim") == size // heads:
        fields.pop("head_dim")  # it was derived, and is derived again
    try:
        return type(config).from_dict(fields | overrides)
    except Exception as error:  # transformers' strict configs raise types of their own
        raise ValueError(
            f"config_overrides = {overrides} make no {type(config).__name__}: {one_line(error, 200)}."
        ) from None


def on_meta(config: "PretrainedConfig") -> "nn.Module":
    """The network on the meta device: shapes without values. By its class: from_config shares it out under ZeRO-3."""
    import torch

    with torch.device("meta"):
        return model_class(config)(config)


class Size(NamedTuple):
    """What a checkpoint's bytes follow from: all weights, those of embeddings, and whether the head is tied to one."""

    weights: int
    embeddings: int
    tied: bool


def size(config: "PretrainedConfig") -> Size:
    """Count a config's network."""
    from torch import nn

    network = on_meta(config)
    embeddings = sum(p.numel() for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    return Size(sum(p.numel() for p in network.parameters()), embeddings, bool(config.tie_word_embeddings))


def checkpoint_bytes(counted: Size, *, optim: str, bf16: bool, zero_stage: int | None) -> tuple[int, int]:
    """What one checkpoint takes, and what the exported model takes, from the architecture and the optimizer.

    A checkpoint under ZeRO holds the weights in the compute type twice (safetensors', with both copies of a tied head,
    and DeepSpeed's own), the float32 weights and the optimizer's state; without ZeRO float32 weights and the state.

    Returns:
        (bytes, bytes), a few per cent too many rather than too few.
    """
    weights, embeddings, tied = counted
    compute = 2 if bf16 else 4
    kept = next((count for name, count in _STATES.items() if name in optim), 2)
    if "8bit" in optim:  # 8 bits, and a float32 for every 256 of them; embeddings keep 32 bits
        state = kept * (4 * embeddings + (1 + 4 / 256) * (weights - embeddings))
    elif optim == "muon":  # one value of a hidden matrix, AdamW's two of an embedding or a head
        state = 4 * (weights + embeddings * (1 if tied else 2))
    else:
        state = kept * 4 * weights
    saved = 4 * weights
    if zero_stage:
        saved += compute * (2 * weights + (embeddings if tied else 0))
    return math.ceil(saved + state) + BESIDES, compute * weights + BESIDES
