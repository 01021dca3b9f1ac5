"""A disk that is too small is said before training, and one that fills up costs no whole checkpoint."""

import subprocess

import pytest
from test_divergence import Fault, saved, train
from transformers import LlamaConfig

from smolpretrain.arguments import PretrainArguments
from smolpretrain.core import architectures
from smolpretrain.training.safety import checkpoints
from smolpretrain.training.safety import disk as space

CONFIG = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def reckoned(config, optim="adamw_bnb_8bit", bf16=True):
    return architectures.checkpoint_bytes(architectures.size(config), optim=optim, bf16=bf16, zero_stage=0)


def arguments(output_dir, **changes):
    known = {
        "output_dir": str(output_dir),
        "deepspeed": None,
        "bf16": True,
        "eval_strategy": "no",
        "max_steps": 100,
        "save_steps": 10,
    }
    return PretrainArguments(**known | changes)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB of its own, and a function that leaves so many bytes free on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")

    def leave(free):
        filler = disk / "filler"
        filler.unlink(missing_ok=True)
        filler.write_bytes(bytes(space.free_bytes(disk) - free))

    yield disk, leave
    subprocess.run(["umount", "-l", disk], check=True)


def needed_at_start(args, monkeypatch, free=0):
    """How many checkpoints the refusal counts on a disk with so much room."""
    monkeypatch.setattr(space, "free_bytes", lambda output_dir: free)
    with pytest.raises(space.NoSpace) as refused:
        space.check_start(args, CONFIG, rows=800, say=print)
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 4),  # save_total_limit 3, and one more while it is written
        ({"save_total_limit": 2}, 3),
        ({"save_total_limit": None}, 10),
        ({"keep_every_steps": 50}, 6),
        ({"save_steps": 80}, 2),  # at 80 and at the end
        ({"save_steps": 0.5}, 2),
        ({"max_steps": -1, "num_train_epochs": 2.0, "save_strategy": "epoch", "save_total_limit": None}, 2),
    ],
)
def test_the_room_for_every_checkpoint_that_stands_at_one_time_is_asked_for(tmp_path, monkeypatch, changes, count):
    message = needed_at_start(arguments(tmp_path, **changes), monkeypatch)
    one, model = reckoned(CONFIG)
    assert f"needs {space.show(count * one + model)} more for {count} checkpoints of {space.show(one)} at" in message
    assert "lower save_total_limit, or raise save_steps or keep_every_steps" in message
    monkeypatch.setattr(space, "free_bytes", lambda output_dir: count * one + model)
    assert space.check_start(arguments(tmp_path, **changes), CONFIG, rows=800, say=print) == one


def test_checkpoints_that_are_there_already_are_not_asked_for_again(tmp_path, monkeypatch):
    one, model = reckoned(CONFIG)
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "optimizer.pt").write_bytes(bytes(one))
    assert f"needs {space.show(3 * one + model)} more" in needed_at_start(arguments(tmp_path), monkeypatch)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
def test_what_one_checkpoint_takes_is_reckoned_from_the_model_and_the_optimizer(tmp_path, optim):
    sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "tie_word_embeddings": True}
    trainer, *_ = train(tmp_path, "loss", {1}, optim=optim, sizes=sizes, max_steps=2)
    weights = reckoned(trainer.model.config, optim, False)[0] - architectures.BESIDES
    assert weights == pytest.approx(space.newest_bytes(tmp_path), rel=0.02)


def test_a_disk_with_too_little_room_is_noticed_before_a_byte_of_the_checkpoint_is_written(small_disk):
    disk, leave = small_disk

    class Fill(Fault):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                leave(50_000)

    with pytest.raises(space.NoSpace) as full:
        train(disk, "loss", {1}, fault_class=Fill)
    assert saved(disk) == [2] and not (disk / "checkpoint-4").exists()
    assert full.value.__cause__ is None  # no writer had to fail first
    one = space.newest_bytes(disk)
    assert f"it takes {space.show(one)}, {space.show(one - space.free_bytes(disk))} are missing." in str(full.value)
    assert f"The last whole checkpoint is {disk / 'checkpoint-2'}. Make room, and the same command" in str(full.value)


@pytest.mark.parametrize("free", range(1_000, 100_000, 11_000))
def test_a_disk_that_fills_up_in_a_save_leaves_the_checkpoint_before_and_no_partial_one(small_disk, monkeypatch, free):
    disk, leave = small_disk
    reasons = []

    class Fill(Fault):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                leave(free)
                monkeypatch.setattr(space, "free_bytes", lambda path: 2**40)  # a quota, which nothing shows beforehand

    write = checkpoints.commit
    monkeypatch.setattr(checkpoints, "commit", lambda *a, **k: (write(*a, **k), reasons.append("committed")))
    with pytest.raises(space.NoSpace, match=r"is there a quota\?") as full:
        train(disk, "loss", {1}, fault_class=Fill)
    assert reasons == ["committed"] and full.value.__cause__ is not None
    assert saved(disk) == [2] and not (disk / "checkpoint-4").exists()


def test_a_disk_that_is_mounted_to_be_read_is_refused(small_disk):
    disk, _ = small_disk
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(ValueError, match="cannot be written: Read-only file system. Name another."):
        space.check_writable(disk)


def test_an_error_that_is_not_about_space_stays_what_it_is(tmp_path):
    assert space.explain(RuntimeError("size mismatch"), tmp_path, 1) is None
    assert space.explain(PermissionError(13, "Permission denied"), tmp_path, 1) is None
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert isinstance(space.explain(wrapped, tmp_path, 1), space.NoSpace)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "apart"), [(0, None), (1, 10), (None, None)])
def test_two_ranks_whose_disk_fills_up_in_a_save_end_with_status_5_one_line_and_a_checkpoint(poison, rank, apart):
    """The shards of `rank` do not fit any more (a limit of the size of files), those of the other do.

    Where it has removed its part before the other writes, that one's missing directory is no error of its own.
    """
    fault = {"limit_from": 7, "limit": 300_000, "rank": rank, "apart": apart}
    output_dir, seen, done = poison(fault, "save_steps=5", expect=5)
    assert [len(part) for part in seen] == [10, 10]
    assert saved(output_dir) == [5] and not (output_dir / "checkpoint-10").exists()
    text = done.stdout + done.stderr
    lines = [line for line in text.splitlines() if "error:" in line]
    assert len(lines) == 1 and f"The last whole checkpoint is {output_dir / 'checkpoint-5'}." in lines[0]
    assert "Traceback" not in text
