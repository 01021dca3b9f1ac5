"""The table of bad input, row by row through the command line: one line that names the place, an exit status, no more.

The rows' numbers are the design's. What only preparation, the Hub or the Space can be given wrong is tested with them.
"""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from transformers import LlamaConfig, MixtralConfig

from smolpretrain import limits, run_pretrain
from smolpretrain.core.architectures import load_config
from smolpretrain.data.tokens.tokenization import load_tokenizer, train_tokenizer
from smolpretrain.training import model

MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
TINY = [
    "model_name=smollm2-1m", "tokenizer_name=train", f"config_overrides={json.dumps(MODEL)}", "block_size=64",
    "validation_fraction=0.1", "eval_strategy=no", "sample_steps=0", "logging_steps=1", "learning_rate=3e-3",
    "per_device_train_batch_size=2", "deepspeed=null", "disable_tqdm=true",
]  # fmt: skip
TOKEN = "hf_" + "b2C3" * 8
OWN = ["validation_fraction=null"]
WSD = ["lr_scheduler_type=warmup_stable_decay"]
ENVIRONMENT_SECRET = "0123456789abcdef0123456789abcdef01234567"  # 40 hexadecimal digits, as wandb's keys
LEFT = {"run.json", "metrics.jsonl", "training_log.md", "model.safetensors", "config.json", "report"}


def overrides(**changes):
    return f"config_overrides={json.dumps(MODEL | changes)}"


def inline(**blocks):
    """A DeepSpeed JSON on the command line."""
    return f"deepspeed={json.dumps({'zero_optimization': {'stage': 2}} | blocks)}"


