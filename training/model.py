"""The model: an architecture by name, always from random weights."""

import math
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, set_seed

# As their authors pre-trained them, before the long-context stage that the released configs describe.
# Source: huggingface/smollm, text/pretraining/smollm2/config_smollm2_{135M,360M,1B}.yaml
_SMOLLM2 = {
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
BUILT_IN = {
    "smollm2-1m": {
        "vocab_size": 4096,
        "max_position_embeddings": 512,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 352,
        "initializer_range": 0.088,  # 1 / sqrt(hidden_size), as the 135M has 1 / 24
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "initializer_range": 1 / 24,
    },
    "smollm2-360m": {
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
        "initializer_range": 0.03227,
    },
    "smollm2-1.7b": {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 8192,
        "initializer_range": 0.02,
    },
}
TRAIN = "train"  # tokenizer_name of a tokenizer trained on the data


def load_config(model_name, overrides=None):
    """The architecture's configuration.

    Args:
        model_name: A built-in's name, a directory with config.json, or a Hub id.
        overrides: Fields to change; a field that the config does not have is refused.

    Raises:
        ValueError: The name leads nowhere, or a field does not exist.
    """
    if model_name in BUILT_IN:
        config = LlamaConfig(**{**_SMOLLM2, **BUILT_IN[model_name]})
    elif Path(model_name).expanduser().is_dir():
        if not (Path(model_name).expanduser() / "config.json").is_file():
            raise ValueError(f"model_name = {model_name} is a directory without config.json.")
        config = AutoConfig.from_pretrained(Path(model_name).expanduser())
    elif model_name.count("/") != 1 or model_name.startswith((".", "/", "~")):
        raise ValueError(
            f"model_name = {model_name} is not a directory, a Hub id (user/name) or one of {', '.join(BUILT_IN)}."
        )
    else:
        try:
            config = AutoConfig.from_pretrained(model_name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model_name = {model_name} cannot be had from the Hub: {str(error).splitlines()[0]} Is the name "
                "right, the network there, and, where it is gated, `hf auth login` done?"
            ) from None
    for name, value in (overrides or {}).items():
        if not hasattr(config, name):
            raise ValueError(f"config_overrides: {name} is not a field of {type(config).__name__}.")
        setattr(config, name, value)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"model_name = {model_name} is a {config.model_type}, which is not a causal language model.")
    return config


def tokenizer_source(model_name, tokenizer_name):
    """Where the tokenizer comes from: what was asked, else the model's own."""
    if tokenizer_name is not None:
        return tokenizer_name
    if model_name in BUILT_IN:
        # The 1M's vocabulary of 4096 is nobody's but ours; the three SmolLM2 share one tokenizer.
        return TRAIN if model_name == "smollm2-1m" else "HuggingFaceTB/SmolLM2-135M"
    return model_name


def fit_config(config, tokenizer, block_size):
    """Hold config against tokenizer and rows, and give it the tokenizer's special ids.

    Raises:
        ValueError: An id would have no embedding, or a row would be longer than the positions.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size} (config vocab_size): set "
            f'config_overrides={{"vocab_size": {math.ceil(len(tokenizer) / 128) * 128}}} or take another tokenizer.'
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and block_size > positions:
        raise ValueError(
            f"block_size = {block_size} is more than the model's {positions} positions: lower it, or set "
            f'config_overrides={{"max_position_embeddings": {block_size}}}.'
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def choose_attention(asked, device):
    """The attention implementation and the reason, in words.

    Raises:
        ValueError: flash_attention_2 is asked for and cannot be had.
    """
    installed = find_spec("flash_attn") is not None
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    if asked == "flash_attention_2" and not (installed and ampere):
        missing = (
            "flash-attn is not installed (pip install 'smolpretrain[gpu]')"
            if not installed
            else (f"{device.type} is not a CUDA device of compute capability 8 or more")
        )
        raise ValueError(f"attn_implementation = flash_attention_2 cannot be had: {missing}. Set it to auto or sdpa.")
    if asked != "auto":
        return asked, "as asked"
    if installed and ampere:
        return "flash_attention_2", "flash-attn is installed and the device allows it"
    return "sdpa", f"flash-attn is not installed, device {device.type}" if not installed else f"device {device.type}"


def random_model(config, seed, attn_implementation):
    """The model from random weights, in float32 (DeepSpeed keeps these as its master weights).

    The same seed gives the same weights on every rank and every machine of one torch version.
    """
    set_seed(seed)
    config._name_or_path = ""  # or a card would call the model a fine-tune of that name
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
