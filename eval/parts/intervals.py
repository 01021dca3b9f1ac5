"""How sure a figure is: a bootstrap over documents."""

import numpy as np

from .. import perplexity

LEAST_DOCUMENTS = 10  # a bootstrap over fewer says nothing
METHOD = "95 % bootstrap-t over documents, 999 resamples, seed 0"


def bootstrap(numerators, denominators, resamples=999, seed=0):
    """Interval (low, high) that covers sum(numerators) / sum(denominators) of the population 95 % of the time.

    Bootstrap-t over documents: each resample is studentized by its ratio's own standard error, and the result scaled by
    the jackknife's, which keeps the coverage where few documents of very unequal length make percentiles too narrow
    (29 documents, lengths spread by a factor e: 93 %, percentiles 90 %). (None, None) below LEAST_DOCUMENTS.
    Source: Efron and Tibshirani 1993, sections 11.3 and 12.5; Cochran 1977, section 6.4 for the standard error.
    """
    a, b = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    a, b = a[b > 0], b[b > 0]
    count, rng, sums = len(b), np.random.default_rng(seed), []
    if count < LEAST_DOCUMENTS:
        return None, None
    moments = np.stack([a, b, a * a, a * b, b * b], 1)
    for part in range(0, resamples, chunk := max(1, 2**22 // count)):
        times = rng.multinomial(count, np.full(count, 1 / count), min(chunk, resamples - part))
        sums.append(times @ moments)
    a_sum, b_sum, aa, ab, bb = np.concatenate(sums).T
    drawn, ratio = a_sum / b_sum, a.sum() / b.sum()
    its_error = np.sqrt(np.maximum(aa - 2 * drawn * ab + drawn**2 * bb, 0)) / b_sum
    moves = its_error > 1e-6 * np.abs(drawn)  # not where all documents have one ratio, up to rounding
    t = np.divide(drawn - ratio, its_error, out=np.zeros(resamples), where=moves)
    below, above = np.quantile(t, (0.025, 0.975), method="weibull")
    without = (a.sum() - a) / (b.sum() - b)
    error = np.sqrt((count - 1) * without.var())
    return float(ratio - above * error), float(ratio - below * error)


def measure(each, settings):
    """Turn what score_documents(..., each=True) gives into summarize's dict, _low and _high beside each figure."""
    result, intervals = perplexity.summarize(perplexity.add_up(each, settings)), {}
    if "mean_perplexity" in result:
        texts = np.exp(each[:, 0] / each[:, 1])
        return result | _interval("mean_perplexity", *bootstrap(texts, np.ones(len(texts))))
    for column, unit in enumerate(perplexity.UNITS, 1):
        with np.errstate(over="ignore"):
            ends = [end if end is None else float(np.exp(end)) for end in bootstrap(each[:, 0], each[:, column])]
        intervals |= _interval(f"{unit}_perplexity", *ends)
    intervals |= _interval("bits_per_byte", *bootstrap(each[:, 0], each[:, 2] * np.log(2)))
    return result | intervals


def _interval(name, low, high):
    return {f"{name}_low": low, f"{name}_high": high}
