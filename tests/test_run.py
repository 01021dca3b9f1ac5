"""The main job as users launch it: deepspeed, torchrun, accelerate and python, on one and two CPU ranks."""

import json
import math
import re
import shutil
from itertools import pairwise

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from smolpretrain import run_pretrain
from smolpretrain.core.words import read_json
from smolpretrain.data.tokens.tokenization import train_tokenizer

pytestmark = pytest.mark.slow

FAKE_TOKEN = "hf_" + "x0Y1" * 9
TINY = [
    "model_name=smollm2-1m",
    "tokenizer_name=train",
    'config_overrides={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}',
    "block_size=64",
    "validation_fraction=0.1",
    "eval_strategy=no",
    "sample_steps=0",
    "logging_steps=1",
    "warmup_steps=3",
    "learning_rate=3e-3",
]


def metrics(output_dir, key="loss"):
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def cosine_with_warmup(step, peak, warmup, total):
    """The learning rate of a step (from 1), as the schedule's papers write it."""
    done = step - 1
    if done < warmup:
        return peak * done / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))


@pytest.fixture(scope="session")
def readme_run(launch, tmp_path_factory):
    """The README's run on two ranks at the same global batch, every step logged."""
    output_dir = tmp_path_factory.mktemp("readme") / "first"
    recipe = read_json(ROOT / "args.json")
    words = [f"output_dir={output_dir}", "logging_steps=1"]
    words.append(f"per_device_train_batch_size={recipe['per_device_train_batch_size'] // 2}")
    done = launch(
        "deepspeed", "--num_gpus", "2", "run_pretrain.py", "args.json", *words, HF_TOKEN=FAKE_TOKEN, OMP_NUM_THREADS="1"
    )
    return output_dir, recipe, done


def test_the_loss_falls_and_the_model_beats_its_yardsticks(readme_run):
    output_dir, _, done = readme_run
    losses = metrics(output_dir)
    last = sum(list(losses.values())[-10:]) / 10
    assert math.log(4096) - last >= 2.5
    result = json.loads((output_dir / "run.json").read_text())["result"]
    assert result["bits_per_byte"] < result["unigram_bits_per_byte"] < result["random_bits_per_byte"]
    assert f"held-out bits per byte: {result['bits_per_byte']:.4f}" in done.stdout


def test_the_first_loss_is_said_beside_ln_of_the_vocabulary(readme_run):
    output_dir, _, done = readme_run
    first = metrics(output_dir)[1]
    assert f"First loss {first:.3f} nats, ln(4096) = 8.318: as random weights should give." in done.stderr + done.stdout


def test_the_learning_rate_is_the_closed_form_at_every_step_on_two_ranks(readme_run):
    output_dir, recipe, _ = readme_run
    rates = metrics(output_dir, "learning_rate")
    assert len(rates) == recipe["max_steps"]
    for step, rate in rates.items():
        expected = cosine_with_warmup(step, recipe["learning_rate"], recipe["warmup_steps"], recipe["max_steps"])
        assert rate == pytest.approx(expected, rel=1e-9, abs=1e-15), step


def test_tokens_seen_are_steps_times_rows_times_block(readme_run):
    output_dir, recipe, _ = readme_run
    a_step = recipe["per_device_train_batch_size"] * recipe["block_size"]
    seen = metrics(output_dir, "tokens_seen")
    assert all(tokens == step * a_step for step, tokens in seen.items())
    assert json.loads((output_dir / "run.json").read_text())["result"]["tokens_seen"] == recipe["max_steps"] * a_step


