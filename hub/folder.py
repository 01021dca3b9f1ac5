"""The folder that is published: what from_pretrained reads, its card and its record, built anew and then checked."""

import json
import math
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import RepoCard, get_token
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from smolpretrain.core import secrets
from smolpretrain.core.files import write_json

from . import run_record

WEIGHTS = r"model(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
TOKENIZER = (
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
)
MODEL = re.compile(rf"{WEIGHTS}|(?:generation_)?config\.json|{TOKENIZER}")  # what a checkpoint's model is, and no more
ALLOWED = re.compile(rf"{MODEL.pattern}|README\.md|run\.json|report/[\w.-]+\.png")
PROBE = "In 1969, 3 people flew 384,400 km:\n\n\tdef f(x):  return x**2  # na\u00efve \u4e2d\u6587"


def model_files(directory) -> list[Path]:
    """A model's own files in a run or a checkpoint: never an optimizer's, nor a pickle."""
    return sorted(path for path in Path(directory).iterdir() if MODEL.fullmatch(path.name) and path.is_file())


def of_tokenizer(path: Path) -> bool:
    return re.fullmatch(TOKENIZER, path.name) is not None


def has_weights(directory) -> bool:
    return any(Path(directory).glob("model*.safetensors"))


def write_model(source, target, dtype: torch.dtype | None, seed: int | None = None) -> None:
    """Write a model as from_pretrained wants it: one copy of tied weights, use_cache on, no chat template.

    Args:
        source: A directory with config.json, tokenizer and, unless there is a seed, weights.
        dtype: What the weights are written as; None: as they are.
        seed: Of random weights, as they stood before the first step.

    Raises:
        ValueError: A weight is missing.
    """
    target = Path(target)
    target.mkdir(parents=True)
    if seed is None:
        network, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(f"{source} lacks weights, such as {min(info['missing_keys'])}.")
    else:
        set_seed(seed)
        config = own_padding(AutoConfig.from_pretrained(source))
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype or torch.float32)
    own_padding(network.config).use_cache = network.generation_config.use_cache = True
    network.save_pretrained(target)
    for path in model_files(source):
        if of_tokenizer(path):  # as they stand: AutoTokenizer rebuilds some and loses steps
            shutil.copyfile(path, target / path.name)
    settings = target / "tokenizer_config.json"
    if settings.is_file():
        kept = json.loads(settings.read_text(encoding="utf-8"))
        if kept.pop("chat_template", None):
            write_json(settings, kept)


def own_padding(config):
    """The same config; EOS is never its padding row, which would be 0 in random weights: Trainer makes it so."""
    if config.pad_token_id in (config.eos_token_id, config.bos_token_id):
        config.pad_token_id = None
    return config


def write_card(target, card: str, run_dir=None) -> None:
    """Put the card, the pictures that it shows and the run's record, without paths, beside the model."""
    target = Path(target)
    (target / "README.md").write_text(card, encoding="utf-8")
    if run_dir is not None:
        write_json(target / "run.json", run_record.read_json(Path(run_dir, "run.json")))
        for name in sorted(set(re.findall(r"report/[\w.-]+\.png", card))):
            (target / "report").mkdir(exist_ok=True)
            shutil.copyfile(Path(run_dir, name), target / name)
    for path in files(target):
        (target / path).chmod(0o644)  # save_pretrained writes 0600


def files(folder) -> dict[str, int]:
    """Every file of a folder and its bytes, links among them."""
    found = (path for path in sorted(Path(folder).rglob("*")) if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.lstat().st_size for path in found}


def check(folder, license: str, run_dir) -> list[str]:
    """Hold a folder, made from run_dir, against what may be published; returns what was seen, in sentences.

    Raises:
        ValueError: The first thing that may not, and its file.
    """
    folder = Path(folder)
    check_names(folder)
    check_texts(folder, Path(run_dir))
    check_settings(folder, license)
    tied = check_weights(folder)
    check_loads(folder)
    return [
        "it loads: AutoModelForCausalLM, every weight in place, and AutoTokenizer, which gives tokenizer.json's ids;",
        f"safetensors alone, mode 0644{', tied weights once' if tied else ''}; no pickle, no chat template;",
        f"no access token, no path of this machine; license {license} in the card.",
    ]


