"""What the gradient follows beside the cross-entropy, kept apart from it so that logged and held-out loss compare."""

import torch
import torch.distributed as dist


class Terms:
    """Sums of named terms between two log lines, each as it enters the objective: with its coefficient.

    Attributes:
        steps: Optimizer steps whose terms are in the sums.
    """

    def __init__(self):
        self.sums, self.steps = {}, 0

    def add(self, name, value):
        """Add a micro-batch's share, a tensor, to the sum of its step."""
        self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def take(self):
        """{name: mean over steps of the sum over micro-batches and ranks}, and begin anew. All ranks call."""
        names, sums = sorted(self.sums), [self.sums[name] for name in sorted(self.sums)]
        steps, self.sums, self.steps = max(1, self.steps), {}, 0
        if not names:
            return {}
        together = torch.stack(sums)
        if dist.is_initialized():
            dist.all_reduce(together)
        return {name: value / steps for name, value in zip(names, together.tolist(), strict=True)}
