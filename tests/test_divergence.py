"""A run that no longer learns says so at once, names the rows, changes no weight by them and ends with status 3."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, TrainerCallback

from smolpretrain.arguments import PretrainArguments
from smolpretrain.data.collator import PackedCollator
from smolpretrain.training import model
from smolpretrain.training.safety import checkpoints
from smolpretrain.training.trainer import PretrainTrainer

TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BLOCK = 16


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of a kilobyte
    yield
    torch.set_num_threads(threads)


class Fault(TrainerCallback):
    """Harms the steps of `at`: their loss, their gradient, or the weights after them; notes every step's weights."""

    def __init__(self, trainer, what, at, by):
        self.trainer, self.what, self.at, self.by, self.seen, self.fired = trainer, what, at, by, [], 0
        trainer.model.register_forward_hook(self.after_forward)
        trainer.model.lm_head.weight.register_hook(self.on_gradient)

    def due(self, what):
        due = self.what == what and self.trainer.state.global_step + 1 in self.at
        self.fired += due
        return due

    def after_forward(self, network, args, outputs):
        if self.due("loss"):
            outputs.loss = outputs.loss * self.by

    def on_gradient(self, gradient):
        return gradient * self.by if self.due("gradient") else gradient

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = snapshot(self.trainer)
        if self.due("weights"):  # as an optimizer that overflows would leave them
            model.lm_head.weight.data[0] = self.by

    def on_step_end(self, args, state, control, **kwargs):
        after = snapshot(self.trainer)
        same = all(torch.equal(a, b) for a, b in zip(self.before, after, strict=False))
        self.seen.append(same and not any(new.any() for new in after[len(self.before) :]))  # state of a first step


