"""The model: an architecture by name, from random weights or those of a checkpoint."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from .safety import checkpoints

_TABLE = json.loads((Path(__file__).resolve().parents[1] / "architectures.json").read_text(encoding="utf-8"))
BUILT_IN = {name: _TABLE["shared"] | own for name, own in _TABLE["models"].items()}  # plan.py reads the same file
TRAIN = "train"  # tokenizer_name of a tokenizer trained on the data


def load_config(model_name, overrides=None):
    """The architecture's configuration.

    Args:
        model_name: A built-in's name, a directory with config.json, or a Hub id.
        overrides: Fields to change; a field that the config does not have is refused.

    Raises:
        ValueError: The name leads nowhere, it is no causal language model, or a field cannot be so.
    """
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
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"model_name = {model_name} is a {config.model_type}, which is not a causal language model.")
    if overrides:
        config = _override(config, overrides)
    elif model_name in BUILT_IN:
        return config
    if (reason := _cannot_compute(config)) and not _cannot_compute(type(config)()):
        origin = f"config_overrides = {overrides} make" if overrides else f"model_name = {model_name} is"
        raise ValueError(f"{origin} a {type(config).__name__} that cannot compute: {reason}.")
    return config


def _read_config(model_name, source):
    """AutoConfig's; code that comes with a config is never run, nor is it asked whether to run it."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config.__dict__.pop("auto_map", None)  # or our export would ask for that code
        return config
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model_name = {model_name} has a config.json that makes no model here: {reason}") from None


def _cannot_compute(config):
    """Why 8 tokens do not pass through the architecture, as with 5 KV heads for 9 heads; None where they do.

    On the meta device nothing is allocated. Some architectures cannot be run there: it counts where their default can.
    """
    fields = config.to_dict()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if isinstance(value := fields.get(name), int) and value < 1:
            return f"{name} must be at least 1, is {value}"
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM._model_mapping[type(config)](config)  # not shared out under ZeRO-3
            seen = torch.zeros(1, 1, 8, 8)  # a mask that is given is not built, which would need values
            network(input_ids=torch.zeros(1, 8, dtype=torch.long), attention_mask=seen, use_cache=False)
    except Exception as error:  # as many kinds as there are architectures
        return " ".join(str(error).split())[:200]
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
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"config_overrides = {overrides} make no {type(config).__name__}: {reason}.") from None


def tokenizer_source(model_name, tokenizer_name):
    """Where the tokenizer comes from: what was asked, else the model's own."""
    if tokenizer_name is not None:
        return tokenizer_name
    if model_name in BUILT_IN:
        # The 1Ms' vocabulary of 4096 is nobody's but ours; the others share SmolLM2's tokenizer.
        own = BUILT_IN[model_name]["vocab_size"] != _TABLE["shared"]["vocab_size"]
        return TRAIN if own else "HuggingFaceTB/SmolLM2-135M"
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
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    pad = tokenizer.pad_token_id  # an embedding's padding row gets no gradient: EOS must never be it
    config.pad_token_id = None if pad in (tokenizer.bos_token_id, tokenizer.eos_token_id) else pad


def choose_attention(asked, device, config):
    """The attention implementation and the reason, in words.

    Raises:
        ValueError: What is asked for cannot be had, here or with this architecture.
    """
    network = AutoModelForCausalLM._model_mapping[type(config)]
    supported = {"eager": True, "sdpa": network._supports_sdpa, "flash_attention_2": network._supports_flash_attn}
    installed = find_spec("flash_attn") is not None
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    if asked != "auto" and not supported[asked]:
        raise ValueError(f"attn_implementation = {asked}: {network.__name__} does not have it. Set it to auto.")
    if asked == "flash_attention_2" and not (installed and ampere):
        missing = f"{device.type} is not a CUDA device of compute capability 8 or more"
        if not installed:
            missing = "flash-attn is not installed (pip install --no-build-isolation flash-attn)"
        raise ValueError(f"attn_implementation = flash_attention_2 cannot be had: {missing}. Set it to auto or sdpa.")
    if asked != "auto":
        return asked, "as asked"
    if installed and ampere and supported["flash_attention_2"]:
        return "flash_attention_2", "flash-attn is installed and the device allows it"
    if not supported["sdpa"]:
        return "eager", f"{network.__name__} has no other"
    return "sdpa", f"device {device.type}" if installed else f"flash-attn is not installed, device {device.type}"


