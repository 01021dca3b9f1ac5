"""What a model writes, how it repeats itself, and how fast it writes."""

import statistics
import time
from collections import Counter
from math import exp, log
from pathlib import Path

import torch
from transformers import GenerationConfig, set_seed

PROMPTS = Path(__file__).with_name("prompts.txt")


def read_prompts(path=None):
    """Prompts of a text file, one a line; ours by default. ValueError where there is none."""
    try:
        prompts = Path(path or PROMPTS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {path}: {error}") from error
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"prompts {path}: it holds no prompt; one line is one prompt.")
    return prompts


def continue_prompts(
    model, tokenizer, prompts, decoding, max_new_tokens, seed=0, samples=1, temperature=1.0, top_p=1.0
):
    """Continue each prompt, by itself, so that nothing is padded.

    Args:
        decoding: greedy, or sampled: `samples` of each prompt, all prompts from one seed.

    Returns:
        A dict a continuation: prompt, decoding, sample, text (what follows the prompt), ids, ended (by EOS).
    """
    sampled = decoding == "sampled"
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": 0, "num_return_sequences": samples}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **(drawing if sampled else {}),
    )
    set_seed(seed)
    rows = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        with torch.inference_mode():
            outputs = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
        for number, ids in enumerate(outputs):
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else None
            text = tokenizer.decode(ids[:end], skip_special_tokens=True)
            row = {"prompt": prompt, "decoding": decoding, "sample": number, "text": text, "ids": ids[:end]}
            rows.append(row | {"ended": end is not None})
    return rows


def ngrams(items, order):
    return [tuple(items[start : start + order]) for start in range(len(items) - order + 1)]


def repetition(ids, order=4):
    """seq-rep-n of one continuation: the share of its n-grams that it had written before; 0 where it has none.

    Source: Welleck et al. 2019 (arXiv 1908.04319), section 6.1.
    """
    found = ngrams(ids, order)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct(texts, order):
    """distinct-n: different word n-grams over all of all texts. Source: Li et al. 2016 (arXiv 1510.03055)."""
    found = [gram for text in texts for gram in ngrams(text.split(), order)]
    return len(set(found)) / len(found) if found else 0.0


def bleu(candidate, references, order=4):
    """BLEU of a list of words against several, from 0 to 1; a precision of 0 counts as half a match.

    Source: Papineni et al. 2002, section 2; the smoothing is that of mteval-v13a as sacrebleu's `floor` at 0.5.
    """
    if not candidate:
        return 0.0
    logs = 0.0
    for n in range(1, order + 1):
        grams = Counter(ngrams(candidate, n))
        most = Counter()
        for reference in references:
            most |= Counter(ngrams(reference, n))
        total = sum(grams.values())
        if not total:
            return 0.0
        logs += log((sum((grams & most).values()) or 0.5) / total) / order
    closest = min((len(r) for r in references), key=lambda size: (abs(size - len(candidate)), size))
    return min(1.0, exp(1 - closest / len(candidate))) * exp(logs)


def self_bleu(texts):
    """Mean BLEU of each text against the others: 1 where all are alike. Source: Zhu et al. 2018 (arXiv 1802.01886)."""
    words = [text.split() for text in texts]
    return statistics.mean(bleu(one, words[:place] + words[place + 1 :]) for place, one in enumerate(words))


def time_generation(model, tokenizer, prompts, prompt_tokens=256, new_tokens=32, rounds=5):
    """Time the prompt and the tokens after it apart, batch 1, greedy, EOS ignored so that all ids are counted.

    Returns:
        {"prefill_tokens_per_second": [a round, ...], "decode_tokens_per_second": [...]}, after one round of warm-up.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or prompt_tokens + new_tokens
    prompt_tokens = max(1, min(prompt_tokens, positions - new_tokens))
    ids = tokenizer(" ".join(prompts), return_tensors="pt")["input_ids"][0]
    ids = ids.repeat(-(-prompt_tokens // len(ids)))[None, :prompt_tokens].to(model.device)

    def now():
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    rates = {"prefill_tokens_per_second": [], "decode_tokens_per_second": []}
    for _ in range(rounds + 1):
        with torch.inference_mode():
            began = now()
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            last = out.logits[:, -1:].argmax(-1)
            read = now()
            for _ in range(new_tokens):
                out = model(input_ids=last, past_key_values=out.past_key_values, use_cache=True)
                last = out.logits[:, -1:].argmax(-1)
            done = now()
        rates["prefill_tokens_per_second"].append(prompt_tokens / (read - began))
        rates["decode_tokens_per_second"].append(new_tokens / (done - read))
    return {name: values[1:] for name, values in rates.items()}
