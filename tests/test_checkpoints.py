"""A checkpoint counts when its manifest says so; a run killed or signalled anywhere goes on exactly."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import BIN, ROOT
from safetensors.torch import load_file

from smolpretrain.training import checkpoints

SAME = {"world_size": 1, "data": "abc", "learning_rate": 0.001}


def make(output_dir, step, same=SAME, finished=True):
    path = output_dir / f"checkpoint-{step}"
    (path / "global_step1").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(os.urandom(100))
    (path / "global_step1" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(os.urandom(50))
    (path / "trainer_state.json").write_text("{}")
    if finished:
        checkpoints.commit(path, 0, 1, step=step, tokens_seen=step * 10, same=same)
    return path


def choose(output_dir, resume="auto", trust=False, **same):
    return checkpoints.choose(output_dir, resume, trust, SAME | same)


def test_with_none_at_all_a_run_starts_fresh(tmp_path):
    assert choose(tmp_path) == (None, [])
    assert choose(tmp_path / "not there") == (None, [])


def test_the_newest_whole_one_by_step_is_chosen_whatever_the_times_say(tmp_path):
    for step in (300, 50, 1000):
        make(tmp_path, step)
    os.utime(tmp_path / "checkpoint-50", (9e9, 9e9))
    (tmp_path / "checkpoint-foo").mkdir()
    (tmp_path / "checkpoint-2000").write_text("a file")
    assert choose(tmp_path) == (str(tmp_path / "checkpoint-1000"), [])


def test_an_unfinished_one_is_passed_over_and_said(tmp_path):
    make(tmp_path, 10)
    make(tmp_path, 20, finished=False)
    found, passed = choose(tmp_path)
    assert found.endswith("checkpoint-10")
    assert passed == [f"{tmp_path / 'checkpoint-20'} was passed over: it was never finished (no manifest.json)."]
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert choose(tmp_path)[0] is None  # killed in its first save: it starts again


@pytest.mark.parametrize("name", ["model.safetensors", "global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_file_is_named_and_the_one_before_is_taken(tmp_path, name, harm):
    make(tmp_path, 10)
    file = make(tmp_path, 20) / name
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[7] ^= 1
    file.write_bytes({"flip": content, "truncate": content[:-1], "empty": b"", "delete": b""}[harm])
    if harm == "delete":
        file.unlink()
    found, passed = choose(tmp_path)
    assert found.endswith("checkpoint-10") and str(file) in passed[0]
    shutil.rmtree(tmp_path / "checkpoint-10")
    with pytest.raises(checkpoints.Damaged, match=f"is whole: .*{file.name} is (missing|damaged)"):
        choose(tmp_path)


def test_a_damaged_manifest_is_named(tmp_path):
    (make(tmp_path, 10) / "manifest.json").write_text("{")
    with pytest.raises(checkpoints.Damaged, match=r"manifest.json is damaged"):
        choose(tmp_path)


def test_a_strangers_checkpoint_is_refused_unless_trusted(tmp_path):
    path = make(tmp_path, 10, finished=False)
    with pytest.raises(checkpoints.Damaged, match=r"is not one of ours; trust_checkpoint=true loads it"):
        choose(tmp_path, resume=str(path))
    assert choose(tmp_path, resume=str(path), trust=True) == (str(path), [])
    with pytest.raises(ValueError, match="is not auto, never or a directory"):
        choose(tmp_path, resume=str(tmp_path / "none"))


@pytest.mark.parametrize(("key", "value"), [("world_size", 2), ("data", "xyz"), ("learning_rate", 0.01)])
def test_going_on_with_another_run_is_refused_naming_both_values(tmp_path, key, value):
    make(tmp_path, 10)
    was, now = json.dumps(SAME[key]), json.dumps(value)
    with pytest.raises(ValueError, match=f"was trained with {key} = {was}, now it is {now}: set it back"):
        choose(tmp_path, **{key: value})


def test_never_refuses_a_directory_that_has_one(tmp_path):
    assert choose(tmp_path, resume="never") == (None, [])
    make(tmp_path, 10)
    with pytest.raises(ValueError, match="resume = never, but output_dir"):
        choose(tmp_path, resume="never")


def test_rotation_keeps_the_newest_by_step_counts_only_whole_ones_and_spares_the_permanent(tmp_path):
    for step in (100, 200, 300, 400):
        make(tmp_path, step)
    make(tmp_path, 500, finished=False)
    os.utime(tmp_path / "checkpoint-100", (9e9, 9e9))
    assert checkpoints.rotate(tmp_path, 2, keep_every=200) == []
    assert [step for step, _ in checkpoints.by_step(tmp_path)] == [500, 400, 300, 200]


def test_a_directory_that_cannot_be_removed_is_said_and_training_goes_on(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        make(tmp_path, step)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints.shutil, "rmtree", refuse)
    assert checkpoints.rotate(tmp_path, 2) == [
        f"{tmp_path / 'checkpoint-1'} could not be removed (Permission denied): it still takes disk space."
    ]


# Real runs: two ranks, ZeRO-2, 8-bit AdamW, accumulation 2, across epochs

STEPS, SAVE = 18, 3


@pytest.fixture(scope="session")
def run_words(corpus_file, tmp_path_factory):
    where = tmp_path_factory.mktemp("killed")
    small = where / "small.jsonl"
    small.write_text("".join(corpus_file.read_text().splitlines(keepends=True)[:18]))
    overrides = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    return where, [
        "model_name=smollm2-1m", "tokenizer_name=train", f"config_overrides={json.dumps(overrides)}", "block_size=64",
        f"data_files={small}", "validation_fraction=0.1", "eval_steps=4", "sample_steps=0", "logging_steps=1",
        "per_device_train_batch_size=2", "gradient_accumulation_steps=2", f"max_steps={STEPS}", f"save_steps={SAVE}",
        "warmup_steps=3", "learning_rate=3e-3", "disable_tqdm=true",
    ]  # fmt: skip


def start(output_dir, words, log):
    """Launch as a user does, in a process group of its own."""
    return subprocess.Popen(
        [str(BIN / "deepspeed"), "--num_gpus", "2", "run_pretrain.py", *words, f"output_dir={output_dir}"],
        cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def losses(output_dir):
    path = output_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {row["step"]: (row["loss"], row["learning_rate"], row["grad_norm"]) for row in rows if "loss" in row}


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert condition(), f"not reached; exit status {process.poll()}"


@pytest.fixture(scope="session")
def left_alone(run_words):
    where, words = run_words
    with open(where / "alone.log", "w") as log:
        assert start(where / "alone", words, log).wait(600) == 0, (where / "alone.log").read_text()[-3000:]
    epochs = [json.loads(line)["epoch"] for line in (where / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert max(epochs) > 2  # the data order of later epochs is at stake too
    return where / "alone"


def assert_equal_runs(one, other):
    weights = [load_file(directory / "model.safetensors") for directory in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses(one) == losses(other) and len(losses(one)) == STEPS
    results = [json.loads((directory / "run.json").read_text())["result"] for directory in (one, other)]
    assert results[0]["bits_per_byte"] == results[1]["bits_per_byte"]
    assert results[0]["tokens_seen"] == results[1]["tokens_seen"]


@pytest.mark.slow
def test_killed_anywhere_and_started_again_the_run_ends_bit_identical(left_alone, run_words):
    where, words = run_words
    output_dir, kills = where / "killed", random.Random(0)
    for number, at_least in enumerate((5, 11, None)):
        log_path = where / f"killed{number}.log"
        with open(log_path, "w") as log:
            process = start(output_dir, words, log)
            if at_least is None:
                assert process.wait(600) == 0, log_path.read_text()[-3000:]
                break
            wait_for(lambda step=at_least: max(losses(output_dir), default=0) >= step, process)
            time.sleep(kills.random() * 0.5)
            os.killpg(process.pid, signal.SIGKILL)  # the runner, the launcher and both ranks
            assert process.wait() == -signal.SIGKILL
        done = max(losses(output_dir))
        assert done < STEPS, "the kill came too late to mean anything"
    assert "going on from" in log_path.read_text()
    assert_equal_runs(left_alone, output_dir)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_one_step_with_a_whole_checkpoint_and_status_75(left_alone, run_words):
    where, words = run_words
    output_dir = where / "stopped"
    with open(where / "stopped.log", "w") as log:
        process = start(output_dir, words, log)
        wait_for(lambda: max(losses(output_dir), default=0) >= 4, process)
        ranks = subprocess.run(
            ["pgrep", "-g", str(process.pid), "-f", "run_pretrain.py --local_rank=1"], capture_output=True, text=True
        ).stdout.split()
        assert len(ranks) == 1
        os.kill(int(ranks[0]), signal.SIGTERM)
        assert process.wait(120) == 75, (where / "stopped.log").read_text()[-3000:]
    step, newest = checkpoints.by_step(output_dir)[0]
    assert checkpoints.verify(newest)["step"] == step < STEPS
    assert f"stopped at step {step}: checkpoint-{step} is whole" in (where / "stopped.log").read_text()
    with open(where / "stopped.log", "a") as log:
        assert start(output_dir, words, log).wait(600) == 0
    assert_equal_runs(left_alone, output_dir)


@pytest.mark.slow
def test_stop_and_save_files_are_heard(left_alone, run_words):
    where, words = run_words
    output_dir = where / "files"
    with open(where / "files.log", "w") as log:
        process = start(output_dir, words, log)
        wait_for(lambda: max(losses(output_dir), default=0) >= 1, process)
        (output_dir / "SAVE").touch()
        wait_for(lambda: not (output_dir / "SAVE").exists(), process)
        (output_dir / "STOP").touch()
        assert process.wait(120) == 75, (where / "files.log").read_text()[-3000:]
    saved = {step for step, path in checkpoints.by_step(output_dir) if checkpoints.verify(path)}
    assert any(step % SAVE for step in saved) and not (output_dir / "STOP").exists()


@pytest.mark.slow
def test_a_finished_run_started_again_trains_nothing_and_ends_the_same(left_alone, run_words, tmp_path):
    _, words = run_words
    again = tmp_path / "again"
    shutil.copytree(left_alone, again)
    with open(tmp_path / "log", "w") as log:
        assert start(again, words, log).wait(600) == 0
    assert_equal_runs(left_alone, again)


@pytest.mark.slow
def test_a_flipped_byte_in_the_newest_is_named_and_another_learning_rate_is_refused(left_alone, run_words, tmp_path):
    _, words = run_words
    harmed = tmp_path / "harmed"
    shutil.copytree(left_alone, harmed)
    shard = next(harmed.glob(f"checkpoint-{STEPS}/global_step*/*rank_1*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with open(tmp_path / "log", "w+") as log:
        assert start(harmed, words, log).wait(600) == 0
        log.seek(0)
        text = log.read()
    assert f"{shard} is damaged: sha256" in text and f"going on from {harmed / f'checkpoint-{STEPS - SAVE}'}" in text
    assert_equal_runs(left_alone, harmed)
    with open(tmp_path / "log", "w+") as log:
        assert start(harmed, [*words, "learning_rate=1e-3"], log).wait(600) == 2
        log.seek(0)
        lines = [line for line in log.read().splitlines() if "error:" in line]
    assert len(lines) == 1 and "trained with learning_rate = 0.003, now it is 0.001" in lines[0]
