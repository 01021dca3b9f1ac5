"""Publishing a run: what the folder may hold, what the Hub gets in one commit, and what each refusal says."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SECRETS
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from smolpretrain.hub import branches, folder, publish
from smolpretrain.training import model

pytestmark = pytest.mark.slow  # all need the run that `pushed` launches
PUBLISH = ("python", ROOT / "hub" / "publish.py")
LICENSE = ("--license", "apache-2.0")


@pytest.fixture
def run(pushed, tmp_path):
    """A finished run's directory, this test's own."""
    return shutil.copytree(pushed[0], tmp_path / "run", ignore=shutil.ignore_patterns("run.lock"))


def refusal(capsys, *words, status=2) -> str:
    with pytest.raises(SystemExit) as end:
        publish.main(list(map(str, words)))
    error = capsys.readouterr().err
    assert end.value.code == status and error.count("\n") == 1 and "hf_loopback" not in error, error
    return error


def built(run) -> Path:
    """The folder of the model, as a dry run leaves it."""
    publish.main([str(run), "--repo", "user/dry", *LICENSE, "--dry_run", "--unscored"])
    return run / "publish" / "main"


def test_a_dry_run_lists_the_exact_folder_scores_it_and_sends_nothing(hub, launch, run, tmp_path):
    asked = len(hub.requests)
    words = ("--repo", "user/dry", *LICENSE, "--checkpoints", "--dry_run", "--output_dir", tmp_path / "here")
    said = launch(*PUBLISH, run, *words, **hub.environment(tmp_path / "hf", "hf_none")).stdout
    assert len(hub.requests) == asked and "dry run: nothing was sent to user/dry." in said
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [
        "main", "step0-tokens0M", "step10-tokens0M", "step20-tokens0M",
    ]  # fmt: skip
    for name, size in folder.files(tmp_path / "here" / "main").items():
        assert re.search(rf"^ +{size:,}  {re.escape(name)}$", said, re.M), name
        assert stat.S_IMODE((tmp_path / "here" / "main" / name).stat().st_mode) == 0o644
    bits = json.loads((run / "run.json").read_text())["result"]["bits_per_byte"]
    assert f"held-out bits per byte {bits:.4f}, the run's {bits:.4f}, over" in said


def test_the_score_of_the_folder_must_be_the_run_s(run, monkeypatch):
    target, record = built(run), json.loads((run / "run.json").read_text())
    weights = load_file(target / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"is not the model that the run scored: held-out bits per byte"):
        publish.reproduce(run, target, record)
    shutil.rmtree(run / "prepared")
    with pytest.raises(ValueError, match=r"cannot be reproduced: put it back, or give --unscored\."):
        publish.reproduce(run, target, record)
    record["result"].pop("bits_per_byte")
    assert publish.reproduce(run, target, record).startswith("no score to reproduce: run.json holds no")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)


TOKEN = "hf_" + "Q7r9" * 6
WRONG = {
    "a pickle": (lambda f: (f / "training_args.bin").write_bytes(b"x"), "training_args.bin is no file of a model"),
    "an optimizer": (lambda f: (f / "optimizer.pt").write_bytes(b"x"), "optimizer.pt is no file of a model"),
    "an environment": (lambda f: (f / "secrets.env").write_text("x"), "secrets.env is no file of a model"),
    "lm-eval's result": (
        lambda f: ((f / "report" / "lm_eval").mkdir(parents=True), (f / "report/lm_eval/a.json").write_text("{}")),
        "report/lm_eval/a.json is no file of a model",
    ),
    "a link": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to(ROOT / "args.json")),
        "config.json is no file of a model",
    ),
    "a mode": (lambda f: (f / "model.safetensors").chmod(0o600), "model.safetensors has mode 600, not 644"),
    "a token in the card": (
        lambda f: (f / "README.md").write_text((f / "README.md").read_text() + TOKEN),
        "README.md holds an access token",
    ),
    "a token in the weights' header": (
        lambda f: (
            save_file(load_file(f / "model.safetensors"), f / "model.safetensors", {"format": "pt", "by": TOKEN}),
            (f / "model.safetensors").chmod(0o644),
        ),
        "model.safetensors holds an access token",
    ),
    "a secret of the environment": (
        lambda f: edit_json(f / "config.json", note=f"key {SECRETS['WANDB_API_KEY']}"),
        "config.json holds an access token or a secret of the environment",
    ),
    "the run's path": (
        lambda f: (f / "README.md").write_text((f / "README.md").read_text() + f"see {f.parents[1]}"),
        "README.md names a path of this machine",
    ),
    "a path": (
        lambda f: edit_json(f / "config.json", _name_or_path="/data/models/secret"),
        "config.json names a path of this machine, /data/models/secret",
    ),
    "no cache": (lambda f: edit_json(f / "generation_config.json", use_cache=False), "use_cache is not true"),
    "a chat template": (lambda f: edit_json(f / "tokenizer_config.json", chat_template="{{x}}"), "a base model"),
    "another licence": (
        lambda f: (f / "README.md").write_text((f / "README.md").read_text().replace("apache-2.0", "mit")),
        "README.md says license mit, asked for is apache-2.0",
    ),
    "a tied weight twice": (
        lambda f: edit_weights(
            f / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
        ),
        "lm_head.weight is saved beside the embeddings",
    ),
    "a weight that is not finite": (
        lambda f: edit_weights(f / "model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "model.norm.weight has values that are not finite",
    ),
    "a weight too few": (
        lambda f: edit_weights(f / "model.safetensors", lambda t: t.pop("model.norm.weight")),
        "does not find its weights as they are: model.norm.weight",
    ),
    "a tokenizer that is built otherwise": (
        lambda f: edit_json(f / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_prefix_space=True),
        "AutoTokenizer gives other ids than its tokenizer.json",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_may_not_be_published_is_found_and_named(run, monkeypatch, what):
    target = built(run)
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    folder.check(target, "apache-2.0", run)
    spoil, sentence = WRONG[what]
    spoil(target)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        folder.check(target, "apache-2.0", run)


def test_the_model_is_written_clean_whatever_the_run_left(run):
    (run / "optimizer.pt").write_bytes(b"x")
    (run / "trainer.env").write_text("HF_TOKEN=x")
    edit_json(run / "tokenizer_config.json", chat_template="{{ messages }}")
    edit_json(run / "config.json", use_cache=False, pad_token_id=0)
    edit_weights(
        run / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    target = built(run)
    config = AutoConfig.from_pretrained(target)
    assert config.use_cache and config.pad_token_id is None and config.eos_token_id == 0
    assert set(load_file(target / "model.safetensors")) == set(load_file(run / "model.safetensors")) - {
        "lm_head.weight"
    }
    assert AutoTokenizer.from_pretrained(target).chat_template is None
    assert not {"optimizer.pt", "trainer.env"} & set(folder.files(target))
    assert str(run) not in (target / "run.json").read_text()


def test_a_card_of_one_s_own_is_taken_and_checked_like_any_other(run, capsys, tmp_path):
    mine = tmp_path / "mine.md"
    mine.write_text("---\nlicense: apache-2.0\n---\n\n![loss](report/loss.png)\n")
    words = (run, "--repo", "user/dry", "--dry_run", "--unscored", "--card", mine)
    publish.main(list(map(str, (*words, *LICENSE))))
    target = run / "publish" / "main"
    assert (target / "README.md").read_text() == mine.read_text()
    assert [path.name for path in (target / "report").iterdir()] == ["loss.png"]
    assert "says license apache-2.0, asked for is mit." in refusal(capsys, *words, "--license", "mit")


@pytest.mark.parametrize(("flag", "dtype"), [("--fp32", torch.float32), ("--bf16", torch.bfloat16)])
def test_weights_are_written_as_asked(run, flag, dtype):
    publish.main([str(run), "--repo", "user/dry", *LICENSE, "--dry_run", "--unscored", flag])
    weights, were = load_file(run / "publish/main/model.safetensors"), load_file(run / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert all(torch.equal(tensor.float(), were[name].float()) for name, tensor in weights.items())
    assert json.loads((run / "publish/main/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_step_0_is_the_model_before_its_first_step_or_is_left_out_with_a_reason(hub, pushed, run, tmp_path):
    at_0 = tmp_path / "model.safetensors"
    at_0.write_bytes(hub.repos["model", "user/pushed"].files("step0-tokens0M")["model.safetensors"])
    record = json.loads((run / "run.json").read_text())
    first = model.random_model(AutoConfig.from_pretrained(run), record["arguments"]["seed"], None).state_dict()
    drawn = load_file(at_0)
    assert drawn and all(torch.equal(first[name].bfloat16(), tensor) for name, tensor in drawn.items())
    assert branches.why_no_step_0(record, 2) is None
    assert branches.why_no_step_0(record, 3) == "ZeRO-3 draws the weights split over its ranks"
    record["versions"]["torch"] = "1.0"
    assert branches.why_no_step_0(record, None).startswith("its weights were drawn by torch 1.0, here is ")
    record["arguments"]["init_from"] = "elsewhere"
    assert "began from elsewhere" in branches.why_no_step_0(record, None)


def test_a_damaged_checkpoint_is_not_published(run, capsys):
    weights = run / "checkpoint-10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    error = refusal(capsys, run, "--repo", "user/dry", *LICENSE, "--dry_run", "--unscored", "--checkpoints")
    assert "checkpoint-10/model.safetensors is damaged: it is not what its manifest.json says." in error


def test_anybody_who_may_loads_what_the_run_has_published(hub, launch, pushed, tmp_path):
    code = """
