"""A checkpoint counts when its manifest says so, and a command goes on with the same run or says no."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from ports import free_port
from test_training import rows, trainer
from transformers import AutoModelForCausalLM

from smolpretrain import launch
from smolpretrain.arguments import PretrainArguments
from smolpretrain.core.architectures import load_config
from smolpretrain.training import model
from smolpretrain.training.safety import checkpoints, guards, lock, ranks, resume, spot

RUN = resume.Run(
    same={"block_size": 64, "config hidden_size": 64, "seed": 42, "optim": "adamw_bnb_8bit", "data": "abc"},
    schedule={"learning_rate": 0.001, "lr_scheduler_type": "cosine"},
    free={"max_steps": 100, "logging_steps": 10},
    ranks=2,
    accumulation=2,
    micro_batches=100,
    fixed_ranks=True,
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
)


def make(output_dir, step, run=RUN, finished=True, **facts):
    path = output_dir / f"checkpoint-{step}"
    (path / "global_step1").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(os.urandom(100))
    for name in ("global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state_0.pth", "scheduler.pt"):
        (path / name).write_bytes(os.urandom(50))
    (path / "latest").write_text("global_step1")
    (path / "trainer_state.json").write_text("{}")
    if finished:
        checkpoints.commit(path, 0, 1, step=step, tokens_seen=step * 10, **run.facts(), **facts)
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"world_size": run.ranks}))
    return path


def choose(output_dir, how="auto", trust=False, run=RUN, allowed=()):
    choice = resume.choose(output_dir, how, trust, run, allowed)
    return choice.checkpoint, choice.said


def test_with_none_at_all_a_run_starts_fresh(tmp_path):
    assert choose(tmp_path) == (None, [])
    assert choose(tmp_path / "not there") == (None, [])


def test_the_newest_whole_one_by_step_is_chosen_whatever_the_times_say(tmp_path):
    for step in (300, 50, 1000):
        make(tmp_path, step)
    os.utime(tmp_path / "checkpoint-50", (9e9, 9e9))
    assert choose(tmp_path) == (str(tmp_path / "checkpoint-1000"), [])


def test_what_only_looks_like_a_checkpoint_is_passed_over_with_the_reason(tmp_path):
    make(tmp_path, 10)
    for name in ("checkpoint-foo", "checkpoint--1"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    (tmp_path / "checkpoint-7").symlink_to(tmp_path / "checkpoint-7")
    found, said = choose(tmp_path)
    assert found == str(tmp_path / "checkpoint-10")
    assert said == [
        f"{tmp_path / name} was passed over: {reason}."
        for name, reason in (
            ("checkpoint--1", "its name has no step"),
            ("checkpoint-5", "it is not a directory"),
            ("checkpoint-7", "it is not a directory"),
            ("checkpoint-foo", "its name has no step"),
        )
    ]


def test_an_unfinished_one_is_passed_over_and_said(tmp_path):
    make(tmp_path, 10)
    make(tmp_path, 20, finished=False)
    found, passed = choose(tmp_path)
    assert found.endswith("checkpoint-10")
    assert passed == [f"{tmp_path / 'checkpoint-20'} was passed over: it was never finished (no manifest.json)."]
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert choose(tmp_path)[0] is None  # killed in its first save: it starts again


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state_0.pth",
        "scheduler.pt", "latest",
    ],
)  # fmt: skip
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
    with pytest.raises(resume.Damaged, match=f"is whole: .*{file.name} is (missing|damaged)"):
        choose(tmp_path)


def test_a_manifest_that_was_not_written_to_its_end_does_not_count(tmp_path):
    make(tmp_path, 10)
    path = make(tmp_path, 20, finished=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.commit(path, 0, 1, step=20, tokens_seen=200, **RUN.facts())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    found, passed = choose(tmp_path)
    assert found.endswith("checkpoint-10") and passed[0].endswith("it was never finished (no manifest.json).")


def test_the_disk_has_every_file_and_its_name_before_the_manifest_counts(tmp_path, monkeypatch):
    path, synced, fsync = make(tmp_path, 10, finished=False), [], os.fsync

    def noted(descriptor):
        fsync(descriptor)
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), (path / "manifest.json").exists()))

    monkeypatch.setattr(os, "fsync", noted)
    inside = list(path.rglob("*"))
    checkpoints.commit(path, 0, 1, step=10)
    before = {name for name, counts in synced if not counts}
    assert before == {*inside, tmp_path, path / f".manifest.json.{os.getpid()}"} and synced[-1] == (path, True)


def test_a_damaged_manifest_is_named(tmp_path):
    (make(tmp_path, 10) / "manifest.json").write_text("{")
    with pytest.raises(resume.Damaged, match=r"manifest.json is damaged"):
        choose(tmp_path)


def test_a_strangers_checkpoint_is_refused_unless_trusted(tmp_path):
    path = make(tmp_path, 10, finished=False)
    with pytest.raises(resume.Damaged, match=r"is not one of ours; trust_checkpoint=true loads it"):
        choose(tmp_path, how=str(path))
    assert choose(tmp_path, how=str(path), trust=True) == (str(path), [])
    with pytest.raises(ValueError, match="is not auto, never or a directory"):
        choose(tmp_path, how=str(tmp_path / "none"))


def test_a_pickle_that_the_manifest_does_not_name_is_refused_unread(tmp_path):
    make(tmp_path, 10)
    fired = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return (open, (str(fired), "w"))

    torch.save(Hostile(), tmp_path / "checkpoint-10" / "optimizer.pt")
    with pytest.raises(resume.Damaged, match=r"optimizer.pt is not in its manifest.json: it would be unpickled"):
        choose(tmp_path)
    assert not fired.exists()
    torch.load(tmp_path / "checkpoint-10" / "optimizer.pt", weights_only=False)
    assert fired.exists()  # it would have been


def test_a_model_given_as_a_checkpoint_is_told_apart(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no trainer_state.json\): init_from=.* starts a run from its weights"):
        choose(tmp_path / "runs", how=str(tmp_path))


def test_going_back_is_refused_where_the_newer_would_be_taken_after_the_next_stop(tmp_path):
    old = make(tmp_path / "run", 10)
    make(tmp_path / "run", 20)
    with pytest.raises(ValueError, match=r"is older than .*checkpoint-20, which would be taken after the next stop"):
        choose(tmp_path / "run", how=str(old))
    elsewhere = tmp_path / "elsewhere"
    assert choose(elsewhere, how=str(old)) == (str(old), [])
    newer = make(elsewhere, 15)
    assert choose(elsewhere, how=str(old)) == (str(newer), [])  # the same command, started again


@pytest.mark.parametrize(
    ("part", "key", "value", "remedy"),
    [
        ("same", "data", "xyz", ""),
        ("same", "config hidden_size", 128, ""),
        ("same", "optim", "adamw_torch_fused", ""),
        ("same", "block_size", 128, ""),
        ("same", "seed", 1, ""),
        ("schedule", "learning_rate", 0.01, r"allow it with allow_changes=\[\"learning_rate\"\], "),
        ("versions", "transformers", "6.0.0", ""),
    ],
)
def test_going_on_with_another_run_is_refused_naming_both_values_and_the_way_out(tmp_path, part, key, value, remedy):
    path = make(tmp_path, 10)
    was, now = json.dumps(getattr(RUN, part)[key]), json.dumps(value)
    changed = replace(RUN, **{part: getattr(RUN, part) | {key: value}})
    with pytest.raises(
        ValueError, match=f"was trained with {key} = {was}, now it is {now}: set it back .*{remedy}"
    ) as no:
        choose(tmp_path, run=changed)
    assert f"init_from={path} and another output_dir" in str(no.value)


def test_what_may_change_is_said(tmp_path):
    path = make(tmp_path, 10)
    changed = replace(
        RUN,
        schedule=RUN.schedule | {"learning_rate": 0.01},
        free={"max_steps": 200, "logging_steps": 10},
        versions={"torch": "2.14.0", "transformers": "5.24.0"},
    )
    _, said = choose(tmp_path, run=changed, allowed=["learning_rate"])
    assert said == [
        f'changed since {path}: learning_rate 0.001 -> 0.01, max_steps 100 -> 200, torch "2.13.0" -> "2.14.0", '
        'transformers "5.23.0" -> "5.24.0".'
    ]
    with pytest.raises(ValueError, match="lr_scheduler_type"):
        choose(
            tmp_path,
            run=replace(RUN, schedule=RUN.schedule | {"lr_scheduler_type": "linear"}),
            allowed=["learning_rate"],
        )


def test_zero_refuses_other_ranks_and_ddp_keeps_the_global_batch_or_refuses(tmp_path):
    zero = make(tmp_path / "zero", 10)
    with pytest.raises(ValueError, match=r"trained with world_size = 2, now it is 1: set it back .*init_from"):
        choose(zero.parent, run=replace(RUN, ranks=1))
    ddp = replace(RUN, fixed_ranks=False)
    path = make(tmp_path / "ddp", 10, run=ddp)
    choice = resume.choose(path.parent, "auto", False, replace(ddp, ranks=1), ())
    assert choice.accumulation == 4
    assert choice.said == [f"changed since {path}: ranks 2 -> 1, gradient_accumulation_steps 2 -> 4."]
    assert resume.choose(path.parent, "auto", False, replace(ddp, ranks=4), ()).accumulation == 1
    for ranks_now, accumulation in ((3, 2), (1, 3)):  # cannot share 4 micro-batches; asks for another batch
        with pytest.raises(ValueError, match=f"micro-batches a step .* = 4, now it is {ranks_now * accumulation}"):
            choose(path.parent, run=replace(ddp, ranks=ranks_now, accumulation=accumulation))
    with pytest.raises(ValueError, match="gradient_accumulation_steps = 2, now it is 4"):
        choose(path.parent, run=replace(ddp, accumulation=4))
    odd = make(tmp_path / "odd", 10, run=replace(ddp, micro_batches=101))  # two ranks leave one of each epoch out
    with pytest.raises(ValueError, match="micro-batches an epoch = 100, now it is 101"):
        choose(odd.parent, run=replace(ddp, micro_batches=101, ranks=1))


def test_an_evaluation_that_a_stop_cut_short_is_owed(tmp_path):
    make(tmp_path, 10)
    assert not resume.choose(tmp_path, "auto", False, RUN, ()).evaluate_first
    make(tmp_path, 20, evaluation_owed=True)
    assert resume.choose(tmp_path, "auto", False, RUN, ()).evaluate_first


def test_the_manifest_says_what_the_checkpoint_is(tmp_path):
    manifest = json.loads((make(tmp_path, 10) / "manifest.json").read_text())
    assert {"step", "tokens_seen", "world_size", "same", "schedule", "versions", "files"} <= set(manifest)


def test_never_refuses_a_directory_that_has_one(tmp_path):
    assert choose(tmp_path, how="never") == (None, [])
    make(tmp_path, 10)
    with pytest.raises(ValueError, match="resume = never, but output_dir"):
        choose(tmp_path, how="never")


def test_rotation_keeps_the_newest_by_step_counts_only_whole_ones_and_spares_the_permanent(tmp_path):
    for step in (100, 200, 300, 400):
        make(tmp_path, step)
    make(tmp_path, 500, finished=False)
    os.utime(tmp_path / "checkpoint-100", (9e9, 9e9))
    assert checkpoints.rotate(tmp_path, 2, keep_every=200) == []
    assert [step for step, _ in checkpoints.by_step(tmp_path)] == [500, 400, 300, 200]


def test_the_last_whole_one_is_never_removed(tmp_path):
    make(tmp_path, 10)
    for step in (20, 30, 40):
        make(tmp_path, step, finished=False)
    assert checkpoints.rotate(tmp_path, 2) == []
    assert [step for step, _ in checkpoints.by_step(tmp_path)] == [40, 30, 20, 10]


def test_a_directory_that_cannot_be_removed_is_said_and_training_goes_on(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        make(tmp_path, step)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints.shutil, "rmtree", refuse)
    assert checkpoints.rotate(tmp_path, 2) == [
        f"{tmp_path / 'checkpoint-1'} could not be removed (Permission denied): it still takes disk space."
    ]
    assert checkpoints.finished(tmp_path) == [tmp_path / "checkpoint-3", tmp_path / "checkpoint-2"]  # half is none


HOLD = """
import sys, time
from smolpretrain.training.safety import lock
lock.take(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


def test_two_runs_cannot_share_an_output_dir_and_a_killed_one_leaves_it_free(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(
        ValueError, match=rf"output_dir = .* is in use by another run \(pid {other.pid} host \S+\): wait"
    ):
        lock.take(tmp_path)
    other.kill()
    other.wait()
    who = f"pid {other.pid} host {os.uname().nodename}"
    once = [
        sys.executable,
        "-c",
        "import sys; from smolpretrain.training.safety import lock; print(lock.take(sys.argv[1]))",
        tmp_path,
    ]
    said = [subprocess.run(once, capture_output=True, text=True, cwd=ROOT).stdout.strip() for _ in range(2)]
    assert said[0].endswith(f"was left by a run that ended without a word ({who}): taken over.")
    assert said[1] == "None"  # one that ended in order leaves no word behind


def test_storage_without_locks_is_said_and_gone_on_with(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", none)
    assert lock.take(tmp_path) == (
        f"{tmp_path}/run.lock: its storage has no locks: nothing keeps a second run away from output_dir; "
        "start only one."
    )


class Metadata(BaseHTTPRequestHandler):
    """EC2's instance metadata as AWS documents it: a token by PUT, 404 until there is a notice."""

    def do_PUT(self):
        self.answer(200, "a token") if self.server.imdsv2 else self.answer(403)

    def do_GET(self):
        self.server.polls.append(self.headers.get("X-aws-ec2-metadata-token"))
        if self.server.imdsv2 and self.server.polls[-1] != "a token":
            return self.answer(401)
        does = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        if does == "hang":
            time.sleep(spot.ANSWER_SECONDS + 1)
        self.answer(200 if does == "hang" else does, '{"action": "terminate", "time": "2026-01-01T00:02:00Z"}')

    def answer(self, status, body=""):
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())
        except OSError:
            pass  # the watcher has hung up

    def log_message(self, *args):
        pass


@pytest.fixture
def metadata():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.script, server.polls, server.imdsv2 = [404], [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/latest/meta-data/spot/instance-action"
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("imdsv2", [True, False])
def test_a_spot_notice_is_heard_and_nothing_else_is(metadata, imdsv2, monkeypatch):
    monkeypatch.setattr(spot, "ANSWER_SECONDS", 0.3)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # metadata is never asked through a proxy
    metadata.imdsv2, metadata.script = imdsv2, [404, 500, "hang", 404, 200]
    heard = []
    spot.watch(metadata.url, heard.append, poll_seconds=0.05)
    until = time.monotonic() + 600
    while not heard and time.monotonic() < until:
        time.sleep(0.05)
    assert heard == ["the cloud's notice that it takes this machine back"] and len(metadata.polls) >= 5
    assert metadata.script == [200]  # not before, whatever came


def test_a_metadata_service_that_is_not_there_is_no_notice(metadata):
    metadata.script = [404]
    assert not spot.noticed(metadata.url)
    metadata.imdsv2, metadata.script = False, [200]
    assert spot.noticed(metadata.url)
    metadata.shutdown()
    metadata.server_close()
    assert not spot.noticed(metadata.url)


@pytest.fixture
def network_and_directory(tmp_path):
    config = load_config("smollm2-1m", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64})
    network = model.random_model(config, 7, "sdpa")
    network.save_pretrained(tmp_path / "model")
    return network, tmp_path / "model", config


def test_init_from_takes_the_weights_and_names_the_first_tensor_that_does_not_fit(network_and_directory):
    network, directory, config = network_and_directory
    loaded = model.model_from(str(directory), config, "sdpa")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    wider = load_config("smollm2-1m", {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64})
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[64, 32\], .* make it \[64, 64\]"):
        model.model_from(str(directory), wider, "sdpa")
    deeper = load_config("smollm2-1m", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64})
    with pytest.raises(ValueError, match=r"there is no model.layers.1\."):
        model.model_from(str(directory), deeper, "sdpa")
    checkpoints.commit(directory, 0, 1, step=1)
    weights = bytearray((directory / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (directory / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: it is not what its manifest.json says"):
        model.model_from(str(directory), config, "sdpa")
    torch.save(network.state_dict(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is not a directory with .safetensors files"):
        model.model_from(str(directory), config, "sdpa")  # nothing is unpickled
    assert AutoModelForCausalLM.from_pretrained(directory)  # which transformers alone would have done


@pytest.mark.parametrize(
    "message",
    [
        "[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:34567",
        "[gloo/transport/tcp/buffer.cc] Timed out waiting 20000ms for recv operation to complete",
        "NCCL Error 6: remote process exited or there was a network error",
    ],
)
def test_an_error_that_only_tells_of_another_rank_is_known_as_one(message):
    assert ranks.LOST.search(message)
    assert not ranks.LOST.search("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_shared_buffer_that_a_killed_run_has_left_is_removed_and_one_that_ranks_may_still_open_is_not(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "a test's")
    monkeypatch.setenv("MASTER_PORT", "1")
    own, others, left = (
        Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_a test's_{name}") for name in ("1_0", "1_1", "2_0")
    )
    try:
        for path in (own, others, left):
            path.touch()
        os.utime(left, (time.time(), time.time() - ranks.MEETING_SECONDS - 1))
        ranks.forget_shared_buffer(0)
        assert [path.exists() for path in (own, others, left)] == [False, True, False]
    finally:
        for path in (own, others, left):
            path.unlink(missing_ok=True)


def test_a_second_signal_of_another_kind_changes_nothing(tmp_path):
    stop = guards.StopTogether(tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert stop.heard == "SIGTERM"


def test_a_stop_in_the_evaluation_that_is_made_up_takes_no_step(tmp_path):
    """Or the checkpoint of that step would owe an evaluation of another."""
    held_out = {"eval_rows": rows(6), "per_device_eval_batch_size": 1, "save_steps": 2, "save_strategy": "steps"}
    trainer(tmp_path, **held_out).train()
    (tmp_path / "STOP").touch()
    made = trainer(tmp_path, max_steps=4, **held_out, eval_on_start=True)
    made.add_callback(guards.StopTogether(tmp_path))
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert made.evaluation_owed and made.state.global_step == 2
    assert checkpoints.finished(tmp_path) == [tmp_path / "checkpoint-2"] and not (tmp_path / "STOP").exists()


def test_what_is_forked_is_deaf_from_its_birth_and_the_rank_hears_on():
    program = """
import multiprocessing, os, signal
from smolpretrain.training.safety import guards
guards.deafen_forks()
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
def mask():
    return sorted(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, []))
here, there = multiprocessing.get_context("fork").Pipe()
child = multiprocessing.get_context("fork").Process(target=lambda: there.send(mask()))
child.start()
os.kill(os.getpid(), signal.SIGTERM)
print(here.recv() == sorted(map(int, guards.SIGNALS)), mask() == [], heard == [1])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True True True\n", done.stderr


def test_a_stream_that_was_closed_from_the_start_takes_what_is_written():
    closed = guards.Unheard(None)
    assert closed.write("a word") == 6 and closed.flush() is None


@pytest.mark.parametrize("words", [[], ["run_pretrain.py", "args.json"]])
def test_our_launcher_without_a_launcher_says_how_it_is_called(words):
    done = subprocess.run([sys.executable, "launch.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    launchers = "[restarts=N] deepspeed|torchrun|accelerate [its own words] run_pretrain.py args.json"
    assert done.stderr == f"usage: launch.py {launchers}\n"


@pytest.mark.slow
def test_what_outlives_a_rank_that_has_failed_is_no_rank_of_a_launcher_that_died(tmp_path):
    """As its DataLoader's workers do: the status was 75, interrupted, and a loop started such a run again for ever."""
    script, worker = tmp_path / "fails.py", tmp_path / "worker"
    script.write_text("import os, pathlib, sys, time\npid = os.fork()\nif not pid:\n    time.sleep(600)\n"
                      "pathlib.Path(sys.argv[-1]).write_text(str(pid))\nos._exit(5)\n")  # fmt: skip
    command = ["launch.py", "deepspeed", "--num_gpus", "1", "--master_port", free_port(), script, worker]
    with open(tmp_path / "log", "w") as log:  # no pipe: the worker would keep it open
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, timeout=600)
    os.kill(int(worker.read_text()), signal.SIGKILL)
    assert done.returncode == 5, (tmp_path / "log").read_text()


def test_our_launcher_finds_the_run_s_directory_and_its_newest_finished_checkpoint(tmp_path):
    default = next(field.default for field in fields(PretrainArguments) if field.name == "output_dir")
    words = ["deepspeed", "--num_gpus", "2", "run_pretrain.py"]
    assert launch.output_dir([*words, "max_steps=3"]) == Path(default)
    file = tmp_path / "args.json"
    file.write_text('{"output_dir": "from/the/file"}')
    assert launch.output_dir([*words, str(file)]) == Path("from/the/file")
    assert launch.output_dir([*words, str(file), "output_dir=~/words"]) == Path.home() / "words"
    assert launch.output_dir([*words, str(tmp_path / "none.json")]) is None and launch.newest_step(None) == 0
    for name in ("checkpoint-20", "checkpoint-100", "checkpoint-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "checkpoint-300").mkdir()  # killed while it was written
    assert launch.newest_step(tmp_path) == 100
