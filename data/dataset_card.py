"""The dataset card of a prepared set, made from its manifest and from nothing else."""

from collections.abc import Iterator

from huggingface_hub import DatasetCard, DatasetCardData

from .pack.manifest import Manifest

MOST_FILES = 20  # of a source, named on the card; manifest.json names all
SIZES = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]  # the Hub's, in rows


def make_card(manifest: Manifest, name: str, license: str | None) -> DatasetCard:
    """Describe a set for people, and for `load_dataset`.

    Args:
        name: The repository, user/name.
        license: As the Hub names it; None leaves it out and says so.
    """
    filled = [split for split, entry in manifest.splits.items() if entry["blocks"]]
    data = DatasetCardData(
        license=license,
        pretty_name=name.split("/")[-1],
        task_categories=["text-generation"],
        tags=["pre-training", "tokenized", "packed", "smolpretrain"],
        source_datasets=sorted(set(_hub_names(manifest.source))) or None,
        size_categories=[_size_category(sum(entry["blocks"] for entry in manifest.splits.values()))],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}-*.arrow"} for split in filled],
            }
        ],
    )
    sections = [_summary(manifest, name), _splits(manifest), _source(manifest), _tokens(manifest), _use(manifest, name)]
    sections.append(
        f"## Licence\n\n{license}, as its publisher states."
        if license
        else "## Licence\n\nNot stated by its publisher: see what its source allows."
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _summary(manifest: Manifest, name: str) -> str:
    tokens = sum(entry["tokens"] for entry in manifest.splits.values())
    return (
        f"# {name.split('/')[-1]}\n\nText as token ids for pre-training a causal language model: {tokens:,} tokens in "
        f"rows of {manifest.block_size}, made by smolpretrain and checked "
        f"byte for byte against `manifest.json`. Fingerprint `{manifest.fingerprint}`: equal for equal sets, anywhere."
    )


def _held_out(manifest: Manifest) -> str:
    if "validation" in manifest.options:
        return "Held out is text of its own; training documents that stand there too were left out."
    return f"A document's hash decides whether it is held out (validation_fraction {manifest.validation_fraction})."


def _splits(manifest: Manifest) -> str:
    names = ("documents", "tokens", "bytes", "blocks", "fill", "documents_cut")
    lines = ["## What is in it", "", "| split | documents | tokens | bytes | rows | fill | documents cut |"]
    lines.append("|---|" + "---:|" * len(names))
    for split, entry in manifest.splits.items():
        lines.append(f"| {split} | " + " | ".join(f"{entry[name]:,}" for name in names) + " |")
    lines += [
        "",
        f"{_held_out(manifest)} The held-out texts are in `validation_documents*.jsonl`; "
        "`unigram_counts.npy` counts each id of the training "
        "documents. Bytes are those of the text in UTF-8.",
    ]
    return "\n".join(lines)


def _source(manifest: Manifest) -> str:
    """Say where the text is from, with revision or hashes, and what was done to it."""
    lines = ["## Where the text is from", "", *_listed(manifest.source)]
    if manifest.mixture:
        lines += ["", "Realised mixture:", "", *_listed(manifest.mixture)]
    done = dict(manifest.options) | {f"left out by {kind}": count for kind, count in manifest.filtered.items()}
    done |= {"null or blank rows passed over": manifest.skipped_rows} if manifest.skipped_rows else {}
    done |= {"bad rows passed over": manifest.bad_rows["rows"]} if manifest.bad_rows else {}
    return "\n".join([*lines, *(["", "What was done to it:", "", *_listed(done)] if done else [])])


def _tokens(manifest: Manifest) -> str:
    packing = {
        "concat": "documents end to end, cut into rows (`concat`)",
        "best_fit": "documents up to a row are never cut, rows are padded with EOS (`best_fit`)",
    }
    where = " Its files are in `tokenizer/`." if any(name.startswith("tokenizer/") for name in manifest.files) else ""
    made = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return (
        f"## How it is tokenized and packed\n\n- Tokenizer: ids below {manifest.vocab_size:,}, sha256 of its "
        f"tokenizer.json as `tokenizers` writes it `{manifest.tokenizer_hash}`.{where}\n- Each document ends in EOS, "
        f"id {manifest.eos_token_id}; nothing else is added. The text of a special token inside a document is plain "
        f"text.\n- Packing: {packing.get(manifest.packing, manifest.packing)}, {manifest.block_size} tokens a row.\n"
        f"- Made with {made}."
    )


def _use(manifest: Manifest, name: str) -> str:
    here = f"prepared/{name.split('/')[-1]}"
    words = f"prepared_dir={here} block_size={manifest.block_size} packing={manifest.packing}"
    if "validation" not in manifest.options:
        words += f" validation_fraction={manifest.validation_fraction}"
    if any(path.startswith("tokenizer/") for path in manifest.files):
        words += f" tokenizer_name={here}/tokenizer"
    return f"""## How to use it

```python
from datasets import load_dataset

rows = load_dataset("{name}", split="train")["input_ids"]  # {manifest.block_size} ids a row
```

Training on it with smolpretrain:

```
hf download {name} --repo-type dataset --local-dir {here}
python data/prepare.py --verify {here}
deepspeed run_pretrain.py args.json {words}
```"""


def _listed(values, indent: str = "") -> list[str]:
    """Return values of a manifest as a Markdown list, nested as they are; a file is its name, size and sha256."""
    lines = []
    items = values.items() if isinstance(values, dict) else enumerate(values, start=1)
    for key, value in list(items)[: None if isinstance(values, dict) else MOST_FILES]:
        if isinstance(value, dict) and set(value) == {"name", "bytes", "sha256"}:
            lines.append(f"{indent}- `{value['name']}`, {value['bytes']:,} bytes, sha256 `{value['sha256']}`")
        elif isinstance(value, (dict, list)):
            lines += [f"{indent}- {key}:", *_listed(value, indent + "  ")]
        elif isinstance(value, int) and not isinstance(value, bool):
            lines.append(f"{indent}- {key}: {value:,}")
        elif value is not None:
            lines.append(f"{indent}- {key}: `{value}`")
    if isinstance(values, list) and len(values) > MOST_FILES:
        lines.append(f"{indent}- and {len(values) - MOST_FILES:,} more, in `manifest.json`")
    return lines


def _hub_names(source) -> Iterator[str]:
    """Yield the Hub datasets that a source, or any of a mixture's, names."""
    if isinstance(source, dict) and source.get("dataset_commit"):
        yield source["dataset_name"]
    for value in source.values() if isinstance(source, dict) else source if isinstance(source, list) else ():
        yield from _hub_names(value)


def _size_category(rows: int) -> str:
    for power, size in enumerate(SIZES):
        if rows < 1000 * 10**power:
            return f"{SIZES[power - 1]}<n<{size}" if power else f"n<{size}"
    return f"n>{SIZES[-1]}"
