"""What a run of two ranks leaves: the model of its last checkpoint, and none of the secrets around it."""

import json
import pickle
import zipfile

import pytest
import torch
from conftest import ROOT, SECRETS
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from smolpretrain.core.precision import computes_bf16

pytestmark = pytest.mark.slow


def test_the_exported_model_computes_what_the_last_checkpoint_does_and_is_ready_for_others(skipping):
    output_dir, *_ = skipping
    exported, checkpoint = output_dir, output_dir / "checkpoint-60"
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    logits = []
    for directory in (exported, checkpoint):
        network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        logits.append(network(ids, use_cache=False).logits)
    assert torch.equal(*logits) and logits[0].std() > 0.1
    with (
        safe_open(exported / "model.safetensors", "pt") as file,
        safe_open(checkpoint / "model.safetensors", "pt") as both,
    ):
        names = set(file.keys())
        assert "lm_head.weight" not in names and names == set(both.keys()) - {"lm_head.weight"}
        kept = torch.bfloat16 if computes_bf16("cpu") else torch.float32  # what the run computed in
        assert {file.get_tensor(name).dtype for name in names} == {kept}
    assert json.loads((exported / "config.json").read_text())["use_cache"] is True
    assert json.loads((exported / "generation_config.json").read_text())["use_cache"] is True
    assert {path.stat().st_mode & 0o777 for path in exported.glob("*.safetensors")} == {0o644}


def contents(path):
    """A file's bytes, and those of its members where it is an archive, as torch's pickles are."""
    yield path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def test_no_secret_of_the_environment_is_in_a_file_a_pickle_or_what_was_printed(skipping):
    output_dir, _, done = skipping
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert {".bin", ".pt", ".pth", ".json", ".jsonl", ".md", ".safetensors", ".png"} <= {path.suffix for path in files}
    for name, secret in SECRETS.items():
        for encoding in ("utf-8", "utf-16-le"):
            hidden = secret.encode(encoding)
            assert not [path for path in files for content in contents(path) if hidden in content], name
        assert secret not in done.stdout + done.stderr, name


def test_what_trainer_pickles_of_the_arguments_has_no_token(skipping, monkeypatch):
    output_dir, *_ = skipping
    monkeypatch.syspath_prepend(ROOT)  # the run was run_pretrain.py, whose arguments are a flat module
    found = list(output_dir.rglob("training_args.bin"))
    assert found and not (output_dir / "training_args.bin").exists()  # with checkpoints, never beside the model
    for path in found:
        args = torch.load(path, weights_only=False)
        assert args.hub_token is None
        shown = repr(vars(args)).encode() + pickle.dumps(vars(args) | {"distributed_state": None})
        assert not [name for name, secret in SECRETS.items() if secret.encode() in shown]
