"""Gradients in fewer bytes on the wire, where DDP sends them: torch's own communication hooks."""

from accelerate.utils import DDPCommunicationHookType

HOOKS = {
    "fp16": DDPCommunicationHookType.FP16,
    "bf16": DDPCommunicationHookType.BF16,
    "powersgd": DDPCommunicationHookType.POWER_SGD,
}
RANK = 4  # of PowerSGD's matrices; Vogels et al. 2019 (arXiv 1905.13727) compare 1, 2 and 4


def hook(handler, kind, max_steps):
    """Set a DistributedDataParallelKwargs to compress as asked.

    PowerSGD begins after a tenth of the steps, at most 1,000, as torch's documentation advises.

    Args:
        handler: accelerate's; its comm_hook and state are set.
        kind: none, bf16, fp16 or powersgd.
        max_steps: Steps of the run, or -1.
    """
    if kind not in HOOKS:
        return
    handler.comm_hook = HOOKS[kind]
    if kind == "powersgd":
        begin = max(2, min(1000, max_steps // 10)) if max_steps > 0 else 1000
        handler.comm_state_option = {"matrix_approximation_rank": RANK, "start_powerSGD_iter": begin}