def check_optimizer(config, optim):
    """Refuse Muon where weights are stacked, as a mixture's experts are: torch's takes single matrices.

    Raises:
        ValueError: A parameter has three dimensions.
    """
    if optim != "muon":
        return
    with torch.device("meta"):
        network = AutoModelForCausalLM._model_mapping[type(config)](config)
    for name, parameter in network.named_parameters():
        if parameter.dim() > 2:
            raise ValueError(
                f"optim = muon takes matrices, and {type(network).__name__}'s {name} is a stack of them "
                f"{list(parameter.shape)}: set optim=adamw_torch_fused."
            )


def check_masking(network):
    """Hold that restarting position_ids keep attention inside a document, on 8 tokens.

    Raises:
        ValueError: They do not (Bloom and MPT ignore position_ids), so attention would run across documents.
    """
    ids, positions = torch.arange(1, 9).unsqueeze(0), torch.arange(8).unsqueeze(0) % 4
    other = torch.where(torch.arange(8) < 4, ids + 9, ids)
    was_training, attention = network.training, network.config._attn_implementation
    if attention.startswith("flash"):
        network.config._attn_implementation = "eager"  # its kernels do not run on a CPU; the collator marks for them
    try:
        with torch.no_grad():
            logits = [network.eval()(input_ids=i, position_ids=positions, use_cache=False).logits for i in (ids, other)]
    except RuntimeError as error:
        raise ValueError(
            f"model_name: its {type(network).__name__} cannot compute: {error}. Mend its config."
        ) from None
    network.config._attn_implementation = attention
    network.train(was_training)
    if not torch.allclose(logits[0][:, 4:], logits[1][:, 4:], atol=1e-4):
        raise ValueError(
            f"intra_document_masking = true: {type(network).__name__} lets attention run across documents whatever "
            "their positions. Set intra_document_masking=false to train it so, or take another model."
        )


def weight_files(path):
    """The .safetensors files of a directory, held against its manifest where it has one.

    Raises:
        ValueError: There are none, or one is damaged.
    """
    files = sorted(Path(path).expanduser().glob("*.safetensors"))
    if not files:
        raise ValueError(f"init_from = {path} is not a directory with .safetensors files.")
    manifest = checkpoints.read_manifest(Path(path).expanduser())
    for file in files:
        if manifest and checkpoints.describe(file) != manifest["files"].get(file.name):
            raise ValueError(f"init_from = {path}: {file.name} is damaged: it is not what its manifest.json says.")
    return files


def check_weights(path, config):
    """Hold the weights of a checkpoint or model directory against the architecture, by their names and shapes.

    Raises:
        ValueError: As weight_files, and for the first tensor that is missing or has another shape.
    """
    found = {}
    for file in weight_files(path):
        with safe_open(file, "pt") as tensors:
            found |= {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    with torch.device("meta"):  # by its class: from_config would share it out under ZeRO-3
        network = AutoModelForCausalLM._model_mapping[type(config)](config)
    tied = network._tied_weights_keys or {} if config.tie_word_embeddings else {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if found.get(name) != (shape := list(parameter.shape)) and not (name in tied and name not in found):
            there = f"{name} is {found[name]}" if name in found else f"there is no {name}"
            raise ValueError(f"init_from = {path}: {there}, model_name and config_overrides make it {shape}.")


def model_from(path, config, attn_implementation):
    """The model with the weights of a checkpoint or model directory, in float32; nothing is unpickled.

    Raises:
        ValueError: As check_weights.
    """
    check_weights(path, config)
    config._name_or_path = ""
    return AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation=attn_implementation, use_safetensors=True
    )


def random_model(config, seed, attn_implementation):
    """The model from random weights, in float32 (DeepSpeed keeps these as its master weights).

    The same seed gives the same weights on every rank and every machine of one torch version.
    """
    set_seed(seed)
    config._name_or_path = ""  # or a card would call the model a fine-tune of that name
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
