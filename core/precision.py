"""What a device computes in: bfloat16 where it has instructions for it, else float32."""

from . import upstream


def computes_bf16(kind: str) -> bool:
    """Tell whether a device has bfloat16 instructions: a CUDA device of compute capability 8, a CPU by oneDNN.

    Without them torch multiplies element by element: 0.8 against 22 GFLOP/s of float32 on an AMD EPYC with AVX2 alone.

    Args:
        kind: cuda or cpu, as torch.device has it; another kind is asked of torch.amp.
    """
    if kind == "cpu":
        return upstream.cpu_has_bf16()
    import torch

    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.amp.is_autocast_available(kind)


def choose(asked: bool | None, kind: str) -> tuple[bool, str | None]:
    """Say whether to compute in bfloat16, and the sentence a user should read where the device has none."""
    native = computes_bf16(kind)
    if native or asked is False:
        return native if asked is None else asked, None
    if asked:
        return True, (
            f"bf16 = true: this {kind.upper()} has no bfloat16 instructions, each product takes many times as long as "
            "in float32: leave bf16 out, or set bf16=false."
        )
    return False, f"bf16: false, this {kind.upper()} has no bfloat16 instructions; computing in float32."
