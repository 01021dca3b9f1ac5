"""The one door to what the stack does not promise: private names, and objects whose inside we set.

transformers, accelerate, DeepSpeed, torch and bitsandbytes are called by their public names everywhere else. Each
function here says with which version it was written and why the public way does not do; tests/test_upstream.py fails
when one of them moves, so that an upgrade is this file's work. setup.cfg bounds the versions. It lies in core/ because
the plan and the check of DeepSpeed's files need it too.
"""

import shlex
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

# torch and transformers are imported inside: a plan of a budget needs neither.


# transformers 5.23


def model_class(config: Any) -> Any:
    """The class of the causal language model of a config; None where it is another kind of model.

    AutoModelForCausalLM keeps the mapping in a private name, and from_config shares a model out under ZeRO-3.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def attention_kinds(network_class: Any) -> dict[str, bool]:
    """{kind of attention: whether the class has it}; transformers says so when a model is built, not before.

    flash stands for all of flash-attn's; any for kernels that AttentionInterface has been told of.
    """
    return {
        "eager": True,
        "sdpa": network_class._supports_sdpa,
        "flex_attention": network_class._supports_flex_attn,
        "flash": network_class._supports_flash_attn,
        "any": network_class._supports_attention_backend,
    }


def attention_of(config: Any) -> str:
    """What attention a model's config has settled on: no public name reads it."""
    return config._attn_implementation


def set_attention(config: Any, kind: str) -> None:
    """Settle a config's attention before a model is made by its class, or for a while.

    A model's set_attn_implementation checks what is installed, and would refuse to go back to flash on a CPU.
    """
    config._attn_implementation = kind


def tied_weights(network: Any) -> set[str]:
    """Names of weights that a checkpoint may leave out: they are tied to others."""
    return set(network._tied_weights_keys or {}) if network.config.tie_word_embeddings else set()


def forget_logged_loss(trainer: Any) -> None:
    """Zero what Trainer has summed of the loss since its last log.

    Trainer subtracts the sum from itself, which leaves a NaN in every later row once there was one.
    """
    trainer._tr_loss.zero_()


