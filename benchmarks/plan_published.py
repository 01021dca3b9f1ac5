"""Published runs beside the plan's arithmetic: rates and GPU-hours at the utilization their authors state.

    python benchmarks/plan_published.py

Where no utilization is stated, the one that follows from their figure is printed instead. Attention is counted as
dense, so a model with sliding windows (Olmo 3) comes out a little high.
"""

from smolpretrain.core.architectures import built_in
from smolpretrain.planning import counting, hardware

LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 32000}
TINYLLAMA = LLAMA | {
    "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "intermediate_size": 5632,
}  # fmt: skip
PYTHIA_1B = {
    "model_type": "gpt_neox", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8,
    "intermediate_size": 8192, "vocab_size": 50304, "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM3 = {
    "model_type": "smollm3", "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 4, "intermediate_size": 11008, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
SMOLLM2_70M = built_in("smollm2-135m") | {
    "hidden_size": 384, "num_hidden_layers": 32, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 1024,
}  # fmt: skip
GPT2 = {  # its matrices are gpt_neox's
    "model_type": "gpt_neox", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "vocab_size": 50257, "tie_word_embeddings": True,
}  # fmt: skip
OLMO3 = {"model_type": "olmo3", "vocab_size": 100278, "tie_word_embeddings": False}
OLMO3_7B = OLMO3 | {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 11008,
}  # fmt: skip
OLMO3_32B = OLMO3 | {
    "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8,
    "intermediate_size": 27648,
}  # fmt: skip
# name, config, tokens a row, device, tokens a second and device, stated utilization, source
RUNS = (
    ("TinyLlama-1.1B", TINYLLAMA, 2048, "A100-40GB", 24_000, 0.56, "its README: 24k tokens/s, 56 %"),
    (
        "TinyLlama-1.1B", TINYLLAMA, 2048, "A100-40GB", 300e9 / 3456 / 3600, 0.56,
        "its README: 3,456 A100 hours for 300B tokens",
    ),
    (
        "GPT-2 124M", GPT2, 1024, "A100-80GB", 10e9 / 8 / 5400, 0.60,
        "llm.c, discussion 481: 10B tokens in about 90 minutes on 8 A100, up to about 60 %",
    ),
    (
        "Pythia-1B", PYTHIA_1B, 2048, "A100-40GB", 300e9 / 4830 / 3600, None,
        "Biderman et al. 2023, as TinyLlama's README has it: 4,830 A100 hours for 300B tokens",
    ),
    (
        "SmolLM3-3B", SMOLLM3, 4096, "H100-SXM", 14_000, 0.294,
        "Hugging Face's training configuration of SmolLM3, as tzafon.ai/blog/breaking-40k-tokens has it",
    ),
    (
        "Olmo 3 7B", OLMO3_7B, 8192, "H100-SXM", 7_700, None,
        "Olmo 3 (arXiv 2512.13961), as muxup.com/2025q4/minipost-olmo3-training-cost has it",
    ),
    ("Olmo 3 32B", OLMO3_32B, 8192, "H100-SXM", 1_900, None, "the same"),
    (
        "SmolLM2-70M", SMOLLM2_70M, 8192, "L40S", 110_000, None,
        "codelion/SmolLM2-70M's card: one L40S, FlashAttention 2, torch.compile",
    ),
)  # fmt: skip


def main():
    print("| run | parameters | device | published tokens/s | MFU | ours at it | off | source |")
    print("|---|---:|---|---:|---:|---:|---:|---|")
    for name, config, block, gpu, rate, mfu, source in RUNS:
        flops, peak = counting.flops_per_token(config, block), hardware.find(gpu).peak_flops
        total = counting.count(config).total
        if mfu:
            ours = peak * mfu / flops
            shown = f"{mfu:.1%} stated | {ours:,.0f} | {ours / rate - 1:+.0%}"
        else:
            shown = f"{rate * flops / peak:.1%} follows | - | -"
        print(f"| {name} | {total / 1e9:.2f}B | {gpu} | {rate:,.0f} | {shown} | {source} |")
    config, tokens = built_in("smollm2-1.7b"), 11e12
    by_6n, ours = 6 * counting.count(config).total * tokens, counting.flops_per_token(config, 2048) * tokens
    print(
        f"\nSmolLM2-1.7B, 11T tokens: its authors say about 1e23 FLOPs (arXiv 2502.02737); 6 N D is {by_6n:.2e}, with "
        f"attention {ours:.2e}."
    )


if __name__ == "__main__":
    main()
