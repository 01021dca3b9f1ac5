"""Gradients in fewer bytes: what is sent, what it leads to, and what is refused where it cannot be."""

import json
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedDataParallelKwargs

from smolpretrain import limits
from smolpretrain.arguments import DataArguments, ModelArguments, PretrainArguments
from smolpretrain.core.architectures import load_config
from smolpretrain.core.words import parse_args
from smolpretrain.training import compression, model
from smolpretrain.training.trainer import PretrainTrainer

CLASSES = (ModelArguments, DataArguments, PretrainArguments)
ZERO = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}, "communication_data_type": "fp32"}


def compressed(kind, *words):
    return parse_args([f"gradient_compression={kind}", *words], CLASSES)[2]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_zero_the_argument_is_deepspeed_s_own_key(stage):
    args = compressed("bf16", f"deepspeed=ds_configs/zero{stage}.json", "bf16=false")
    assert args.deepspeed_plugin.hf_ds_config.config["communication_data_type"] == "bf16"
    args = compressed("none", f"deepspeed=ds_configs/zero{stage}.json")
    assert "communication_data_type" not in args.deepspeed_plugin.hf_ds_config.config


@pytest.mark.parametrize(("kind", "name"), [("none", "NO"), ("fp16", "FP16")])
def test_without_zero_the_trainer_s_accelerator_has_torch_s_hook(kind, name, tmp_path):
    words = ["deepspeed=null", f"output_dir={tmp_path}", "max_steps=60", "eval_strategy=no"]
    network = model.random_model(load_config("smollm2-1m"), 0, "sdpa")
    handler = PretrainTrainer(model=network, args=compressed(kind, *words)).accelerator.ddp_handler
    assert (handler.comm_hook.name, handler.comm_state_option) == (name, {})


@pytest.mark.parametrize(("steps", "begin"), [(5, 2), (60, 6), (50_000, 1000), (-1, 1000)])
def test_powersgd_begins_after_a_tenth_of_the_run(steps, begin):
    handler = DistributedDataParallelKwargs()
    compression.hook(handler, "powersgd", steps)
    assert handler.comm_state_option == {"matrix_approximation_rank": 4, "start_powerSGD_iter": begin}


@pytest.mark.parametrize(
    ("kind", "words", "sentence"),
    [
        ("int8", [], "gradient_compression = 'int8' is not one of none, bf16, fp16, powersgd"),
        ("bf16", ["deepspeed=null"], "needs NCCL, and CPUs have gloo: torch refuses its hook"),
        ("powersgd", ["deepspeed=null"], "needs NCCL, and CPUs have gloo: its chained reductions hang"),
        ("powersgd", [], "is DDP's, and ZeRO (deepspeed = "),
        ("fp16", ["bf16=true"], "saves nothing: ZeRO sends bfloat16 where bf16 = true"),
        ("bf16", [f"deepspeed={json.dumps(ZERO)}"], "has communication_data_type = fp32. Leave one of them out."),
    ],
)
def test_what_cannot_be_is_refused_by_name(kind, words, sentence):
    with pytest.raises(ValueError) as error:
        compressed(kind, *words)
    assert f"gradient_compression = {kind}" in str(error.value).replace("'", "") and sentence in str(error.value)


def test_powersgd_skips_no_step():
    args = SimpleNamespace(gradient_compression="powersgd", deepspeed=None, use_cpu=False, on_spike="skip")
    with pytest.raises(ValueError, match="so no step can be skipped: on_spike=stop"):
        limits.check_compression(args)


@pytest.mark.slow
def test_compressed_gradients_are_as_many_fewer_bytes_on_the_wire_as_planned_and_train_as_well(wires):
    wire, scaling = wires
    found = {}
    for kind in ("none", "fp16"):
        words = ["block_size=64", "per_device_train_batch_size=2", "warmup_steps=10", "learning_rate=3e-3",
                 "optim=adamw_torch", "bf16=false", "deepspeed=null", f"gradient_compression={kind}"]  # fmt: skip
        found[kind] = wire.measure(words, 2, steps=40)[0]
        planned, _, _ = scaling.predict(words, 2, None, 1.0)
        assert planned < found[kind]["bytes"] < 1.1 * planned, kind
    assert found["fp16"]["bytes"] < 0.6 * found["none"]["bytes"]
    assert found["fp16"]["losses"][0] > 7 > found["none"]["losses"][-1], "what is compared has learned"
    assert found["fp16"]["losses"] == pytest.approx(found["none"]["losses"], abs=0.02)
