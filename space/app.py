"""A page on which a base language model continues text, beside a second one if you like.

    python space/app.py --model RUN_DIR [--compare RUN_DIR/checkpoint-250] [--port 7860]

A model is a directory, a Hub id or id@revision. On a Hugging Face Space MODEL_ID and COMPARE_ID name them. Works on a
CPU, on CUDA and on ZeroGPU; without network where the models are directories.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # a page of yours reports to nobody
try:
    import spaces  # ZeroGPU's own, there on Spaces only; must come before torch looks for a device
except ImportError:
    spaces = None

import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

try:
    from .page import broken, build, serve
except ImportError:  # a Space, or run as a file: page.py lies beside it
    from page import broken, build, serve

MOST_CHARACTERS = 8000  # of a prompt
WALL_SECONDS = 60  # of one continuation; ZeroGPU's own default
KNOBS = {  # {name: (lowest, highest, step, default)}: what is asked beyond them is refused, whoever asks
    "max_new_tokens": (1, 512, 1, 64),
    "temperature": (0, 2, 0.05, 0),
    "top_p": (0.05, 1, 0.05, 1),
    "top_k": (0, 200, 1, 0),
    "repetition_penalty": (1, 2, 0.05, 1),
    "seed": (0, 2**31 - 1, 1, 0),
}
MODELS = []  # placed on their device before the page is served, as ZeroGPU wants it


@dataclass
class Model:
    """A model ready to write; `context` is its most tokens, prompt and continuation; `about` is {label: text}."""

    name: str
    network: torch.nn.Module
    tokenizer: object
    context: int
    about: dict[str, str]

    @classmethod
    def load(cls, name: str) -> "Model":
        """Load a directory, a Hub id or id@revision. ValueError, one line without any token, where it cannot be."""
        path, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
        cuda = torch.cuda.is_available()
        try:
            if not Path(path).is_dir() and path.count("/") != 1:
                raise ValueError("no such directory, and no Hub id (user/name)")
            where = {"revision": revision or "main"}
            tokenizer = AutoTokenizer.from_pretrained(path, **where)
            network, found = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto" if cuda else torch.float32, use_safetensors=True, output_loading_info=True, **where
            )  # a CPU without bf16 instructions would write many times slower in it
            if found["missing_keys"]:
                raise ValueError(f"its weights lack {len(found['missing_keys'])} tensors")
            if len(tokenizer) > network.get_input_embeddings().num_embeddings:
                raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, more than the model knows")
            network = network.to("cuda" if cuda else "cpu").eval()
            context = getattr(network.config, "max_position_embeddings", None) or 2048
            parts = Path(path).resolve().parts[-1 - Path(path).name.startswith("checkpoint-") :]
            shown = "/".join(parts) if Path(path).is_dir() else name
            return cls(shown, network, tokenizer, context, about(network, context, path, where["revision"]))
        except Exception as error:  # whatever a damaged file makes the libraries raise
            raise ValueError(f"{name} cannot be loaded: {one_line(error)}") from error

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt; ValueError where nothing could follow it. The text of a special token is text."""
        ids = self.tokenizer(prompt, split_special_tokens=True)["input_ids"]
        if not 0 < len(ids) < self.context:
            raise ValueError(f"The text is {len(ids):,} tokens long; {self.name} takes 1 to {self.context - 1:,}.")
        return ids

    def write(self, prompt: str, knobs: dict):
        """Continue a text; yields, a token at a time, what there is so far.

        `generate` is called for each token with the cache of the call before. So nothing runs between two tokens: who
        closes the generator has the CPU back, and models take turns, each with random numbers and a clock of its own.
        It costs 1 ms a token (2 cores, no GPU); the text is that of one call after `torch.manual_seed(seed)`.

        Yields:
            A dict: model, continuation, new_tokens, seconds_to_first_token, tokens_per_second (after the first; None
            until there are two) and stop_reason: None, length, eos, context (it is full) or time.
        """
        begun = time.perf_counter()
        ids = torch.tensor([self.encode(prompt)], device=self.network.device)
        prompt_length, prompt_text = ids.shape[1], self.decode(ids)
        config = self.decoding(knobs)
        numbers = torch.cuda if ids.is_cuda else torch
        torch.manual_seed(int(knobs["seed"]))
        cache, reason, seconds, state = None, None, [], numbers.get_rng_state()
        while reason is None:
            turn = time.perf_counter()
            numbers.set_rng_state(state)
            mask = torch.ones_like(ids)
            out = self.network.generate(ids, attention_mask=mask, past_key_values=cache, generation_config=config)
            ids, cache, state = out.sequences, out.past_key_values, numbers.get_rng_state()
            text = self.decode(ids)[len(prompt_text) :]
            count, now = ids.shape[1] - prompt_length, time.perf_counter()
            seconds.append(now - turn)
            if ids[0, -1] in (config.eos_token_id or []):
                reason = "eos"
            elif count >= knobs["max_new_tokens"]:
                reason = "length"
            elif ids.shape[1] >= self.context:
                reason = "context"
            elif now - begun > WALL_SECONDS:
                reason = "time"
            yield {
                "model": self.name,
                "continuation": text if reason else text.rstrip("\ufffd"),  # the rest of a character may follow
                "new_tokens": count,
                "seconds_to_first_token": round(seconds[0], 3),
                "tokens_per_second": round((count - 1) / sum(seconds[1:]), 1) if count > 1 else None,
                "stop_reason": reason,
            }

    def decode(self, ids: torch.Tensor) -> str:
        return self.tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decoding(self, knobs: dict) -> GenerationConfig:
        """How the next token is chosen. Below a temperature of 0.01 it is the likeliest."""
        ends = self.network.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        ends = ends if isinstance(ends, list | None) else [ends]
        sampling = {name: float(knobs[name]) for name in ("temperature", "top_p")} | {"top_k": int(knobs["top_k"])}
        return GenerationConfig(
            max_new_tokens=1,
            repetition_penalty=float(knobs["repetition_penalty"]),
            eos_token_id=ends,
            pad_token_id=ends[0] if ends else 0,
            use_cache=True,
            return_dict_in_generate=True,
            **({"do_sample": True} | sampling if knobs["temperature"] >= 0.01 else {"do_sample": False}),
        )


