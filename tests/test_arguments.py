"""args.json and key=value words become checked arguments; every mistake is one sentence that names its place."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.integrations import integration_utils

from smolpretrain import arguments, ds_configs, limits
from smolpretrain.arguments import DataArguments, ModelArguments, PretrainArguments
from smolpretrain.core import precision, upstream
from smolpretrain.core.words import collect, parse_args

ROOT = Path(__file__).parents[1]
CLASSES = (ModelArguments, DataArguments, PretrainArguments)
PLAIN = "deepspeed=null"


def parse(*words):
    return parse_args(list(words), CLASSES)


def refusal(*words):
    with pytest.raises(ValueError) as caught:
        parse(*words, PLAIN)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def args_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(content):
        Path("args.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return "args.json"

    return write


def test_words_win_over_the_file_in_any_order(args_json):
    file = args_json({"max_steps": 7, "block_size": 64, "warmup_steps": 2})
    for words in ([file, "max_steps=50"], ["max_steps=50", file]):
        _, data, training = parse(*words, PLAIN)
        assert (training.max_steps, data.block_size) == (50, 64)


def test_the_argv_that_the_deepspeed_launcher_makes_is_understood(args_json):
    file = args_json({"max_steps": 7})
    for flag in ("--local_rank=0", "--local-rank=1"):
        assert parse(flag, file, PLAIN)[2].max_steps == 7


def test_an_unknown_key_gets_a_suggestion(args_json):
    args_json({"learing_rate": 1e-3})
    assert refusal("args.json") == "args.json: learing_rate is not an argument. Did you mean learning_rate?"
    assert refusal("blocksize=3") == "command line: blocksize is not an argument. Did you mean block_size?"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("learning_rate", "fast", "valid number"),
        ("learning_rate", True, "must not be a boolean"),
        ("learning_rate", None, "valid number"),
        ("max_steps", "ten", "valid integer"),
        ("max_steps", 2.5, "valid integer"),
        ("bf16", "yes", "must be true or false"),
        ("bf16", 1, "must be true or false"),
        ("model_name", ["a"], "valid string"),
        ("data_files", 3, "valid list"),
        ("config_overrides", "wide", "valid dictionary"),
        ("lr_scheduler_type", "cosin", "Did you mean cosine?"),
        ("optim", "adamw_bnb", "Did you mean adamw_bnb_8bit?"),
    ],
)
def test_a_bad_type_names_file_key_and_value(args_json, key, value, reason):
    args_json({key: value})
    message = refusal("args.json")
    assert message.startswith(f"args.json: {key} = {json.dumps(value)}: ")
    assert reason in message


def test_a_word_for_a_string_stays_as_typed():
    assert parse("dataset_revision=1234567e12", PLAIN)[1].dataset_revision == "1234567e12"
    assert parse("dataset_config_name=1.10", PLAIN)[1].dataset_config_name == "1.10"


def test_numbers_as_strings_become_numbers_and_whole_steps_stay_whole(args_json):
    args_json('{"learning_rate": "2e-5", "save_steps": 100, "bf16": "false", "data_files": "a.txt"}')
    _, data, training = parse("args.json", PLAIN)
    assert training.learning_rate == 2e-5 and type(training.save_steps) is int
    assert training.bf16 is False and data.data_files == ["a.txt"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_not_finite_is_refused(args_json, value):
    args_json(f'{{"learning_rate": {value}}}')
    assert "finite" in refusal("args.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"max_steps": 1, "max_steps": 2}', "args.json: max_steps is given twice, as 1 and as 2. Keep one."),
        ('{\n"max_steps": 1 // short\n}', "args.json: not JSON at line 2"),
        ("", "args.json: not JSON at line 1"),
        ("[1]", "args.json: must hold one JSON object, holds a list."),
    ],
)
def test_a_file_that_is_no_object_is_refused_by_line(args_json, content, reason):
    args_json(content)
    assert refusal("args.json").startswith(reason)


def test_a_missing_file_two_files_half_a_flag_and_a_bare_word_are_refused(args_json):
    file = args_json({})
    assert refusal("none.json") == "none.json: cannot be read: No such file or directory."
    assert "args.json is given already" in refusal(file, "other.json")
    assert refusal("-m=5") == "command line: -m=5: write key=value or --key value; --help lists all keys."
    assert "neither a .json file nor key=value" in refusal("max_steps")
    Path("latin.json").write_bytes(b'{"model_name": "\xe9"}')
    assert refusal("latin.json").startswith("latin.json: not UTF-8 at byte 16")


def test_a_token_in_an_argument_is_refused_and_not_repeated(args_json):
    token = "hf_" + "a1B2" * 8
    args_json({"run_name": token})
    assert "HF_TOKEN" in refusal("args.json") and token not in refusal("args.json")
    assert "hf auth login" in refusal("hub_token=secret")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["block_size=1"], "block_size must be at least 2 (one input, one target), got 1."),
        (["validation_fraction=1"], "validation_fraction must be at least 0 and below 1, got 1."),
        (["packing=best"], "packing = 'best' is not one of concat, best_fit."),
        (["attn_implementation=flash_attention2"], "Did you mean flash_attention_2?"),
        (["dataset_name=a/b", "data_files=c.txt"], "keep one"),
        (["data_files=[]"], "data_files is an empty list"),
        (["learning_rate=0"], "learning_rate must be above 0"),
        (["adam_beta2=1"], "adam_beta2 must be at least 0 and below 1, got 1"),
        (["max_grad_norm=0"], "max_grad_norm must be above 0"),
        (["weight_decay=-0.1"], "weight_decay must be at least 0, got -0.1."),
        (["per_device_train_batch_size=0"], "per_device_train_batch_size must be at least 1, got 0."),
        (["max_bad_steps=0"], "max_bad_steps must be at least 1, got 0."),
        (["on_spike=ignore"], "on_spike = 'ignore' is not one of stop, skip, report."),
        (["max_steps=0"], "max_steps must be at least 1, or -1"),
        (["max_steps=5", "warmup_steps=5"], "warmup_steps = 5 is not below max_steps = 5"),
        (["save_total_limit=1"], "save_total_limit must be at least 2, got 1"),
        (["resume_from_checkpoint=x/checkpoint-1"], "write resume=x/checkpoint-1"),
        (["save_only_model=true"], "save_only_model must be false"),
        (["allow_changes=optim"], "allow_changes = 'optim' is not one of learning_rate, lr_scheduler_type,"),
        (["spot_notice_url=169.254.169.254"], "spot_notice_url = 169.254.169.254 must be aws or begin with http://"),
        (["enable_jit_checkpoint=true"], "enable_jit_checkpoint must be false"),
        (["average_tokens_across_devices=false"], "average_tokens_across_devices must be true"),
    ],
)
def test_a_value_out_of_range_says_what_to_do(words, reason):
    message = refusal(*words)
    assert reason in message and message.startswith("command line: ")


def test_an_8_bit_optimizer_without_bitsandbytes_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in refusal("optim=adamw_bnb_8bit")
    parse("optim=adamw_torch", PLAIN)


@pytest.mark.parametrize("home", ["/proc/nobody", "a file"])
def test_a_home_that_cannot_be_written_is_said_before_anything_is_prepared(home, monkeypatch, tmp_path):
    (tmp_path / "a file").touch()
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.setattr(arguments.torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"builds a small extension on a CPU, and .* cannot be written \(.*\): set "):
        parse("deepspeed=ds_configs/zero2.json")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    parse("deepspeed=ds_configs/zero2.json")
    parse(PLAIN)


def test_without_a_compiler_deepspeed_on_a_cpu_says_so(monkeypatch):
    monkeypatch.setattr(arguments.torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(ds_configs.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"a C\+\+ compiler \(g\+\+\) is missing: install it .*deepspeed=null"):
        parse("deepspeed=ds_configs/zero2.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optimizer": {"type": "Adam"}}, "'optimizer' block would silently override optim"),
        ({"train_micro_batch_size_per_gpu": 3}, "but per_device_train_batch_size = 8"),
        ({"gradient_accumulation_steps": 2}, "but gradient_accumulation_steps = 1"),
        ({"gradient_clipping": 0.5}, "but max_grad_norm = 1.0"),
        ({"train_batch_size": 7}, "but micro-batch x accumulation x ranks = 8"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "zero_force_ds_cpu_optimizer"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": None}}, "stage3_gather_16bit_weights_on_model_save"),
        ({"bf16": {"enabled": False}}, "bf16 = False, but bf16 = True here"),
        ({"bf16": {"enabled": "auto", "check_grad_overflow": False}}, "would apply gradients that are not finite"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage = 0, but must be 1, 2 or 3"),
        ({"zero_optimization": None}, "zero_optimization.stage = None, but must be 1, 2 or 3"),
    ],
)
def test_a_deepspeed_json_that_contradicts_the_arguments_is_refused(tmp_path, change, reason):
    config = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()) | change
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        parse(f"deepspeed={tmp_path / 'ds.json'}", "bf16=true")


@pytest.mark.parametrize("path", sorted(path.name for path in (ROOT / "ds_configs").glob("*.json")))
def test_every_shipped_deepspeed_json_leaves_shared_numbers_to_the_arguments(path):
    config = json.loads((ROOT / "ds_configs" / path).read_text())
    assert config["bf16"] == {"enabled": "auto"}
    for key in ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size"):
        assert config[key] == "auto"
    assert config["train_micro_batch_size_per_gpu"] == "auto"


def test_a_deepspeed_json_is_found_here_and_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ds_configs.find("ds_configs/zero2.json") == str(ROOT / "ds_configs" / "zero2.json")
    Path("mine.json").write_text("{}")
    assert ds_configs.find("mine.json") == "mine.json"
    with pytest.raises(ValueError, match=r"deepspeed = zero9.json is not a file. Shipped: ds_configs/zero1.json, "):
        ds_configs.find("zero9.json")


def test_defaults_are_those_of_pre_training():
    training = parse(PLAIN)[2]
    found = {name: getattr(training, name) for name in ("adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm")}
    assert found == {"adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1, "max_grad_norm": 1.0}
    assert training.optim == "adamw_bnb_8bit" and training.lr_scheduler_type == "cosine"
    assert (
        training.bf16 is precision.computes_bf16("cpu")
        and training.activation_checkpointing
        and training.save_total_limit == 3
    )
    default = {f.name: f.default for f in dataclasses.fields(PretrainArguments)}
    assert default["deepspeed"] == "ds_configs/zero2.json"


def test_asking_for_no_checkpointing_by_either_name_is_heard():
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        assert parse(f"{name}=false", PLAIN)[2].activation_checkpointing is False


def test_help_lists_every_key():
    shown = subprocess.run(
        [sys.executable, "run_pretrain.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert shown.returncode == 0
    for cls in CLASSES:
        for field in dataclasses.fields(cls):
            assert not field.init or f"  {field.name}=" in shown.stdout, field.name


def test_the_shipped_args_json_parses_and_holds_only_what_differs():
    given = {key: source.value for key, source in collect([str(ROOT / "args.json")]).items()}
    parse(str(ROOT / "args.json"), PLAIN)
    defaults = {f.name: f.default for cls in CLASSES for f in dataclasses.fields(cls)}
    assert not [key for key, value in given.items() if defaults[key] == value]


@pytest.mark.parametrize("name", ["trackio", "tensorboard", "wandb"])
def test_a_dashboard_that_is_not_installed_is_refused(monkeypatch, name):
    others = [other for other in integration_utils.get_available_reporting_integrations() if other != name]
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: others)
    assert refusal(f"report_to={name}", "deepspeed=null").endswith(f"pip install {name}.")


def test_a_lock_that_a_killed_build_left_is_removed_and_a_working_one_s_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(ds_configs, "LOCK_SECONDS", 0.2)
    assert "builds its extension" in ds_configs.say_if_unbuilt(True)
    directory = tmp_path / upstream.DEEPSPEED_EXTENSION
    builder = subprocess.Popen(["sleep", "600"], cwd=directory)
    (directory / "lock").touch()
    ds_configs.say_if_unbuilt(True)
    assert (directory / "lock").exists()  # torch waits for this one, and rightly
    builder.kill()
    builder.wait()
    ds_configs.say_if_unbuilt(False)
    assert (directory / "lock").exists()  # only one rank looks after it
    ds_configs.say_if_unbuilt(True)
    assert not (directory / "lock").exists()
    (directory / f"{upstream.DEEPSPEED_EXTENSION}.so").touch()
    assert ds_configs.say_if_unbuilt(True) is None


@pytest.mark.parametrize("native", [True, False])
def test_bf16_follows_the_device_unless_it_is_given(native, monkeypatch):
    monkeypatch.setattr(precision, "computes_bf16", lambda kind: native)
    (_, _, default), (_, _, off), (_, _, on) = (parse(PLAIN, *words) for words in ([], ["bf16=false"], ["bf16=true"]))
    assert (default.bf16, off.bf16, on.bf16) == (native, False, True)
    assert off.precision_said is None
    if native:
        assert default.precision_said is on.precision_said is None
    else:
        assert default.precision_said == "bf16: false, this CPU has no bfloat16 instructions; computing in float32."
        assert on.precision_said.startswith("bf16 = true: this CPU has no bfloat16 instructions")
