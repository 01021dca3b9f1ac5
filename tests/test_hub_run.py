"""A run that publishes itself: checked before it starts, never held up, never ended by the Hub, honest at its end."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SECRETS
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from smolpretrain.arguments import PretrainArguments
from smolpretrain.core.words import parse_args
from smolpretrain.hub import folder, uploads
from smolpretrain.hub.connection import Repository

WORDS = ("deepspeed=null", "optim=adamw_torch", "sample_steps=0", "push_to_hub=true", "hub_license=apache-2.0")


@pytest.mark.slow
def test_a_run_publishes_its_checkpoints_as_it_goes_and_itself_at_its_end(hub, pushed):
    out, done = pushed
    repo = hub.repos["model", "user/pushed"]
    titles = [re.sub(", of .*", "", title) for _, title in repo.log]
    steps = ["Step 0, 0 tokens", "Step 10, 2560 tokens", "Step 20, 5120 tokens"]
    assert titles[0] == "initial commit" and sorted(titles[1:]) == ["5,120 tokens", *steps]
    assert f"hub: the model goes to {hub.endpoint}/user/pushed, private." in done.stdout
    log = (out / "training_log.md").read_text()
    for sentence in ("uploaded step0-tokens0M to user/pushed.", f"published: {hub.endpoint}/user/pushed"):
        assert sentence in done.stdout and sentence in log
    assert not (out / "unsent").exists() and not (out / "publish").exists()


@pytest.mark.slow
def test_neither_the_hub_nor_the_run_s_files_nor_its_log_hold_a_secret(hub, pushed):
    (out, done), repo = pushed, hub.repos["model", "user/pushed"]
    sent = {f"{branch}: {name}": content for branch in repo.refs for name, content in repo.files(branch).items()}
    left = {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not [name for name in sent if name.endswith((".bin", ".pt", ".pth", ".pkl", ".env"))]
    assert [name for name in left if name.endswith("training_args.bin")]
    for name, content in (sent | left | {"output": (done.stdout + done.stderr).encode()}).items():
        assert not [key for key, secret in SECRETS.items() if secret.encode() in content], name
    assert not [name for name, content in sent.items() if str(out.parent).encode() in content]


@pytest.mark.slow
def test_a_hub_that_refuses_for_good_does_not_end_training_and_is_said_once(hub, launch, small_words, tmp_path):
    hub.faults.clear()
    hub.fail("POST", "/models/user/refused/commit/", status=403, times=10**6)
    words = [*small_words, *WORDS[1:], "hub_model_id=user/refused", "max_steps=30", "save_steps=10", "on_spike=report"]
    out, environment = tmp_path / "out", hub.environment(tmp_path / "hf")
    command = ("deepspeed", "--num_gpus", "2", "run_pretrain.py", *words, f"output_dir={out}")
    done = launch(*command, OMP_NUM_THREADS="1", expect=6, **environment)
    refused = "--repo user/refused: the access token has no write right there (403: failing on command)"
    repeat = f"python hub/publish.py {out} --repo user/refused --license apache-2.0 --checkpoints"
    assert (out / "training_log.md").read_text().count(f"NOT uploaded: {refused}") == 2
    assert f"run_pretrain.py: error: saved, NOT uploaded: {refused}" in done.stderr
    assert f"; then: {repeat}\n" in done.stderr and "Traceback" not in done.stderr
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 512
    assert [title for _, title in hub.repos["model", "user/refused"].log] == ["initial commit"]
    hub.faults.clear()
    launch(sys.executable, *shlex.split(repeat)[1:], **environment)
    branches = {"main", *(f"step{step}-tokens0M" for step in (0, 10, 20, 30))}
    assert set(hub.repos["model", "user/refused"].refs) == branches and not list((out / "unsent").glob("step*"))


@pytest.mark.slow
def test_weights_shared_out_by_zero_3_are_published_whole_and_score_as_the_run_did(hub, launch, small_words, tmp_path):
    hub.faults.clear()
    out, environment = tmp_path / "out", hub.environment(tmp_path / "hf")
    words = [*small_words, "deepspeed=ds_configs/zero3.json", *WORDS[2:], "hub_model_id=user/shared", "max_steps=6"]
    command = ("deepspeed", "--num_gpus", "2", "run_pretrain.py", *words, "save_steps=3", f"output_dir={out}")
    assert f"published: {hub.endpoint}/user/shared" in launch(*command, OMP_NUM_THREADS="1", **environment).stdout
    repo = hub.repos["model", "user/shared"]
    places = {"main": out, "step3-tokens0M": out / "checkpoint-3", "step6-tokens0M": out / "checkpoint-6"}
    assert set(repo.refs) == set(places)
    for branch, place in places.items():
        files = repo.files(branch)
        assert all(folder.ALLOWED.fullmatch(name) or name == ".gitattributes" for name in files), sorted(files)
        sent, own = load(files["model.safetensors"]), load_file(place / "model.safetensors")
        twice = set() if place == out else {"lm_head.weight"}  # Trainer's checkpoint holds a tied weight twice
        assert "lm_head.weight" not in sent and sent.keys() == own.keys() - twice
        assert all(torch.equal(tensor, own[name]) for name, tensor in sent.items())
    result = json.loads((out / "run.json").read_text())["result"]
    settings = [f"--{name}={result['held_out'][name]}" for name in ("window", "stride", "prefix")]
    documents, scores = (out / "prepared").glob("validation*.jsonl"), tmp_path / "scores.json"
    judge = ("python", "eval/perplexity.py", "--model", "user/shared", *settings, "--dtype", "float32")
    launch(*judge, "--data_files", *documents, "--output", scores, **environment)
    found = json.loads(scores.read_text())
    assert found["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-6)
    assert found["documents"] == result["held_out"]["documents"]


def at(step, last=False):
    state = SimpleNamespace(global_step=step, num_input_tokens_seen=step * 256)
    return None, state, SimpleNamespace(should_training_stop=last)


def heard(upload):
    """Wait for the process that sends, then let the next step hear of it; returns what was said since."""
    upload.process.wait()
    upload.said_here.clear()
    upload.on_step_end(*at(0))
    return list(upload.said_here)


@pytest.fixture
def upload(client, pushed, tmp_path):
    """What sends a finished run's checkpoints, as a run uses it; its repository is there."""
    run, said = tmp_path / "run", []
    shutil.copytree(pushed[0], run, ignore=shutil.ignore_patterns("run.lock"))
    repository = Repository("user/step")
    repository.claim()
    made = uploads.Uploads(run, repository, "apache-2.0", True, said.append)
    made.said_here = said
    return made