def one_line(error) -> str:
    """What an error says in one line of at most 300 characters, with no access token in it."""
    text = " ".join(str(error).split()) or type(error).__name__
    for secret in filter(None, map(os.environ.get, ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))):
        text = text.replace(secret, "hf_...")
    return re.sub(r"hf_\w{8,}", "hf_...", text)[:300]


def about(network, context: int, path: str, revision: str) -> dict[str, str]:
    """What is known of a model: its config, its run's record (run.json) and its card, here or on the Hub."""

    local = Path(path).is_dir()

    def read(file, places=(path, *([Path(path).parent] if local else []))):  # a checkpoint's record is its run's
        for place in places:
            if found := cached_file(place, file, revision=revision, _raise_exceptions_for_missing_entries=False):
                return Path(found).read_text(encoding="utf-8")
        return ""

    config = network.config
    rows = {
        "Parameters": f"{network.num_parameters():,}",
        "Architecture": f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}, context "
        f"{context:,}, vocabulary {config.vocab_size:,}",
        "Runs here as": f"{str(network.dtype).removeprefix('torch.')} on {network.device.type}",
    }
    run, checkpoint = json.loads(read("run.json") or "{}"), json.loads(read("manifest.json", [path]) or "{}")
    result, source = run.get("result", {}), run.get("data", {}).get("source")
    if source:
        rows["Trained on"] = ", ".join(str(value) for value in source.values() if isinstance(value, str)) or "own files"
    if "step" in checkpoint:
        rows["Checkpoint"] = f"step {checkpoint['step']:,}, {checkpoint['tokens_seen']:,} tokens seen"
    elif result:
        rows["Tokens seen"] = f"{result['tokens_seen']:,}"
        if math.isfinite(bits := result.get("bits_per_byte", math.nan)):
            rows["Held-out bits per byte"] = (
                f"{bits:.3f} (random weights {result['random_bits_per_byte']:.3f}, unigram model "
                f"{result['unigram_bits_per_byte']:.3f})"
            )
    card = ModelCard(read("README.md") or "---\nlicense: not stated\n---\n", ignore_metadata_errors=True).data
    rows["License"] = str(card.get("license") or "not stated")
    if not run:
        rows |= {"Trained on": ", ".join(card.get("datasets") or [])} if card.get("datasets") else {}
        for row in (card.eval_results or [])[:5]:
            rows[f"{row.dataset_name}: {row.metric_name or row.metric_type}"] = f"{row.metric_value}"
    return rows


