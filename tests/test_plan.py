"""The plan: counted, held against the real models, the real optimizer and what was published."""

import json

import pytest
import torch
from conftest import ROOT
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from smolpretrain.planning import counting, hardware
from smolpretrain.training.model import BUILT_IN, load_config

RECIPES = [ROOT / "args.json", *sorted((ROOT / "configs").glob("*.json"))]
# Small ones of each family, and fields that change what there is to count.
FAMILIES = [
    ("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 48, "tie_word_embeddings": True}),
    ("mistral", {}), ("smollm3", {}), ("qwen2", {}), ("qwen3", {}), ("olmo", {}), ("olmo2", {}),
    ("olmo3", {"attention_bias": True}), ("mixtral", {}), ("olmoe", {}), ("qwen3_moe", {}),
    ("qwen3_moe", {"num_hidden_layers": 6, "mlp_only_layers": [1], "decoder_sparse_step": 2}), ("gpt_neox", {}),
]  # fmt: skip
SMALL = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 640}
MORE = {"num_hidden_layers": 4, "vocab_size": 1000}


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def small(kind, **fields):
    return CONFIG_MAPPING[kind](**SMALL | MORE | {"pad_token_id": None} | fields)


@pytest.mark.parametrize(("kind", "fields"), FAMILIES)
@pytest.mark.parametrize("size", ["small", "released"])
def test_parameters_are_those_of_the_real_model(kind, fields, size):
    config = small(kind, **fields) if size == "small" else CONFIG_MAPPING[kind](**fields)
    model = on_meta(config)
    counted = counting.count(config.to_dict())
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.parts["embedding"] == model.get_input_embeddings().weight.numel()
    attention = [p.numel() for n, p in model.named_parameters() if ".self_attn." in n or ".attention." in n]
    inside = [p.numel() for n, p in model.named_parameters() if "q_norm" in n or "k_norm" in n]
    assert counted.parts["attention"] == sum(attention) - sum(inside)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert counted.parts.get("experts", 0) == experts
    per_token = getattr(config, "num_experts_per_tok", 1) / (getattr(config, "num_local_experts", None) or 1)
    assert counted.active == counted.total - round(experts * (1 - per_token))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_s_model_is_counted_to_the_parameter(recipe):
    asked = json.loads(recipe.read_text(encoding="utf-8"))
    name, overrides = asked.get("model_name", "smollm2-135m"), asked.get("config_overrides")
    model = on_meta(load_config(name, overrides))
    assert counting.count(counting.load_config(name, overrides)).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_plan_and_the_training_read_one_table_of_built_in_models(name):
    ours, theirs = counting.load_config(name), load_config(name).to_dict()
    assert {key: theirs[key] for key in BUILT_IN[name]} == BUILT_IN[name] | {
        "rope_parameters": theirs["rope_parameters"]
    }
    assert counting.weights(ours) == counting.weights(theirs)


def test_overridden_sizes_derive_the_head_size_again_as_the_training_does():
    overrides = {"hidden_size": 1152, "attention_bias": True}
    theirs = load_config("smollm2-135m", overrides)
    assert counting.weights(counting.load_config("smollm2-135m", overrides)) == counting.weights(theirs.to_dict())
    with pytest.raises(ValueError, match="hidden_sizes is not a field"):
        counting.load_config("smollm2-135m", {"hidden_sizes": 768})


def test_an_unknown_architecture_is_refused_by_name():
    with pytest.raises(ValueError, match="model_type = bloom is not counted; known are llama"):
        counting.weights(CONFIG_MAPPING["bloom"]().to_dict())


@pytest.mark.parametrize(("kind", "fields"), FAMILIES)
def test_flops_are_those_of_a_real_forward_and_backward_within_2_percent(kind, fields):
    from torch.utils.flop_counter import FlopCounterMode

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # grouped products are not counted
    if kind in counting.MIXTURES:
        eager |= {"num_local_experts" if kind == "mixtral" else "num_experts": 4, "num_experts_per_tok": 2}
    config, batch, block = small(kind, **{"num_hidden_layers": 2} | fields, **eager), 1, 64
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(0, config.vocab_size, (batch, block))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = counting.flops(config.to_dict(), block)
    assert counter.get_total_flops() == pytest.approx(batch * block * expected.model, rel=0.02)

    model.gradient_checkpointing_enable()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert counter.get_total_flops() == pytest.approx(batch * block * (expected.model + expected.recompute), rel=0.02)


def test_a_gpu_is_known_by_cuda_s_name_and_a_sister_card_is_not_taken_for_it():
    known = {"NVIDIA L4": "L4", "NVIDIA A100-SXM4-80GB": "A100-80GB", "NVIDIA H100 80GB HBM3": "H100-SXM"}
    known |= {"NVIDIA H100 PCIe": "H100-PCIe", "NVIDIA GeForce RTX 4090": "RTX-4090", "NVIDIA L40S": "L40S"}
    assert {name: hardware.from_cuda_name(name).name for name in known} == known
    for other in ("NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 NVL", "Tesla T4", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert hardware.from_cuda_name(other).peak_flops is None
    assert hardware.find("rtx 4090") == hardware.find("4090")
    with pytest.raises(ValueError, match="gpu = h100 is not one device: choose from H100-SXM, H100-PCIe"):
        hardware.find("h100")
    assert all(device.source and device.peak_flops for device in hardware.DEVICES)
