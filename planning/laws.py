"""Published scaling laws: how large a model for how much compute, at which batch and learning rate."""

from typing import NamedTuple


class Fit(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta, loss in nats a token of N parameters after D tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    source: str


HOFFMANN = Fit(1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022 (arXiv 2203.15556), equation 10, approach 3")
REFIT = Fit(1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al. 2024 (arXiv 2404.10102), re-fit of approach 3")
TOKENS_PER_PARAMETER = (
    20  # Hoffmann et al. 2022, table 3: 8.0B tokens for 400M parameters, 20.2B for 1B, 205.1B for 10B
)
FITTED_FROM = 1e17  # FLOPs: the least of the runs behind the laws of batch and learning rate below
EPOCHS = 4  # Muennighoff et al. 2023 (arXiv 2305.16264): up to 4 passes are nearly as good as new text


def optimal(flops, fit=REFIT):
    """(parameters, tokens) of least loss with 6 N D = flops.

    >>> [round(x / 1e9) for x in optimal(5.76e23)]  # Chinchilla's budget: 70B parameters, 1.4T tokens
    [70, 1376]
    """
    ratio = (fit.alpha * fit.A / (fit.beta * fit.B)) ** (1 / (fit.alpha + fit.beta))
    parameters = ratio * (flops / 6) ** (fit.beta / (fit.alpha + fit.beta))
    return parameters, flops / 6 / parameters


def flops_for_tokens(tokens, fit=REFIT):
    """The budget whose optimal number of tokens this is."""
    ratio = (fit.alpha * fit.A / (fit.beta * fit.B)) ** (1 / (fit.alpha + fit.beta))
    return 6 * (tokens * ratio) ** ((fit.alpha + fit.beta) / fit.alpha)


def loss(parameters, tokens, fit=REFIT):
    """Loss in nats a token on Hoffmann et al.'s text and tokenizer: other text has other losses."""
    return fit.E + fit.A / parameters**fit.alpha + fit.B / tokens**fit.beta


class Advice(NamedTuple):
    """A learning rate, a batch in tokens, and who says so."""

    learning_rate: float
    batch_tokens: float
    source: str


def deepseek(flops):
    """DeepSeek LLM's law, AdamW with warm-up, fitted from 1e17 to 2e19 FLOPs and used at 3e23."""
    source = "DeepSeek LLM (arXiv 2401.02954), equation 1: lr 0.3118 C^-0.1250, batch 0.2920 C^0.3271 tokens"
    return Advice(0.3118 * flops**-0.1250, 0.2920 * flops**0.3271, source)


def olmo_ladder(parameters):
    """The law of OLMo's ladder, for rows of 2,048 tokens and runs near Chinchilla's optimum."""
    source = (
        "OLMo's ladder (Bhagia et al. 2024, arXiv 2412.04403, after Porian et al. 2024): lr 0.0047 (N/108M)^(-1/3), "
        "batch 160 (N/108M)^(2/3) rows of 2,048"
    )
    size = parameters / 108e6
    return Advice(0.0047 * size ** (-1 / 3), 2048 * 160 * size ** (2 / 3), source)
