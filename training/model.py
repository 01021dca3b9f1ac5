"""The model of a config, from random weights or those of a checkpoint, and what it can do here."""

import math
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, set_seed

from smolpretrain.core import upstream
from smolpretrain.core.architectures import BUILT_IN, SHARED_VOCABULARY, on_meta

from . import attention
from .safety import checkpoints

TRAIN = "train"  # tokenizer_name of a tokenizer trained on the data


def tokenizer_source(model_name, tokenizer_name):
    """Where the tokenizer comes from: what was asked, else the model's own."""
    if tokenizer_name is not None:
        return tokenizer_name
    if model_name in BUILT_IN:
        # The 1Ms' vocabulary of 4096 is nobody's but ours; the others share SmolLM2's tokenizer.
        own = BUILT_IN[model_name]["vocab_size"] != SHARED_VOCABULARY
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


def check_optimizer(config, optim):
    """Refuse Muon where weights are stacked, as a mixture's experts are: torch's takes single matrices.

    Raises:
        ValueError: A parameter has three dimensions.
    """
    if optim != "muon":
        return
    network = on_meta(config)
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
    was_training = network.training
    try:
        with torch.no_grad(), attention.portable(network):
            logits = [network.eval()(input_ids=i, position_ids=positions, use_cache=False).logits for i in (ids, other)]
    except RuntimeError as error:
        raise ValueError(
            f"model_name: its {type(network).__name__} cannot compute: {error}. Mend its config."
        ) from None
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
    network = on_meta(config)
    tied = upstream.tied_weights(network)
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
    config.name_or_path = ""  # or a card would call the model a fine-tune of that name
    return AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation=attn_implementation, use_safetensors=True
    )


def random_model(config, seed, attn_implementation):
    """The model from random weights, in float32 (DeepSpeed keeps these as its master weights).

    The same seed gives the same weights on every rank and every machine of one torch version.
    """
    set_seed(seed)
    config.name_or_path = ""  # or a card would call the model a fine-tune of that name
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
