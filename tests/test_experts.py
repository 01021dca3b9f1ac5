"""Mixtures of experts: an auxiliary loss of one weight whatever the accumulation and the ranks, and what is chosen."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from smolpretrain import run_pretrain
from smolpretrain.arguments import PretrainArguments
from smolpretrain.core.architectures import built_in, load_config
from smolpretrain.data.collator import PackedCollator
from smolpretrain.planning import counting
from smolpretrain.training import loss, model
from smolpretrain.training.experts import Experts
from smolpretrain.training.trainer import PretrainTrainer

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 512}
COEFFICIENT = 0.5  # loud enough to be seen beside the cross-entropy


def mixture(name="smollm2-1m-moe", **changes):
    config = load_config(name, SIZES | {"router_aux_loss_coef": COEFFICIENT} | changes)
    return model.random_model(config, 0, "sdpa")


def rows(count):
    return [{"input_ids": row} for row in np.random.default_rng(0).integers(1, 512, (count, 64))]


def trainer(tmp_path, network, accumulation, count, **options):
    set_seed(0)
    words = {"eval_strategy": "no", "save_strategy": "no", "max_steps": 1, "warmup_steps": 0, "bf16": False}
    words |= {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 1e9, "logging_steps": 1}
    words |= {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": accumulation}
    args = PretrainArguments(
        output_dir=str(tmp_path), deepspeed=None, disable_tqdm=True, per_device_train_batch_size=1, **words | options
    )
    return PretrainTrainer(
        model=network, args=args, train_dataset=rows(count), eval_dataset=rows(2), data_collator=PackedCollator(0)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("accumulation", "count"), [(1, 4), (4, 4), (4, 3)])  # the last: an epoch's unfilled step
def test_a_step_s_auxiliary_loss_is_the_mean_over_its_micro_batches(accumulation, count, checkpointing, tmp_path):
    made = trainer(tmp_path, mixture(), accumulation, count, activation_checkpointing=checkpointing)
    loss.install_chunked_loss(made.model, 100)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    expected, found = mixture(), []
    batches = [PackedCollator(0)([row]) for row in rows(count)][: min(accumulation, count)]
    for batch in batches:
        output = expected(**batch, output_router_logits=True)  # transformers' own: cross-entropy + 0.5 x auxiliary
        (output.loss / len(batches)).backward()
        aux = COEFFICIENT * output.aux_loss.item()
        found.append((output.loss.item() - aux, aux))
    for name, p in expected.named_parameters():
        assert torch.allclose(before[name] - dict(made.model.named_parameters())[name], p.grad, atol=1e-5), name
    row = next(row for row in made.state.log_history if "loss" in row)
    means = torch.tensor(found).mean(0)
    assert (row["loss"], row["aux_loss"]) == pytest.approx((means[0].item(), means[1].item()), rel=1e-5)
    assert row["aux_loss"] > 0.9 * COEFFICIENT * 2  # 2 of 8 experts a token: even routing gives 2


def test_held_out_loss_is_a_cross_entropy(tmp_path):
    made = trainer(tmp_path, mixture(), 1, 4)
    logits = made.model(
        **{k: v for k, v in PackedCollator(0)(rows(2)).items() if k != "labels"}, use_cache=False
    ).logits
    labels = PackedCollator(0)(rows(2))["labels"]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert made.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_load_is_that_of_the_busiest_expert_and_the_entropy_of_all():
    experts = Experts(mixture())
    even = torch.eye(8).repeat(4, 1) + torch.eye(8).roll(1, 1).repeat(4, 1)  # each expert is chosen equally often
    one = torch.zeros(32, 8)
    one[:, :2] = 1.0  # all tokens go to the first two
    experts.count((even, even))
    assert experts.take() == {"expert_load_max": 1.0, "expert_load_entropy": 1.0}
    experts.count((even, one))
    experts.count((even, one))
    assert experts.take() == {
        "expert_load_max": 4.0,
        "expert_load_entropy": pytest.approx((1 + math.log(2, 8)) / 2, abs=1e-5),
    }
    assert experts.take() == {}


@pytest.mark.parametrize("name", ["smollm2-1m", "smollm2-135m"])
def test_a_sibling_has_as_many_active_weights_and_several_times_as_many_in_all(name):
    dense, sibling = (counting.count(built_in(n)) for n in (name, f"{name}-moe"))
    assert sibling.active == pytest.approx(dense.total, rel=0.01) and sibling.total > 2 * dense.total


def test_muon_is_refused_a_mixture_s_stacked_experts():
    with pytest.raises(ValueError, match=r"optim = muon takes matrices, .* is a stack of them \[8, 64, 64\]"):
        model.check_optimizer(mixture().config, "muon")
    model.check_optimizer(load_config("smollm2-1m"), "muon")


@pytest.mark.parametrize(
    ("name", "optim", "rows"),
    [
        ("smollm2-1m", "muon", {"loss", "z_loss"}),
        (
            "smollm2-1m-moe",
            "adamw_torch_fused",
            {"loss", "z_loss", "aux_loss", "expert_load_max", "expert_load_entropy"},
        ),
    ],
)
def test_a_run_records_what_it_minimizes_and_how_tokens_are_sent(name, optim, rows, small_words, tmp_path):
    words = [w for w in small_words if not w.startswith(("model_name", "config_overrides", "max_steps", "warmup"))]
    words += ["z_loss=1e-4", f"model_name={name}", f"config_overrides={json.dumps(SIZES)}", f"optim={optim}"]
    words += ["max_steps=3", "warmup_steps=1"]
    run_pretrain.main([*words, "deepspeed=null", f"output_dir={tmp_path}", "validation_fraction=0"])
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    for step in steps:
        assert {key for key in step if "loss" in key or "expert" in key} == rows | {"loss", "z_loss"}
        assert step["z_loss"] == pytest.approx(1e-4 * math.log(512) ** 2, rel=0.1)  # of weights that know nothing yet
        assert step["loss"] == pytest.approx(math.log(512), rel=0.1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(again.config, "router_aux_loss_coef", 0.01) == 0.01 and again.config.use_cache


@pytest.mark.slow
def test_one_rank_of_four_micro_batches_and_two_of_two_train_alike(launch, small_words, tmp_path):
    words = [*(w for w in small_words if not w.startswith(("model_name", "config_overrides"))), "bf16=false"]
    overrides = json.dumps(SIZES | {"router_aux_loss_coef": COEFFICIENT})
    words += ["model_name=smollm2-1m-moe", f"config_overrides={overrides}", "optim=adamw_torch", "max_steps=6"]
    words += ["save_strategy=no", f"prepared_dir={tmp_path / 'prepared'}"]
    launch("python", "run_pretrain.py", *words, "deepspeed=null", f"output_dir={tmp_path / 'one'}",
           "gradient_accumulation_steps=4")  # fmt: skip
    launch("deepspeed", "--num_gpus", 2, "run_pretrain.py", *words, f"output_dir={tmp_path / 'two'}")
    rows = [[json.loads(line) for line in (tmp_path / each / "metrics.jsonl").read_text().splitlines()]
            for each in ("one", "two")]  # fmt: skip
    assert len(rows[0]) == 6
    for alone, together in zip(*rows, strict=True):
        for name in ("loss", "aux_loss", "expert_load_entropy", "grad_norm"):
            assert together[name] == pytest.approx(alone[name], rel=2e-3), name
    one, two = (load_file(tmp_path / each / "model.safetensors") for each in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in one)
