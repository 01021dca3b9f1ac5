"""What cannot be, or should be known before it starts: one line each, with its numbers."""

import math

from . import laws

FAR = 4  # times below the least or above the most that any law here says


def steps_and_data(plan, values):
    """Lines about steps, warm-up, saving, epochs and tokens a parameter."""
    lines, steps, tokens = [], plan["data"]["steps"], plan["data"]["tokens"]
    if steps:
        warmup = values["warmup_steps"]
        if warmup >= steps:
            lines.append(
                f"warmup_steps = {warmup:,} is not below the run's {steps:,} steps: the peak is never reached."
            )
        if str(values.get("save_strategy", "steps")).endswith("steps") and values["save_steps"] > steps:
            lines.append(f"save_steps = {values['save_steps']:,} is beyond the run's {steps:,} steps: none is saved.")
        share = tokens / plan["model"]["total"]
        if share < 1:
            lines.append(
                f"{tokens:,} tokens for {plan['model']['total']:,} parameters are {share:.2g} a parameter, under 1; "
                f"compute-optimal is about {laws.TOKENS_PER_PARAMETER} (Hoffmann et al. 2022, table 3)."
            )
    epochs = plan["data"]["epochs"]
    if epochs is not None and epochs < 0.995:
        lines.append(f"the run sees {epochs:.2%} of the prepared set: fewer than one epoch.")
    if epochs is not None and epochs > laws.EPOCHS:
        lines.append(
            f"the run sees the prepared set {epochs:.1f} times: beyond {laws.EPOCHS} passes repeated text gives little "
            "(Muennighoff et al. 2023, arXiv 2305.16264)."
        )
    positions, block = plan["model"]["positions"], values["block_size"]
    if positions and block > positions:
        lines.append(f"block_size = {block:,} is more than the model's {positions:,} positions.")
    return lines


def learning_rate(plan, values):
    """A line where the learning rate is FAR outside what every law here says for this size and compute."""
    flops = plan["compute"]["flops"]
    if not flops or flops < laws.FITTED_FROM:
        return []
    said = [laws.deepseek(flops), laws.olmo_ladder(plan["model"]["non_embedding"])]
    rates, rate = sorted(advice.learning_rate for advice in said), values["learning_rate"]
    if rates[0] / FAR <= rate <= rates[1] * FAR:
        return []
    batches = sorted(advice.batch_tokens for advice in said)
    return [
        f"learning_rate = {rate:g} is more than {FAR} times outside {rates[0]:.1e} to {rates[1]:.1e}, which DeepSeek "
        f"LLM's law (arXiv 2401.02954, equation 1) and OLMo's ladder (arXiv 2412.04403) say for {flops:.1e} FLOPs and "
        f"{plan['model']['non_embedding']:,} non-embedding parameters, at {batches[0]:,.0f} to {batches[1]:,.0f} "
        f"tokens a step; here a step takes {plan['data']['tokens_a_step']:,}."
    ]


def disk(plan, values, free_bytes):
    """A line where the checkpoints kept at one time, one more while saving, exceed the free disk."""
    each, kept = plan["memory"]["checkpoint_bytes"], values["save_total_limit"]
    if free_bytes is None or not each or kept is None:
        return []
    if (needed := each * (kept + 1)) > free_bytes:
        return [
            f"{kept} checkpoints and one being written are {needed / 1e9:,.1f} GB ({each / 1e9:,.1f} GB each), and "
            f"{values['output_dir']} has {free_bytes / 1e9:,.1f} GB free."
        ]
    return []


def beyond_peak(flops, hours, device, ranks, what="the run"):
    """A line where so many FLOPs cannot be done in so many hours, even at the data sheet's peak.

    Args:
        flops: {words: FLOPs}, from the least that must be done to the most.
    """
    if not hours or not device.peak_flops:
        return []
    peak = device.peak_flops * ranks * hours * 3600
    shares = {words: amount / peak for words, amount in flops.items()}
    if max(shares.values()) < 0.7:
        return []
    verdict = "impossible" if max(shares.values()) > 1 else "beyond what published runs reached"
    listed = ", ".join(f"{share:.0%} {words}" for words, share in shares.items())
    return [
        f"{what} in {hours:g} h on {ranks} x {device.name} needs, of the dense bf16 peak of "
        f"{device.peak_flops / 1e12:g} TFLOPS each: {listed}: {verdict}."
    ]


def claims(claimed, plan, compute, device, ranks):
    """Hold a report's claims against arithmetic.

    Args:
        claimed: {steps, tokens, hours, loss, perplexity, parameters}, any of them.
        plan: As `assemble.make` returns it, for the recipe.
        compute: counting.Flops of one token.
    """
    lines, data = [], plan["data"]
    steps = claimed.get("steps", data["steps"])
    if data["steps"] and steps != data["steps"]:
        lines.append(f"claimed {steps:,} steps, the recipe says {data['steps']:,}.")
    tokens = steps * data["tokens_a_step"] if steps else None
    if tokens and abs(claimed.get("tokens", tokens) / tokens - 1) > 0.01:
        lines.append(
            f"claimed {claimed['tokens']:,} tokens, {steps:,} steps x {data['tokens_a_step']:,} tokens are {tokens:,}."
        )
    if "parameters" in claimed and abs(claimed["parameters"] / plan["model"]["total"] - 1) > 0.01:
        lines.append(f"claimed {claimed['parameters']:,} parameters, the config has {plan['model']['total']:,}.")
    tokens = claimed.get("tokens", tokens)
    if tokens and claimed.get("hours"):
        needed = {
            "by 6 N alone": 6 * plan["model"]["active"] * tokens,
            "with attention": compute.model * tokens,
        }
        if plan["compute"]["checkpointing"]:
            needed["with recomputed activations"] = (compute.model + compute.recompute) * tokens
        lines += beyond_peak(needed, claimed["hours"], device, ranks, what=f"{tokens:,} tokens")
    if "loss" in claimed and "perplexity" in claimed:
        loss, said, right = claimed["loss"], claimed["perplexity"], math.exp(claimed["loss"])
        if abs(said / right - 1) > 0.05:
            lines.append(
                f"claimed loss {loss:g} and perplexity {said:g}: exp({loss:g}) is {right:.1f}, and a perplexity of "
                f"{said:g} is a loss of {math.log(said):.2f}."
            )
    return lines
