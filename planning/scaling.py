"""From a budget to a run: a compute-optimal size, its tokens, batch, learning rate, and the args.json of it."""

from math import sqrt

from smolpretrain.core.architectures import built_in

from . import counting, laws

VOCABULARY, HEAD, ROW = 49152, 64, 2048
ASPECT = 80  # hidden size over layers: between Pythia-160M's 64, SmolLM2-1.7B's 85 and Llama-7B's 128


def shape(parameters):
    """A Llama of about so many parameters, embeddings included: SmolLM2's vocabulary, heads of 64, ASPECT, MLP 8/3."""

    def config(hidden):
        return built_in("smollm2-1.7b") | {
            "hidden_size": hidden,
            "num_hidden_layers": max(2, round(hidden / ASPECT)),
            "num_attention_heads": hidden // HEAD,
            "num_key_value_heads": hidden // HEAD,
            "intermediate_size": round(hidden * 8 / 3 / 64) * 64,
            "initializer_range": round(1 / sqrt(hidden), 5),
        }

    sizes = [config(hidden) for hidden in range(HEAD, 16384 + HEAD, HEAD)]
    return min(sizes, key=lambda found: abs(counting.count(found).total - parameters))


def advise(flops):
    """What published laws say for a budget of 6 N D = flops.

    Returns:
        {flops, optimum: {source: {parameters, tokens, loss}}, batch_and_learning_rate: {source: ...}, arguments}; the
        arguments follow Besiroglu et al.'s optimum and DeepSeek LLM's batch and learning rate.
    """
    optimum = {}
    for fit in (laws.REFIT, laws.HOFFMANN):
        parameters, tokens = laws.optimal(flops, fit)
        loss = laws.loss(parameters, tokens, fit)
        optimum[fit.source] = {"parameters": parameters, "tokens": tokens, "loss": loss}
    parameters, tokens = laws.optimal(flops)
    config = shape(parameters)
    counted = counting.count(config)
    said = [laws.deepseek(flops), laws.olmo_ladder(counted.non_embedding)]
    rows = max(1, round(said[0].batch_tokens / ROW))
    overrides = {key: config[key] for key in config if config[key] != built_in("smollm2-135m").get(key)}
    return {
        "flops": flops,
        "optimum": optimum,
        "batch_and_learning_rate": {advice.source: advice._asdict() for advice in said},
        "parameters": counted.total,
        "tokens": tokens,
        "arguments": {
            "model_name": "smollm2-135m",
            "config_overrides": overrides,
            "block_size": ROW,
            "output_dir": f"runs/{counted.total / 1e6:.0f}m",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": rows,
            "max_steps": max(1, round(tokens / (rows * ROW))),
            "learning_rate": float(f"{said[0].learning_rate:.2g}"),
            "warmup_steps": 0.01,
        },
    }


def lines(advice):
    """The advice in words."""
    yield f"{advice['flops']:.2e} FLOPs"
    for source, found in advice["optimum"].items():
        parameters, tokens = found["parameters"], found["tokens"]
        yield (
            f"  {parameters:.3g} parameters, {tokens:.3g} tokens, {tokens / parameters:.0f} a parameter, loss "
            f"{found['loss']:.2f} on their text: {source}"
        )
    for source, found in advice["batch_and_learning_rate"].items():
        yield f"  learning rate {found['learning_rate']:.2e}, {found['batch_tokens']:,.0f} tokens a step: {source}"
    yield (
        f"  taken: {advice['parameters']:,} parameters, the first optimum and the first batch and learning rate, all "
        "rows on one device: share gradient_accumulation_steps out over your devices."
    )
