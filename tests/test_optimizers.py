"""Every optimizer that a run may name: resumed to the bit, counted to the byte, refused where it cannot work."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training import TINY
from transformers import Gemma2Config, LlamaConfig, set_seed

from smolpretrain import limits
from smolpretrain.arguments import DataArguments, ModelArguments, PretrainArguments
from smolpretrain.core import architectures
from smolpretrain.core.words import parse_args
from smolpretrain.data.collator import PackedCollator
from smolpretrain.data.tokens.tokenization import train_tokenizer
from smolpretrain.planning import memory
from smolpretrain.training import loss, model
from smolpretrain.training.trainer import PretrainTrainer

EOS = 0
SIZES = TINY | {"tie_word_embeddings": False}
ALONE = {"lr_scheduler_type": "constant", "warmup_steps": 2}  # what schedule-free optimizers ask for
OPTIMIZERS = [
    *("adamw_bnb_8bit", "adamw_torch_fused", "adamw_torch", "muon", "lion_8bit", "lion_32bit", "paged_adamw_32bit"),
    *("ademamix_8bit", "rmsprop_bnb_8bit", "sgd", "adafactor", "schedule_free_adamw"),
]


def rows(count, length=64):
    ids = np.random.default_rng(0).integers(1, SIZES["vocab_size"], (count, length))
    ids[np.random.default_rng(1).random(ids.shape) < 0.1] = EOS
    return [{"input_ids": row} for row in ids]


def trainer(directory, optim, **options):
    set_seed(0)
    words = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "warmup_steps": 1}
    words |= {"bf16": False, "per_device_train_batch_size": 2, "optim": optim, "logging_steps": 1}
    words |= ALONE if optim.startswith("schedule_free") else {}
    args = PretrainArguments(output_dir=str(directory), deepspeed=None, disable_tqdm=True, **words | options)
    return PretrainTrainer(
        model=model.random_model(LlamaConfig(**SIZES), 0, "sdpa"),
        args=args,
        train_dataset=rows(32),
        eval_dataset=rows(2),
        data_collator=PackedCollator(EOS),
    )


def bits(made):
    """Every parameter and every tensor of the optimizer's state, by its place."""
    held = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    state = made.optimizer.state_dict()["state"]
    return held | {(at, k): v.clone() for at, each in state.items() for k, v in each.items() if torch.is_tensor(v)}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_resumed_run_ends_bit_identical_and_the_plan_knows_its_state(optim, tmp_path):
    if optim.startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    whole = trainer(tmp_path / "whole", optim, save_strategy="steps", save_steps=3)
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.train()
    resumed = trainer(tmp_path / "resumed", optim)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    ended, again = bits(whole), bits(resumed)
    assert ended.keys() == again.keys() and all(torch.equal(ended[name], again[name]) for name in ended)
    assert not any(torch.equal(ended[name], start) for name, start in before.items())  # every weight was trained
    if optim in memory.OPTIMIZERS:
        setup = memory.Setup(LlamaConfig(**SIZES).to_dict(), 64, stage=None, optim=optim)
        held = {
            v.data_ptr(): v.nbytes for s in whole.optimizer.state.values() for v in s.values() if torch.is_tensor(v)
        }
        assert sum(held.values()) == memory.states(setup)["optimizer"]
    counted = architectures.size(whole.model.config)
    reckoned = architectures.checkpoint_bytes(counted, optim=optim, bf16=False, zero_stage=None)[0]
    reckoned -= architectures.BESIDES
    files = [tmp_path / "whole" / "checkpoint-3" / name for name in ("model.safetensors", "optimizer.pt")]
    size = sum(file.stat().st_size for file in files)
    assert size - 2**17 < reckoned < (2.0 if optim == "adafactor" else 1.2) * size  # names and headers of a tiny model


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(tmp_path):
    made = trainer(tmp_path, "muon", optim_args="momentum=0.9,ns_steps=4")
    made.train()
    kinds = {}
    for name, p in made.model.named_parameters():
        kinds.setdefault(tuple(sorted(made.optimizer.optimizer.state[p])), set()).add(name.split(".")[-2])
    hidden = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert kinds[("momentum_buffer",)] == hidden
    assert {"embed_tokens", "lm_head", "input_layernorm", "norm"} <= kinds[("exp_avg", "exp_avg_sq", "step")]
    groups = made.optimizer.param_groups
    assert groups[0]["momentum"] == 0.9 and groups[0]["ns_steps"] == 4
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert len({group["lr"] for group in groups}) == 1  # the schedule reaches all of them


