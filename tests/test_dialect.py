"""One dialect in all commands: key=value, --key value and --key=value alike; one door; recipes found in the package."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT

from smolpretrain import __main__, __version__, launch, plan
from smolpretrain.arguments import DataArguments, ModelArguments, PretrainArguments
from smolpretrain.core.options import Parser
from smolpretrain.core.words import collect, parse_args, take_switch
from smolpretrain.data.prepare import PrepareArguments


@dataclass
class Knobs:
    name: str | None = None
    rate: float = 1.0
    steps: int = 5
    files: list[str] | None = None
    on: bool = False
    also: bool | None = None


SPELLINGS = {
    "key=value": lambda key, value: [f"{key}={value}"],
    "--key value": lambda key, value: [f"--{key}", value],
    "--key=value": lambda key, value: [f"--{key}={value}"],
    "--a-key value": lambda key, value: [f"--{key.replace('_', '-')}", value],
}


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_the_spellings_of_a_key_say_the_same_to_training(spelled):
    said = {"learning_rate": "-1e-3", "model_name": "12e7", "data_files": '["a.txt"]', "bf16": "false", "seed": "3"}
    given = collect([word for key, value in said.items() for word in SPELLINGS[spelled](key, value)], {"bf16"})
    assert {key: entry.value for key, entry in given.items()} == {
        "learning_rate": -1e-3, "model_name": 12e7, "data_files": ["a.txt"], "bf16": False, "seed": 3
    }  # fmt: skip
    assert given["model_name"].word == "12e7"


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_the_spellings_of_a_key_say_the_same_to_a_command_of_few_options(spelled):
    parser = Parser("x")
    parser.add_argument("run_dir")
    parser.add_argument("--max_documents", type=int)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--public", action="store_true")
    parser.add_mutually_exclusive_group().add_argument("--license")
    say = SPELLINGS[spelled]
    found = parser.parse_args(["runs/a=b", *say("max_documents", "3"), *say("license", "mit"), *say("public", "true")])
    assert vars(found) == {"run_dir": "runs/a=b", "max_documents": 3, "tasks": None, "public": True, "license": "mit"}
    assert not parser.parse_args(["r", *say("public", "false")]).public
    assert parser.parse_args(['tasks=["a", "b"]', "r"]).tasks == ["a", "b"]
    assert parser.parse_args(["r", "--tasks", "a", "x=b"]).tasks == ["a", "x=b"], "NAME=PATH is no key"


def test_a_file_s_keys_come_first_and_words_win(tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps({"run_dir": "r", "max_documents": 3, "public": True, "tasks": ["a"]}))
    parser = Parser("x")
    parser.add_argument("run_dir")
    parser.add_argument("--max_documents", type=int)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--public", action="store_true")
    found = parser.parse_args([str(tmp_path / "x.json"), "--max_documents", "4", "public=false"])
    assert vars(found) == {"run_dir": "r", "max_documents": 4, "tasks": ["a"], "public": False}
    for words, sentence in (
        (["r", "max_document=4"], "max_document is not an option. Did you mean max_documents?"),
        (["r", "tasks=hf_" + "a1B2" * 6], "tasks holds an access token"),
        (["r", "public=maybe"], "public = maybe: must be true or false."),
    ):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(words)
        assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_a_switch_needs_no_value_and_takes_no_other_word():
    assert parse_args(["--on", "steps=7"], (Knobs,)) == (Knobs(on=True, steps=7),)
    assert parse_args(["--also", "false", "--on"], (Knobs,)) == (Knobs(also=False, on=True),)
    for words in (["--steps"], ["--steps", "--on"]):
        with pytest.raises(ValueError, match="--steps needs a value, as in --steps=... or steps=..."):
            parse_args(words, (Knobs,))
    with pytest.raises(ValueError, match="-n: write key=value or --key value"):
        parse_args(["-n", "x"], (Knobs,))


@pytest.mark.parametrize("words", [["debug=true"], ["--debug=true"], ["--debug", "true"], ["--debug"]])
def test_debug_is_a_switch_of_the_command_and_not_trainer_s(words):
    assert take_switch(["a.json", *words, "--seed", "1"], "debug") == (True, ["a.json", "--seed", "1"])
    assert take_switch(["debug=underflow_overflow"], "debug") == (False, ["debug=underflow_overflow"])


def test_a_recipe_is_found_in_the_working_directory_and_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = json.loads((ROOT / "configs" / "smollm2-135m.json").read_text())
    assert {key: each.value for key, each in collect(["configs/smollm2-135m.json"]).items()} == shipped
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smollm2-135m.json").write_text('{"seed": 9}')
    assert collect(["configs/smollm2-135m.json"])["seed"].value == 9
    assert collect(["args.json"])["model_name"].origin == "args.json"


@pytest.mark.parametrize(
    "command",
    [
        "deepspeed run_pretrain.py args.json {}",
        "deepspeed --num_gpus 2 --module smolpretrain.run_pretrain args.json {}",
        "torchrun --nproc_per_node 2 -m smolpretrain.run_pretrain args.json {}",
        "accelerate launch -m smolpretrain.run_pretrain args.json {}",
        "torchrun --no_python /some/bin/smolpretrain train args.json {}",
    ],
)
@pytest.mark.parametrize("spelled", list(SPELLINGS)[:3])
def test_a_launch_knows_where_the_run_keeps_its_checkpoints(command, spelled):
    words = " ".join(SPELLINGS[spelled]("output_dir", "runs/here"))
    for more in (words, f"--bf16 false {words}", f"{words} --deepspeed ds_configs/zero1.json --max_steps 5"):
        assert str(launch.output_dir(command.format(more).split())) == "runs/here"


def test_a_verb_is_its_command_and_words_without_one_are_training_s(capsys, monkeypatch):
    monkeypatch.setattr("smolpretrain.run_pretrain.main", lambda argv: argv)
    for words in (["args.json", "a=1"], ["a=1"], ["--a", "1"]):
        assert __main__.main(words) == __main__.main(["train", *words]) == words
    assert __main__.main(["plann"]) == 2
    assert "plann is not a verb. Did you mean plan?" in capsys.readouterr().err
    assert __main__.main([]) == __main__.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(said.count(f"\n  {verb} ") == 2 for verb in __main__.VERBS)


@pytest.mark.parametrize("verb", [verb for verb in __main__.VERBS if verb != "demo"])
def test_every_verb_says_the_version(verb, capsys):
    try:
        __main__.main([verb, "--version"])
    except SystemExit as ended:
        assert ended.code in (None, 0)
    assert capsys.readouterr().out == f"smolpretrain {__version__}\n"


def test_the_same_key_stands_for_the_same_thing_in_training_plan_and_preparation():
    shared = {"block_size": 64, "data_files": ["a.txt"], "packing": "best_fit"}
    words = [f"{key}={json.dumps(value)}" for key, value in shared.items()]
    _, data, _ = parse_args(words, (ModelArguments, DataArguments, PretrainArguments))
    values, _ = plan.parse(words)
    (prepare,) = parse_args(words, (PrepareArguments,))
    for key, value in shared.items():
        assert getattr(data, key) == values[key] == getattr(prepare, key) == value


def test_the_door_opens_from_a_clone_too():
    words = [sys.executable, ROOT / "__main__.py", "plan", "--version"]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True)
    assert done.stdout == f"smolpretrain {__version__}\n", done.stderr
