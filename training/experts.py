"""A mixture's experts: their auxiliary loss weighted as one step's, and how evenly tokens are sent to them."""

import inspect
import math

import torch
import torch.distributed as dist


class Experts:
    """Takes the auxiliary load-balancing loss out of the model's own loss and counts what its routers choose.

    transformers adds coefficient x loss to each micro-batch's share of the cross-entropy, so it weighs as many times
    too much as a step has micro-batches on all ranks: 4 times at accumulation 2 on 2 ranks (5.23, measured). Here the
    step's auxiliary loss is the mean over its micro-batches. Each micro-batch is balanced by itself, all layers
    together, as load_balancing_loss_func has it (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6).

    Args:
        model: Its router_aux_loss_coef is set to 0; the config keeps it.
    """

    def __init__(self, model):
        self.coefficient, model.router_aux_loss_coef = model.router_aux_loss_coef, 0.0
        self.chosen, self.counts = model.config.num_experts_per_tok, None

    @classmethod
    def of(cls, model):
        """Those of a model, or None where it has none that transformers can balance."""
        takes = "output_router_logits" in inspect.signature(type(model).forward).parameters
        return cls(model) if takes and hasattr(model, "router_aux_loss_coef") else None

    def count(self, router_logits):
        """Count a micro-batch's choices.

        Args:
            router_logits: A tensor [tokens, experts] of each layer.
        """
        logits = torch.stack([each.detach() for each in router_logits])
        found = torch.zeros_like(logits[:, 0], dtype=torch.long)
        chosen = logits.topk(self.chosen, dim=-1).indices.flatten(1)
        found.scatter_add_(1, chosen, torch.ones_like(chosen))
        self.counts = found if self.counts is None else self.counts + found

    def take(self):
        """How even the choices were since the last call, over all ranks; all ranks call.

        Returns:
            expert_load_max: tokens of the busiest expert of any layer, as a multiple of the even share;
            expert_load_entropy: of the shares, 1 where all are even, the mean over layers.
        """
        if self.counts is None:
            return {}
        counts, self.counts = self.counts.double(), None
        if dist.is_initialized():
            dist.all_reduce(counts)
        shares = counts / counts.sum(1, keepdim=True)
        entropy = torch.special.entr(shares).sum(1).mean() / math.log(shares.shape[1])
        return {
            "expert_load_max": round(shares.max().item() * shares.shape[1], 4),
            "expert_load_entropy": round(entropy.item(), 5),
        }
