"""What a run left, read back for its card: no number that is not finite, no path of a machine, no access token."""

import csv
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from smolpretrain.core import files, secrets

HOMES = re.compile(r"(?<![\w.-])(?:/(?:home|Users)/|[A-Za-z]:\\Users\\)[^\s/\\'\"`,;]+")
PART = r"[^\s/\\'\"`<>|,;]+"
PATHS = re.compile(rf"(?:file://|(?<![\w./-]))~?/(?:{PART}/)+({PART})?|(?<!\w)(?:[A-Za-z]:|~)\\(?:{PART}\\)*({PART})?")


def clean_text(text):
    """Text without what must not leave the machine: tokens go, an absolute path becomes its last part."""
    text = text.encode("utf-8", "replace").decode()
    text = HOMES.sub("~", secrets.remove(text))
    return PATHS.sub(lambda found: found[1] or found[2] or re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def clean(value, whole=False):
    """A JSON value with its texts cleaned and None for numbers that JSON has no name for.

    Args:
        whole: A text that is an absolute path from end to end, blanks included, is one path.
    """
    if isinstance(value, dict):
        return {clean_text(str(key)): clean(entry, whole) for key, entry in value.items()}
    if isinstance(value, list):
        return [clean(entry, whole) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        one_path = whole and re.fullmatch(r"(?:~|[A-Za-z]:)?[/\\][^\n]*", value)
        return clean_text(re.split(r"[/\\]", value.rstrip("/\\"))[-1] if one_path else value)
    return value


def read_json(path, otherwise=None):
    """A JSON file, cleaned; `otherwise` where there is none. ValueError where it is damaged."""
    return clean(files.read_json(path), whole=True) if path.is_file() else otherwise


def read_rows(path):
    """Rows of a JSON lines file, as they are."""
    return files.read_rows(path).rows


@dataclass
class Run:
    """A run directory as its card needs it; what is not there is empty.

    Attributes:
        name: What the model is called: the repository's name, else the directory's.
        record: run.json.
        trained, held_out, bad: Rows of metrics.jsonl: logged steps, evaluations, steps that were found bad.
        samples: Rows of samples.jsonl, and
        edited: whether a path or a token was taken out of one.
        resumed: Steps at which it went on after an interruption, from training_log.md.
        config: The model's config.json, or that of the newest checkpoint.
        manifest: The prepared set's, if it is the one that was trained on.
        compared: Rows of report/comparison.csv; comparison: comparison.json; written: its samples.
        scores: Rows of report/benchmark.json.
        pictures: (path from the run directory, what it shows) of those that report/report.md shows.
    """

    directory: Path
    name: str
    record: dict
    trained: list = field(default_factory=list)
    held_out: list = field(default_factory=list)
    bad: list = field(default_factory=list)
    samples: list = field(default_factory=list)
    edited: bool = False
    resumed: list = field(default_factory=list)
    config: dict = field(default_factory=dict)
    manifest: dict = field(default_factory=dict)
    compared: list = field(default_factory=list)
    comparison: dict = field(default_factory=dict)
    written: list = field(default_factory=list)
    scores: list = field(default_factory=list)
    pictures: list = field(default_factory=list)

    @property
    def arguments(self):
        return (self.record.get("arguments") or {}) | (self.record.get("decided") or {})

    @property
    def plan(self):
        return self.record.get("plan") or {}

    @property
    def result(self):
        """What stands in run.json of the end; empty where the run did not end, or went on after it."""
        result = self.record.get("result") or {}
        last = max((row.get("tokens_seen") or 0 for row in self.trained), default=0)
        return result if (result.get("tokens_seen") or 0) >= last else {}

    @property
    def tokens_seen(self):
        """At the end, or at the last logged step of a run that did not end."""
        logged = self.trained[-1].get("tokens_seen") if self.trained else None
        return self.result.get("tokens_seen", logged)

    @property
    def steps(self):
        """Optimizer steps: of a run that ended tokens over the tokens of one, else the last that was logged."""
        logged = self.trained[-1]["step"] if self.trained else 0
        a_step = (self.plan.get("data") or {}).get("tokens_a_step")
        whole = self.result and a_step and self.tokens_seen % a_step == 0
        return max(logged, self.tokens_seen // a_step) if whole else logged

    @property
    def ranks(self):
        """Processes that trained, as the last logged step counted them; None where none was logged."""
        return len(self.trained[-1].get("peak_memory_gib_by_rank") or []) or None if self.trained else None

    @property
    def names(self):
        """What a comparison or a benchmark calls the exported model: its directory, then and now."""
        return {str(self.arguments.get("output_dir")).rstrip("/").split("/")[-1], self.directory.resolve().name}

    @property
    def from_stream(self):
        bounds = self.arguments.get("max_documents"), self.arguments.get("max_tokens")
        return bool(self.arguments.get("streaming")) and bounds == (None, None)


def read_run(run_dir, repo_id=None):
    """Read a run directory.

    Raises:
        ValueError: It holds no run.json, or a file of the record is damaged.
    """
    directory = Path(run_dir)
    record = read_json(directory / "run.json")
    if not isinstance(record, dict) or not record.get("arguments"):
        raise ValueError(f"{run_dir}: no run.json of a run; give the output_dir of run_pretrain.py.")
    metrics, raw = clean(read_rows(directory / "metrics.jsonl")), read_rows(directory / "samples.jsonl")
    samples, report = clean(raw), directory / "report"
    return Run(
        directory=directory,
        name=(repo_id or directory.resolve().name).split("/")[-1],
        record=record,
        trained=[row for row in metrics if "loss" in row],
        held_out=[row for row in metrics if "eval_loss" in row],
        bad=[row for row in metrics if "bad_step" in row],
        samples=samples,
        edited=samples != raw,
        resumed=_resumed(directory / "training_log.md"),
        config=_config(directory),
        manifest=_manifest(directory, record),
        compared=_table(report / "comparison.csv"),
        comparison=read_json(report / "comparison.json", {}),
        written=clean(read_rows(report / "comparison_samples.jsonl")),
        scores=read_json(report / "benchmark.json", []),
        pictures=_pictures(report),
    )


def _resumed(log):
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return [int(step) for step in re.findall(r"^Resumed at step (\d+)\.$", text, flags=re.MULTILINE)]


def _config(directory):
    steps = {int(path.name.split("-")[1]): path for path in directory.glob("checkpoint-*") if path.name[11:].isdigit()}
    places = [directory, *(steps[step] for step in sorted(steps, reverse=True))]
    return next((found for place in places if (found := read_json(place / "config.json"))), {})


def _manifest(directory, record):
    """The manifest of the prepared set, from where the run says it is; empty where that is another set now."""
    asked = files.read_json(directory / "run.json").get("arguments", {}).get("prepared_dir")
    if isinstance(asked, list):  # several sets, each with a manifest of its own
        return {}
    found = read_json((Path(asked) if asked else directory / "prepared") / "manifest.json", {})
    return found if found.get("fingerprint") == (record.get("data") or {}).get("fingerprint") else {}


def _table(path):
    """Rows of a CSV; value, low and high are floats, or None where there is no finite number."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in ("value", "low", "high"):
            row[key] = float(row[key]) if row.get(key) else None
        row["settings"] = json.loads(row.get("settings") or "{}")
    return clean(rows)


def _pictures(report):
    page = report / "report.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    shown = re.findall(r"^!\[([^\]\n]*)\]\(([\w.-]+\.png)\)$", text, flags=re.MULTILINE)
    return [(f"report/{name}", clean_text(alt)) for alt, name in shown if (report / name).is_file()]
