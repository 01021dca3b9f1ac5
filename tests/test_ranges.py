"""Every range of training's arguments: just inside is accepted, just outside is refused by name."""

import pytest

from smolpretrain import limits
from smolpretrain.arguments import DataArguments, ModelArguments, PretrainArguments
from smolpretrain.core.words import parse_args

ABOVE_0, AT_LEAST_0, AT_LEAST_1 = "above 0", "at least 0", "at least 1"
DECAY = ("lr_scheduler_type=warmup_stable_decay", "warmup_steps=0")
EDGES = {  # key: (the rule as it is said, values just inside, values just outside)
    **dict.fromkeys(
        ("learning_rate", "max_grad_norm", "adam_epsilon", "num_train_epochs", "neftune_noise_alpha"),
        (ABOVE_0, (1e-12,), (0, -1e-12)),
    ),
    **dict.fromkeys(("save_steps", "eval_steps", "logging_steps"), (ABOVE_0, (1,), (0, -1))),
    "decay_fraction": ("above 0 and at most 1", (1e-12, 1), (0, 1.000001)),
    **dict.fromkeys(("weight_decay", "z_loss", "warmup_steps"), (AT_LEAST_0, (0,), (-1e-12,))),
    **dict.fromkeys(
        ("sample_steps", "loss_chunk_tokens", "keep_every_steps", "dataloader_num_workers"), (AT_LEAST_0, (0,), (-1,))
    ),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "label_smoothing_factor"), ("at least 0 and below 1", (0, 0.999999), (-1e-12, 1))
    ),
    **dict.fromkeys(("seed", "data_seed"), ("at least 0 and below 2^32", (0, 4294967295), (-1, 4294967296))),
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("max_eval_samples", "max_eval_documents", "max_bad_steps", "ddp_timeout"),
        ),
        (AT_LEAST_1, (1,), (0,)),
    ),
}


def parse(key, value):
    words = [word for word in DECAY if key == "decay_fraction"]
    classes = (ModelArguments, DataArguments, PretrainArguments)
    return parse_args(["deepspeed=null", "optim=adamw_torch", *words, f"{key}={value}"], classes)[2]


def test_no_range_is_left_out():
    assert set(EDGES) == {name for _, names in limits.RANGES.values() for name in names.split()}


@pytest.mark.parametrize("key", EDGES)
def test_a_value_just_inside_its_range_is_accepted_and_just_outside_refused(key):
    rule, inside, outside = EDGES[key]
    for value in inside:
        assert getattr(parse(key, value), key) == value
    for value in outside:
        with pytest.raises(ValueError) as caught:
            parse(key, value)
        assert str(caught.value) == f"command line: {key} must be {rule}, got {value}."
