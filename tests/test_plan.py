"""The plan: counted, held against the real models, the real optimizer and what was published."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
import torch
from conftest import ROOT
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from smolpretrain import plan as plan_command
from smolpretrain.arguments import DataArguments, ModelArguments, PretrainArguments
from smolpretrain.core.architectures import BUILT_IN, built_in, load_config
from smolpretrain.core.words import parse_args, resolve
from smolpretrain.data.arguments import VALIDATION_FRACTION
from smolpretrain.planning import assemble, contradictions, cost, counting, cpu, hardware, laws, machines, memory, start
from smolpretrain.training import loss

ARGUMENTS = (ModelArguments, DataArguments, PretrainArguments)
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
    assert counting.count(load_config(name, overrides).to_dict()).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_plan_and_the_training_read_one_table_of_built_in_models(name):
    ours, theirs = built_in(name), load_config(name).to_dict()
    assert {key: theirs[key] for key in BUILT_IN[name]} == BUILT_IN[name] | {
        "rope_parameters": theirs["rope_parameters"]
    }
    assert counting.weights(ours) == counting.weights(theirs)


def test_overridden_sizes_derive_the_head_size_again_as_the_training_does():
    overrides = {"hidden_size": 1152, "attention_bias": True}
    config = load_config("smollm2-135m", overrides)
    assert config.head_dim == 1152 // config.num_attention_heads
    assert counting.count(config.to_dict()).total == sum(p.numel() for p in on_meta(config).parameters())


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
    assert all(device.source and device.peak_flops and device.watts for device in hardware.DEVICES)


# Sizes that no rank count divides, and an untied head; each case is trained two steps by run_pretrain.py itself.
ODD = {"intermediate_size": 353, "vocab_size": 4099, "tie_word_embeddings": False} | {
    "num_attention_heads": 8,  # keys of 16 x 128 are too small for 8-bit state
}
CASES = [
    (None, "adamw_bnb_8bit"), (1, "adamw_torch"), (2, "adamw_bnb_8bit"), (2, "adamw_torch"), (3, "adamw_bnb_8bit"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_states_are_those_of_real_runs_to_the_byte(ranks, launch, tmp_path):
    common = [
        "model_name=smollm2-1m", "tokenizer_name=train", f"config_overrides={json.dumps(ODD)}", "block_size=128",
        "per_device_train_batch_size=2", "max_steps=2", "warmup_steps=1", "validation_fraction=0", "sample_steps=0",
        "save_strategy=no", "disable_tqdm=true", "resume=never", "bf16=true", f"prepared_dir={tmp_path / 'prepared'}",
    ]  # fmt: skip
    words = [
        [*common, f"optim={optim}", f"output_dir={tmp_path / str(number)}",
         f"deepspeed={'null' if stage is None else f'ds_configs/zero{stage}.json'}"]
        for number, (stage, optim) in enumerate(CASES)
    ]  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps(words))
    done = launch("deepspeed", "--num_gpus", ranks, ROOT / "tests" / "walked_run.py", tmp_path / "cases.json")
    walked = [json.loads(found) for found in re.findall(r"walked (\{[^}]*\})", done.stdout)]  # ranks may share a line
    assert len(walked) == len(CASES) * ranks
    config = load_config("smollm2-1m", ODD).to_dict()
    for case, found in enumerate(walked):
        stage, optim = CASES[case // ranks]
        setup = memory.Setup(
            config, 128, micro_batch=2, ranks=ranks, stage=stage, optim=optim, persistent=10 * config["hidden_size"]
        )
        expected = memory.states(setup)
        compared = ["weights", "master", "optimizer", *(["gradients_fp32"] if "gradients_fp32" in found else [])]
        assert {part: found[part] for part in compared} == {part: expected[part] for part in compared}, (stage, optim)


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("name", ["smollm2-1m", "smollm2-135m", "smollm2-1.7b"])
def test_states_are_deepspeed_s_own_estimate_where_its_assumptions_agree(name, ranks):
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    config = load_config(name).to_dict()
    parts = memory.states(memory.Setup(config, 512, ranks=ranks, stage=2, optim="adamw_torch"))
    # It takes float32 gradients of all groups at once and no step counters; ours are of the largest group.
    shares = [memory.partition(tensors, ranks) for tensors, _ in memory.groups(
        memory.Setup(config, 512, optim="adamw_torch")).values()]  # fmt: skip
    ours = sum(parts.values()) - 4 * len(shares) + 4 * (sum(shares) - max(shares))
    theirs = estimate_zero2_model_states_mem_needs(counting.count(config).total, ranks, cpu_offload=False)[1]
    padding = sum(shares) * ranks - counting.count(config).total
    assert theirs <= ours <= theirs + 20 * (padding + 1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("attention", "packed"), [("sdpa", True), ("sdpa", False), ("eager", True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_a_real_forward_saves(autocast, attention, packed, checkpointing):
    config = small("llama", attn_implementation=attention, tie_word_embeddings=True)
    rows, block = 2, 320
    model = AutoModelForCausalLM.from_config(config).train()
    if not autocast:
        model.to(torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable()
    known, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids, positions = torch.randint(0, config.vocab_size, (rows, block)), torch.arange(block).repeat(rows, 1)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = model.model(ids, position_ids=positions % 50 if packed else positions, use_cache=False)
    setup = memory.Setup(
        config.to_dict(), block, micro_batch=rows, stage=None if autocast else 2, checkpointing=checkpointing,
        attention=attention, packed=packed,
    )  # fmt: skip
    real = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    cast = memory._cast_weights(setup) if checkpointing else 0  # autocast's own, which no backward asks for
    assert memory.activations(setup) - cast == pytest.approx(real, rel=0.02)
    del kept


def write(path, **values):
    path.write_text(json.dumps(values))
    return str(path)


def planned(*words):
    values, plan_args = plan_command.parse(words)
    return plan_command.plan_of(values, plan_args)[0]


def test_importing_the_command_imports_no_torch_and_a_plan_none_of_the_models():
    code = (
        "import sys, smolpretrain.plan as plan; before = 'torch' in sys.modules; plan.main(['gpu=L4', '--json'])\n"
        "print([name for name in ('torch._dynamo', 'transformers.models.auto') if name in sys.modules], before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[] False")


def test_the_older_project_s_claims_are_found_impossible(capsys):
    recipe, claims = ("configs/smollm2-1.7b-cosmopedia-4xl4.json", "configs/claims/smollm2-1.7b-cosmopedia-4xl4.json")
    plan_command.main([str(ROOT / recipe), "gpus=4", "gpu=L4", "--claims", str(ROOT / claims), "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["data"]["tokens"] == 30_000 * 64 * 2048 and plan["model"]["total"] == 1_711_376_384
    assert "93% by 6 N alone" in plan["claims"][0] and "impossible" in plan["claims"][0]
    assert "exp(3.75) is 42.5" in plan["claims"][1]
    assert len(plan["claims"]) == 2 and plan["memory"]["fits"]


def test_claims_that_agree_with_arithmetic_are_left_alone():
    config = load_config("smollm2-135m").to_dict()
    plan = planned("max_steps=1000", "gpu=H100-SXM", "gpus=8")
    tokens = plan["data"]["tokens"]
    hours = tokens * plan["compute"]["flops_per_token"] / (8 * 989.4e12 * 0.4) / 3600
    claims = {"steps": 1000, "tokens": tokens, "hours": hours, "loss": 3.0, "perplexity": 20.1}
    terms = (plan, counting.flops(config, 2048), hardware.find("H100-SXM"), 8)
    assert contradictions.claims(claims, *terms) == []
    assert "claimed 9,999 tokens" in contradictions.claims(claims | {"tokens": 9999}, *terms)[0]
    assert "claimed 1,500 steps, the recipe says 1,000" in contradictions.claims(claims | {"steps": 1500}, *terms)[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["max_steps=100", "save_steps=500"], "save_steps = 500 is beyond the run's 100 steps"),
        (["max_steps=100000", "learning_rate=1e-5"], "learning_rate = 1e-05 is more than 4 times outside 1.6e-03 to"),
        (["max_steps=100000", "learning_rate=0.1"], "learning_rate = 0.1 is more than 4 times outside"),
        (["max_steps=100"], "tokens for 134,515,008 parameters are 0.012 a parameter, under 1"),
        (["max_steps=100", "block_size=4096"], "block_size = 4,096 is more than the model's 2,048 positions"),
        (["max_steps=100000", "hours=0.1"], "in 0.1 h on 1 x L4 needs, of the dense bf16 peak of 121 TFLOPS each"),
        (
            ["max_steps=100", 'deepspeed={"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}'],
            "gradient_accumulation_steps = 4, but gradient_accumulation_steps = 1",
        ),
    ],
)
def test_a_contradiction_is_said_in_one_line_with_its_numbers(words, sentence):
    plan = planned("gpu=L4", *words)
    assert [line for line in plan["contradictions"] if sentence in line], plan["contradictions"]
    calm = planned("gpu=L4", "max_steps=50000", "per_device_train_batch_size=32", "save_steps=1000")
    assert calm["contradictions"] == []
    tiny = planned("gpu=L4", "model_name=smollm2-1m", "block_size=512", "max_steps=100", "learning_rate=0.1")
    assert not [
        line for line in tiny["contradictions"] if "learning_rate" in line
    ]  # below what the laws were fitted to


@pytest.mark.parametrize(("steps", "sentence"), [(10, "sees 50.00% of the prepared set"), (100, "5.0 times: beyond 4")])
def test_epochs_are_counted_over_the_prepared_set(steps, sentence, tmp_path):
    write(tmp_path / "manifest.json", block_size=512, splits={"train": {"blocks": 80}})
    words = ["gpu=L4", "block_size=512", "per_device_train_batch_size=4", f"prepared_dir={tmp_path}"]
    plan = planned(*words, f"max_steps={steps}")
    assert plan["data"]["epochs"] == steps * 4 / 80
    assert [line for line in plan["contradictions"] if sentence in line]
    by_epochs = planned(*words, "num_train_epochs=2")
    assert by_epochs["data"]["steps"] == 40 and by_epochs["data"]["epochs"] == 2
    late = planned(*words, "num_train_epochs=2", "warmup_steps=200")["contradictions"]
    assert [line for line in late if "warmup_steps = 200 is not below the run's 40 steps" in line]


def test_checkpoints_larger_than_the_disk_are_said(tmp_path):
    plan = {"memory": {"checkpoint_bytes": 10**9}}
    values = {"save_total_limit": 3, "output_dir": "runs/x"}
    said = contradictions.disk(plan, values, free_bytes=3 * 10**9)
    assert said == [
        "3 checkpoints and one being written are 4.0 GB (1.0 GB each), and runs/x has 3.0 GB free."
    ] and not contradictions.disk(plan, values, free_bytes=5 * 10**9)


@pytest.mark.parametrize("micro", [8, 9])
def test_what_does_not_fit_is_told_the_nearest_change_and_it_fits(micro):
    words = ["model_name=smollm2-1.7b", "gpu=L4", "max_steps=100", "activation_checkpointing=false"]
    words += [f"per_device_train_batch_size={micro}", "optim=adamw_torch", "gpus=4"]
    plan = planned(*words)
    assert plan["memory"]["fits"] is False
    change = plan["memory"]["nearest_change"]["change"]
    changed = planned(*words, *change.split())
    assert changed["memory"]["fits"] is True
    assert changed["data"]["tokens_a_step"] == plan["data"]["tokens_a_step"]


def test_the_suggested_micro_batch_fits_and_keeps_the_batch():
    words = ["model_name=smollm2-1.7b", "gpu=L4", "gpus=4", "max_steps=100", "gradient_accumulation_steps=64"]
    plan = planned(*words, "suggest=true", "per_device_train_batch_size=1")
    found = plan["memory"]["suggestion"]
    micro, accumulation = found["per_device_train_batch_size"], found["gradient_accumulation_steps"]
    assert micro * accumulation == 64 and micro > 1
    words[-1] = f"gradient_accumulation_steps={accumulation}"
    assert planned(*words, f"per_device_train_batch_size={micro}")["memory"]["fits"]
    words[-1] = f"gradient_accumulation_steps={accumulation // 2}"
    assert not planned(*words, f"per_device_train_batch_size={micro * 2}")["memory"]["fits"]


def test_time_is_flops_over_peak_and_money_and_energy_follow():
    words = ["gpu=H100-SXM", "gpus=8", "max_steps=1000", "mfu=0.5", "price_per_gpu_hour=2", "deepspeed=null"]
    plan = planned(*words)
    flops = plan["data"]["tokens"] * plan["compute"]["flops_per_token"]
    hours = flops / (8 * 989.4e12 * 0.5) / 3600
    assert plan["time"]["hours"] == pytest.approx(hours)
    assert plan["time"]["money"] == pytest.approx(hours * 8 * 2)
    assert plan["time"]["kilowatt_hours"] == pytest.approx(hours * 8 * 0.7)


def test_a_slow_network_sets_the_pace():
    words = ["gpu=H100-SXM", "gpus=16", "nodes=2", "max_steps=1000", "mfu=0.5"]
    slow = planned(*words, "network_gbit_per_second=1")["time"]
    sent = 3 * 2 * counting.count(load_config("smollm2-135m").to_dict()).total * 15 / 16
    assert slow["limited_by"] == "network"
    assert slow["seconds_a_step"] == pytest.approx(sent / (1e9 / 8), rel=1e-6)
    fast = planned(*words, "network_gbit_per_second=100000")["time"]
    assert fast["limited_by"] == "compute"
    assert fast["network_seconds_a_step"] == pytest.approx(sent / 450e9)  # NVLink's, which its machines are built on
    computing = (
        fast["seconds_a_step"] - sent / 3 / 450e9
    )  # gradients go behind the backward, new weights after the step
    words += ["network_gbit_per_second=10"]
    config, gathered = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()), sent / 3 / (10e9 / 8)
    assert planned(*words)["time"]["seconds_a_step"] == pytest.approx(max(computing, 2 * gathered) + gathered)
    config["zero_optimization"]["overlap_comm"] = False
    waits = planned(*words, f"deepspeed={json.dumps(config)}")["time"]["seconds_a_step"]
    assert waits == pytest.approx(computing + 3 * gathered)


@pytest.mark.parametrize(
    ("zero", "words", "times"),  # bytes a parameter, without (n - 1) / n
    [
        (None, [], 2 * 4),
        (None, ["gradient_compression=fp16", "gradient_accumulation_steps=4"], 2 * 2),
        ({"stage": 1}, ["gradient_accumulation_steps=4"], 2 * 2 + 2),
        ({"stage": 2}, ["gradient_accumulation_steps=4"], 4 * 2 * 2 + 2),
        ({"stage": 2}, ["bf16=false"], 2 * 4 + 4),
        ({"stage": 2}, ["bf16=false", "gradient_compression=bf16"], 2 * 2 + 4),
        ({"stage": 2, "use_multi_rank_bucket_allreduce": False}, [], 2 + 2),
        ({"stage": 2, "use_multi_rank_bucket_allreduce": False, "reduce_scatter": False}, [], 2 * 2 + 2),
        ({"stage": 3}, ["gradient_accumulation_steps=4"], 4 * (2 + 2)),
        ({"stage": 3, "stage3_max_reuse_distance": 0}, ["gradient_accumulation_steps=4"], 4 * (2 + 2 * 2)),
    ],
)
def test_what_a_rank_sends_follows_what_is_sent_and_how_often(zero, words, times):
    config = load_config("smollm2-135m").to_dict()
    content = zero and {"bf16": {"enabled": "auto"}, "zero_optimization": zero}
    values, _ = plan_command.parse(["gpu=L4", *words])
    setup, total = assemble.set_up(config, values, content, 4, cuda=True), counting.count(config).total
    assert sum(cost.traffic(setup, total, 4)) == pytest.approx(times * total * 3 / 4)
    assert not sum(cost.traffic(setup, total, 1))


def test_on_gloo_reducing_to_the_owner_costs_more():
    config, total = load_config("smollm2-135m").to_dict(), 1000
    owner = memory.Setup(config, 512, stage=2, all_reduce=False, cuda=False)
    assert cost.traffic(owner, total, 4) == (0, pytest.approx(750 * 2 * (5 / 4 + 1)))  # a ring, then collected
    assert cost.traffic(memory.Setup(config, 512, stage=3, cuda=False), total, 4) == (750 * 2, 2 * 750 * 2)


def test_more_machines_send_what_the_formulas_say_and_hide_it_or_wait_for_it():
    words = ["gpu=H100-SXM", "gpus=8", "mfu=0.5", "network_gbit_per_second=10", "scaling=true", "deepspeed=null"]
    rows = planned(*words, "gradient_accumulation_steps=4")["scaling"]
    assert [row["nodes"] for row in rows] == [1, 2, 4, 8, 16, 32, 64] and rows[-1]["ranks"] == 512
    parameters = counting.count(load_config("smollm2-135m").to_dict()).total
    for row in rows:
        assert row["sent_bytes"] == pytest.approx(2 * 4 * parameters * (row["ranks"] - 1) / row["ranks"])  # DDP, fp32
        speed = 450e9 if row["nodes"] == 1 else 10e9 / 8  # NVLink within a machine, then its network
        assert row["sending_seconds"] == pytest.approx(row["sent_bytes"] / speed)
        both, longer = (
            row["computing_seconds"] + row["sending_seconds"],
            max(row["computing_seconds"], row["sending_seconds"]),
        )
        assert row["tokens_per_second"] == pytest.approx([row["tokens_a_step"] / both, row["tokens_a_step"] / longer])
        assert row["efficiency"][0] < row["efficiency"][1] <= 1
    # twice the accumulation computes twice as long for the same traffic; ZeRO-3 gathers for every micro-batch
    more = planned(*words, "gradient_accumulation_steps=8")["scaling"][-1]
    assert more["sent_bytes"] == rows[-1]["sent_bytes"] and more["efficiency"][0] > rows[-1]["efficiency"][0]
    zero3 = planned(*words[:-1], "deepspeed=ds_configs/zero3.json", "gradient_accumulation_steps=4")["scaling"][-1]
    assert zero3["sent_bytes"] == pytest.approx(2 * 4 * 2 * parameters * 511 / 512)
    with pytest.raises(ValueError, match="its peak is unknown"):
        machines.scale(None, hardware.from_cuda_name("Tesla T4"), None, 1)


@pytest.mark.slow
def test_ranks_on_a_slow_network_send_what_the_plan_says(wires):
    wire, scaling = wires
    words = ["block_size=64", "per_device_train_batch_size=2", "gradient_accumulation_steps=2", "optim=adamw_torch",
             "deepspeed=ds_configs/zero2.json"]  # fmt: skip
    free, bound = wire.measure(words, 2, rates=(None, 100e6), steps=4)
    planned, least, most = scaling.predict(words, 2, bound["rate"], computing=1.0)
    assert least == most == pytest.approx(1 + planned / (100e6 / 8))  # DeepSpeed on CPUs sends after computing
    assert planned < free["bytes"] < 1.1 * planned and planned < bound["bytes"] < 1.1 * planned


# tokens a second and device at the utilization its authors state, and where they say so
PUBLISHED = [
    ({"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
      "intermediate_size": 5632, "vocab_size": 32000}, "llama", 2048, "A100-40GB", 0.56, 24_000, "TinyLlama's README"),
    ({}, "smollm3", 4096, "H100-SXM", 0.294, 14_000, "SmolLM3's training configuration"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "kind", "block", "gpu", "mfu", "rate", "source"), PUBLISHED)
def test_published_rates_follow_from_their_stated_utilization(fields, kind, block, gpu, mfu, rate, source):
    config = CONFIG_MAPPING[kind](**fields).to_dict()
    ours = hardware.find(gpu).peak_flops * mfu / counting.flops_per_token(config, block)
    assert ours == pytest.approx(rate, rel=0.1), source


def test_the_laws_give_what_their_papers_print():
    # Hoffmann et al. 2022, table 3: 67B parameters and 1.5T tokens at Gopher's 5.76e23; Chinchilla took 70B and 1.4T
    parameters, tokens = laws.optimal(5.76e23)
    assert parameters == pytest.approx(67e9, rel=0.15) and tokens == pytest.approx(1.5e12, rel=0.15)
    assert laws.flops_for_tokens(tokens) == pytest.approx(5.76e23)
    # the re-fit's exponent is 0.5126 (Besiroglu et al. 2024); approach 3's as published beta / (alpha + beta) = 0.45
    for fit, exponent in ((laws.REFIT, 0.5126), (laws.HOFFMANN, 0.45)):
        found = math.log(laws.optimal(1e22, fit)[0] / laws.optimal(1e20, fit)[0]) / math.log(100)
        assert found == pytest.approx(exponent, abs=0.005)
    # DeepSeek LLM 7B and 67B at 2T tokens trained with 4.2e-4 and 3.2e-4, 2304 and 4608 rows of 4096 (table 2)
    for flops, rate, batch in ((6 * 6.9e9 * 2e12, 4.2e-4, 2304 * 4096), (6 * 67e9 * 2e12, 3.2e-4, 4608 * 4096)):
        advice = laws.deepseek(flops)
        assert advice.learning_rate == pytest.approx(rate, rel=0.25)
        assert advice.batch_tokens == pytest.approx(batch, rel=0.35)
    assert laws.olmo_ladder(108e6)[:2] == (0.0047, 160 * 2048)


def test_a_budget_becomes_arguments_that_the_plan_and_the_run_accept(tmp_path, capsys):
    target = tmp_path / "args.json"
    plan_command.main(["--budget_flops", "1e20", "--write", str(target)])
    said = capsys.readouterr().out
    assert "arXiv 2404.10102" in said and "arXiv 2401.02954" in said and "arXiv 2412.04403" in said
    plan = planned(str(target), "gpu=H100-SXM")
    assert 6 * plan["model"]["total"] * plan["data"]["tokens"] == pytest.approx(1e20, rel=0.1)
    assert not [line for line in plan["contradictions"] if "learning_rate" in line or "a parameter" in line]
    model, _, args = parse_args([str(target), "deepspeed=null"], ARGUMENTS)
    built = load_config(model.model_name, model.config_overrides)
    assert sum(p.numel() for p in on_meta(built).parameters()) == plan["model"]["total"] and args.max_steps > 0
    with pytest.raises(SystemExit):
        plan_command.main(["--budget_flops", "1e20", "--write", str(target)])
    assert "the file exists" in capsys.readouterr().err


def test_hours_and_tokens_are_budgets_too(capsys):
    plan_command.main(["--budget_gpu_hours", "100", "gpu=L4", "mfu=0.4", "--json"])
    assert json.loads(capsys.readouterr().out)["flops"] == pytest.approx(100 * 3600 * 121e12 * 0.4)
    plan_command.main(["--tokens", "1e10", "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == pytest.approx(1e10)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["learing_rate=1"],
            "plan.py: error: command line: learing_rate is not an argument. Did you mean learning_rate?",
        ),
        (["gpu=V100"], "plan.py: error: command line: gpu = V100 is not known: choose from L4,"),
        (["gpus=3", "nodes=2"], "cannot be shared out over nodes = 2 evenly"),
        (["gpus=0"], "gpus must be at least 1, got 0."),
        (["mfu=0"], "mfu must be above 0, got 0"),
        (["mfu=40"], "mfu = 40 is a share of the peak: at most 1"),
        (["per_device_train_batch_size=0"], "per_device_train_batch_size must be at least 1, got 0."),
        (["gradient_accumulation_steps=0"], "gradient_accumulation_steps must be at least 1, got 0."),
        (["gpu=L4", "model_name=./none"], "model_name = ./none is not a directory, a Hub id"),
        (["gpu=L4", "optim=galore_adamw"], "optim = galore_adamw: its state is not counted"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, line, capsys):
    with pytest.raises(SystemExit) as end:
        plan_command.main(words)
    said = capsys.readouterr().err
    assert end.value.code == 2 and line in said and said.count("\n") == 1


def test_a_budget_outside_the_laws_is_refused(capsys):
    for flops in ("1e11", "1e28"):
        with pytest.raises(SystemExit):
            plan_command.main(["--budget_flops", flops])
        assert "are outside what the laws were fitted for" in capsys.readouterr().err


def test_at_its_start_a_run_says_two_lines_and_an_unknown_architecture_stops_none(tmp_path):
    values, _ = plan_command.parse(
        ["model_name=smollm2-1m", "max_steps=10", f"output_dir={tmp_path}", "deepspeed=null"]
    )
    config, cpu = load_config("smollm2-1m").to_dict(), torch.device("cpu")
    said, plan = start.plan(config, values, cpu, ranks=2)
    assert said[0].startswith("plan: 1.26M parameters, 32,768 tokens a step x 10 steps = 328K tokens")
    assert "GiB a device (fits)" in said[1] and "of the peak of 2 x cpu" in said[1]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert plan["memory"]["device_bytes"] == total / 2  # the ranks of a machine share it
    said, plan = start.plan(CONFIG_MAPPING["bloom"]().to_dict(), values, cpu, ranks=1)
    assert plan is None and said[0].startswith("plan: none: model_type = bloom is not counted")


def test_the_ranks_of_a_machine_share_its_memory_and_its_cores():
    words = ["model_name=smollm2-1m", "block_size=512", "max_steps=10"]
    _, alone = plan_command.parse([*words, "gpus=1"])
    _, pair = plan_command.parse([*words, "gpus=4", "nodes=2"])
    one, two = plan_command.device_of(alone), plan_command.device_of(pair)
    assert two.memory_bytes == one.memory_bytes / 2
    assert hardware.shared(one, 2).peak_flops == one.peak_flops / 2


def timed_layers(monkeypatch, config, **changes):
    """cpu.parts where n layers take n + 1/4 seconds for each 512 tokens, and any other call one second."""
    monkeypatch.setattr(
        cpu, "_layers", lambda torch, config, setup, layers, *size: math.prod(size) / 512 * (layers + 0.25)
    )
    monkeypatch.setattr(cpu, "_best", lambda work: 1.0 if callable(work) else work)
    given = {"block_size": 512, "micro_batch": 4, "accumulation": 2, "stage": None, "checkpointing": False} | changes
    return cpu.parts(config, memory.Setup(config, **given))


def test_the_parts_of_a_cpu_s_step_are_counted(monkeypatch):
    config = load_config("smollm2-1m").to_dict()
    found = timed_layers(monkeypatch, config)
    assert found == {"layers": 4 * config["num_hidden_layers"], "around": 4 * 0.25, "loss": 1.0, "optimizer": 1 / 2}
    monkeypatch.setattr(cpu, "LAYER", cpu.LAYER // 2**10)  # too much for one time: a row, then a part of one
    assert timed_layers(monkeypatch, config)["layers"] == found["layers"], "the tokens it had not the time for"


@pytest.mark.parametrize("kind", ["llama", "olmoe", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_cpu_s_step_is_timed_on_the_real_model_and_leaves_no_trace(kind, checkpointing):
    config = small(kind).to_dict()
    setup = memory.Setup(config, 64, micro_batch=2, accumulation=1, stage=None, checkpointing=checkpointing)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_num_threads(2)
        low, middle, high, source = cpu.utilization(config, setup)
        assert 0 < low < middle < high and "by the parts of a step" in source
        assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)


def test_small_tensors_keep_32_bit_state_as_bitsandbytes_has_it():
    import bitsandbytes

    for numel in (4095, 4096, 5000):
        weight = torch.nn.Parameter(torch.zeros(numel))
        optimizer = bitsandbytes.optim.AdamW8bit([weight])
        weight.grad = torch.ones(numel)
        optimizer.step()
        held = optimizer.state[weight]
        names = [name for name in ("state1", "state2", "absmax1", "absmax2") if name in held]
        real = sum(held[name].numel() * held[name].element_size() for name in names)
        assert memory._state_bytes("adamw_bnb_8bit", numel, 8) == real, numel


def test_what_a_recorder_needs_for_mfu_is_none_where_it_is_not_known():
    cpu = torch.device("cpu")
    terms = start.utilization_terms(load_config("smollm2-135m").to_dict(), 2048, cpu)
    assert terms["flops_per_token"] == counting.flops(load_config("smollm2-135m").to_dict(), 2048).model
    assert terms["peak_flops"] > 1e9 and terms["device"] == "cpu"
    assert start.utilization_terms({"model_type": "bloom"}, 2048, cpu)["flops_per_token"] is None


def test_the_fields_are_those_of_the_run_with_its_defaults():
    values, _ = plan_command.parse([])
    for cls in ARGUMENTS:
        for each in fields(cls):
            if each.init and each.default is not MISSING and each.name != "bf16":  # which follows the device
                default = VALIDATION_FRACTION if each.name == "validation_fraction" else each.default
                assert values[each.name] == default, each.name
    assert assemble.checkpoints(values) and not assemble.checkpoints(values | {"gradient_checkpointing": False})


def test_the_plan_counts_the_chunk_of_the_loss_that_a_gpu_would_take():
    for gib in (1, 16, 24, 80, 141):
        assert memory.gpu_chunk(49152, gib * 2**30) == loss.default_chunk(49152, gib * 2**30)


@pytest.mark.parametrize(("model", "said", "left_out"), [
    ("smollm2-135m", None, True), ("smollm2-135m", True, False), ("smollm2-1.7b", None, False),
])  # fmt: skip
def test_activation_checkpointing_is_left_out_on_a_gpu_where_the_plan_fits_without_it(
    monkeypatch, model, said, left_out
):
    """1.7B with 16 rows of 2,048 keeps more than 80 GB of activations."""
    monkeypatch.setattr(hardware, "this_device", lambda device: hardware.find("H100-SXM"))
    args = PretrainArguments(activation_checkpointing=said, per_device_train_batch_size=16, deepspeed=None)
    values = resolve((ModelArguments(model_name=model), DataArguments(block_size=2048), args))
    monkeypatch.setattr(type(args), "device", torch.device("cuda"))
    config = load_config(model, {}).to_dict()
    sentence = start.settle_checkpointing(args, config, values, "varlen")
    assert (sentence is not None) == left_out and args.activation_checkpointing is not left_out


def test_the_plans_utilization_is_our_own_where_it_was_measured_and_a_peers_elsewhere():
    words = ["model_name=smollm2-1.7b", "max_steps=1000", "activation_checkpointing=false", "deepspeed=null"]
    ours = planned(*words, "gpu=H100-SXM")["time"]
    assert ours["mfu"] == 0.522 and ours["mfu_source"].startswith("benchmarks/gpu.py on this device: 1,711M weights")
    assert ours["tokens_per_second"] == pytest.approx(45_228, rel=0.01)  # what the run itself reached
    for other in (
        ["gpu=H100-SXM", "gpus=8"],
        ["gpu=A100-80GB"],
        ["gpu=H100-SXM", "model_name=smollm2-1m", "block_size=512"],
    ):
        assert "llm-foundry" in planned(*words, *other)["time"]["mfu_source"]
    zero = planned(*words[:-1], "gpu=H100-SXM")["time"]
    assert zero["mfu"] == 0.426
