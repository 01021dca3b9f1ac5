"""The sum that the plan shows: which parts count at the fullest moment, and how often."""

import json

import pytest

from smolpretrain import plan
from smolpretrain.core.architectures import load_config
from smolpretrain.planning import memory

MODEL = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 512}
SMALL = {**MODEL, "num_attention_heads": 4, "num_key_value_heads": 2}
STATES = ("weights", "master", "optimizer")

# name: (what differs of a set-up, the moment, parts besides those of STATES that stay as they are)
CASES = {
    "long rows fill the loss": (
        {"micro_batch": 8, "vocab": 16384, "bucket": 1},
        "loss",
        lambda s, held: {"activations": memory.activations(s), "loss": memory.loss_bytes(s)},
    ),
    "with accumulation the loss carries gradients": (
        {"micro_batch": 8, "vocab": 16384, "bucket": 1, "accumulation": 2},
        "loss",
        lambda s, held: {
            "activations": memory.activations(s),
            "loss": memory.loss_bytes(s),
            "gradients": held["gradients"],
        },
    ),
    "a checkpointed backward holds a layer and half of one": (
        {"micro_batch": 1, "block_size": 128, "accumulation": 1, "vocab": 8, "deep": 40},
        "backward",
        lambda s, held: {
            "activations": memory.layer_activations(s) * 3 // 2,
            "gradients": held["gradients"],
            "buckets": memory.buckets(s),
        },
    ),
    "ZeRO-2 adds a micro-batch's gradients to the carried ones": (
        {"micro_batch": 1, "block_size": 128, "accumulation": 2, "vocab": 8, "deep": 40},
        "backward",
        lambda s, held: {
            "activations": memory.layer_activations(s) * 3 // 2,
            "gradients": 2 * held["gradients"],
            "buckets": memory.buckets(s),
        },
    ),
    "ZeRO-1 carries them in place": (
        {"micro_batch": 1, "block_size": 128, "accumulation": 2, "vocab": 8, "deep": 40, "stage": 1},
        "backward",
        lambda s, held: {
            "activations": memory.layer_activations(s) * 3 // 2,
            "gradients": held["gradients"],
            "buckets": memory.buckets(s),
        },
    ),
    "a step holds float32 gradients": (
        {"micro_batch": 1, "block_size": 16, "bucket": 1, "vocab": 8, "deep": 8},
        "step",
        lambda s, held: {"gradients": held["gradients"] + held["gradients_fp32"]},
    ),
    "offloaded, a device holds no master weights, optimizer or float32 gradients": (
        {"block_size": 16, "bucket": 1, "vocab": 8, "deep": 8, "offload": True, "optim": "adamw_torch"},
        "backward",
        lambda s, held: {
            "master": 0,
            "optimizer": 0,
            "activations": memory.layer_activations(s) * 3 // 2,
            "gradients": held["gradients"],
            "buckets": memory.buckets(s),
        },
    ),
    "ZeRO-3 gathers what it computes with": (
        {"micro_batch": 8, "vocab": 16384, "bucket": 1, "stage": 3, "ranks": 2},
        "loss",
        lambda s, held: {
            "activations": memory.activations(s),
            "loss": memory.loss_bytes(s),
            "gathered": memory.gathered(s),
        },
    ),
    "a CPU's 8-bit step makes copies, beside what its libraries hold": (
        {"micro_batch": 1, "block_size": 16, "cuda": False, "vocab": 8, "deep": 8},
        "step",
        lambda s, held: {
            "gradients": held["gradients"] + held["gradients_fp32"],
            "step": memory.step_copies(s),
            "runtime": 110 * 2**20,
        },
    ),
    "without DeepSpeed or checkpointing a backward has every layer's gradients and one layer's activations": (
        {"block_size": 16, "stage": None, "checkpointing": False, "vocab": 8, "deep": 8,
         "offload": True, "optim": "adamw_torch"},
        "backward",
        lambda s, held: {"activations": memory.layer_activations(s), "gradients": held["gradients"]},
    ),
}  # fmt: skip


def set_up(changes):
    given = {"block_size": 256, "checkpointing": True, "stage": 2, **changes}
    config = SMALL | {"num_hidden_layers": given.pop("deep", 4), "vocab_size": given.pop("vocab", 512)}
    return memory.Setup(load_config("smollm2-1m", config).to_dict(), **given)


@pytest.mark.parametrize("name", CASES)
def test_the_fullest_moment_is_the_sum_of_its_parts(name):
    changes, moment, parts = CASES[name]
    setup = set_up(changes)
    held = memory.states(setup)
    expected = {part: held[part] for part in STATES} | parts(setup, held)
    assert memory.peak(setup) == {part: size for part, size in expected.items() if size} | {"moment": moment}


def test_every_moment_is_the_fullest_of_some_set_up():
    assert {moment for _, moment, _ in CASES.values()} == {"loss", "backward", "step"}


@pytest.mark.parametrize("gpu", ["L4", "H100-SXM"])
def test_the_sum_that_the_plan_shows_is_that_of_its_parts_and_is_held_against_the_device(gpu, capsys):
    plan.main(["model_name=smollm2-1.7b", f"gpu={gpu}", "gpus=1", "--json"])
    shown = json.loads(capsys.readouterr().out)["memory"]
    assert shown["total_bytes"] == sum(shown["parts"].values()) > 2 * 1_711_376_384
    assert shown["fits"] == (shown["total_bytes"] <= shown["device_bytes"]) == (gpu == "H100-SXM")
    plan.main(["model_name=smollm2-1.7b", f"gpu={gpu}", "gpus=1"])
    assert f"at the fullest moment {shown['total_bytes'] / 2**30:.2f} GiB" in " ".join(capsys.readouterr().out.split())