@pytest.fixture(scope="module")
def places(corpus_file, tmp_path_factory):
    """Files and directories that rows name as {name}; `run` is a whole run of one rank with checkpoints 1 and 2."""
    where = tmp_path_factory.mktemp("bad input")
    names = ("empty", "short", "large", "no_eos", "slow", "remote", "remote_model", "kv", "vit", "bare", "none")
    found = {name: where / name for name in names} | {"corpus": corpus_file, "where": where, "run": where / "run"}
    for name, text in (("empty", ""), ("short", '{"text": "one two"}\n')):
        found[name] = where / f"{name}.jsonl"
        found[name].write_text(text)
    tokenizer = train_tokenizer([corpus_file.read_text()], 700)
    tokenizer.save_pretrained(found["large"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(found["no_eos"])
    for name, files in {
        "slow": {"vocab.txt": "a\nb\n", "tokenizer_config.json": '{"tokenizer_class": "CpmTokenizer"}'},
        "remote": {"tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})},
        "remote_model": {"config.json": json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}})},
        "vit": {"config.json": '{"model_type": "vit"}'},
        "bare": {"readme.txt": "nothing"},
    }.items():
        found[name].mkdir()
        for file, text in files.items():
            (found[name] / file).write_text(text)
        (found[name] / "evil.py").write_text(
            f"open({str(where / 'ran')!r}, 'w')\nclass Evil: pass\nclass Config: pass\n"
        )
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 5, "hidden_size": 576, "vocab_size": 512}
    LlamaConfig(**sizes, num_hidden_layers=1, intermediate_size=64).save_pretrained(found["kv"])
    run_pretrain.main([*TINY, f"data_files={corpus_file}", f"output_dir={found['run']}", "max_steps=2", "save_steps=1"])
    found["flipped"] = where / "flipped"
    shutil.copytree(found["run"] / "prepared", found["flipped"])
    shard = max(found["flipped"].rglob("*.arrow"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    found["other"] = where / "other.jsonl"
    found["other"].write_text("".join(corpus_file.read_text().splitlines(keepends=True)[:200]))
    found["harmed"] = where / "harmed"
    shutil.copytree(found["run"] / "checkpoint-2", found["harmed"])
    weights = bytearray((found["harmed"] / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (found["harmed"] / "model.safetensors").write_bytes(weights)
    found["stranger"] = where / "stranger"
    shutil.copytree(found["run"] / "checkpoint-2", found["stranger"])
    (found["stranger"] / "manifest.json").unlink()
    return found


@pytest.fixture
def refuse(places, tmp_path, monkeypatch, capsys):
    """Run the command in this process; returns its only line of error."""
    monkeypatch.chdir(tmp_path)

    def run(words, status=2):
        for name, path in places.items():
            words = [word.replace("{" + name + "}", str(path)) for word in words]
        given = {word.partition("=")[0] for word in words}
        usual = [f"data_files={places['corpus']}", f"output_dir={tmp_path / 'out'}", *TINY]
        usual = [word for word in usual if word.partition("=")[0] not in given]
        if given & {"dataset_name", "mixture"}:
            usual = [word for word in usual if not word.startswith("data_files")]
        before = set(places["where"].rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_pretrain.main([*usual, *words])
        shown = capsys.readouterr()
        assert ended.value.code == status
        lines = [line for line in shown.err.splitlines() if not line.startswith("[transformers]")]
        assert len(lines) == 1 and lines[0].startswith("run_pretrain.py: error: "), shown.err
        assert "Traceback" not in shown.err + shown.out and "model:" not in shown.out
        left = {path.name for path in (tmp_path / "out").glob("*")}
        assert not left & LEFT and not [name for name in left if name.startswith("checkpoint")]
        assert set(places["where"].rglob("*")) - before <= {places["run"] / "run.lock"}
        return lines[0].removeprefix("run_pretrain.py: error: ")

    return run


ROWS = [
    ("B1", ["learing_rate=1"], "command line: learing_rate is not an argument. Did you mean learning_rate?"),
    ("B3", ["learning_rate=fast"], 'command line: learning_rate = "fast": should be a valid number'),
    ("B4", ["bf16=yes"], 'bf16 = "yes": must be true or false.'),
    ("B4", ["bf16=Off"], 'bf16 = "Off": must be true or false.'),
    ("B4", ["bf16=[true]"], "bf16 = [true]: must be true or false."),
    ("B5", ["none.json"], "none.json: cannot be read: No such file or directory."),
    *[
        ("B6", [f"{key}={value}"], f"command line: {key} must be {rule}, got {value}.")
        for key, value, rule in (
            ("learning_rate", 0, "above 0"),
            ("learning_rate", -1, "above 0"),
            ("num_train_epochs", 0, "above 0"),
            ("save_steps", 0, "above 0"),
            ("save_steps", -5, "above 0"),
            ("eval_steps", 0, "above 0"),
            ("logging_steps", -1, "above 0"),
            ("neftune_noise_alpha", -1, "above 0"),
            ("warmup_steps", -1, "at least 0"),
            ("dataloader_num_workers", -1, "at least 0"),
            ("keep_every_steps", -1, "at least 0"),
            ("loss_chunk_tokens", -1, "at least 0"),
            ("seed", -1, "at least 0 and below 2^32"),
            ("per_device_train_batch_size", 0, "at least 1"),
            ("per_device_eval_batch_size", 0, "at least 1"),
            ("gradient_accumulation_steps", 0, "at least 1"),
            ("max_eval_samples", 0, "at least 1"),
            ("max_bad_steps", 0, "at least 1"),
            ("ddp_timeout", 0, "at least 1"),
            ("num_proc", 0, "at least 1"),
        )
    ],
    ("B6", ["max_steps=0"], "max_steps must be at least 1, or -1 to train num_train_epochs, got 0."),
    ("B6", ["learning_rate=NaN"], "learning_rate = NaN: must be a finite number."),
    ("B6", ["learning_rate=Infinity"], "learning_rate = Infinity: must be a finite number."),
    ("B7", ["max_steps=5", "warmup_steps=9"], "warmup_steps = 9 is not below max_steps = 5"),
    ("B8", [inline(train_batch_size=7)], "train_batch_size = 7, but micro-batch x accumulation x ranks = 2. Say"),
    ("B8", [inline(train_micro_batch_size_per_gpu=3)], "= 3, but per_device_train_batch_size = 2. Say"),
    ("B8", [inline(gradient_accumulation_steps=4)], "= 4, but gradient_accumulation_steps = 1. Say"),
    ("B9", ["adam_beta2=1"], "adam_beta2 must be at least 0 and below 1, got 1."),
    ("B9", ["weight_decay=-1"], "weight_decay must be at least 0, got -1."),
    ("B9", ["max_grad_norm=0"], "max_grad_norm must be above 0, got 0."),
    ("B10", ["save_total_limit=1"], "save_total_limit must be at least 2, got 1"),
    ("B11", ["save_only_model=true"], "save_only_model must be false, got true: a checkpoint of it could not be"),
    (
        "B13",
        ["fp16=true", "bf16=false"],
        "fp16 must be false, got true: its loss scaling skips steps at will; set bf16",
    ),
    ("B13", [inline(fp16={"enabled": True})], "fp16 is not supported; take it out and set bf16=true or false."),
    ("B13", [inline(zero_optimization={"stage": 4})], "zero_optimization.stage = 4, but must be 1, 2 or 3"),
    ("B13", [inline(zero_optimization=3)], "zero_optimization must be an object, is 3."),
    ("B13", [inline(bf16={"check_grad_overflow": False})], "would apply gradients that are not finite. Take it out."),
    ("B13", ["fsdp=full_shard"], 'fsdp must be null, got "full_shard": deepspeed=ds_configs/zero3.json'),
    ("B13", ["optim=adamw_bnb"], "Did you mean adamw_bnb_8bit?"),
    ("B13", ["optim=muon", "model_name=smollm2-1m-moe"], "command line: optim = muon takes matrices, and "),
    ("B13", ["lr_scheduler_type=warmup_stable_decay"], "decay_fraction is not set: lr_scheduler_type = warmup_stable"),
    ("B13", ["lr_scheduler_type=polynomial", 'lr_scheduler_kwargs={"x": 1}'], "do not fit lr_scheduler_type = polyno"),
    ("B13", ["decay_fraction=0.2"], "decay_fraction = 0.2 is of lr_scheduler_type=warmup_stable_decay, not of cosine"),
    ("B13", ["decay_fraction=0", *WSD], "decay_fraction must be above 0 and at most 1, got 0."),
    (
        "B13",
        ["decay_fraction=0.2", *WSD, 'lr_scheduler_kwargs={"num_decay_steps": 3}'],
        "decay_fraction = 0.2 and lr_scheduler_kwargs' num_decay_steps say the same: keep one",
    ),
    (
        "B13",
        ["decay_fraction=0.2", *WSD, "max_steps=-1", "warmup_steps=3"],
        "decay_fraction = 0.2 with warmup_steps = 3: the run's steps are not known before its data is",
    ),
    (
        "B13",
        ["decay_fraction=0.8", *WSD, "max_steps=10", "warmup_steps=3"],
        "decay_fraction = 0.8 and warmup_steps = 3 (0.3 of the run) are together more than the run",
    ),
    ("B13", ["train_sampling_strategy=group_by_length"], "= 'group_by_length' is not one of random, sequential."),
    ("B13", ["save_strategy=best"], "save_strategy = 'best' is not one of no, steps, epoch."),
    ("B13", ["use_cache=true"], "use_cache must be false, got true: packed rows would attend across documents"),
    ("B13", ["auto_find_batch_size=true"], "auto_find_batch_size must be false, got true: it would change the batch"),
    (
        "B13",
        ["torch_compile_backend=inductr"],
        "command line: torch_compile_backend = 'inductr' is not one of aot_eager, ",
    ),
    ("B13", ["torch_compile_mode=fast"], "torch_compile_mode = 'fast' is not one of default, "),
    ("B13", ["report_to=wandb"], "report_to = wandb needs wandb, which is not installed: pip install wandb."),
    (
        "B15",
        ["attn_implementation=flash_attention_2"],
        "= flash_attention_2 cannot be had: it needs a CUDA device, this is cpu. Set it to auto.",
    ),
    (
        "B15",
        ["use_liger_kernel=true"],
        "use_liger_kernel = true needs liger-kernel, which is not installed: pip install",
    ),
    ("B16", ["model_name=nobody/none"], "model_name = nobody/none cannot be had from the Hub"),
    ("B16", ["tokenizer_name=nobody/none"], "tokenizer_name: nobody/none cannot be loaded"),
    ("B17", ["model_name={bare}", "config_overrides=null"], "bare is a directory without config.json."),
    ("B17", ["model_name={vit}", "config_overrides=null"], "is a vit, which is not a causal language model."),
    (
        "B18",
        ["model_name=smollm3"],
        "model_name = smollm3 is not a directory, a Hub id (user/name) or one of smollm2-1m",
    ),
    ("B18", ["model_name="], "command line: model_name = is not a directory"),
    ("B19", ["tokenizer_name={large}"], "tokens, the model 512 (config vocab_size): set config_overrides="),
    ("B19", [overrides(vocab_size=100)], "vocab_size must be at least 273 (17 special tokens and 256 bytes), got 100."),
    ("B20", ["prepared_dir={run}/prepared", "tokenizer_name={large}", overrides(vocab_size=768)], "tokenizer"),
    ("B22", ["tokenizer_name={no_eos}"], "has no EOS token, so documents would run together"),
    ("B23", ["tokenizer_name={slow}"], "no fast tokenizer"),
    ("F38", ["tokenizer_name={remote}"], "cannot be loaded"),
    ("F38", ["model_name={remote_model}", "config_overrides=null"], "has a config.json that makes no model here"),
    ("B24", ["prepared_dir={corpus}"], "is not a prepared set"),
    ("B24", ["prepared_dir={bare}"], "is not a prepared set"),
    ("B25", ["text_column=body"], "no column 'body'; set text_column to one of text, kind"),
    ("B27", ["data_files={empty}"], "There is no text to train a tokenizer on; the corpus holds no document."),
    ("B27", ["data_files={short}", "validation_fraction=0"], "One block needs 64 tokens"),
    ("B27", ["per_device_train_batch_size=100000"], "one step takes 100000 rows (per_device_train_batch_size 100000 x"),
    ("B29", ["prepared_dir={run}/prepared", "block_size=32"], "was prepared with block_size 64, but 32 is asked for"),
    ("B29", ["block_size=4096"], "block_size = 4096 is more than the model's 512 positions: lower it, or set"),
    ("B30", ["dataset_name={bare}", "dataset_split=nope"], "there is no split 'nope'; set dataset_split to one of"),
    ("B32", ["prepared_dir={flipped}"], "its manifest says"),
    ("B34", ["resume={none}"], "resume = "),
    ("B35", ["resume={run}/checkpoint-2", overrides(hidden_size=128)], "hidden_size = 64, now it is 128"),
    ("B36", ["resume={run}"], "init_from="),
    ("B35", ["init_from={bare}"], "command line: init_from = "),
    ("B35", ["init_from={harmed}"], "model.safetensors is damaged: it is not what its manifest.json says."),
    (
        "B35",
        ["init_from={run}", overrides(hidden_size=128)],
        "is [512, 64], model_name and config_overrides make it [512",
    ),
    ("F28", ["resume={run}/checkpoint-2", "data_files={other}"], "was trained with data = "),
    *[
        ("F29", ["resume={run}/checkpoint-2", f"{key}={value}"], f"was trained with {key} = {was}, now it is {value}")
        for key, was, value in (
            ("seed", 42, 1),
            ("gradient_accumulation_steps", 1, 2),
            ("weight_decay", 0.1, 0.0),
            ("warmup_steps", 0.01, 1),
        )
    ],
    ("B37", ["resume={run}/checkpoint-2", "optim=adamw_torch_fused"], 'optim = "adamw_bnb_8bit", now it is "adamw_'),
    ("B40", ["output_dir={corpus}"], "documents.jsonl cannot be written: File exists. Name another."),
    ("B40", ["output_dir={corpus}/sub"], "documents.jsonl/sub cannot be written: Not a directory. Name another."),
    ("B40", ["output_dir=/proc/no"], "output_dir = /proc/no cannot be written: No such file or directory."),
    ("B40", ["output_dir={run}/prepared/new"], "is inside a prepared set or a checkpoint. Name another."),
    ("-", ["validation_files={corpus}"], "validation_fraction = 0.1 and validation_files = "),
    (
        "-",
        [*OWN, 'validation_files={"wiki": "{none}"}'],
        "validation_files: wiki: no file matches",
    ),
    (
        "-",
        [*OWN, 'validation_files={"wiki": "{empty}"}'],
        "the held-out set wiki holds no text: name other files, or leave it out.",
    ),
    ("-", [*OWN, 'validation_files={"wiki": "{short}"}'], "tokens, a row takes block_size = 64: give more text."),
    ("-", ['validation_files={"a": "x", "a": "y"}'], "command line: a is given twice, as 'x' and as 'y'. Keep one."),
    ("-", ["validation_split=dev", "validation_fraction=null"], "is a split of dataset_name, which is not given."),
    ("B40", ["output_dir="], "output_dir is empty: name the directory that everything goes to."),
    ("B41", [f"run_name={TOKEN}"], "command line: run_name holds an access token: set HF_TOKEN or run `hf auth login`"),
    ("B41", [TOKEN], "command line: a word holds an access token"),
    ("B41", [f"--hub_token={TOKEN}"], "command line: hub_token holds an access token"),
    ("B41", ["hub_token=short"], "hub_token must not be in arguments: set HF_TOKEN or run `hf auth login`."),
    ("B41", [f"config_overrides={json.dumps({'x': [TOKEN]})}"], "config_overrides holds an access token"),
    ("B41", ["run_name=AKIA" + "A1B2C3D4" * 2], "run_name holds an access token"),
    ("B41", ["data_files=https://me:password@host/x.jsonl"], "data_files holds an access token"),
    (
        "B41",
        [f"run_name=a-{ENVIRONMENT_SECRET}"],
        "run_name holds the value of WANDB_API_KEY: leave it in the environment",
    ),
    (
        "-",
        [overrides(hidden_size=576, num_attention_heads=9, num_key_value_heads=5)],
        "cannot compute: The size of tensor",
    ),
    ("-", ["model_name={kv}", "config_overrides=null"], "kv is a LlamaConfig that cannot compute: The size of tensor"),
    ("-", [overrides(num_hidden_layers=-1)], "cannot compute: num_hidden_layers must be at least 1, is -1."),
    ("-", [overrides(hidden_act="gelo")], "cannot compute: 'gelo'"),
    ("-", [overrides(layers=3)], "config_overrides: layers is not a field of LlamaConfig."),
]


@pytest.mark.parametrize(("row", "words", "reason"), ROWS, ids=[f"{row}-{' '.join(w)[:60]}" for row, w, _ in ROWS])
def test_every_mistake_is_one_line_that_names_it_with_status_2_and_nothing_is_written(
    refuse, monkeypatch, places, row, words, reason
):
    monkeypatch.setenv("WANDB_API_KEY", ENVIRONMENT_SECRET)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked whether to run a stranger's code says yes
    message = refuse(words)
    assert reason in message
    assert TOKEN not in message and ENVIRONMENT_SECRET not in message and "password@" not in message
    assert not (places["where"] / "ran").exists()  # no code of a stranger's
    assert not words[0].startswith("init_from") or not Path("out", "prepared").exists()  # nothing was spent


@pytest.mark.parametrize(
    ("row", "content", "reason"),
    [
        ("B1", '{"learing_rate": 1}', "args.json: learing_rate is not an argument. Did you mean learning_rate?"),
        ("B2", '{"max_steps": 1, "max_steps": 2}', "args.json: max_steps is given twice, as 1 and as 2. Keep one."),
        ("B5", "", "args.json: not JSON at line 1"),
        ("B5", "[1]", "args.json: must hold one JSON object, holds a list."),
        ("B5", '{\n"max_steps": 1 // short\n}', "args.json: not JSON at line 2"),
        ("B5", b'{"model_name": "\xe9"}', "args.json: not UTF-8 at byte 16. Save it as UTF-8."),
        ("B34", '{"resume": "nowhere"}', "args.json: resume = nowhere is not auto, never or a directory."),
        (
            "B35",
            '{"init_from": "nowhere"}',
            "args.json: init_from = nowhere is not a directory with .safetensors files.",
        ),
        ("B41", json.dumps({"run_name": TOKEN}), "args.json: run_name holds an access token"),
        ("B41", json.dumps({"hub_token": TOKEN}), "args.json: hub_token holds an access token"),
    ],
)
def test_a_bad_file_is_named_with_its_line(refuse, tmp_path, row, content, reason):
    Path(tmp_path, "args.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refuse(["args.json"])
    assert message.startswith(reason) and TOKEN not in message


@pytest.mark.parametrize(
    ("row", "words", "status", "reason"),
    [
        ("B38", ["resume={stranger}"], 4, "trust_checkpoint=true"),
        ("F18", ["max_steps=2000000000", "keep_every_steps=1"], 5, "save_total_limit = 3 and one being written"),
    ],
)
def test_a_checkpoint_that_cannot_be_trusted_and_a_disk_too_small_have_a_status_of_their_own(
    refuse, row, words, status, reason
):
    assert reason in refuse(words, status)


def test_without_bitsandbytes_the_8_bit_optimizer_is_refused(refuse, monkeypatch):
    monkeypatch.setattr(limits, "find_spec", lambda name: None)
    assert "optim = adamw_bnb_8bit needs bitsandbytes, which is not installed: pip install" in refuse([])


def test_half_an_environment_of_a_launcher_is_named(refuse, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert "WORLD_SIZE = 2 is in the environment, but not RANK and LOCAL_RANK: launch with" in refuse([])


def test_a_port_that_is_taken_is_named(places, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCH_CPP_LOG_LEVEL": "ERROR"} | there
        words = [*TINY, f"data_files={places['corpus']}", f"output_dir={tmp_path / 'out'}"]
        command = [sys.executable, "run_pretrain.py", *words]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | launched, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"MASTER_ADDR:MASTER_PORT = 127.0.0.1:{there['MASTER_PORT']}: the ranks cannot meet there" in done.stderr


def test_save_steps_past_the_end_and_nothing_held_out_are_said_but_not_refused_and_odd_paths_work(
    places, tmp_path, monkeypatch, capsys
):
    odd = tmp_path / "d\u00e9p\u00f4t of texts"
    odd.mkdir()
    shutil.copy(places["corpus"], odd / "t\u00e9xts 1.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = odd / ".." / odd.name / "t\u00e9xts 1.jsonl"
    run_pretrain.main([*TINY, f"data_files={file}", "output_dir=~/r\u00fcn 1", "max_steps=1", "validation_fraction=0"])
    said = capsys.readouterr().out
    assert "save_steps = 500: no checkpoint is written before the last of the 1 steps." in said
    assert "no held-out row: held-out loss is not measured during training" in said
    assert (tmp_path / "r\u00fcn 1" / "model.safetensors").is_file()


def test_a_strangers_files_are_read_and_none_of_their_code_nor_anything_beside_them(places, tmp_path):
    """F38: an auto_map beside a known architecture is passed over, a vocab_file outside the directory is not read."""
    (tmp_path / ".env").write_text("KEY=value\n[SEP]\n[UNK]\n")
    (tmp_path / "model").mkdir()
    named = {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}, "vocab_size": 512}
    (tmp_path / "model" / "config.json").write_text(json.dumps(named))
    (tmp_path / "model" / "vocab.txt").write_text("a\n[SEP]\n[UNK]\n")
    outside = {"tokenizer_class": "BertTokenizer", "vocab_file": "../.env", "eos_token": "[SEP]"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(outside))
    shutil.copy(places["remote_model"] / "evil.py", tmp_path / "model")
    config = load_config(str(tmp_path / "model"))
    assert type(config) is LlamaConfig and not hasattr(config, "auto_map")
    vocabulary = load_tokenizer(str(tmp_path / "model")).get_vocab()
    assert "a" in vocabulary and "KEY=value" not in vocabulary
    assert not (places["where"] / "ran").exists()


def test_a_mixture_of_experts_that_cannot_compute_is_one_sentence():
    config = MixtralConfig(vocab_size=64, hidden_size=72, num_attention_heads=9, num_key_value_heads=5)
    config.num_hidden_layers, config.num_local_experts, config.intermediate_size = 1, 2, 16
    with pytest.raises(ValueError, match="its MixtralForCausalLM cannot compute: .* Mend its config"):
        model.check_masking(model.random_model(config, 0, "sdpa"))


def test_a_clock_that_goes_back_an_hour_does_not_end_the_run(places, tmp_path, monkeypatch):
    calls, now = itertools.count(), time.time
    monkeypatch.setattr(time, "time", lambda: now() - (3600 if next(calls) else 0))
    run_pretrain.main(
        [*TINY, f"data_files={places['corpus']}", f"output_dir={tmp_path}", "max_steps=8", "save_steps=4"]
    )
    assert next(calls) > 1 and (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_any_more_goes_on_to_its_end(places, tmp_path):
    words = [
        *TINY,
        "disable_tqdm=false",
        f"data_files={places['corpus']}",
        f"output_dir={tmp_path / 'out'}",
        "max_steps=4",
    ]
    command = [sys.executable, "run_pretrain.py", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        process.stdout.close()
        process.stderr.close()
        assert process.wait(900) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_launched_on_two_ranks_a_refusal_is_one_line_and_status_2(launch, tmp_path):
    done = launch("deepspeed", "--num_gpus", "2", "run_pretrain.py", *TINY, "deepspeed=ds_configs/zero2.json",
                  f"run_name={TOKEN}", f"output_dir={tmp_path / 'out'}", expect=2)  # fmt: skip
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "error:" in line]
    assert lines == ["run_pretrain.py: error: command line: run_name holds an access token: set HF_TOKEN or run "
                     "`hf auth login` instead."]  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr and not (tmp_path / "out").exists()