class Noting(PretrainTrainer):
    """Keeps the ids of the micro-batch that it trains on."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.given = inputs["input_ids"]
        return super().training_step(model, inputs, num_items_in_batch)


def snapshot(trainer):
    optimizer = trainer.optimizer.optimizer
    moments = [v for entry in optimizer.state.values() for v in entry.values() if torch.is_tensor(v)]
    return [t.detach().clone() for t in (*trainer.model.parameters(), *moments)]


def train(output_dir, what, at, by=math.nan, resume_from=None, fault_class=Fault, sizes=TINY, lag=None, **arguments):
    """A real Trainer on random rows with one fault; returns it, what was told, and the fault."""
    known = {"output_dir": str(output_dir), "deepspeed": None, "optim": "adamw_torch_fused", "bf16": False,
             "per_device_train_batch_size": 2, "save_steps": 2, "max_steps": 10, "eval_strategy": "no",
             "warmup_steps": 0, "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-2}  # fmt: skip
    args = PretrainArguments(**known | arguments)
    ids = np.random.default_rng(0).integers(1, TINY["vocab_size"], (48, BLOCK))
    trainer = Noting(
        model=model.random_model(LlamaConfig(**sizes), 0, "sdpa"),
        args=args,
        train_dataset=[{"input_ids": row} for row in ids],
        data_collator=PackedCollator(0, True),
    )
    told = []
    trainer.divergence.tell = lambda state, sentence, row: told.append((state.global_step, sentence, row))
    trainer.divergence.lag = lag
    fault = fault_class(trainer, what, at, by)
    trainer.add_callback(fault)
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    assert fault.fired
    return trainer, told, fault


def saved(output_dir):
    return sorted(step for step, path in checkpoints.by_step(output_dir) if checkpoints.verify(path))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimizer(tmp_path, optim, what):
    trainer, told, fault = train(tmp_path, what, {3}, optim=optim)
    assert fault.seen == [step == 3 for step in range(1, 11)]
    assert [step for step, *_ in told] == [3] and trainer.divergence.ended is None
    assert told[0][2]["bad_step"] == (
        "a loss of nan" if what == "loss" else "a gradient that is not finite, though every loss is"
    )
    losses = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    assert math.isnan(losses[3]["loss"]) == (what == "loss")
    assert all(math.isfinite(row["loss"]) for step, row in losses.items() if step > 3)  # Trainer's would stay NaN
    assert [losses[step]["skipped_steps"] for step in (2, 3, 10)] == [0, 1, 1]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_judged_while_the_next_one_runs_changes_nothing_either(tmp_path, what, optim):
    """As on CUDA, where the host does not wait: told a step late, never applied, and not saved where a save is due."""
    unlogged = {"lag": 1, "logging_steps": 50, "logging_first_step": False, "optim": optim, "save_total_limit": 9}
    trainer, told, fault = train(tmp_path, what, {3, 6}, **unlogged)
    assert fault.seen == [step in (3, 6) for step in range(1, 11)]
    assert [row[0] - (1 if step == 3 else 0) for row, step in zip(told, (3, 6), strict=True)] == [3, 6]
    assert [sentence.split(":")[0] for _, sentence, _ in told] == ["Step 3", "Step 6"]
    assert saved(tmp_path) == [2, 4, 8, 10] and trainer.divergence.skipped == 2  # 6 was due


def test_a_run_that_is_judged_late_ends_after_as_many_bad_steps_and_applies_none(tmp_path):
    unlogged = {"lag": 1, "logging_steps": 50, "logging_first_step": False, "save_steps": 50}
    trainer, _, fault = train(tmp_path, "gradient", range(4, 99), **unlogged)
    assert fault.seen == [False] * 3 + [True] * 4 and trainer.state.global_step == 7
    assert "3 of 6 steps were applied" in trainer.divergence.ended and saved(tmp_path) == []


def test_three_in_a_row_end_the_run_before_the_next_save_and_name_the_last_good_checkpoint(tmp_path):
    trainer, told, _ = train(tmp_path, "loss", range(4, 99))
    assert trainer.state.global_step == 6 and saved(tmp_path) == [2]
    assert trainer.divergence.ended.startswith(
        "training diverged: 3 bad steps in a row (max_bad_steps), the last with a loss of nan; 3 of 6 steps were "
        f"applied. The last good checkpoint is {tmp_path / 'checkpoint-2'}. "
    )
    assert f"init_from={tmp_path / 'checkpoint-2'}" in trainer.divergence.ended
    assert [sentence.split("applied, ")[1] for _, sentence, _ in told] == [f"{n} bad in a row." for n in (1, 2, 3)]


def test_steps_that_are_bad_now_and_then_do_not_end_the_run(tmp_path):
    trainer, *_ = train(tmp_path, "loss", {2, 3, 5, 6, 8, 9})
    assert trainer.divergence.ended is None and trainer.state.global_step == 10
    assert (trainer.divergence.bad, trainer.divergence.skipped) == (6, 6)


def test_a_save_that_falls_on_a_bad_step_waits_for_the_next_good_one(tmp_path):
    train(tmp_path, "loss", {4}, max_steps=8, save_total_limit=9)
    assert saved(tmp_path) == [2, 5, 6, 8]


def test_what_a_killed_save_left_of_a_step_is_no_part_of_the_checkpoint_that_takes_its_place(tmp_path):
    (tmp_path / "checkpoint-4" / "global_step4").mkdir(parents=True)
    left = [tmp_path / "checkpoint-4" / name for name in ("old.pt", "global_step4/old.pt", "optimizer.pt")]
    for path in left:
        path.write_bytes(b"unfinished")
    train(tmp_path, "loss", {1}, max_steps=4)
    assert saved(tmp_path) == [2, 4] and [path.exists() for path in left] == [False, False, True]


def test_an_older_checkpoint_goes_only_once_the_newer_one_counts(tmp_path, monkeypatch):
    removed, rmtree = [], shutil.rmtree

    def noted(path, **options):
        if Path(path).exists():
            removed.append((Path(path).name, [whole.name for whole in checkpoints.finished(tmp_path)]))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", noted)
    train(tmp_path, "loss", {1}, max_steps=8, save_total_limit=2)
    assert removed == [  # its own manifest went first
        ("checkpoint-2", ["checkpoint-6", "checkpoint-4"]),
        ("checkpoint-4", ["checkpoint-8", "checkpoint-6"]),
    ]


def test_another_learning_rate_is_in_force_from_the_first_step_on(tmp_path):
    class Rates(Fault):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            groups = self.trainer.optimizer.param_groups
            rates.append((state.global_step + 1, {group["lr"] for group in groups}))

    rates = []
    words = {"fault_class": Rates, "lr_scheduler_type": "constant"}
    train(tmp_path / "a", "loss", {1}, max_steps=4, **words)
    train(tmp_path / "b", "loss", {6}, max_steps=6, resume_from=tmp_path / "a" / "checkpoint-4", learning_rate=5e-3,
          **words)  # fmt: skip
    assert rates == [(step, {1e-2}) for step in (1, 2, 3, 4)] + [(step, {5e-3}) for step in (5, 6)]


def test_the_rows_are_found_again_in_every_epoch_and_where_its_last_step_is_short(tmp_path):
    class Seen(Fault):
        def after_forward(self, network, args, outputs):
            self.inputs.append(self.trainer.given)
            super().after_forward(network, args, outputs)

        inputs = []

    trainer, told, fault = train(tmp_path, "loss", {3, 5, 9, 15}, gradient_accumulation_steps=5, max_steps=16,
                                 save_strategy="no", fault_class=Seen)  # fmt: skip
    an_epoch = [5, 5, 5, 5, 4]  # 24 micro-batches of 2
    for step, _, row in told:
        before = sum(an_epoch) * ((step - 1) // 5) + sum(an_epoch[: (step - 1) % 5])
        assert len(row["where"]) == an_epoch[(step - 1) % 5]
        for place in row["where"]:
            given = fault.inputs[before + place["micro_batch"]]
            assert given.tolist() == [trainer.train_dataset[number]["input_ids"].tolist() for number in place["rows"]]
    assert [step for step, *_ in told] == [3, 5, 9, 15]


@pytest.mark.parametrize("save", ["steps", "no"])
def test_weights_that_are_not_finite_are_never_saved_and_never_exported(tmp_path, save):
    trainer, *_ = train(tmp_path, "weights", {10}, by=math.inf, max_steps=10, save_strategy=save)
    assert trainer.divergence.ended.startswith("training diverged: the model has weights that are not finite.")
    assert saved(tmp_path) == ([4, 6, 8] if save == "steps" else [])
    assert ("No checkpoint was written before." in trainer.divergence.ended) == (save == "no")


@pytest.mark.parametrize("on_spike", ["stop", "skip", "report"])
def test_a_loss_far_above_its_past_is_said_once_and_skipped_only_if_asked(tmp_path, on_spike):
    trainer, told, fault = train(tmp_path, "loss", {45}, by=10, on_spike=on_spike, max_steps=50, save_strategy="no")
    assert [step for step, *_ in told] == [45] and "far above" in told[0][1]
    assert fault.seen == [on_spike == "skip" and step == 45 for step in range(1, 51)]
    assert told[0][2]["applied"] == (on_spike != "skip") and trainer.divergence.ended is None
    counted = on_spike != "report"
    assert (trainer.divergence.bad, trainer.divergence.skipped) == (counted, on_spike == "skip")
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert losses[45] > 9 * losses[44] / 2  # the loss as it was, not what the skip made of it


@pytest.mark.parametrize(("on_spike", "last"), [("stop", 47), ("skip", 47), ("report", 60)])
def test_a_lasting_spike_ends_the_run_unless_it_is_only_reported(tmp_path, on_spike, last):
    trainer, *_ = train(tmp_path, "loss", range(45, 99), by=10, on_spike=on_spike, max_steps=60, save_strategy="no")
    assert trainer.state.global_step == last
    assert (trainer.divergence.ended is None) == (on_spike == "report")


def test_a_falling_loss_is_no_spike_and_neither_is_a_slow_rise(tmp_path):
    trainer, *_ = train(tmp_path, "loss", {1}, by=1.0, max_steps=80, save_strategy="no")
    guard = trainer.divergence
    assert guard.bad == 0 and guard.limit < math.inf
    guard.history = [3.0 + 0.1 * (-1) ** step for step in range(128)]
    guard._set_limit()
    assert 3.5 < guard.limit < 4.0


def test_a_run_that_goes_on_from_a_checkpoint_knows_its_past(tmp_path):
    words = {"on_spike": "skip", "max_steps": 44, "save_steps": 20}
    straight, told, _ = train(tmp_path / "a", "loss", {35, 43}, by=10, **words)
    again, told_again, _ = train(
        tmp_path / "b", "loss", {43}, by=10, resume_from=tmp_path / "a" / "checkpoint-40", **words
    )
    assert [step for step, *_ in told] == [35, 43] and told_again == told[1:]
    assert again.divergence.state() == straight.divergence.state() and again.divergence.skipped == 2
    assert torch.equal(again.model.lm_head.weight, straight.model.lm_head.weight)


# Real runs: two ranks, ZeRO-2, 8-bit AdamW, accumulation 2, epochs whose last step has one micro-batch


def rows_of_metrics(output_dir, key):
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if key in row}


@pytest.mark.slow
def test_the_rows_that_are_named_are_the_ones_each_rank_had_in_every_epoch(skipping):
    output_dir, seen, done = skipping
    bad = rows_of_metrics(output_dir, "bad_step")
    with_5 = {line["step"] for part in seen for line in part if any(5 in rows for rows in line["rows"])}
    with_9 = {line["step"] for part in seen for line in part if any(9 in rows for rows in line["rows"])}
    assert set(bad) == with_5 | {step for step in with_9 if step > 45} and len(with_9 - with_5) > 4
    assert any(len(line["rows"]) == 1 for line in seen[0])  # an epoch's last step
    for step, row in bad.items():
        assert {place["rank"] for place in row["where"]} <= {0, 1}
        named = [(place["rank"], place["micro_batch"]) for place in row["where"]]
        harmful = 5 if step in with_5 else 9
        assert named == [
            (rank, number)
            for rank in (0, 1)
            for number, rows in enumerate(seen[rank][step - 1]["rows"])
            if harmful in rows
        ]
        for place in row["where"]:
            assert place["rows"] == seen[place["rank"]][step - 1]["rows"][place["micro_batch"]]
    rank, rows = bad[min(bad)]["where"][0]["rank"], bad[min(bad)]["where"][0]["rows"]
    assert f"Step {min(bad)}: a loss of nan, on rank {rank}, rows {', '.join(map(str, rows))} of" in done.stdout


@pytest.mark.slow
def test_under_zero_2_a_skipped_step_leaves_every_bit_of_both_ranks_and_the_learning_rate_goes_on(skipping):
    output_dir, seen, _ = skipping
    bad, logged = rows_of_metrics(output_dir, "bad_step"), rows_of_metrics(output_dir, "loss")
    for part in seen:
        for before, after in pairwise(part):
            unchanged = before["weights"] == after["weights"] and before["optimizer"] == after["optimizer"]
            assert unchanged == (after["step"] in bad), after["step"]
    assert [line["weights"] for line in seen[0]] == [line["weights"] for line in seen[1]]
    for step, row in logged.items():
        assert row["skipped_steps"] == sum(number <= step for number in bad)
        assert math.isnan(row["loss"]) == ("nan" in bad.get(step, {"bad_step": ""})["bad_step"])
        done = max(step - 1 - 3, 0) / 57
        rate = 3e-3 * (step - 1) / 3 if step <= 3 else 1.5e-3 * (1 + math.cos(math.pi * done))
        assert row["learning_rate"] == pytest.approx(rate, rel=1e-9)
    assert json.loads((output_dir / "run.json").read_text())["result"]["skipped_steps"] == len(bad)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1", "zero2_offload", "zero3"])
def test_under_every_other_zero_a_skipped_step_leaves_every_bit_of_both_ranks_too(poison, config):
    """Row 5 makes its micro-batch's loss NaN, row 9 in the last epoch ten times itself."""
    fault = {"nan_row": 5, "spike_row": 9, "spike_from": 41}
    words = ["on_spike=skip", "max_steps=48", "save_strategy=no", f"deepspeed=ds_configs/{config}.json"]
    output_dir, seen, _ = poison(fault, *words)
    bad = rows_of_metrics(output_dir, "bad_step")
    assert sum("far above" in row["bad_step"] for row in bad.values()) == 1 and len(bad) >= 6
    for part in seen:
        assert len(part) == 48
        for before, after in pairwise(part):
            unchanged = before["weights"] == after["weights"] and before["optimizer"] == after["optimizer"]
            assert unchanged == (after["step"] in bad), after["step"]
    assert rows_of_metrics(output_dir, "skipped_steps")[48]["skipped_steps"] == len(bad)


