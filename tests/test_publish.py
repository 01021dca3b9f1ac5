"""A prepared set on the Hub: one private commit with its card, refused early, finished late, trainable by anybody."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, note_waits
from datasets import load_from_disk
from huggingface_hub import constants

from smolpretrain.data.dataset_card import _size_category, make_card
from smolpretrain.data.pack.manifest import Manifest
from smolpretrain.data.prepare import main
from smolpretrain.data.prepared import load_blocks

PREPARE = ("python", ROOT / "data" / "prepare.py")
KEYS = ("vocab_size=400", "block_size=64", "validation_fraction=0.1")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub-home")


@pytest.fixture(scope="module")
def published(hub, launch, corpus_file, home):
    """A set prepared and pushed by one command; returns its directory."""
    words = (*PREPARE, f"data_files={corpus_file}", *KEYS, "prepared_dir=set")
    flags = ("--push_to_hub", "user/set", "--license", "odc-by")
    done = launch(*words, *flags, cwd=home, **hub.environment(home / "hf"))
    assert f"published: {hub.endpoint}/datasets/user/set" in done.stdout
    assert "hf_loopback" not in done.stdout + done.stderr
    return home / "set"


@pytest.fixture
def here(hub, monkeypatch, home):
    """This process as a client of the loopback Hub; the command's main() is called in it."""
    hub.faults.clear()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "none"))
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    monkeypatch.chdir(home)
    yield hub
    hub.faults.clear()


def refusal(capsys, *words, status=2) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    error = capsys.readouterr().err
    assert end.value.code == status and error.count("\n") == 1 and "hf_loopback" not in error, error
    return error


def test_one_private_commit_holds_the_whole_set_and_its_card(hub, published):
    repo, manifest = hub.repos["dataset", "user/set"], Manifest.load(published)
    assert repo.private
    assert [title for _, title in repo.log] == ["initial commit", f"Prepared set {manifest.fingerprint}"]
    files = repo.files()
    assert set(files) == {*manifest.files, "manifest.json", "README.md", ".gitattributes"}
    for name in [*manifest.files, "manifest.json"]:
        assert files[name] == (published / name).read_bytes(), name