def test_the_output_stands_alone_and_loads_as_the_hub_loads_it(readme_run, tmp_path):
    output_dir = tmp_path / "elsewhere"
    shutil.copytree(readme_run[0], output_dir, ignore=shutil.ignore_patterns("checkpoint-*", "prepared"))
    model, info = AutoModelForCausalLM.from_pretrained(output_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    text = pipeline("text-generation", str(output_dir))("Return a list of", max_new_tokens=8, do_sample=False)
    assert text[0]["generated_text"].startswith("Return a list of ")
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    assert tokenizer("In 2024", add_special_tokens=False).input_ids[-4:] == [
        tokenizer.convert_tokens_to_ids(digit) for digit in "2024"
    ]
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0


def test_run_json_has_what_others_rely_on(readme_run):
    run = json.loads((readme_run[0] / "run.json").read_text())
    assert {"arguments", "versions", "git_commit", "parameters", "data", "plan", "result"} <= set(run)
    assert run["plan"]["model"]["total"] == run["parameters"] and run["plan"]["memory"]["fits"]
    assert {"documents", "tokens", "blocks", "fingerprint"} <= set(run["data"])
    assert run["arguments"]["optim"] == "adamw_bnb_8bit" and run["arguments"]["deepspeed"] == "ds_configs/zero2.json"
    assert run["decided"]["eval_strategy"] == "steps" and run["decided"]["attn_implementation"] == "sdpa"
    assert run["arguments"]["attn_implementation"] == "auto", "what was asked stays as it was asked"
    assert run["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert run["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(readme_run[0]).parameters())


def test_the_output_tree_is_the_one_that_docs_draw(readme_run):
    output_dir, recipe, _ = readme_run
    found = {re.sub(r"-\d+$", "-N", path.name) for path in output_dir.iterdir()}
    page = (ROOT / "docs" / "outputs.md").read_text(encoding="utf-8")
    tree = page[page.index("\nruns/first/\n") + 1 :].split("```")[0]
    drawn = set(re.findall(r"^  ([\w.-]+)/?", tree, flags=re.MULTILINE))
    assert found == drawn
    steps = {int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")}
    assert max(steps) == recipe["max_steps"]


def test_the_log_is_tables_that_render_with_samples_between(readme_run):
    lines = (readme_run[0] / "training_log.md").read_text(encoding="utf-8").splitlines()
    for before, line in pairwise(lines):
        if line.startswith("|") and not before.startswith("|"):
            assert before == "" and line.startswith("| step ")
        if line.startswith("|"):
            assert line.count("|") == 8
    assert sum(line.startswith("- **Photosynthesis is the process by which**") for line in lines) >= 2
    picture = (readme_run[0] / "report" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_held_out_loss_was_measured_during_training(readme_run):
    held_out = list(metrics(readme_run[0], "eval_loss").values())
    assert len(held_out) >= 2 and held_out[-1] < held_out[0]


def test_the_token_of_the_environment_is_in_no_file(readme_run):
    output_dir, _, done = readme_run
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if FAKE_TOKEN.encode() in path.read_bytes()]
    assert FAKE_TOKEN not in done.stdout + done.stderr


def test_under_zero_embeddings_and_norms_keep_32_bit_state(readme_run):
    output_dir, recipe, _ = readme_run
    for rank in (0, 1):
        path = next(output_dir.glob(f"checkpoint-{recipe['max_steps']}/global_step*/*_pp_rank_{rank}_*optim_states.pt"))
        saved = torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"]
        states = [s["__bnb_optimizer_quant_state__"] for s in saved["base_optimizer_state"]["state"].values()]
        bits = [state["state1"].element_size() * 8 for state in states]
        assert bits == [8, 32, 32]  # matrices, embeddings, norms


def test_perplexity_on_the_prepared_set_gives_the_run_s_own_figure(readme_run, launch, tmp_path):
    output_dir, recipe, _ = readme_run
    file = tmp_path / "p.json"
    launch("python", "eval/perplexity.py", "--model", output_dir, "--prepared_dir", output_dir / "prepared",
           "--window", recipe["block_size"], "--output", file)  # fmt: skip
    found, run = json.loads(file.read_text()), json.loads((output_dir / "run.json").read_text())["result"]
    assert found["bits_per_byte"] == pytest.approx(run["bits_per_byte"], rel=1e-6)
    assert found["documents"] == run["held_out"]["documents"]


@pytest.fixture(scope="session")
def trajectories(launch, corpus_file, tmp_path_factory):
    """One global batch of four rows, four ways to reach it, four launchers, one prepared set.

    32-bit AdamW: the 8-bit state's blocks of 256 values fall elsewhere on two ranks, which is worth 1.4e-4 by step 9.
    """
    where = tmp_path_factory.mktemp("trajectories")
    ways = {
        "4x1 on 1 rank": (4, 1, ["python"]),
        "1x4 on 1 rank": (1, 4, ["torchrun", "--nproc_per_node", "1"]),
        "2x2 on 1 rank": (2, 2, ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
                                 "--mixed_precision", "no", "--dynamo_backend", "no"]),
        "2x1 on 2 ranks": (2, 1, ["deepspeed", "--num_gpus", "2"]),
    }  # fmt: skip
    losses = {}
    for number, (name, (micro, accumulation, launcher)) in enumerate(ways.items()):
        output_dir = where / str(number)
        done = launch(*launcher, "run_pretrain.py", *TINY, f"data_files={corpus_file}", f"output_dir={output_dir}",
                      f"prepared_dir={where / 'prepared'}", f"per_device_train_batch_size={micro}", "bf16=false",
                      f"gradient_accumulation_steps={accumulation}", "max_steps=12", "save_strategy=no",
                      "optim=adamw_torch")  # fmt: skip
        losses[name] = (metrics(output_dir), metrics(output_dir, "learning_rate"), output_dir, done)
    return losses


def test_one_trajectory_whatever_micro_batch_accumulation_and_ranks(trajectories):
    (reference, *_), *others = trajectories.values()
    assert len(reference) == 12 and reference[12] < reference[1] - 0.3
    for losses, *_ in others:
        assert losses == pytest.approx(reference, abs=1e-4)


def test_the_learning_rate_is_the_closed_form_at_every_step_however_launched(trajectories):
    for _, rates, *_ in trajectories.values():
        assert list(rates.values()) == pytest.approx([cosine_with_warmup(s, 3e-3, 3, 12) for s in rates], rel=1e-9)


def test_a_prepared_set_is_made_once_and_found_again(trajectories):
    outputs = [done.stdout for *_, done in trajectories.values()]
    assert "written to" in outputs[0] and all("found in" in output for output in outputs[1:])


def test_a_local_directory_is_a_model_and_its_weights_are_not_taken(trajectories, launch, corpus_file, tmp_path):
    trained = trajectories["4x1 on 1 rank"][2]
    launch("python", "run_pretrain.py", *TINY[2:], f"model_name={trained}", f"data_files={corpus_file}",
           "config_overrides=null", f"output_dir={tmp_path / 'again'}", "per_device_train_batch_size=4", "bf16=false",
           "max_steps=4", "save_strategy=no", "deepspeed=null")  # fmt: skip
    again = metrics(tmp_path / "again")
    assert abs(again[1] - math.log(512)) < 1 and again[1] > metrics(trained)[12]
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["hidden_size"] == 64 and str(trained) not in json.dumps(config)


@pytest.mark.parametrize("config", ["zero1", "zero2_offload", "zero3"])
def test_every_shipped_deepspeed_config_trains_and_exports_on_two_ranks(launch, corpus_file, tmp_path, config):
    output_dir = tmp_path / config
    (tmp_path / "prompts.txt").write_text("Of the\n")
    done = launch("deepspeed", "--num_gpus", "2", "run_pretrain.py", *TINY, f"data_files={corpus_file}",
                  f"output_dir={output_dir}", f"deepspeed=ds_configs/{config}.json", "bf16=true", "max_steps=6",
                  "per_device_train_batch_size=2", "eval_strategy=steps", "eval_steps=6", "sample_steps=6",
                  "activation_checkpointing=true", f"sample_prompts={tmp_path / 'prompts.txt'}",
                  OMP_NUM_THREADS="1")  # fmt: skip
    losses = metrics(output_dir)
    assert losses[6] < losses[1]
    assert json.loads((output_dir / "samples.jsonl").read_text())["prompt"] == "Of the"
    weights = load_file(output_dir / "model.safetensors")
    assert "lm_head.weight" not in weights and weights["model.norm.weight"].dtype == torch.bfloat16
    result = json.loads((output_dir / "run.json").read_text())["result"]
    assert result["bits_per_byte"] < result["random_bits_per_byte"]
    assert ("the model's own" in done.stdout) == (config == "zero3")


def test_resumed_from_a_checkpoint_the_run_ends_as_one_left_alone(launch, corpus_file, tmp_path):
    words = [*TINY, f"data_files={corpus_file}", "per_device_train_batch_size=2", "max_steps=8", "save_steps=4",
             "gradient_accumulation_steps=2"]  # fmt: skip
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    command = ["deepspeed", "--num_gpus", "2", "run_pretrain.py", *words]
    launch(*command, f"output_dir={straight}", OMP_NUM_THREADS="1")
    launch(*command, f"output_dir={resumed}", f"resume={straight / 'checkpoint-4'}", OMP_NUM_THREADS="1")
    ends = [load_file(directory / "model.safetensors") for directory in (straight, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert {step: loss for step, loss in metrics(straight).items() if step > 4} == metrics(resumed)


def errors(text):
    return [line for line in text.splitlines() if "error:" in line]


@pytest.mark.parametrize("launcher", [["python"], ["deepspeed", "--num_gpus", "2"]])
def test_a_mistake_is_one_line_and_exit_status_2_launched_by_python_and_by_deepspeed(launch, tmp_path, launcher):
    done = launch(*launcher, "run_pretrain.py", "learing_rate=1", f"output_dir={tmp_path / 'x'}", expect=2)
    assert errors(done.stdout + done.stderr) == [
        "run_pretrain.py: error: command line: learing_rate is not an argument. Did you mean learning_rate?"
    ]
    assert "Traceback" not in done.stderr and not (tmp_path / "x").exists()


def test_a_mistake_that_only_the_first_rank_meets_ends_both_ranks(launch, corpus_file, tmp_path):
    done = launch("deepspeed", "--num_gpus", "2", "run_pretrain.py", *TINY, f"data_files={corpus_file}",
                  "text_column=body", f"output_dir={tmp_path / 'x'}", expect=2, timeout=600)  # fmt: skip
    assert len(errors(done.stdout + done.stderr)) == 1 and "Traceback" not in done.stderr
    assert "no column 'body'; set text_column to one of text, kind" in errors(done.stdout + done.stderr)[0]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["data_files=none.jsonl"], "no file matches none.jsonl"),
        (["data_files={corpus}", "text_column=body"], "no column 'body'; set text_column to one of text, kind"),
        (["data_files={empty}"], "There is no text"),
        (["data_files={short}", "validation_fraction=0"], "One block needs 64 tokens"),
        (["data_files={corpus}", "per_device_train_batch_size=100000"], "one step takes 100000 rows"),
        (["data_files={corpus}", "tokenizer_name={no_eos}"], "has no EOS token"),
        (["data_files={corpus}", "tokenizer_name={large}"], "tokens, the model 512"),
        (["data_files={corpus}", "tokenizer_name=nobody/none"], "cannot be loaded"),
        (["dataset_name=nobody/none"], "dataset_name 'nobody/none' cannot be loaded"),
        (["data_files={corpus}", "block_size=4096"], "more than the model's 512 positions"),
        (["model_name=smollm3"], "model_name = smollm3 is not a directory"),
        (["attn_implementation=flash_attention_2"], "flash_attention_2 cannot be had"),
        (["sample_prompts=none.txt"], "prompts none.txt: "),
    ],
)
def test_every_mistake_ends_before_a_model_is_built(trajectories, corpus_file, tmp_path, capsys, words, reason):
    places = {"corpus": corpus_file, "empty": tmp_path / "empty.jsonl", "short": tmp_path / "short.jsonl"}
    places |= {name: tmp_path / name for name in ("no_eos", "large")} | {"used": trajectories["4x1 on 1 rank"][2]}
    places["empty"].write_text('{"text": " "}\n')
    places["short"].write_text('{"text": "one two"}\n')
    tokenizer = train_tokenizer([corpus_file.read_text()], 700)
    tokenizer.save_pretrained(places["large"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(places["no_eos"])
    given = [*TINY, "deepspeed=null", f"output_dir={tmp_path / 'out'}", *(word.format(**places) for word in words)]
    with pytest.raises(SystemExit) as ended:
        run_pretrain.main(given)
    shown = capsys.readouterr()
    assert ended.value.code == 2 and "model:" not in shown.out
    lines = errors(shown.err)
    assert len(lines) == 1 and reason in lines[0]
    assert "Traceback" not in shown.err and not (tmp_path / "out" / "run.json").exists()


def test_debug_shows_the_traceback(launch, tmp_path):
    done = launch("python", "run_pretrain.py", "debug=true", "block_size=1", expect=1)
    assert "Traceback" in done.stderr and "block_size must be at least 2" in done.stderr
