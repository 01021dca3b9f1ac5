"""Put a Space on the Hub: the live demo of a model, or the static page of a run; private unless --public.

    python space/deploy.py --model user/name[@revision] [--compare user/name[@revision]] [--repo user/space]
        [--hardware auto|cpu-basic|zero-a10g] [--license ID] [--public] [--dry_run]
    python space/deploy.py --model user/name --sdk static --run_dir RUN_DIR ...

Makes the Space or updates it: its variables, then all files in one commit. A dry run writes them into a folder and says
what would be sent. Whoever asks is known by HF_TOKEN or `hf auth login`, and by nothing else.
"""

import argparse
import runpy
import sys
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "in_place.py"))

from huggingface_hub import HfApi, SpaceCard
from huggingface_hub.utils import disable_progress_bars

from smolpretrain.core.options import Parser
from smolpretrain.core.text import reason
from smolpretrain.hub.connection import Repository, check_license, owner, persist
from smolpretrain.space.static import write_page

HERE = Path(__file__).resolve().parent
LIVE, STATIC = ("README.md", "requirements.txt", "app.py", "page.py"), ("README.md", "index.html")
REMEDIES = {
    402: "a live Space on this hardware asks for a paid plan ({said}); choose a plan, or --hardware zero-a10g (a free "
    "personal account may hold two), or --sdk static --run_dir RUN_DIR (free for everybody)",
    404: "the Hub has no such model or revision ({said}); publish it first, or mend the name",
}


def look_up(asked: str, word: str):
    """Return what the Hub says of a model, user/name or user/name@revision; ValueError where it is not there."""
    name, _, revision = word.partition("@")
    return persist(lambda: HfApi().model_info(name, revision=revision or None), f"{asked} {word}", REMEDIES)


def license_of(asked: str | None, model) -> str:
    """The Space's licence: what was asked, else the model's own."""
    stated = asked or (model.card_data and model.card_data.license)
    if not stated:
        raise ValueError(f"--license is missing: {model.id}'s card states none, and none is guessed.")
    return stated


def write_live(output_dir: Path, words: list[str], license: str) -> None:
    """Write the folder of the live demo of these models (Hub ids, with or without revision)."""
    names = list(dict.fromkeys(word.partition("@")[0] for word in words))
    for file in LIVE[1:]:
        (output_dir / file).write_bytes((HERE / file).read_bytes())
    card = SpaceCard.load(HERE / "README.md")
    title = " beside ".join(word.split("/")[-1] for word in words)
    card.data.title, card.data.models, card.data.license = title, names, license
    card.data.short_description = f"{title} goes on from your text"[:60]  # the Hub takes no more
    (output_dir / "README.md").write_text(str(card), encoding="utf-8")


def hardware_of(asked: str, space: str) -> str:
    """The hardware of a new live Space. auto: ZeroGPU for a free personal account, which gets no other; else CPU."""
    if asked != "auto":
        return asked
    me = persist(HfApi().whoami, f"--repo {space}")
    return "zero-a10g" if me["name"] == space.split("/")[0] and not me.get("isPro") else "cpu-basic"


def set_variables(repository: Repository, wanted: dict[str, str]) -> None:
    """Give a Space these variables, and take COMPARE_ID away where nothing is compared. What is right is not sent."""
    api, name = repository.api, repository.name
    there = {key: variable.value for key, variable in repository.call(api.get_space_variables, name).items()}
    for key, value in wanted.items():
        if there.get(key) != value:
            repository.call(api.add_space_variable, name, key, value)
    if "COMPARE_ID" in set(there) - set(wanted):
        repository.call(api.delete_space_variable, name, "COMPARE_ID")


def deploy(args, folder: Path) -> str:
    """Claim the Space, set its variables and commit the folder; returns its address. ValueError: a refusal."""
    repository = Repository(
        args.repo, kind="space", public=args.public, asked=f"--repo {args.repo}", remedies={402: REMEDIES[402]}
    )
    owner(repository.asked, args.repo.split("/")[0])
    live = args.sdk == "gradio"
    hardware = {"space_hardware": hardware_of(args.hardware, args.repo)} if live else {}
    there = repository.claim(space_sdk=args.sdk, **hardware)
    files = {file.rfilename for file in there.siblings or []} - {".gitattributes", "README.md"}
    if files and not files & {LIVE[-1], STATIC[-1]}:
        raise ValueError(f"{repository.asked}: it holds something else ({min(files)}); give another name.")
    if live:
        words = {"MODEL_ID": args.model, "COMPARE_ID": args.compare}
        set_variables(repository, {key: word for key, word in words.items() if word})
    paths = {file: folder / file for file in (LIVE if live else STATIC)}
    repository.commit(paths, f"Demo of {args.model}", stale=lambda path: path in LIVE + STATIC)
    return repository.address


def parse(argv=None):
    description = __doc__.split("\n")[0]
    parser = Parser("deploy.py", argparse.SUPPRESS, description)
    parser.add_argument("--model", required=True, metavar="USER/NAME[@REVISION]", help="the model on the Hub")
    parser.add_argument("--compare", metavar="USER/NAME[@REVISION]", help="a second one to stand beside it")
    parser.add_argument("--repo", metavar="USER/SPACE", help="default: named like the model")
    parser.add_argument("--sdk", choices=["gradio", "static"], default="gradio", help="default: gradio, the live demo")
    parser.add_argument("--run_dir", metavar="RUN_DIR", help="with --sdk static: output_dir of run_pretrain.py")
    parser.add_argument("--hardware", default="auto", help="of a new live Space; default: the free one of the account")
    parser.add_argument("--license", metavar="ID", help="default: the one that the model's card states")
    parser.add_argument("--public", action="store_true", help="default: private")
    parser.add_argument("--dry_run", action="store_true", help="write the folder, send nothing")
    parser.add_argument("--output_dir", metavar="DIR", help="the folder; default: runs/space")
    args = parser.parse_args(argv)
    args.repo = args.repo or args.model.partition("@")[0]
    args.output_dir = Path(args.output_dir or "runs/space")
    if (args.sdk == "static") != bool(args.run_dir):
        parser.error("--sdk static needs --run_dir RUN_DIR, whose report it shows, and a live Space takes none.")
    if args.sdk == "static" and (args.compare or args.hardware != "auto"):
        parser.error("--compare and --hardware are for a live Space: leave them out, or take --sdk gradio.")
    return parser, args


def main(argv=None):
    """The command; what a user can get wrong is one line and exit status 2."""
    parser, args = parse(argv)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        models = [look_up(f"--{name}", getattr(args, name)) for name in ("model", "compare") if getattr(args, name)]
        license = license_of(args.license, models[0])
        check_license(f"--license {license}", license)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if args.sdk == "static":
            write_page(args.run_dir, args.output_dir, models[0].id, license)
        else:
            write_live(args.output_dir, [word for word in (args.model, args.compare) if word], license)
        for file in LIVE if args.sdk == "gradio" else STATIC:
            print(f"{(args.output_dir / file).stat().st_size:>10,}  {args.output_dir / file}")
        if args.dry_run:
            return print(f"dry run: nothing was sent; it would go to the {args.sdk} Space {args.repo}.")
        address = deploy(args, args.output_dir)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(reason(error) + ".")
    for model in models:
        if model.private and args.sdk == "gradio":
            print(f"{model.id} is private: give the Space a secret HF_TOKEN that may read it (Settings).")
    return print(f"done: {address}")


if __name__ == "__main__":
    main()