def check(prompt, knobs: dict) -> None:
    """Refuse what is no text, too long, or no number within KNOBS. ValueError: one sentence."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("There is nothing to continue: write the beginning of a text.")
    if len(prompt) > MOST_CHARACTERS:
        raise ValueError(f"The text has {len(prompt):,} characters; at most {MOST_CHARACTERS:,} are continued.")
    if re.search("[\ud800-\udfff]", prompt):
        raise ValueError("The text holds half a character (a lone surrogate), which no tokenizer can read.")
    for name, (low, high, step, _) in KNOBS.items():
        value, kind = knobs[name], "a whole number" if step == 1 else "a number"
        good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not good or (step == 1 and value != int(value)):
            raise ValueError(f"{name} must be {kind} from {low} to {high}, got {value!r:.40}.")
    for model in MODELS:
        model.encode(prompt)


@spaces.GPU(duration=WALL_SECONDS + 10) if spaces else lambda function: function
def take_turns(prompt: str, knobs: dict):
    """Let each model write a token in turn; yields the list of what each has so far, ten times a second at most."""
    shown, latest = 0.0, [None] * len(MODELS)
    for turn in itertools.zip_longest(*(model.write(prompt, knobs) for model in MODELS)):
        latest = [new or old for new, old in zip(turn, latest, strict=True)]
        over = all(writing["stop_reason"] for writing in latest)
        if over or time.perf_counter() - shown > 0.1:
            yield latest
            shown = time.perf_counter()


def continued(prompt, **knobs):
    """Check, then write. ValueError, one sentence, for whatever goes wrong."""
    check(prompt, knobs)
    try:
        yield from take_turns(prompt, knobs)
    except Exception as error:  # out of memory, or no GPU to be had
        traceback.print_exc()
        raise ValueError(f"The models stopped: {one_line(error)}.") from error


def main(argv=None):
    parser = argparse.ArgumentParser("app.py", argparse.SUPPRESS, __doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default=os.environ.get("MODEL_ID"), help="directory, Hub id or id@revision")
    parser.add_argument("--compare", default=os.environ.get("COMPARE_ID"), help="a second one, to stand beside it")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    args = parser.parse_args(argv)
    if not args.model:
        parser.error("--model is missing: a directory, a Hub id or id@revision (on a Space: the variable MODEL_ID).")
    try:
        MODELS.extend([Model.load(name) for name in (args.model, args.compare) if name])
        address = os.environ.get("SPACE_ID") or f"http://127.0.0.1:{args.port or 7860}"
        demo = build([(model.name, model.about) for model in MODELS], KNOBS, continued, address)
    except ValueError as error:
        if "SPACE_ID" not in os.environ:
            parser.error(str(error))
        print(error, file=sys.stderr)
        demo = broken(str(error))
    serve(demo, args.port)


if __name__ == "__main__":
    main()
