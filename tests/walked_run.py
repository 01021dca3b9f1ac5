"""Runs of run_pretrain.py, one after the other in one launch, that say what each rank's model and optimizer hold.

    deepspeed tests/walked_run.py CASES.json    [[key=value, ...], ...]

Prints `walked {...}` with bytes by part for each case and rank: of distinct storages at the end of the second step,
and of the gradients while the optimizer steps.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
import in_place  # noqa: F401
from smolpretrain import run_pretrain


def storages(tensors):
    """Bytes of the distinct storages behind tensors."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(found.values())


def engine_parts(optimizer):
    """(weights, master weights) as DeepSpeed's optimizers name them."""
    for weights, master in (
        ("bit16_groups_flat", "single_partition_of_fp32_groups"),
        ("fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat"),
        ("fp16_groups", "fp32_groups"),
    ):
        if hasattr(optimizer, master):
            return flat(getattr(optimizer, weights)), flat(getattr(optimizer, master))
    return None, []


def flat(nested):
    return [t for part in nested for t in (flat(part) if isinstance(part, list) else [part])]


class Walk(TrainerCallback):
    """Walks at the end of step 2."""

    def __init__(self, trainer):
        self.trainer, self.gradients = trainer, {}

    def on_step_begin(self, args, state, control, **kwargs):
        optimizer = self.unwrapped()
        if state.global_step == 1 and hasattr(optimizer, "single_partition_of_fp32_groups"):
            step = optimizer._optimizer_step

            def watched(group):
                of_groups = [t for each in optimizer.averaged_gradients.values() for t in each or ()]
                partition = optimizer.single_partition_of_fp32_groups[group].grad
                self.gradients.setdefault("gradients", storages(of_groups))
                largest = max(self.gradients.get("gradients_fp32", 0), storages([partition]))
                self.gradients["gradients_fp32"] = largest
                return step(group)

            optimizer._optimizer_step = watched

    def unwrapped(self):
        """DeepSpeed's optimizer, or torch's."""
        optimizer = self.trainer.optimizer
        while type(optimizer).__name__ in ("AcceleratedOptimizer", "DeepSpeedOptimizerWrapper"):
            optimizer = optimizer.optimizer
        return optimizer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step != 2:
            return
        outer = self.unwrapped()
        inner = outer.optimizer if hasattr(outer, "optimizer") else outer
        weights, master = engine_parts(outer)
        persistent = [p.data for p in model.parameters()]
        found = {
            "weights": storages([*persistent, *(weights or ())]),
            "master": storages(master),
            "optimizer": storages([v for s in inner.state.values() for v in s.values() if isinstance(v, torch.Tensor)]),
        }
        line = json.dumps(found | self.gradients | {"rank": args.process_index})
        print(f"walked {line}", flush=True)  # one write: unbuffered parts of two ranks' lines would mix


def main():
    make_trainer = run_pretrain.make_trainer

    def walked(*args, **kwargs):
        trainer, log = make_trainer(*args, **kwargs)
        trainer.add_callback(Walk(trainer))
        return trainer, log

    run_pretrain.make_trainer = walked
    run_pretrain.dist.destroy_process_group = lambda: None  # the next case goes on with the same ranks
    for words in json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8")):
        run_pretrain.main(words)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
            dist.distributed_c10d._get_default_store().delete_key("prepared")  # the next case's ranks wait again
            dist.barrier()
    os._exit(0)  # ranks that never left their group end together


if __name__ == "__main__":
    main()
