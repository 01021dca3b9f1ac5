"""The learning rate's schedule where its parts are shares of the run, now that the steps are known."""

LINEAR = {"decay_type": "linear"}  # SmolLM2's (config_smollm2_*.yaml: lr_decay_style); transformers' own is cosine


def resolve(args, steps):
    """`lr_scheduler_kwargs` of `get_scheduler`, with `decay_fraction` in steps.

    Args:
        args: PretrainArguments, checked: warm-up and decay are at most the whole run.
        steps: Optimizer updates of the run.
    """
    if args.decay_fraction is None:
        return args.lr_scheduler_kwargs
    decay = min(max(1, round(args.decay_fraction * steps)), steps - args.get_warmup_steps(steps))
    return LINEAR | (args.lr_scheduler_kwargs or {}) | {"num_decay_steps": decay}
