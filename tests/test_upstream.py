"""The door to the stack: each private name that we touch is there and does what we count on, in the versions installed.

A failure here after an upgrade names the function of core/upstream.py to mend; nothing else touches such a name.
"""

import ast
import inspect
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import bitsandbytes
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from accelerate.utils import DistributedDataParallelKwargs
from conftest import ROOT
from torch import distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from smolpretrain.core import upstream

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PUBLIC = {"_asdict", "_replace", "_fields", "_exit", "_get_args"}  # of namedtuple, and os._exit


def config(**more):
    return LlamaConfig(**SIZES | {"tie_word_embeddings": True} | more)


def product():
    skip = {"tests", "build", ".venv", "benchmarks", "runs", "docs"}
    return [p for p in sorted(ROOT.rglob("*.py")) if not skip & set(p.relative_to(ROOT).parts)]


def test_no_other_file_touches_a_private_name_of_the_stack():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in product()}
    ours = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
    known, found = ours | PUBLIC | upstream.TRAINER_METHODS.keys(), []
    for path, tree in trees.items():
        if path == ROOT / "core" / "upstream.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                stored = isinstance(node.ctx, ast.Store) and not (
                    isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "made")
                )
                found += [(str(path.relative_to(ROOT)), node.attr)] if node.attr not in known or stored else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                private = [n.name for n in node.names if n.name.startswith("_")]
                private += [part for part in (node.module or "").split(".") if part.startswith("_")]
                found += [(str(path.relative_to(ROOT)), name) for name in private if not name.startswith("__")]
    assert found == []


@pytest.mark.parametrize("name", upstream.TRAINER_METHODS)
def test_trainer_still_has_and_still_calls_what_ours_overrides(name):
    accepted = inspect.signature(getattr(Trainer, name)).parameters
    assert set(upstream.TRAINER_METHODS[name]) <= accepted.keys()
    assert f"self.{name}(" in inspect.getsource(Trainer), "nobody calls it: the override would do nothing"


def test_the_class_of_a_config_is_known_and_one_without_a_causal_model_is_told():
    assert upstream.model_class(config()) is LlamaForCausalLM
    assert upstream.model_class(CONFIG_MAPPING["t5"]()) is None


def test_what_attention_a_class_has_is_known_before_a_model_is_built():
    assert all(upstream.attention_kinds(LlamaForCausalLM).values())
    assert not upstream.attention_kinds(upstream.model_class(CONFIG_MAPPING["bloom"]()))["flash"]


def test_attention_is_read_and_set_before_a_model_is_built_and_after():
    model = LlamaForCausalLM._from_config(config(), attn_implementation="eager")
    assert upstream.attention_of(model.config) == "eager"
    upstream.set_attention(model.config, "sdpa")
    assert {upstream.attention_of(layer.self_attn.config) for layer in model.model.layers} == {"sdpa"}
    assert torch.isfinite(model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits).all()


def test_tied_weights_are_named_as_the_model_names_them():
    model = LlamaForCausalLM(config())
    assert upstream.tied_weights(model) == {"lm_head.weight"}
    assert "lm_head.weight" in dict(model.named_parameters(remove_duplicate=False))
    assert upstream.tied_weights(LlamaForCausalLM(config(tie_word_embeddings=False))) == set()


def test_trainer_sums_its_loss_where_we_zero_it_and_builds_accelerate_s_handler_first(tmp_path):
    """A NaN in one step must not be in every row: Trainer subtracts the sum from itself."""
    source = inspect.getsource(Trainer)
    assert "self._tr_loss += tr_loss_step" in source and "tr_loss -= tr_loss" in source
    trainer = Trainer(LlamaForCausalLM(config()), TrainingArguments(tmp_path, use_cpu=True, report_to="none"))
    trainer._tr_loss = torch.tensor(float("nan"))
    upstream.forget_logged_loss(trainer)
    assert trainer._tr_loss.item() == 0
    assert isinstance(upstream.ddp_handler(trainer._build_accelerator_args()), DistributedDataParallelKwargs)


def test_a_loaded_schedule_follows_the_new_peak_from_where_it_stands():
    def made(rate):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
        return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    optimizer, scheduler = made(1.0)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    again, loaded = made(1.0)
    again.load_state_dict(optimizer.state_dict())
    loaded.load_state_dict(scheduler.state_dict())
    upstream.set_peak_rate(loaded, 0.5)
    assert loaded.get_last_lr() == [0.5 / 4] and again.param_groups[0]["lr"] == 0.5 / 4
    again.step()
    loaded.step()
    assert again.param_groups[0]["lr"] == 0.5 / 5


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_rows_of_a_micro_batch_are_those_that_its_rank_is_given(epoch):
    def loader(rank):
        sampler = SeedableRandomSampler(range(16), data_seed=7)
        sampler.set_epoch(epoch)
        shard = BatchSamplerShard(BatchSampler(sampler, 2, drop_last=True), num_processes=2, process_index=rank)
        return DataLoader(range(16), batch_sampler=shard)

    given = {rank: [batch.tolist() for batch in loader(rank)] for rank in (0, 1)}
    first = loader(0)
    next(iter(first))
    assert [[upstream.rows_of(first, epoch, number, rank) for number in range(4)] for rank in (0, 1)] == [
        given[0],
        given[1],
    ]


