"""Optimizers that Trainer does not make by itself: Muon with AdamW, and 8-bit AdamW whose embeddings keep 32 bits."""

from itertools import islice

import torch
from torch import nn

from smolpretrain.core import upstream


def grouped(model, decayed):
    """Trained parameters by what an optimizer may treat alike.

    Args:
        decayed: Names that weight decay reaches, as Trainer gives them.

    Returns:
        {matrices, embeddings, norms: parameters}; an untied head is in `head`, biases are among the norms.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    heads = {id(p) for p in head.parameters()} if head is not None else set()
    groups = {"matrices": [], "embeddings": [], "head": [], "norms": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "matrices" if name in decayed else "norms"
            kind = "embeddings" if id(parameter) in embeddings else "head" if id(parameter) in heads else kind
            groups[kind].append(parameter)
    return groups


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for hidden matrices and torch's AdamW for the rest, as one optimizer with one state.

    Both take their steps on the groups and the state of this one, so that a scheduler, a checkpoint and a reload see
    a plain torch optimizer.

    Args:
        matrices, others: Parameter groups of each.
        muon, adamw: Their keywords.
    """

    def __init__(self, matrices, others, muon, adamw):
        self.parts = torch.optim.Muon(matrices, **muon), torch.optim.AdamW(others, **adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self):
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state

    def load_state_dict(self, state_dict):
        """torch's, which makes new groups and a new state."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure=None):
        """One step of each.

        Raises:
            ValueError: A closure is given: it would be evaluated twice.
        """
        if closure is not None:
            raise ValueError("MuonAndAdamW takes no closure.")
        for part in self.parts:
            part.step()


def muon(groups, args):
    """Muon for the hidden matrices, AdamW for embeddings, head and norms, both at learning_rate and weight_decay.

    A matrix's step is scaled to AdamW's usual size, 0.2 sqrt(max(rows, columns)), so that a rate found with AdamW
    holds (Liu et al. 2025, arXiv 2502.16982, section 2.2). Momentum 0.95, Nesterov's, and 5 Newton-Schulz steps are
    Jordan's (kellerjordan.github.io/posts/muon); optim_args changes momentum and ns_steps.
    """
    given = dict(word.split("=") for word in (args.optim_args or "").replace(" ", "").split(",") if word)
    options = {name: kind(given[name]) for name, kind in (("momentum", float), ("ns_steps", int)) if name in given}
    decay, rate = args.weight_decay, {"lr": args.learning_rate}
    others = [(groups["embeddings"] + groups["head"], decay), (groups["norms"], 0.0)]
    return MuonAndAdamW(
        [{"params": groups["matrices"]}],
        [{"params": parameters, "weight_decay": by} for parameters, by in others if parameters],
        rate | {"weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"} | options,
        rate | {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "fused": True},
    )


def eight_bit(cls, kwargs, groups, decay):
    """An 8-bit optimizer of bitsandbytes in three groups, so that embeddings and norms keep 32-bit state.

    bitsandbytes asks for 32-bit state of embeddings (Dettmers et al. 2022, arXiv 2110.02861, section 2.2), and
    Trainer registers it by module; under ZeRO a parameter group becomes one flat tensor, so the request is lost.
    A group of their own and an `optim_bits` in that group survive it, and a checkpoint's reload.
    """
    options = [
        (groups["matrices"] + groups["head"], {"weight_decay": decay, "optim_bits": 8}),
        (groups["embeddings"], {"weight_decay": decay, "optim_bits": 32}),
        (groups["norms"], {"weight_decay": 0.0, "optim_bits": 32}),
    ]
    return upstream.with_group_bits(cls)(
        [{"params": parameters, **each} for parameters, each in options if parameters], **kwargs
    )