@pytest.mark.slow
def test_gone_on_from_a_checkpoint_the_same_rows_are_named_and_the_count_goes_on(skipping, poison):
    straight = skipping[0]
    fault, checkpoint = {"nan_row": 5, "spike_row": 9}, straight / "checkpoint-40"
    again, seen, _ = poison(fault, "on_spike=skip", "max_bad_steps=9", f"resume={checkpoint}")
    assert seen[0][0]["step"] == 41
    same = ("bad_step", "applied", "where", "loss", "learning_rate", "grad_norm", "skipped_steps", "bad_steps")
    for key in ("bad_step", "skipped_steps"):
        one, other = [
            {
                step: [row.get(name) for name in same]
                for step, row in rows_of_metrics(directory, key).items()
                if step > 40
            }
            for directory in (straight, again)
        ]
        assert len(one) > 2 and json.dumps(one) == json.dumps(other)  # as text, because NaN is not NaN
    ends = [load_file(directory / "model.safetensors") for directory in (straight, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_on_one_rank_stops_both_with_status_3_and_names_rank_rows_and_checkpoint(poison, what):
    fault = {"loss": "nan_from", "gradient": "gradient_from"}[what]
    output_dir, seen, done = poison({fault: 12, "rank": 1}, "save_steps=5", expect=3)
    assert [len(part) for part in seen] == [14, 14] and saved(output_dir) == [5, 10]
    assert not (output_dir / "model.safetensors").exists() and "Traceback" not in done.stderr + done.stdout
    ill = (
        "a loss of nan, on rank 1"
        if what == "loss"
        else "a gradient that is not finite, though every loss is, on ranks 0, 1"
    )
    parts = seen[1:] if what == "loss" else seen  # the gradients are one sum
    rows = ", ".join(str(row) for part in parts for rows in part[13]["rows"] for row in rows)
    assert f"Step 14: {ill}, rows {rows} of the training set; not applied, 3 bad in a row." in done.stdout
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "error:" in line]
    assert len(errors) == 1 and "11 of 14 steps were applied" in errors[0]
    assert f"The last good checkpoint is {output_dir / 'checkpoint-10'}." in errors[0]