@pytest.mark.slow
def test_a_refusal_is_said_once_and_each_save_tries_again_with_all_that_waits(client, monkeypatch, tmp_path, upload):
    for name, value in client.environment(tmp_path / "hf").items():
        monkeypatch.setenv(name, value)
    client.fail("POST", "/commit/", status=413, times=99)
    upload.on_save(*at(10))
    (refused,) = heard(upload)
    assert refused.startswith("NOT uploaded: --repo user/step: the Hub takes no commit of this size (413")
    shutil.rmtree(upload.run_dir / "checkpoint-10")
    upload.on_save(*at(20))
    assert heard(upload) == [] and upload.process is None
    client.faults.clear()
    upload.on_save(*at(20))
    assert heard(upload) == [f"uploaded step{step}-tokens0M to user/step." for step in (10, 20)]
    assert {"step10-tokens0M", "step20-tokens0M"} < set(client.repos["model", "user/step"].refs)


@pytest.mark.slow
def test_only_whole_checkpoints_of_this_very_run_are_sent_and_none_where_none_is_asked_for(upload, monkeypatch):
    (upload.unsent / "step5-tokens0M").mkdir(parents=True)
    upload.on_train_begin(*at(0))
    assert not upload.unsent.exists() and upload.process is None
    (upload.run_dir / "checkpoint-10" / "manifest.json").unlink()
    upload.on_save(*at(10))
    upload.on_save(*at(20, last=True))
    (waiting,) = upload.unsent.iterdir()
    assert waiting.name == "step20-tokens0M" and upload.process is None
    assert {path.name for path in waiting.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "manifest.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    model = sum(path.stat().st_size for path in waiting.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * model - 1))
    (upload.run_dir / "checkpoint-20").rename(upload.run_dir / "checkpoint-30")
    upload.on_save(*at(30, last=True))
    assert [path.name for path in upload.unsent.iterdir()] == ["step20-tokens0M"]
    assert upload.said_here[-1].startswith("step30-tokens0M is not kept for the Hub: the disk is too full")
    (upload.run_dir / "checkpoint-30").rename(upload.run_dir / "checkpoint-20")
    shutil.rmtree(upload.unsent)
    upload.unsent.write_text("in the way")
    upload.on_save(*at(20))
    assert upload.said_here[-1].startswith("NOT uploaded: ") and upload.process is None
    upload.unsent.unlink()
    upload.each_save = False
    upload.on_save(*at(20))
    upload.on_train_begin(*at(20))
    assert not upload.unsent.exists()


def is_sending(out):
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as publish.py does
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@pytest.mark.slow
def test_training_goes_on_past_an_upload_that_stands_still_and_a_signal_ends_both(hub, launch, small_words, tmp_path):
    hub.faults.clear()
    hub.fail("POST", "/models/user/still/commit/", status=503, times=10**6, Retry_After=300)
    words = [*small_words, *WORDS, "hub_model_id=user/still", "max_steps=100000", "save_steps=5", "save_total_limit=2"]
    out, environment = tmp_path / "out", hub.environment(tmp_path / "hf")
    command = [sys.executable, "run_pretrain.py", *words, "warmup_steps=3", f"output_dir={out}"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE)

    def reached(condition):
        deadline = time.monotonic() + 600
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)

    def step():
        rows = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").is_file() else []
        return max((json.loads(row)["step"] for row in rows if row.endswith("}")), default=0)

    reached(lambda: hub.count("POST", "/models/user/still/commit/"))  # the first upload now stands still
    at = step()
    reached(lambda: step() >= at + 20 and not (out / "checkpoint-5").exists())
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 75 and "not uploaded yet: " in said
    deadline = time.monotonic() + 200  # the upload would stand still for 300 s
    while is_sending(out):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert hub.count("POST", "/models/user/still/commit/") == 1
    waiting = {path.name for path in (out / "unsent").glob("step*")}
    assert {"step0-tokens0M", "step5-tokens0M", "step10-tokens0M"} <= waiting  # the last two were rotated away
    last = step()
    hub.faults.clear()
    again = ["python", *command[1:], f"max_steps={last}", "allow_changes=[]"]
    assert "published: " in launch(*again, **environment).stdout
    assert waiting | {"main"} <= set(hub.repos["model", "user/still"].refs)


