"""Common ground: files whole or not at all, rows that a kill cut short, one list of secrets, one reckoning."""

import json
import os

import pytest
from conftest import SECRETS

from smolpretrain import plan
from smolpretrain.arguments import DataArguments, ModelArguments, PretrainArguments
from smolpretrain.core import architectures, files, secrets, text
from smolpretrain.core.words import parse_args
from smolpretrain.eval import report
from smolpretrain.hub import folder, run_record
from smolpretrain.planning import counting, memory
from smolpretrain.space import static
from smolpretrain.training import record
from smolpretrain.training.safety import checkpoints

SHAPES = {
    "hugging face": "hf_" + "Ab1" * 8,
    "github, fine-grained": "github_pat_" + "1A_b" * 8,
    "github, a workflow's": "ghs_" + "a1B2" * 6,
    "aws, a user's": "AKIA" + "Z9Y8" * 4,
    "aws, a session's": "ASIA" + "Z9Y8" * 4,
    "openai": "sk-proj-" + "a-1" * 7,
    "an address": "https://somebody:pass%20word@example.org/x",
}


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_json(path, {"new": 1}),
        lambda path: record.write_run(path.parent, new=1),
        lambda path: checkpoints.commit(path.parent, 0, 1, new=1),
    ],
    ids=["core", "run.json", "a checkpoint's manifest"],
)
def test_json_is_whole_or_not_written_at_all_and_nothing_else_is_left(tmp_path, monkeypatch, write):
    path = tmp_path / ("run.json" if write.__code__.co_names[0] == "record" else "manifest.json")
    files.write_json(path, {"old": "é\u2028"})
    synced, whole = [], os.fsync

    def full(descriptor):
        if not os.path.isdir(name := os.readlink(f"/proc/self/fd/{descriptor}")) and path.name in name:
            synced.append(name)
            raise OSError(28, "No space left on device")
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path)
    assert synced, "it is on the disk before it gets its name"
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": "é\u2028"} and os.listdir(tmp_path) == [path.name]


def test_text_that_utf_8_cannot_hold_is_escaped_and_read_back(tmp_path):
    files.write_json(tmp_path / "x.json", {"name": "caf\udce9"})
    assert files.read_json(tmp_path / "x.json") == {"name": "caf\udce9"}


@pytest.mark.parametrize(
    "read", [files.read_rows, run_record.read_rows, static.read_rows], ids=["core", "card", "page"]
)
def test_a_last_line_that_a_kill_cut_short_is_left_out_and_a_damaged_one_before_it_is_named(tmp_path, read):
    path = tmp_path / "samples.jsonl"
    path.write_bytes('{"step": 1, "text": "a\u2028b"}\n{"step": 2, "text": "é'.encode()[:-1])
    found = read(path)
    assert (found.rows if read is files.read_rows else found) == [{"step": 1, "text": "a\u2028b"}]
    assert files.read_rows(path).cut == 1 and files.read_rows(tmp_path / "none").cut == 0
    path.write_bytes(b'{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl: line 1 is no JSON"):
        read(path)


def test_the_report_of_a_run_killed_in_mid_line_is_written_and_says_so(tmp_path):
    files.write_json(tmp_path / "run.json", {"arguments": {}})
    row = {"step": 1, "loss": 2.0, "tokens_seen": 5, "learning_rate": 1e-3, "grad_norm": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:20])
    report.write_report(tmp_path)
    assert "last line of metrics.jsonl was cut short" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize("kind", SHAPES)
def test_every_shape_of_a_secret_is_refused_on_the_command_line_and_leaves_card_and_page(kind, tmp_path):
    secret, said = SHAPES[kind], f"see {SHAPES[kind]} there"
    hidden = "pass%20word" if kind == "an address" else secret
    with pytest.raises(ValueError, match="seed holds an access token") as refused:
        parse_args([f"seed={said}"], (PretrainArguments,))
    assert hidden not in str(refused.value)
    for clean in (secrets.remove, run_record.clean_text, static.clean):
        assert hidden not in clean(said) and "[removed]" in clean(said)
    (tmp_path / "README.md").write_text(said)
    with pytest.raises(ValueError, match="holds an access token or a secret"):
        folder.check_texts(tmp_path, tmp_path)


def test_words_that_look_a_little_like_a_secret_stay(monkeypatch):
    for harmless in ("task-oriented-dialogues-and-more", "https://a.org:80/b@c", "AKIAshort", "a hf_token here"):
        assert secrets.find(harmless) is None and secrets.remove(harmless) == harmless
    for name, value in (SECRETS | {"TOKENIZERS_PARALLELISM": "true" * 9}).items():
        monkeypatch.setenv(name, value)
    assert secrets.in_environment().keys() >= SECRETS.keys()
    assert "TOKENIZERS_PARALLELISM" not in secrets.in_environment()
    assert secrets.find(f"x{SECRETS['WANDB_API_KEY']}") == "the value of WANDB_API_KEY"


def test_an_error_is_one_line_and_one_without_words_is_its_kind():
    assert text.one_line(ValueError("a\n  b.")) == "a b." and text.reason(ValueError("a\n b.")) == "a b"
    assert text.one_line(KeyboardInterrupt()) == "KeyboardInterrupt" and text.one_line("abcd", 2) == "ab"


@pytest.mark.parametrize(
    "words",
    [
        ['config_overrides={"num_key_value_heads": 4}'],
        ['config_overrides={"num_hidden_layers": "three"}'],
        ['config_overrides={"layers": 3}'],
        ["model_name=smollm2-9b"],
        ["learning_rate=-1"],
        ["warmup_steps=200", "max_steps=100"],
        ["lr_scheduler_type=warmup_stable_decay"],
        ["gradient_accumulation_steps=0"],
        ["on_spike=shrug"],
        ["spot_notice_url=ftp://x"],
        ["allow_changes=seed"],
    ],
    ids=lambda words: words[0],
)
def test_the_plan_refuses_what_the_run_refuses_in_the_same_line(words, capsys):
    with pytest.raises(ValueError) as run:
        model, *_ = parse_args(words, (ModelArguments, DataArguments, PretrainArguments))
        architectures.load_config(model.model_name, model.config_overrides)
    with pytest.raises(SystemExit) as ended:
        plan.main([*words, "gpu=L4"])
    assert ended.value.code == 2 and capsys.readouterr().err == f"plan.py: error: {text.one_line(run.value)}\n"


@pytest.mark.parametrize("name", ["smollm2-1m", "smollm2-135m", "smollm2-1m-moe"])
@pytest.mark.parametrize("stage", [None, 2])
def test_plan_and_disk_reckon_one_checkpoint(name, stage):
    config = architectures.load_config(name)
    setup = memory.Setup(config.to_dict(), 512, stage=stage, optim="adamw_bnb_8bit")
    counted = architectures.size(config)
    assert counted.weights == counting.count(config.to_dict()).total
    asked = {"optim": setup.optim, "bf16": setup.bf16, "zero_stage": stage}
    assert memory.checkpoint_bytes(setup) == architectures.checkpoint_bytes(counted, **asked)[0]
