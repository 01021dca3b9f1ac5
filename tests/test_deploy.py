"""Claims about space/deploy.py: the Space on the Hub is the dry run's folder, configured, private and refused well.

The Hub is a real server on loopback (loopback_hub.py), the command a process of its own, as a user starts it.
"""

import re

import pytest
import yaml
from conftest import ROOT
from loopback_hub import LoopbackHub

FILES = {"README.md", "requirements.txt", "app.py", "page.py"}
CARD = b"---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as running:
        for name in ("user/first", "user/second", "other/theirs"):
            running.add("model", name, {"README.md": CARD, "config.json": b"{}"})
        running.add("model", "user/bare", {"README.md": b"# no front matter\n"})
        yield running


@pytest.fixture(scope="module")
def deploy(launch, hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")

    def run(*words, expect=0, token="hf_loopback"):
        folder = tmp_path_factory.mktemp("folder")
        command = ("python", "space/deploy.py", *words, "--output_dir", folder)
        done = launch(*command, expect=expect, **hub.environment(home, token))
        return folder, done.stdout, done.stderr

    return run


def front_matter(text):
    return yaml.safe_load(text.decode().split("---\n")[1])


def pins(name):
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))


def test_the_pins_of_the_space_are_those_we_test_with():
    ours, theirs = pins("constraints.txt"), pins("space/requirements.txt")
    assert {"torch", "transformers"} <= set(theirs) <= set(ours) and "gradio" not in theirs
    assert {name: ours[name] for name in theirs} == theirs
    front = front_matter((ROOT / "space" / "README.md").read_bytes())
    assert front["sdk_version"] == ours["gradio"] and front["app_file"] == "app.py"
    assert len(front["short_description"]) <= 60 and front["python_version"] and front["startup_duration_timeout"]


def test_a_dry_run_writes_the_very_folder_and_sends_nothing_then_it_is_sent_as_one_commit(deploy, hub):
    words = ("--model", "user/first", "--compare", "user/second@main", "--repo", "user/demo")
    folder, said, _ = deploy(*words, "--dry_run")
    assert "nothing was sent" in said and ("space", "user/demo") not in hub.repos
    for file in FILES:
        assert re.search(rf"{(folder / file).stat().st_size:,}  \S+/{re.escape(file)}\n", said)
    _, said, _ = deploy(*words)
    space = hub.repos["space", "user/demo"]
    assert "done: " in said and "/spaces/user/demo" in said
    assert len(space.log) == 2, "the Hub's own first commit, and ours"
    assert set(space.files()) == FILES | {".gitattributes"}
    assert {file: space.files()[file] for file in FILES} == {file: (folder / file).read_bytes() for file in FILES}
    assert space.private and space.asked["sdk"] == "gradio"
    assert space.asked["hardware"] == "zero-a10g", "all that a free personal account may have"
    assert space.variables == {"MODEL_ID": "user/first", "COMPARE_ID": "user/second@main"}
    front = front_matter(space.files()["README.md"])
    assert front["models"] == ["user/first", "user/second"] and front["license"] == "apache-2.0"
    assert front["title"] == "first beside second@main" and len(front["short_description"]) <= 60
    deploy("--model", "user/first", "--repo", "user/demo", "--license", "mit")
    assert space.variables == {"MODEL_ID": "user/first"} and len(space.log) == 3, "updated in place"
    assert front_matter(space.files()["README.md"])["license"] == "mit"
    assert hub.count("POST", "/spaces/user/demo/variables") == 2, "each restarts a Space: what is right is not sent"


def test_who_pays_gets_a_cpu_and_402_names_the_three_ways_out(deploy, hub):
    _, _, error = deploy("--model=user/first", "--repo=user/paid", "--hardware=cpu-basic", expect=2)
    assert error.count("\n") == 1
    for way in ("choose a plan", "--hardware zero-a10g", "--sdk static"):
        assert way in error
    assert ("space", "user/paid") not in hub.repos
    hub.pro = True
    deploy("--model=user/first", "--repo=user/paid", "--public")
    hub.pro = False
    space = hub.repos["space", "user/paid"]
    assert space.asked["hardware"] == "cpu-basic" and not space.private
    deploy("--model=user/second", "--repo=user/paid", "--public")
    assert space.variables == {"MODEL_ID": "user/second"}, "what is there may be updated without paying again"


def test_a_static_space_is_free_and_takes_the_place_of_a_live_one(deploy, hub, tmp_path):
    (tmp_path / "run.json").write_text('{"arguments": {}}')
    deploy("--model=user/first", "--repo=user/both")
    words = ("--model=user/first", "--sdk=static", f"--run_dir={tmp_path}")
    deploy(*words, "--repo=user/both")
    assert set(hub.repos["space", "user/both"].files()) == {".gitattributes", "README.md", "index.html"}
    deploy(*words)
    space = hub.repos["space", "user/first"]
    assert space.asked["sdk"] == "static" and "hardware" not in space.asked and space.variables == {}
    front = front_matter(space.files()["README.md"])
    assert front["sdk"] == "static" and front["models"] == ["user/first"] and front["license"] == "apache-2.0"


def test_a_busy_hub_is_asked_again(deploy, hub):
    hub.fail("POST", "/spaces/user/busy/commit/", status=503, times=1)
    deploy("--model=user/first", "--repo=user/busy")
    assert set(hub.repos["space", "user/busy"].files()) > FILES


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--model=user/none"], "--model user/none: the Hub has no such model or revision"),
        (["--model=user/first@gone"], "--model user/first@gone: the Hub has no such model or revision"),
        (["--model=user/bare"], "--license is missing: user/bare's card states none"),
        (["--model=user/first", "--license=unheard-of"], "--license unheard-of: the Hub does not take it"),
        (["--model=other/theirs"], "--repo other/theirs: the access token is user's"),
        (["--model=user/first", "--repo=user/full"], "--repo user/full: it holds something else (game.js)"),
        (["--model=user/first", "--sdk=static"], "--sdk static needs --run_dir"),
        (["--model=user/first", "--sdk=static", "--run_dir=runs", "--compare=user/second"], "are for a live Space"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_sent(deploy, hub, words, reason):
    if ("space", "user/full") not in hub.repos:
        hub.add("space", "user/full", {"game.js": b"//"}, private=True)
    commits = hub.count("POST", r"/spaces/.*/commit/")
    _, _, error = deploy(*words, expect=2)
    assert reason in error and error.startswith("deploy.py: error: ") and error.count("\n") == 1
    assert hub.count("POST", r"/spaces/.*/commit/") == commits
    assert hub.repos["space", "user/full"].files() == {"game.js": b"//"}


def test_a_private_model_s_demo_needs_a_secret_and_the_user_is_told(deploy, hub):
    hub.add("model", "user/hidden", {"README.md": CARD}, private=True)
    _, said, _ = deploy("--model=user/hidden")
    assert "user/hidden is private: give the Space a secret HF_TOKEN" in said
    _, said, _ = deploy("--model=user/second")
    assert "secret" not in said


def test_without_a_token_the_remedy_is_said(deploy):
    _, _, error = deploy("--model=user/first", "--repo=user/nobody-s", expect=2, token="")
    assert "there is no access token; set HF_TOKEN or run `hf auth login`" in error


def test_a_token_that_may_only_read_is_refused_before_a_space_is_made(deploy, hub):
    _, _, error = deploy("--model=user/first", "--repo=user/not-mine", expect=2, token="hf_loopback_read")
    assert "may only read" in error and ("space", "user/not-mine") not in hub.repos