# What PretrainTrainer overrides of Trainer's, and the arguments it counts on: Trainer calls them, and has no public
# place to do what is done there (training/trainer.py says it at each).
TRAINER_METHODS = {
    "_build_accelerator_args": ("kwargs",),
    "_get_grad_norm": ("model", "grad_norm"),
    "_track_num_input_tokens": ("inputs",),
    "_prepare_inputs": ("inputs",),
    "_run_epoch": ("model", "epoch", "train_dataloader"),
    "_save_checkpoint": ("model", "trial"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_push_from_checkpoint": ("checkpoint_folder",),
}


def set_peak_rate(scheduler: Any, peak: float) -> None:
    """Have a LambdaLR that was just loaded follow this peak, from where it stands (torch 2.13).

    Its state holds the checkpoint's peak, which would win over the arguments'.
    """
    scheduler.base_lrs = [peak] * len(scheduler.base_lrs)
    scheduler._last_lr = [peak * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["initial_lr"], group["lr"] = peak, rate


# accelerate 1.15


def ddp_handler(accelerator_arguments: dict[str, Any]) -> Any:
    """accelerate's DistributedDataParallelKwargs among what Trainer builds an Accelerator with: the first handler."""
    return accelerator_arguments["kwargs_handlers"][0]


def rows_of(loader: Any, epoch: int, batch: int, rank: int) -> list[int]:
    """The rows of the training set in micro-batch number `batch` of an epoch, on one rank.

    Copies of the loader's samplers are drawn anew: its own are in the middle of the epoch and must not move.
    accelerate's BatchSamplerShard deals out the batches of torch's BatchSampler among ranks; SeedableRandomSampler
    draws from its seed and the epoch.
    """
    import copy

    shard = copy.copy(loader.batch_sampler)
    batches = shard
    if hasattr(shard, "process_index"):
        shard.process_index = rank
        batches = shard.batch_sampler = copy.copy(shard.batch_sampler)
    sampler = batches.sampler = copy.copy(batches.sampler)
    if hasattr(sampler, "set_epoch"):
        sampler.generator = None  # made anew from the sampler's seed, not shared with the original
        sampler.set_epoch(epoch)
    return next(islice(shard, batch, None))


# DeepSpeed 0.19.8


def share_of(parameter: Any) -> Any:
    """What this rank holds of a parameter: under ZeRO-3 a share (ds_tensor), and the parameter itself is empty."""
    return getattr(parameter, "ds_tensor", parameter)


def shared_buffers(user: int) -> Iterator[Path]:
    """The buffers that DeepSpeed's extension for CPUs leaves in memory, of one user, whatever their launch."""
    yield from Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{user}_*")


def shared_buffer(user: int, address: str, port: str, rank: int) -> str:
    """The name of one rank's: 66 MiB, with the launch's address and port in it."""
    return f"deepspeed_allreduce_buffer_{user}_{address}_{port}_{rank}"


def see_overflow_at_once(optimizer: Any) -> None:
    """Have ZeRO-1 and -2 look for inf and NaN in all gradients by one multi-tensor kernel, in place of one by one.

    DeepSpeed takes seven launches a gradient: most of the 5,149 a step of SmolLM2-135M (profiled on one H100), whose
    host then keeps the device waiting. A square that float32 does not hold counts as inf, as it does in the norm after.
    Under offload it keeps its own way.
    """
    if getattr(optimizer, "cpu_offload", True) or not hasattr(optimizer, "has_overflow_partitioned_grads_serial"):
        return
    import torch

    def found() -> Any:
        groups = [optimizer.averaged_gradients[number] or () for number in range(len(optimizer.bit16_groups))]
        gradients = [gradient for group in groups for gradient in group if gradient is not None]
        if not gradients:
            return torch.zeros(1, dtype=torch.bool)
        return ~torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).isfinite().all().reshape(1)

    optimizer.has_overflow_partitioned_grads_serial = found


DEEPSPEED_RANK_STARTER = "deepspeed.launcher.launch"  # the module between the deepspeed command and its ranks
DEEPSPEED_EXTENSION = "deepspeed_shm_comm"  # what it builds on a CPU


# torch 2.13


def default_store() -> Any:
    """The store through which the ranks of a launch met: what works when a collective does not."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def bound_groups(seconds: float) -> None:
    """Have every process group there is wait so long and no longer; torch sets it only where a group is made."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def extension_directory(name: str) -> Path:
    """Where torch builds a C++ extension, and its lock."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, verbose=False))


def link_where_paths_have_spaces() -> None:
    """torch writes its library directory into the linker's command as it is, which a space would cut in two."""
    from torch.utils import cpp_extension

    if Path(cpp_extension.TORCH_LIB_PATH).is_dir():  # not quoted yet
        cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)


def compile_modes() -> list[str]:
    """torch.compile's modes: it says them only when it is called with another."""
    import torch._inductor

    return list(torch._inductor.list_mode_options())


def cpu_has_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions, as oneDNN sees it; torch.amp says yes everywhere."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_triton() -> bool:
    """Whether torch's compiler finds a triton that works with this device."""
    from torch.utils._triton import has_triton

    return has_triton()


def is_compiled(network: Any) -> bool:
    """Whether any of its modules was compiled in place; Module.compile leaves no public mark."""
    return any(module._compiled_call_impl is not None for module in network.modules())


def mark_dynamic(tensor: Any, dimension: int) -> None:
    """Tell the compiler that a dimension changes; its module has a private name, its documentation names it so."""
    import torch._dynamo

    torch._dynamo.mark_dynamic(tensor, dimension)


# bitsandbytes 0.50.2


def with_group_bits(optimizer_class: Any) -> Any:
    """The class with `optim_bits` taken from each parameter group.

    bitsandbytes overrides bits by module, which is lost when ZeRO makes a group one flat tensor.
    """

    class GroupedBits(optimizer_class):
        def get_config(self, group_index, parameter_index, group):
            return super().get_config(group_index, parameter_index, group) | {"optim_bits": group["optim_bits"]}

    GroupedBits.__name__ = optimizer_class.__name__  # DeepSpeed and logs show the name
    return GroupedBits


# Python 3.11 to 3.13


def pool_processes(pool: Any) -> list[Any]:
    """The processes of a ProcessPoolExecutor: there is no other way to their exit statuses."""
    return list(pool._processes.values())