import json, os, sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
name, found = "user/pushed", {}
for revision in ("main", "step0-tokens0M", "step10-tokens0M", "step20-tokens0M"):
    network = AutoModelForCausalLM.from_pretrained(name, revision=revision)
    found[revision] = network(torch.tensor([[5, 6, 7]])).logits.float().flatten().tolist()
found["ids"] = AutoTokenizer.from_pretrained(name)("Two words")["input_ids"]
found["text"] = pipeline("text-generation", name)("The", max_new_tokens=5, do_sample=False)[0]["generated_text"]
found["files"] = sorted(os.listdir(snapshot_download(name)))
print("found", json.dumps(found))
"""
    done = launch("python", "-c", code, cwd=tmp_path, **hub.environment(tmp_path / "hf"))
    found = json.loads(done.stdout.split("found ")[-1])
    places = {"main": pushed[0], "step10-tokens0M": pushed[0] / "checkpoint-10"}
    for revision, place in (places | {"step20-tokens0M": pushed[0]}).items():
        network = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
        assert found[revision] == network(torch.tensor([[5, 6, 7]])).logits.float().flatten().tolist(), revision
    assert found["main"] == found["step20-tokens0M"] != found["step10-tokens0M"] != found["step0-tokens0M"]
    assert found["ids"] == AutoTokenizer.from_pretrained(pushed[0])("Two words")["input_ids"]
    assert found["text"].startswith("The") and {"README.md", "run.json", "report"} <= set(found["files"])


def test_published_again_nothing_is_sent_and_what_is_stale_goes(client, capsys, run):
    words = [str(run), "--repo", "user/again", *LICENSE, "--unscored", "--checkpoints", "--tag", "v1"]
    publish.main(words)
    repo, sent = client.repos["model", "user/again"], client.count("PUT", "/lfs/")
    assert repo.private and repo.refs["v1"] == repo.refs["main"] and len(repo.log) == 5
    publish.main(words)
    said = capsys.readouterr().out
    assert said.count("there already: ") == 4 and len(repo.log) == 5 and client.count("PUT", "/lfs/") == sent
    repo.commit(repo.files() | {"model-00001-of-00002.safetensors": b"\0old", "notes.md": b"mine"}, "by hand")
    publish.main(words[:-2])
    assert "notes.md" in repo.files() and "model-00001-of-00002.safetensors" not in repo.files()
    assert "--tag v1: user/again has it already, at another commit" in refusal(capsys, *words)
    publish.main([*words[:-1], "v2"])
    edit_json(run / "run.json", note="another record")
    error = refusal(capsys, *words[:-1], "v2", status=6)
    assert "--tag v2: user/again has it already" in error and repo.refs["v2"] != repo.refs["main"]


def test_one_commit_holds_weights_card_pictures_and_record(hub, pushed):
    repo, run = hub.repos["model", "user/pushed"], pushed[0]
    main = repo.files()
    assert [sha for sha, files in repo.commits.items() if "report/loss.png" in files] == [repo.refs["main"]]
    assert repo.private and main["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert set(main) - {".gitattributes"} == {
        *("README.md", "run.json", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
        *re.findall(r"report/[\w.-]+\.png", main["README.md"].decode()),
    }
    card = ModelCard(main["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.base_model is None and "fine-tuned" not in card.text
    at_10 = repo.files("step10-tokens0M")
    assert set(at_10) - {".gitattributes"} == set(main) - {".gitattributes", "run.json"} - {
        name for name in main if name.startswith("report/")
    }
    text = at_10["README.md"].decode()
    assert 'revision="step10-tokens0M"' in text and "an unfinished model" in text and "bits per byte" not in text


@pytest.mark.parametrize(
    ("words", "token", "sentence"),
    [
        ("--repo user/new", None, "--repo user/new: there is no access token; set HF_TOKEN or run `hf auth login`."),
        ("--repo user/new", "hf_wrong", "the Hub does not know the access token (401"),
        ("--repo user/new", "hf_loopback_read", "the access token may only read"),
        ("--repo user/private", "hf_loopback_fineGrained", "has no write right there (403: You have no"),
        ("--repo somebody/new", "hf_loopback", "the access token is user's; push to user."),
        ("--repo user/open", "hf_loopback", "it is there already and public; add --public, or change its settings."),
        ("--repo user/private --public", "hf_loopback", "it is there already and private; leave --public out"),
        ("--repo user/other", "hf_loopback", "it holds another model (config.json) already; give another name."),
        ("--repo new", "hf_loopback", "--repo new names no owner: write user/new."),
        ("--repo user/new --license mti", "hf_loopback", "--license mti: the Hub does not take it"),
    ],
)
def test_what_the_hub_would_refuse_is_said_before_anything_is_built(
    client, capsys, monkeypatch, run, words, token, sentence
):
    client.add("model", "user/open", {})
    client.add("model", "user/private", {}, private=True)
    client.add("model", "user/other", {"config.json": b"{}"}, private=True)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    assert sentence in refusal(capsys, run, *LICENSE, *words.split())
    assert not (run / "publish").exists() and ("model", "user/new") not in client.repos


def test_what_is_no_finished_run_is_refused(capsys, run, tmp_path):
    words = ("--repo", "user/dry", *LICENSE, "--dry_run")
    assert "has no run.json: give the output_dir of a run." in refusal(capsys, tmp_path, *words)
    with pytest.raises(SystemExit):
        publish.main([str(run), *words[:2]])
    assert "the following arguments are required: --license" in capsys.readouterr().err
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    assert "thesis.txt is not of this command" in refusal(capsys, run, *words, "--output_dir", mine)
    assert (mine / "thesis.txt").exists()
    (run / "model.safetensors").unlink()
    assert "has no model*.safetensors: the run is not finished" in refusal(capsys, run, *words)


@pytest.mark.parametrize(
    ("method", "path", "status", "exit_status", "sentence"),
    [
        ("GET", "/whoami", 401, 2, "the Hub does not know the access token (401"),
        ("POST", "/repos/create", 402, 2, "the Hub asks for payment (402"),
        ("POST", "/commit/main", 403, 6, "the access token has no write right there (403"),
        ("POST", "/commit/main", 413, 6, "the Hub takes no commit of this size (413"),
        ("PUT", "/lfs/", 401, 6, "the Hub does not know the access token (401"),
    ],
)
def test_a_refusal_for_good_is_one_sentence_with_the_command_that_repeats_it(
    client, capsys, run, method, path, status, exit_status, sentence
):
    name = f"user/no-{status}-{method}"
    client.objects.clear()
    before = client.count(method, path)
    client.fail(method, path, status=status, times=99)
    error = refusal(capsys, run, "--repo", name, *LICENSE, "--unscored", status=exit_status)
    assert sentence in error and client.waits == [] and client.count(method, path) - before <= 5
    if exit_status == 6:
        command = f"python hub/publish.py {run} --repo {name} --license apache-2.0 --unscored"
        assert f"{run} is saved, NOT uploaded: --repo {name}: " in error and error.endswith(f"; then: {command}\n")
        assert [title for _, title in client.repos["model", name].log] == ["initial commit"]
        assert not (run / "publish").exists()


def test_what_passes_is_waited_for_and_bounded(client, capsys, run):
    words = ("--repo", "user/slow", *LICENSE, "--unscored")
    for number, status in enumerate((503, 504, 408)):
        client.fail("POST", "/commit/main", status=status)
        publish.main([str(run), *words[:1], f"user/slow{number}", *words[2:]])
    assert client.waits == [1, 1, 1]
    client.fail("POST", "/commit/main", status=429, Retry_After=7)
    client.fail("POST", "/commit/main")
    client.fail("POST", "/commit/main", after=True)
    publish.main([str(run), *words])
    assert client.waits[3:] == [7, 2, 4] and len(client.repos["model", "user/slow"].log) == 2
    client.waits.clear()
    client.fail("POST", "/commit/main", status=503, times=99)
    error = refusal(capsys, run, "--repo", "user/never", *LICENSE, "--unscored", status=6)
    assert "the Hub answered 503; try again later; then: python" in error and client.waits == [1, 2, 4, 8]


@pytest.mark.parametrize("held_back", ["main", "step10-tokens0M"])
def test_a_killed_upload_leaves_nothing_mixed_and_a_rerun_finishes_it(hub, launch, run, tmp_path, held_back):
    name = f"user/killed-{held_back}"
    hub.faults.clear()
    hub.objects.clear()
    before = hub.count("PUT", "/lfs/")
    hub.fail("POST", f"/models/{name}/commit/{held_back}", status=503, Retry_After=300)  # it waits; then it is killed
    command = [sys.executable, PUBLISH[1], run, "--repo", name, *LICENSE, "--unscored", "--checkpoints"]
    environment = hub.environment(tmp_path / "hf")
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while any(fault.times for fault in hub.faults) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    repo = hub.repos["model", name]
    whole = {"config.json", "model.safetensors", "README.md", "tokenizer.json"}
    for branch in repo.refs:
        files = set(repo.files(branch)) - {".gitattributes"}
        assert (files == set()) if branch == held_back or held_back == "main" else (whole <= files), branch
    launch(*command, **environment)
    assert set(repo.refs) == {"main", "step0-tokens0M", "step10-tokens0M", "step20-tokens0M"}
    assert all(whole <= set(repo.files(branch)) for branch in repo.refs) and len(repo.log) == 5
    assert hub.count("PUT", "/lfs/") - before == len(hub.objects)  # what was up is not sent again