def test_muon_s_step_is_torch_s_own_and_as_large_as_adamw_s(tmp_path):
    made = trainer(tmp_path, "muon", max_steps=1, warmup_steps=0, weight_decay=0.0, max_grad_norm=1e9)
    gradients = {}
    made.optimizer = made.create_optimizer()
    made.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in made.model.named_parameters()})
    )
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    name = "model.layers.1.mlp.up_proj.weight"
    alone = torch.nn.Parameter(before[name].clone())
    alone.grad = gradients[name]
    torch.optim.Muon([alone], lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    after = dict(made.model.named_parameters())
    assert torch.equal(after[name], alone)
    size = (after[name] - before[name]).pow(2).mean().sqrt() / 1e-3
    assert 0.1 < size < 0.4  # AdamW's is 0.2 to 0.4 (arXiv 2502.16982, section 2.2)


def test_schedule_free_weights_are_read_as_their_average(tmp_path):
    pytest.importorskip("schedulefree")
    made = trainer(tmp_path, "schedule_free_adamw", eval_strategy="no")
    made.processing_class = train_tokenizer(["some text to train on, long enough"] * 3, 300)
    made.train()
    optimizer, weights = made.optimizer.optimizer, dict(made.model.named_parameters())
    trained = {name: p.detach().clone() for name, p in weights.items()}
    # a trained weight is 0.9 x the average + 0.1 x the last iterate (Defazio et al. 2024, arXiv 2405.15682)
    average = {name: (y - 0.1 * optimizer.state[weights[name]]["z"]) / 0.9 for name, y in trained.items()}
    made.evaluate()
    assert all(torch.allclose(p, average[name], atol=1e-6) for name, p in weights.items())
    optimizer.train()  # as the next training_step does
    assert all(torch.allclose(p, trained[name], atol=1e-6) for name, p in weights.items())
    made.export()
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.allclose(exported[name], average[name], atol=1e-6) for name in average)
    assert not all(torch.allclose(trained[name], average[name], atol=1e-6) for name in average)


def refusal(*words):
    with pytest.raises(ValueError) as error:
        parse_args([*words], (ModelArguments, DataArguments, PretrainArguments))
    return str(error.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optim", ["muon", "adafactor"])
def test_what_needs_whole_tensors_is_refused_under_zero(optim, stage):
    found = refusal(f"optim={optim}", f"deepspeed=ds_configs/zero{stage}.json")
    assert f"optim = {optim} works on whole tensors" in found and "set deepspeed=null" in found


@pytest.mark.parametrize(
    ("optim", "package"),
    [
        ("schedule_free_adamw", "schedulefree"),
        ("lion_8bit", "bitsandbytes"),
        ("galore_adamw", "galore-torch"),
        ("adamw_torch_8bit", "torchao"),
        ("stable_adamw", "torch-optimi"),
    ],
)
def test_an_optimizer_whose_package_is_missing_is_refused_by_its_name(optim, package, monkeypatch):
    module = next(module for begins, (module, _) in limits.PACKAGES.items() if optim.startswith(begins))
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(limits, "find_spec", lambda name: None if name == module else True)
    found = refusal(f"optim={optim}", "deepspeed=null")
    assert f"optim = {optim} needs {package}, which is not installed: pip install {package}" in found


def test_schedule_free_brings_its_own_warm_up_and_a_share_is_no_number_of_steps(monkeypatch):
    monkeypatch.setattr(limits, "find_spec", lambda name: True)
    for words in (["warmup_steps=10"], ["lr_scheduler_type=constant"]):  # the other is the default: cosine, 0.01
        found = refusal("optim=schedule_free_adamw", "deepspeed=null", *words)
        assert "warms up by itself" in found and "lr_scheduler_type=constant" in found


def test_a_z_loss_without_the_loss_in_chunks_is_refused():
    assert "loss_chunk_tokens = 0 takes another" in refusal("z_loss=1e-4", "deepspeed=null", "loss_chunk_tokens=0")
    liger = refusal("z_loss=1e-4", "deepspeed=null", "use_liger_kernel=true")
    assert "use_liger_kernel = true takes another" in liger
    assert "shares the head out" in refusal("z_loss=1e-4", "deepspeed=ds_configs/zero3.json")


def test_a_z_loss_is_refused_to_a_model_that_keeps_its_own_loss():
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    capped = model.random_model(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.1), 0, "eager")
    with pytest.raises(ValueError, match=r"z_loss = 0.1 is part of the loss in chunks, .* its own"):
        loss.choose(capped, None, 0.1, None)
    assert "the model's own" in loss.choose(capped, None, 0.0, None)


def test_liger_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert "use_liger_kernel = true needs a GPU" in refusal("use_liger_kernel=true", "deepspeed=null")


def test_muon_s_options_are_named_and_a_near_name_is_offered():
    assert "takes momentum and ns_steps, not beta" in refusal("optim=muon", "deepspeed=null", "optim_args=beta=1")
    assert "Did you mean muon?" in refusal("optim=muonn", "deepspeed=null")