def test_the_card_says_what_the_manifest_says(hub, published, corpus_file):
    manifest = Manifest.load(published)
    _, front, body = hub.repos["dataset", "user/set"].files()["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["license"] == "odc-by" and data["task_categories"] == ["text-generation"]
    assert data["configs"][0]["data_files"] == [
        {"split": "train", "path": "train-*.arrow"},
        {"split": "validation", "path": "validation-*.arrow"},
    ]
    said = [manifest.fingerprint, manifest.tokenizer_hash, corpus_file.name, "rows of 64", "id 0"]
    said += [manifest.source["data_files"][0]["sha256"], f"{manifest.splits['train']['tokens']:,}"]
    said += ['load_dataset("user/set"', "tokenizer_name=prepared/set/tokenizer", "block_size=64"]
    assert [text for text in said if text not in body] == []


def test_nothing_that_is_pushed_names_this_machine_or_the_token(here, published, corpus_file, home):
    evaluation, texts, more = (home / name for name in ("evaluation", "texts", "more"))
    for directory in (evaluation, texts, more):
        directory.mkdir()
    lines = corpus_file.read_text(encoding="utf-8").splitlines(keepends=True)
    (evaluation / "bench.jsonl").write_text("".join(lines[:5]))
    (texts / "bad.jsonl").write_text(json.dumps({"text": 3}) + "\n" + "".join(lines))
    (more / "more.jsonl").write_text("".join(reversed(lines)))
    mixture = [{"data_files": str(texts / "bad.jsonl"), "weight": 1}, {"dataset_name": str(more), "weight": 1}]
    main([f"mixture={json.dumps(mixture)}", "prepared_dir=mixed", "bad_rows=skip", *KEYS,
          f"decontaminate={json.dumps([str(evaluation / '*.jsonl')])}", "--push_to_hub", "user/mixed"])  # fmt: skip
    assert {"decontaminated-00000-00000.jsonl", "tokenizer/tokenizer_config.json"} <= set(
        here.repos["dataset", "user/mixed"].files()
    )
    assert b"bad.jsonl" in here.repos["dataset", "user/mixed"].files()["README.md"]
    for repository in ("user/mixed", "user/set"):
        for name, content in here.repos["dataset", repository].files().items():
            for secret in ("hf_loopback", str(home), str(corpus_file.parent), str(ROOT)):
                assert secret.encode() not in content, (repository, name, secret)


def test_a_licence_is_never_guessed_and_a_mixture_names_its_sources(published):
    manifest = Manifest.load(published)
    manifest.source = {
        "mixture": [
            {"dataset_name": "user/one", "dataset_commit": "abc", "weight": 0.25},
            {"data_files": [{"name": f"{n}.jsonl", "bytes": n, "sha256": "0"} for n in range(30)], "weight": 0.75},
        ]
    }
    manifest.filtered, manifest.splits["validation"]["blocks"] = {"duplicates": 1234}, 0
    card = make_card(manifest, "user/set", None)
    assert "license" not in card.data.to_dict() and "Not stated by its publisher" in card.text
    assert card.data.source_datasets == ["user/one"] and "dataset_commit: `abc`" in card.text
    assert (
        "`19.jsonl`" in card.text and "`20.jsonl`" not in card.text and "and 10 more, in `manifest.json`" in card.text
    )
    assert "left out by duplicates: 1,234" in card.text
    assert [item["split"] for item in card.data.configs[0]["data_files"]] == ["train"]
    sizes = (999, 1000, 9_999, 10_000, 10**12 - 1, 10**12)
    assert list(map(_size_category, sizes)) == ["n<1K", "1K<n<10K", "1K<n<10K", "10K<n<100K", "100B<n<1T", "n>1T"]


def test_anybody_who_may_can_load_both_splits(hub, launch, published, home):
    code = "from datasets import load_dataset; load_dataset('user/set').save_to_disk('loaded')"
    launch("python", "-c", code, cwd=home, **hub.environment(home / "hf"))
    for split in ("train", "validation"):
        loaded = load_from_disk(str(home / "loaded" / split))["input_ids"]
        assert [list(row) for row in loaded] == [row.tolist() for row in load_blocks(published, split)["input_ids"]]


def test_pushed_again_nothing_is_sent_and_another_set_leaves_no_shard_behind(here, published, corpus_file):
    flags = ["--push_to_hub", "user/again"]
    main(["prepared_dir=set", *flags])
    sent, repo = here.count("PUT", "/lfs/"), here.repos["dataset", "user/again"]
    main(["prepared_dir=set", *flags])
    assert len(repo.log) == 2 and here.count("PUT", "/lfs/") == sent and "validation-00000-00000.arrow" in repo.files()
    main([f"data_files={corpus_file}", *KEYS[:2], "validation_fraction=0", "prepared_dir=other", *flags])
    assert len(repo.log) == 3 and not [name for name in repo.files() if name.startswith("validation")]


@pytest.mark.parametrize(
    ("words", "token", "sentence"),
    [
        ("--push_to_hub user/new", None, "there is no access token; set HF_TOKEN or run `hf auth login`."),
        ("--push_to_hub user/new", "hf_wrong", "the Hub does not know the access token (401"),
        ("--push_to_hub user/new", "hf_loopback_read", "the access token may only read; make one that may write"),
        (
            "--push_to_hub user/private",
            "hf_loopback_fineGrained",
            "has no write right there (403: You have no",
        ),
        ("--push_to_hub somebody/new", "hf_loopback", "the access token is user's; push to user."),
        ("--push_to_hub user/public", "hf_loopback", "it is there already and public; add --public, or change its"),
        ("--push_to_hub user/private --public", "hf_loopback", "it is there already and private; leave --public out"),
        ("--push_to_hub user/else", "hf_loopback", "it holds something else (data.csv) than a prepared set"),
        ("--push_to_hub user/new --license mti", "hf_loopback", "--license mti: the Hub does not take it"),
        ("--push_to_hub new", "hf_loopback", "--push_to_hub new names no owner: write user/new."),
        ("--push_to_hub user/a--b", "hf_loopback", "--push_to_hub user/a--b: Cannot have -- or .. in repo_id"),
        ("--push_to_hub", "hf_loopback", "--push_to_hub needs a value"),
        ("--license mit", "hf_loopback", "license says how a set is published: give push_to_hub=user/name too."),
        ("--push_to_hub user/new shard_index=0 num_shards=2", "hf_loopback", "push_to_hub belongs to the last step"),
    ],
)
def test_what_the_hub_would_refuse_is_said_before_anything_is_prepared(
    here, capsys, monkeypatch, tmp_path, words, token, sentence
):
    here.add("dataset", "user/public", {})
    here.add("dataset", "user/private", {}, private=True)
    here.add("dataset", "user/else", {"data.csv": b"1"}, private=True)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(capsys, "data_files=never-read.jsonl", *words.split())
    assert list(tmp_path.iterdir()) == [] and ("dataset", "user/new") not in here.repos


def test_offline_is_said_and_a_licence_is_not_judged_by_a_hub_that_does_not_answer(here, capsys, monkeypatch):
    note_waits(monkeypatch, [])
    here.fail("POST", "/validate-yaml", times=99)
    error = refusal(capsys, "prepared_dir=set", "--push_to_hub=user/new", "--license=mit")
    assert "error: --license mit: the Hub could not be reached (" in error and "does not take it" not in error
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sentence = "error: --push_to_hub user/new: HF_HUB_OFFLINE is set; unset it to reach the Hub.\n"
    assert refusal(capsys, "prepared_dir=set", "--push_to_hub=user/new").endswith(sentence)


def test_a_set_that_is_not_whole_is_refused_before_the_hub_is_asked(here, capsys, tmp_path, published):
    asked = len(here.requests)
    assert "is not a prepared set" in refusal(capsys, f"prepared_dir={tmp_path}", "--push_to_hub=user/new")
    flipped = shutil.copytree(published, tmp_path / "set") / "unigram_counts.npy"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\xff")
    assert "is damaged: its sha256 is" in refusal(capsys, f"prepared_dir={tmp_path}/set", "--push_to_hub=user/new")
    assert len(here.requests) == asked


@pytest.mark.parametrize(
    ("method", "path", "status", "exit_status", "sentence"),
    [
        ("POST", "/repos/create", 402, 2, "the Hub asks for payment (402: failing on command); free some private"),
        ("POST", "/commit/", 403, 6, "the access token has no write right there (403"),
        ("POST", "/commit/", 413, 6, "the Hub takes no commit of this size (413: failing on command)"),
        ("PUT", "/lfs/", 413, 6, "the Hub takes no commit of this size (413"),
        ("POST", "/commit/", 418, 6, "the Hub refuses (418: failing on command)."),
    ],
)
def test_a_permanent_refusal_is_one_sentence_asked_once(
    here, published, capsys, method, path, status, exit_status, sentence
):
    name = f"user/refused-{status}-{method}"
    here.objects.clear()
    before = here.count(method, path)
    here.fail(method, path, status=status, times=99)
    error = refusal(capsys, "prepared_dir=set", f"--push_to_hub={name}", status=exit_status)
    assert sentence in error
    assert here.count(method, path) - before <= (3 if method == "PUT" else 1)  # three objects, five threads
    if exit_status == 6:
        assert f"set is whole, but not on the Hub: --push_to_hub {name}: " in error
        assert f"Then: python data/prepare.py --push_to_hub {name} prepared_dir=set\n" in error
        assert [title for _, title in here.repos["dataset", name].log] == ["initial commit"]


def test_what_breaks_in_xet_is_one_sentence_too(here, published, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)  # which this Hub does not speak: hf-xet fails for real
    error = refusal(capsys, "prepared_dir=set", "--push_to_hub=user/xet", status=6)
    assert "set is whole, but not on the Hub: " in error and "Then: python data/prepare.py" in error
    assert [title for _, title in here.repos["dataset", "user/xet"].log] == ["initial commit"]


def test_what_passes_is_waited_for_and_what_stays_is_given_up(here, published, capsys, monkeypatch):
    waits = []
    note_waits(monkeypatch, waits)
    here.fail("POST", "/commit/", status=503, times=99)
    error = refusal(capsys, "prepared_dir=set", "--push_to_hub=user/slow", status=6)
    assert "the Hub answered 503; try again later." in error and waits == [1, 2, 4, 8]
    here.faults.clear()
    here.fail("POST", "/commit/", status=429, times=99, Retry_After=3600)
    assert "the Hub answered 429" in refusal(capsys, "prepared_dir=set", "--push_to_hub=user/slow", status=6)
    here.faults.clear()
    here.fail("GET", "/whoami", times=99)
    assert "the Hub could not be reached (" in refusal(capsys, "prepared_dir=set", "--push_to_hub=user/slow")
    assert waits == [1, 2, 4, 8, 1, 2, 4, 8]


def test_a_push_outlives_a_bad_day_of_the_hub_and_makes_one_commit(hub, launch, published, home):
    hub.fail("GET", "/whoami", status=429, Retry_After=1)
    hub.fail("POST", "/repos/create", status=500)
    hub.fail("POST", "/preupload/", status=503)
    hub.fail("POST", "/lfs/objects/batch")
    hub.objects.clear()
    hub.fail("PUT", "/lfs/", status=500)
    hub.fail("POST", "/datasets/user/bad-day/commit/", after=True)
    words = (*PREPARE, "prepared_dir=set", "--push_to_hub", "user/bad-day")
    done = launch(*words, cwd=home, **hub.environment(home / "hf"))
    assert "published: " in done.stdout and not [fault for fault in hub.faults if fault.times]
    assert [title.split()[0] for _, title in hub.repos["dataset", "user/bad-day"].log] == ["initial", "Prepared"]
    assert hub.repos["dataset", "user/bad-day"].files()["manifest.json"] == (published / "manifest.json").read_bytes()


def test_a_killed_upload_leaves_no_half_set_and_goes_on_when_it_is_run_again(hub, launch, published, home):
    hub.faults.clear()
    hub.objects.clear()
    hub.fail("PUT", "/lfs/", times=1, status=503, Retry_After=600)  # holds one object back until the kill
    before = len(hub.requests)
    command = [sys.executable, PREPARE[1], "prepared_dir=set", "--push_to_hub", "user/killed"]
    process = subprocess.Popen(command, cwd=home, env=os.environ | hub.environment(home / "hf"))
    deadline = time.monotonic() + 600
    while len(hub.objects) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and len(hub.objects) == 2
    repo = hub.repos["dataset", "user/killed"]
    assert [title for _, title in repo.log] == ["initial commit"]
    launch(*PREPARE, *command[2:], cwd=home, **hub.environment(home / "hf"))
    assert repo.files()["manifest.json"] == (published / "manifest.json").read_bytes()
    sent = [path for method, path in hub.requests[before:] if method == "PUT"]
    assert len(sent) == 4 and len(set(sent)) == 3  # only what was held back is sent again


@pytest.mark.slow
def test_the_card_s_commands_download_verify_and_train(hub, launch, published, home):
    card = hub.repos["dataset", "user/set"].files()["README.md"].decode()
    download, verification, training = map(str.split, re.search(r"```\n(hf .*?)\n```", card, re.S)[1].splitlines())
    launch(*download, cwd=home, **hub.environment(home / "hf"))
    assert (home / "prepared" / "set" / "README.md").is_file()
    assert "every byte as its manifest says" in launch(*PREPARE, *verification[2:], cwd=home).stdout
    assert training[:3] == ["deepspeed", "run_pretrain.py", "args.json"]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    words = [f"config_overrides={json.dumps(small)}", "max_steps=2", "warmup_steps=0", "optim=adamw_torch"]
    words += ["deepspeed=null", "per_device_train_batch_size=2", "max_eval_documents=2"]
    command = ("python", ROOT / "run_pretrain.py", ROOT / "args.json", *training[3:], *words, "output_dir=run")
    assert "found in prepared/set" in launch(*command, cwd=home, OMP_NUM_THREADS="1").stdout
    assert Manifest.load(published).fingerprint in (home / "run" / "run.json").read_text()