def test_a_parameter_s_share_is_deepspeed_s_own_name_for_it():
    from deepspeed.runtime.zero import partition_parameters

    assert "param.ds_tensor =" in inspect.getsource(partition_parameters)
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert upstream.share_of(parameter) is parameter
    parameter.ds_tensor = torch.ones(1)
    assert upstream.share_of(parameter) is parameter.ds_tensor


def test_deepspeed_names_its_launcher_its_extension_and_its_buffers_as_we_look_for_them():
    import deepspeed

    root = Path(deepspeed.__file__).parent
    assert Path(root, *upstream.DEEPSPEED_RANK_STARTER.split(".")[1:]).with_suffix(".py").is_file()
    assert f'"{upstream.DEEPSPEED_RANK_STARTER}"' in (root / "launcher" / "runner.py").read_text()
    builder = (root / "ops/op_builder/cpu/comm.py").read_text()
    assert f'NAME = "{upstream.DEEPSPEED_EXTENSION}"' in builder
    source = "".join(p.read_text(errors="replace") for p in (root / "ops/csrc/cpu/comm").glob("*.cpp"))
    assert "deepspeed_allreduce_buffer" in source and '"%s_%d_%s_%s"' in source.replace("\n", "")
    name = upstream.shared_buffer(1000, "127.0.0.1", "29500", 3)
    assert name == "deepspeed_allreduce_buffer_1000_127.0.0.1_29500_3"


GROUPS = """
import os, torch.distributed as dist
from datetime import timedelta
from smolpretrain.core import upstream
dist.init_process_group("gloo", rank=0, world_size=1, timeout=timedelta(seconds=900),
                        store=dist.HashStore())
more = dist.new_group([0], timeout=timedelta(seconds=900))
upstream.bound_groups(77)
for group in (dist.group.WORLD, more):
    assert group._get_backend(__import__("torch").device("cpu")).options._timeout == timedelta(seconds=77)
upstream.default_store().set("a", "b")
assert upstream.default_store().get("a") == b"b"
"""


def test_every_process_group_waits_as_long_as_told_and_the_store_is_the_launch_s():
    done = subprocess.run([sys.executable, "-c", GROUPS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_an_extension_is_built_where_torch_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert upstream.extension_directory("some_op") == tmp_path / "some_op" and os.path.isdir(tmp_path / "some_op")


def test_compile_s_modes_and_the_cpu_s_bfloat16_are_asked_of_torch():
    assert {"default", "max-autotune"} <= set(upstream.compile_modes())
    assert isinstance(upstream.has_triton(), bool)
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert not upstream.is_compiled(layer)
    layer[0].compile()
    assert upstream.is_compiled(layer)
    upstream.mark_dynamic(marked := torch.zeros(3, 2), 0)
    assert marked._dynamo_dynamic_indices == {0}
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    assert isinstance(upstream.cpu_has_bf16(), bool)
    assert not upstream.cpu_has_bf16() or "avx2" not in flags or "avx512" in flags, "oneDNN's kernels ask for AVX-512"


def test_bits_of_the_state_are_those_of_a_parameter_s_group():
    before, kept = dist.is_initialized(), [torch.nn.Parameter(torch.ones(64, 128)) for _ in range(2)]
    cls = upstream.with_group_bits(bitsandbytes.optim.AdamW)
    groups = [{"params": [kept[0]], "optim_bits": 8}, {"params": [kept[1]], "optim_bits": 32}]
    optimizer = cls(groups, lr=1e-3, optim_bits=8)
    for parameter in kept:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [optimizer.state[p]["state1"].dtype for p in kept] == [torch.uint8, torch.float32]
    assert cls.__name__ == "AdamW" and dist.is_initialized() == before, "no group of ranks is made for it"


def test_a_pool_s_processes_are_those_that_work():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        worker = pool.submit(os.getpid).result()
        assert [process.pid for process in upstream.pool_processes(pool)] == [worker]


@pytest.mark.parametrize("harm", [None, torch.inf, -torch.inf, torch.nan])
def test_zero_sees_any_gradient_that_is_not_finite_at_once_and_as_deepspeed_does(harm):
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    class Held:
        """What the real method reads of an optimizer."""

        has_overflow_partitioned_grads_serial = DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial
        _has_inf_or_nan = staticmethod(DeepSpeedZeroOptimizer._has_inf_or_nan)
        cpu_offload, bit16_groups = False, [[0, 0], [0]]
        averaged_gradients = {
            0: [torch.randn(8, 4, dtype=torch.bfloat16), torch.randn(5, dtype=torch.bfloat16)],
            1: [torch.randn(300, dtype=torch.bfloat16) * 1e4],
        }

    held = Held()
    if harm is not None:
        held.averaged_gradients[0][1][3] = harm
    theirs = held.has_overflow_partitioned_grads_serial()
    upstream.see_overflow_at_once(held)
    ours = held.has_overflow_partitioned_grads_serial()
    assert (
        ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.item() == theirs.item() == (harm is not None)
    )
    assert "has_overflow_partitioned_grads_serial" in vars(held)  # ours was asked
    held = Held()
    held.cpu_offload = True
    upstream.see_overflow_at_once(held)
    assert "has_overflow_partitioned_grads_serial" not in vars(held)