@pytest.mark.slow
def test_the_hub_s_refusal_ends_a_run_before_its_data_is_read(hub, launch, small_words, tmp_path):
    words = [*small_words, *WORDS, "hub_model_id=user/new", f"output_dir={tmp_path / 'out'}"]
    environment = hub.environment(tmp_path / "hf", "hf_loopback_read")
    done = launch("python", "run_pretrain.py", *words, expect=2, **environment)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("run_pretrain.py: error: ")]
    assert "hub_model_id = user/new: the access token may only read; make one that may write" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "prepared").exists() and ("model", "user/new") not in hub.repos


def asked(**more):
    given = {"hub_model_id": None, "hub_private_repo": None, "hub_license": "mit", "hub_strategy": "every_save"}
    return SimpleNamespace(**given | {"output_dir": "runs/mine"} | more)


def test_a_repository_is_private_unless_told_and_named_after_the_directory_unless_named(client):
    said = []
    uploads.claim(asked(), said.append)
    assert client.repos["model", "user/mine"].private and said == [
        f"hub: the model goes to {client.endpoint}/user/mine, private."
    ]
    shown = uploads.claim(asked(hub_model_id="shown", hub_private_repo=False), said.append)
    assert not client.repos["model", "user/shown"].private and "public." in said[-1]
    assert shown.command() == ["runs/mine", "--repo", "user/shown", "--license", "mit", "--public"]


@pytest.mark.parametrize(
    ("more", "token", "sentence"),
    [
        ({}, None, "push_to_hub = true: there is no access token; set HF_TOKEN or run `hf auth login`."),
        ({"hub_model_id": "user/run"}, "hf_wrong", "hub_model_id = user/run: the Hub does not know the access token"),
        ({"hub_model_id": "them/run"}, "hf_loopback", "hub_model_id = them/run: the access token is user's; push to"),
        ({"hub_license": "mti"}, "hf_loopback", "hub_license = mti: the Hub does not take it ("),
        ({"hub_model_id": "user/seen"}, "hf_loopback", "is there already and public; add hub_private_repo=false, or"),
        ({"hub_model_id": "user/full"}, "hf_loopback", "hub_model_id = user/full: it holds another model (config.json"),
    ],
)
def test_what_the_hub_would_refuse_names_the_run_s_own_key(client, monkeypatch, more, token, sentence):
    client.add("model", "user/seen", {})
    client.add("model", "user/full", {"config.json": b"{}"}, private=True)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError) as refused:
        uploads.claim(asked(**more), print)
    assert sentence in str(refused.value)


def test_payment_is_asked_for_in_the_words_of_the_run(client):
    client.fail("POST", "/repos/create", status=402, times=9)
    with pytest.raises(ValueError, match=r"choose a paid plan, or set hub_private_repo=false\.$"):
        uploads.claim(asked(hub_model_id="user/paid"), print)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("push_to_hub=true", "hub_license is not set: push_to_hub = true publishes the model under a licence that you"),
        ("hub_strategy=checkpoint", "hub_strategy = 'checkpoint' is not one of end, every_save"),
        ("hub_always_push=true", "hub_always_push must be false, got true: every save is sent, one after another."),
        ("hub_revision=dev", 'hub_revision must be null, got "dev": main is the finished model'),
        ("hub_token=secret", "hub_token must not be in arguments: set HF_TOKEN or run `hf auth login`."),
    ],
)
def test_keys_of_the_hub_are_checked(word, sentence):
    with pytest.raises(ValueError) as refused:
        parse_args([word], (PretrainArguments,))
    assert sentence in str(refused.value)
