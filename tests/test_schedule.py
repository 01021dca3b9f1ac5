"""The learning rate of a run is its formula's, step by step, where its parts are shares of the run."""

import pytest
import torch

from smolpretrain.arguments import SCHEDULE, PretrainArguments
from smolpretrain.training.trainer import PretrainTrainer


def trapezoid(step, peak, warmup, decay, total):
    """Rate of the step that follows so many: up to the peak, level, down to 0 at the end."""
    return peak * max(0.0, min(1.0, step / warmup if warmup else 1.0, (total - step) / decay))


def rates(tmp_path, total, at, **words):
    """Of a Trainer's own scheduler, at each of the steps."""
    args = PretrainArguments(
        output_dir=str(tmp_path), deepspeed=None, eval_strategy="no", lr_scheduler_type="warmup_stable_decay", **words
    )
    made = PretrainTrainer(model=torch.nn.Linear(1, 1), args=args)
    made.optimizer = torch.optim.SGD(made.model.parameters(), lr=args.learning_rate)
    factor = made.create_scheduler(total).lr_lambdas[0]
    return [args.learning_rate * factor(step) for step in at]


@pytest.mark.parametrize(
    ("peak", "total", "decay", "share"),
    [(3e-3, 2_000_000, 400_000, 0.2), (3e-3, 2_600_000, 520_000, 0.2), (5e-4, 5_240_000, 524_000, 0.1)],
    ids=["135M", "360M", "1.7B"],
)
def test_decay_fraction_gives_the_rates_of_smollm2(tmp_path, peak, total, decay, share):
    """Steps as the authors wrote them out: config_smollm2_*.yaml, lr_decay_starting_step and lr_decay_steps."""
    at = [0, 1, 1999, 2000, total - decay - 1, total - decay, total - decay + 1, total - decay // 2, total - 1, total]
    seen = rates(tmp_path, total, at, learning_rate=peak, warmup_steps=2000, max_steps=total, decay_fraction=share)
    assert seen == pytest.approx([trapezoid(step, peak, 2000, decay, total) for step in at], rel=1e-9, abs=1e-15)


def test_without_max_steps_shares_are_of_the_steps_that_the_epochs_make(tmp_path):
    seen = rates(tmp_path, 40, range(41), warmup_steps=0.05, num_train_epochs=2, decay_fraction=0.25)
    assert seen == pytest.approx([trapezoid(step, 1e-3, 2, 10, 40) for step in range(41)], rel=1e-9, abs=1e-15)


def test_warm_up_and_decay_may_be_the_whole_run_and_another_decay_type_is_kept(tmp_path):
    seen = rates(tmp_path, 7, range(8), warmup_steps=0.5, max_steps=7, decay_fraction=0.5)
    assert seen == pytest.approx([trapezoid(step, 1e-3, 4, 3, 7) for step in range(8)], rel=1e-9, abs=1e-15)
    options = {"decay_type": "1-sqrt", "min_lr_ratio": 0.1}
    seen = rates(tmp_path, 8, [4, 6, 8], warmup_steps=0, max_steps=8, decay_fraction=0.5, lr_scheduler_kwargs=options)
    assert seen == pytest.approx([1e-3, 1e-3 * (0.9 * (1 - 0.5**0.5) + 0.1), 1e-4], rel=1e-9)


def test_a_run_that_goes_on_is_held_against_its_decay(tmp_path):
    words = {"output_dir": str(tmp_path), "deepspeed": None, "lr_scheduler_type": "warmup_stable_decay"}
    facts = [PretrainArguments(**words, decay_fraction=share).on_resume(SCHEDULE) for share in (0.1, 0.2)]
    assert facts[0] != facts[1]