def check_names(folder: Path) -> None:
    """Only names that are known, plain files that everybody may read: whatever else there is stays here."""
    for name in files(folder):
        path = folder / name
        if not ALLOWED.fullmatch(name) or path.is_symlink():
            raise ValueError(f"{path} is no file of a model, its card or its record: it is not published.")
        if path.stat().st_mode & 0o777 != 0o644:
            raise ValueError(f"{path} has mode {path.stat().st_mode & 0o777:o}, not 644.")


def check_texts(folder: Path, run_dir: Path) -> None:
    """No access token and no path of this machine: in a text, in a safetensors header."""
    here = {str(place) for place in (Path.home(), Path.cwd(), run_dir.resolve()) if len(place.parts) > 2}
    token = get_token()
    for name in files(folder):
        path = folder / name
        if path.suffix == ".png":
            text = path.read_bytes().decode("latin-1")
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                text = json.dumps(tensors.metadata())
        else:
            text = path.read_text(encoding="utf-8")
        vocabulary = of_tokenizer(path) and name != "tokenizer_config.json"  # it may hold any text
        held = (value in text for value in (token, *secrets.in_environment().values()) if value)
        if any(held) or (not vocabulary and secrets.SHAPES.search(text)):
            raise ValueError(f"{path} holds an access token or a secret of the environment: it is not published.")
        if not vocabulary and (found := next((place for place in here if place in text), None)):
            raise ValueError(f"{path} names a path of this machine, {found}: it is not published.")
        if name.endswith(".json") and not vocabulary and (found := next(absolute_paths(json.loads(text)), None)):
            raise ValueError(f"{path} names a path of this machine, {found}: it is not published.")


def absolute_paths(value):
    """Yield the strings of a JSON value that are absolute paths."""
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from absolute_paths(entry)
    elif isinstance(value, str) and re.fullmatch(r"(?:/|[A-Za-z]:\\)[^\n]*[/\\][^\n]*", value):
        yield value


def check_settings(folder: Path, license: str) -> None:
    """use_cache on, the licence that was given in the card."""
    for name in ("config.json", "generation_config.json"):
        if json.loads((folder / name).read_text(encoding="utf-8")).get("use_cache") is not True:
            raise ValueError(f"{folder / name}: use_cache is not true: whoever generates would wait for it.")
    if (said := RepoCard.load(folder / "README.md").data.get("license")) != license:
        raise ValueError(f"{folder / 'README.md'} says license {said}, asked for is {license}.")


def check_weights(folder: Path) -> bool:
    """Every weight once and finite; returns whether some are tied."""
    config, names = json.loads((folder / "config.json").read_text(encoding="utf-8")), set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                names.add(name)
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    raise ValueError(f"{path}: {name} has values that are not finite: this model is broken.")
    tied = bool(config.get("tie_word_embeddings"))
    if tied and "lm_head.weight" in names:
        raise ValueError(f"{folder}: lm_head.weight is saved beside the embeddings that it is tied to.")
    return tied


def check_loads(folder: Path) -> None:
    """As a reader loads it, with nothing but its name: every weight, and ids as in training."""
    network, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ValueError(f"{folder}: from_pretrained does not find its weights as they are: {wrong[0]}.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template:
        raise ValueError(f"{folder}: its tokenizer has a chat template: a base model does not chat.")
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if ids != Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROBE, add_special_tokens=False).ids:
        raise ValueError(
            f"{folder}: AutoTokenizer gives other ids than its tokenizer.json, with which the model was trained: "
            "mend tokenizer_class in tokenizer_config.json."
        )
    with torch.no_grad():
        logits = network(torch.tensor([ids[: getattr(network.config, "max_position_embeddings", None)]])).logits
    if not math.isfinite(logits.float().sum().item()):
        raise ValueError(f"{folder}: the loaded model's logits are not finite.")
