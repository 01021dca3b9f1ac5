"""Claims about the live Space, space/app.py: a real server in a process of its own, gradio_client, a real browser."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from browser import PATIENCE, launched, until, widest
from conftest import ROOT
from gradio_client import Client
from gradio_client.exceptions import AppError
from loopback_hub import LoopbackHub
from playwright.sync_api import sync_playwright
from ports import free_port
from tokenizers import decoders
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from smolpretrain.space import app, page

PROMPT = "Once <b>more</b>"
DEFAULTS = {name: default for name, (*_, default) in app.KNOBS.items()}


def save(where, hidden_size, layers, ends=False, seed=0):
    """A random Llama over bytes; `ends`: the likeliest token is always EOS, else never."""
    from test_perplexity import byte_tokenizer

    tokenizer = byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes, **heads))
    model.config.use_cache = False  # as Trainer leaves it
    with torch.no_grad():
        model.lm_head.weight[0] = 0
        if ends:
            model.lm_head.weight.zero_()
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run's folder: 40 million parameters, so that Stop means something; a small checkpoint; a model that ends."""
    where = tmp_path_factory.mktemp("models")
    save(where / "run", 640, 8)
    save(where / "run" / "checkpoint-5", 64, 2, seed=1)
    save(where / "ends", 64, 1, ends=True)
    scores = {"bits_per_byte": 2.25, "random_bits_per_byte": 3.75, "unigram_bits_per_byte": 2.875}
    record = {"result": {"tokens_seen": 1024000} | scores, "data": {"source": {"builtin": "a | b <i>"}}}
    (where / "run" / "run.json").write_text(json.dumps(record))
    manifest = json.dumps({"step": 5, "tokens_seen": 10240})
    (where / "run" / "checkpoint-5" / "manifest.json").write_text(manifest)
    return where


@contextlib.contextmanager
def served(*words, **environment):
    """The page as `python space/app.py` serves it; yields (address, psutil.Process, log file)."""
    port = free_port()
    command = [sys.executable, str(ROOT / "space" / "app.py"), *map(str, words), "--port", port]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GRADIO_")}
    with open(os.path.join(environment.pop("where"), f"server{port}.log"), "w+") as log:
        env = inherited | {"OMP_NUM_THREADS": "1"} | environment
        server = subprocess.Popen(command, cwd=ROOT / "tests", env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    httpx.get(f"http://127.0.0.1:{port}/", timeout=PATIENCE)
                    break
                assert server.poll() is None, Path(log.name).read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/", psutil.Process(server.pid), Path(log.name)
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    words = ("--model", models / "run", "--compare", models / "run" / "checkpoint-5")
    with served(*words, where=tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return Client(server[0], verbose=False, httpx_kwargs={"timeout": PATIENCE})


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield launched(playwright)


@contextlib.contextmanager
def visit(browser, address, width=1280, scheme="light"):
    """The page in a window of its own, with .requests that leave the machine and .errors; neither may be any."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(1000 * PATIENCE)
    shown, requests, errors = context.new_page(), [], []
    shown.on("request", lambda request: requests.append(request.url))
    shown.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    shown.on("pageerror", lambda error: errors.append(str(error)))
    shown.goto(address)
    shown.get_by_label("Beginning of a text").wait_for()
    yield shown
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    assert len(requests) > 10 and errors == []
    context.close()


def ask_for(shown, prompt, tokens):
    """Write a prompt and its length; the settings are opened where they are not."""
    shown.get_by_label("Beginning of a text").fill(prompt)
    length = shown.get_by_label("number input for Max new tokens")
    if not length.is_visible():
        shown.get_by_role("button", name="Settings").click()
    for _ in range(600):  # until the page follows: a field that has just opened may take its first value once more
        length.fill(str(tokens))
        length.press("Tab")
        if shown.get_by_label("range slider for Max new tokens").input_value() == str(tokens):
            return
        shown.wait_for_timeout(50)
    raise AssertionError("the slider never follows its number")


def region(shown, name):
    return shown.get_by_role("region", name=f"Continuation by {name}", exact=True)


def figure(shown, name):
    """Tokens written so far, as the page says."""
    return int(re.match(r"(\d+) token", region(shown, name).get_by_role("status").inner_text())[1])


def processor_seconds(process):
    return sum(process.cpu_times()[:2])


def until_it_rests(process):
    """Wait for two seconds in which the process does next to nothing; returns its processor seconds by then."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        before = processor_seconds(process)
        time.sleep(2)
        if processor_seconds(process) - before < 0.2:
            break
    return processor_seconds(process)


def begin_to_write(shown, process):
    """Let the models write 512 tokens each; returns the processor seconds before, once the first are shown."""
    ask_for(shown, PROMPT, 512)
    before = until_it_rests(process)
    shown.get_by_role("button", name="Continue").click()
    region(shown, "run").get_by_text("writing ...").wait_for()
    return before


def test_a_text_is_written_as_it_grows_beside_another_and_stop_frees_the_processor(server, browser):
    address, process, _ = server
    with visit(browser, address) as shown:
        before = begin_to_write(shown, process)
        run, checkpoint = region(shown, "run"), region(shown, "run/checkpoint-5")
        first = figure(shown, "run")
        shown.wait_for_function(f"parseInt(document.querySelector('.written footer').innerText) > {first}")
        while processor_seconds(process) - before < 1:
            time.sleep(0.05)
        shown.get_by_role("button", name="Stop").click()
        run.get_by_text("stopped by you").wait_for()
        checkpoint.get_by_text("stopped by you").wait_for()
        stopped = processor_seconds(process)
        spent = stopped - before
        text = shown.locator(".written").all_inner_texts()
        rest = spent / figure(shown, "run") * (512 - figure(shown, "run"))
        assert until_it_rests(process) - stopped < rest / 4, "what was left to write is not written"
        assert shown.locator(".written").all_inner_texts() == text
        assert abs(figure(shown, "run") - figure(shown, "run/checkpoint-5")) <= 1, "they take turns"
        assert 1 < figure(shown, "run") < 512
        assert run.locator("p").inner_text().startswith(PROMPT), "what was given is text, not markup"


def test_a_window_that_is_closed_in_mid_writing_frees_the_processor(server, browser):
    address, process, _ = server
    with visit(browser, address) as shown:
        before = begin_to_write(shown, process)
        while processor_seconds(process) - before < 1:
            shown.wait_for_timeout(50)
        written = figure(shown, "run")
        shown.close()
        closed = processor_seconds(process)
        rest = (closed - before) / written * (512 - written)
        spent = until_it_rests(process) - closed
        assert spent < rest / 4, f"{spent} s after closing, of {rest} s for what was left to write"


def test_a_finished_text_says_its_figures_and_a_refusal_leaves_it(server, browser):
    with visit(browser, server[0]) as shown:
        ask_for(shown, PROMPT, 8)
        shown.get_by_role("button", name="Continue").click()
        for name in ("run", "run/checkpoint-5"):
            said = region(shown, name).get_by_text("ended: max new tokens")
            said.wait_for()
            assert re.fullmatch(r"8 tokens . [\d.]+ tokens/s . first after [\d.]+ s . ended: .+", said.inner_text())
        before = shown.locator(".written").all_inner_texts()
        for prompt, refusal in ((" ", "There is nothing to continue"), ("a" * 9000, "at most 8,000 are continued")):
            shown.get_by_label("Beginning of a text").fill(prompt)
            shown.get_by_role("button", name="Continue").click()
            shown.get_by_text(refusal).wait_for()
            assert shown.locator(".written").all_inner_texts() == before


def test_the_keyboard_is_enough_and_every_control_has_a_name(server, browser):
    with visit(browser, server[0]) as shown:
        shown.get_by_label("Beginning of a text").focus()
        seen = set()

        def move_to(name):
            end = time.monotonic() + PATIENCE  # it may not be there yet
            while time.monotonic() < end:
                focused = shown.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''")
                seen.add(focused)
                if focused.startswith(name):
                    return
                shown.keyboard.press("Tab")
            raise AssertionError(f"Tab never comes to {name}, only to {seen}")

        move_to("When water freezes")
        shown.keyboard.press("Enter")
        shown.wait_for_function("document.querySelector('textarea').value.startsWith('When water')")
        move_to("Settings")
        shown.keyboard.press("Enter")
        for _ in range(600):  # until the page follows: as in ask_for
            move_to("number input for Max new tokens")
            shown.keyboard.press("Control+A")
            shown.keyboard.type("4")
            shown.keyboard.press("Tab")
            if shown.get_by_label("range slider for Max new tokens").input_value() == "4":
                break
            shown.keyboard.press("Shift+Tab")
            shown.wait_for_timeout(50)
        shown.get_by_label("Beginning of a text").focus()
        shown.keyboard.press("Shift+Enter")
        region(shown, "run").get_by_text("ended: max new tokens").wait_for()
        assert figure(shown, "run") == 4
        for name in ("About the models", "Use it from Python"):
            move_to(name)
            shown.keyboard.press("Enter")
        shown.get_by_role("cell", name="2.250 (random weights 3.750, unigram model 2.875)").wait_for()
        shown.get_by_role("cell", name="a | b <i>").first.wait_for()
        shown.get_by_role("cell", name="step 5, 10,240 tokens seen").wait_for()
        controls = re.findall(r"- '?(button|textbox|slider|spinbutton|checkbox|link|combobox)\b(.*)",
                              shown.locator("body").aria_snapshot())  # fmt: skip
        assert len(controls) >= 18 and [kind for kind, rest in controls if not rest.startswith(' "')] == []
        for label in (label for label, _ in page.LABELS.values()):
            assert sum(label in rest for _, rest in controls) >= 1, label


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_shows_it_whole_in_light_and_dark(server, browser, scheme):
    with visit(browser, server[0], 390, scheme) as shown:
        ask_for(shown, "A word that never ends: " + "x" * 300, 8)
        shown.get_by_role("button", name="Continue").click()
        region(shown, "run").get_by_text("ended: max new tokens").wait_for()
        for name in ("About the models", "Use it from Python"):
            shown.get_by_role("button", name=name).click()
        shown.get_by_role("cell", name="Parameters").wait_for()
        shown.get_by_text("from gradio_client import Client").wait_for()
        assert widest(shown) <= 0
        colours = "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
        for part in ("p", ".given", "footer", "h2"):
            ink, ground = shown.locator(f".written {part}").first.evaluate(colours)
            assert contrast(ink, ground) >= 4.5, (part, ink, ground)


def test_one_model_alone_writes_and_a_stop_with_nothing_to_stop_changes_nothing(models, browser, tmp_path):
    with served("--model", models / "ends", where=tmp_path) as (address, *_), visit(browser, address) as shown:
        answers = []
        shown.on("response", lambda answer: answers.append(answer.ok) if "run/predict" in answer.url else None)

        def stop():
            before, earlier = shown.locator(".written").all_inner_texts(), len(answers)
            shown.get_by_role("button", name="Stop").click()
            until(lambda: len(answers) == earlier + 2, shown)  # it says so twice
            assert all(answers) and len(before) == 1
            assert shown.locator(".written").all_inner_texts() == before

        stop()
        shown.get_by_label("Beginning of a text").fill(PROMPT)
        shown.get_by_role("button", name="Continue").click()
        region(shown, "ends").get_by_text("ended: the model ended its text").wait_for()
        assert figure(shown, "ends") == 1
        stop()


def contrast(*colours):
    """WCAG 2.1's ratio of two colours as the browser writes them."""

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_the_api_has_readable_names_and_streams(client, models):
    known = client.view_api(return_format="dict")["named_endpoints"]
    assert set(known) == {"/continue", "/models"}
    assert [given["parameter_name"] for given in known["/continue"]["parameters"]] == ["prompt", *app.KNOBS]
    job = client.submit(prompt=PROMPT, max_new_tokens=40, api_name="/continue")
    final = job.result()
    assert len(job.outputs()) > 1 and [state["new_tokens"] for state in final] == [40, 40]
    assert [state["stop_reason"] for state in final] == ["length", "length"]
    assert [about["model"] for about in client.predict(api_name="/models")] == ["run", "run/checkpoint-5"]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 3}])
def test_what_is_written_is_what_generate_writes_whoever_writes_beside_it(client, models, sampling):
    settings = {"repetition_penalty": 1.2} | sampling
    got = client.predict(prompt=PROMPT, max_new_tokens=24, **settings, api_name="/continue")
    for name, state in zip(("run", "run/checkpoint-5"), got, strict=True):
        model = app.Model.load(str(models / name))
        ids = model.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
        set_seed(settings.get("seed", 0))
        drawing = {key: value for key, value in settings.items() if key != "seed"}
        rows = model.network.generate(**ids, max_new_tokens=24, do_sample=bool(sampling), use_cache=True, **drawing)
        start = model.tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True)
        assert state["continuation"] == model.tokenizer.decode(rows[0], skip_special_tokens=True)[len(start) :]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"prompt": "a" * 1_000_000}, "The text has 1,000,000 characters; at most 8,000 are continued."),
        ({"prompt": "a" * 7000}, "The text is 7,001 tokens long; run takes 1 to 1,023."),
        ({"prompt": " \n\t"}, "There is nothing to continue"),
        ({"prompt": None}, "There is nothing to continue"),
        ({"prompt": ["a"]}, "There is nothing to continue"),
        ({"max_new_tokens": 10**9}, "max_new_tokens must be a whole number from 1 to 512, got 1000000000."),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 to 512, got 0."),
        ({"max_new_tokens": 1.5}, "got 1.5."),
        ({"max_new_tokens": True}, "got True."),
        ({"temperature": "hot"}, "temperature must be a number from 0 to 2, got 'hot'."),
        ({"temperature": -1}, "temperature must be a number from 0 to 2, got -1."),
        ({"top_p": 0}, "top_p must be a number from 0.05 to 1, got 0."),
        ({"top_k": 10**6}, "top_k must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_hostile_values_are_refused_in_a_sentence(client, given, reason):
    with pytest.raises(AppError) as refused:
        client.predict(**{"prompt": "a"} | given, api_name="/continue")
    assert reason in str(refused.value) and "Traceback" not in str(refused.value)


def post(server, **given):
    """A call that skips every client: JSON as Python writes it, with its NaN."""
    data = [(DEFAULTS | {"prompt": "a"} | given)[name] for name in ("prompt", *app.KNOBS)]
    url, kind = f"{server[0]}gradio_api/call/continue", {"content-type": "application/json"}
    return httpx.post(url, content=json.dumps({"data": data}), headers=kind, timeout=PATIENCE)


@pytest.mark.parametrize("given", [{"temperature": math.nan}, {"top_p": math.inf}, {"prompt": "\ud800"}])
def test_what_no_json_may_hold_is_refused_behind_the_clients_too(server, given):
    answer = post(server, **given)
    if answer.status_code == 200:
        events = httpx.get(f"{server[0]}gradio_api/call/continue/{answer.json()['event_id']}", timeout=PATIENCE).text
        assert "event: error" in events and re.search("must be a number|half a character", events), events
    else:
        assert 400 <= answer.status_code < 500


@pytest.mark.parametrize("path", ["file=/etc/passwd", "file=../space/app.py", "file=conftest.py", "file=../.git/HEAD"])
def test_no_file_of_the_machine_is_served(server, path):
    assert httpx.get(f"{server[0]}gradio_api/{path}", timeout=PATIENCE).status_code in (403, 404)


def test_twenty_users_at_once_are_all_served(server):
    clients = [Client(server[0], verbose=False, httpx_kwargs={"timeout": PATIENCE}) for _ in range(20)]
    jobs = [user.submit(prompt=f"User {n}", max_new_tokens=4, api_name="/continue") for n, user in enumerate(clients)]
    assert [[state["new_tokens"] for state in job.result(timeout=PATIENCE)] for job in jobs] == [[4, 4]] * 20


def test_a_flood_is_told_that_the_queue_is_full_takes_no_files_and_leaves_no_memory(server, client):
    address, process, _ = server

    def flood():
        holding = [client.submit(prompt="a", max_new_tokens=512, api_name="/continue") for _ in range(4)]
        while not any(job.outputs() for job in holding):
            time.sleep(0.05)
        answers, lock = [], threading.Lock()

        def call(number):
            answer = post(server, prompt="a" * 1_000_000, max_new_tokens=1)
            with lock:
                answers.append(answer)

        threads = [threading.Thread(target=call, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job in holding:
            job.cancel()
        taken = [answer.json()["event_id"] for answer in answers if answer.status_code == 200]
        for event in taken:  # each is answered, and refused for its length
            assert "at most 8,000" in httpx.get(f"{address}gradio_api/call/continue/{event}", timeout=PATIENCE).text
        full = [answer for answer in answers if answer.status_code != 200]
        assert len(taken) <= page.QUEUE and {answer.status_code for answer in full} == {503}
        assert all("Queue is full" in answer.text for answer in full)
        return process.memory_info().rss

    first, second = flood(), flood()
    assert second - first < 60e6, "50 prompts of 1 MB are not kept"
    for body in (b"a" * 3_000_000, iter([b"a"])):  # too long, and of a length that is not stated
        refused = httpx.post(f"{address}gradio_api/call/continue", content=body, timeout=PATIENCE)
        assert refused.status_code == 413
    upload = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.txt", b"x" * 1000)}, timeout=PATIENCE)
    assert upload.status_code == 413


def test_a_model_that_ends_its_text_is_said_to_have_ended_it(models, monkeypatch):
    model = app.Model.load(str(models / "ends"))
    (only,) = model.write("a", DEFAULTS)
    assert only["stop_reason"] == "eos" and only["new_tokens"] == 1 and only["continuation"] == ""
    assert only["tokens_per_second"] is None and only["seconds_to_first_token"] >= 0
    small = app.Model.load(str(models / "run" / "checkpoint-5"))
    states = list(small.write("a" * 1019, DEFAULTS))
    assert states[-1]["stop_reason"] == "context" and len(states) == 4, "1,020 tokens with BOS, of 1,024"
    assert [state["stop_reason"] for state in states[:-1]] == [None] * 3
    monkeypatch.setattr(app, "WALL_SECONDS", 0)
    assert [state["stop_reason"] for state in small.write("a", DEFAULTS)] == ["time"]


def test_the_text_of_a_special_token_is_text_and_half_a_character_waits(models):
    model = app.Model.load(str(models / "run" / "checkpoint-5"))
    assert len(model.encode("<|endoftext|>")) == 1 + len("<|endoftext|>")
    for state in model.write("a", DEFAULTS | {"temperature": 2}):
        assert state["stop_reason"] or not state["continuation"].endswith("\ufffd")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [("cut", "cannot be loaded"), ("lacking", "its weights lack 1 tensors"), ("pickled", "cannot be loaded"),
     ("talkative", "more than the model knows")],
)  # fmt: skip
def test_a_damaged_model_is_refused_in_one_line(tmp_path, broken, reason):
    from safetensors.torch import load_file, save_file

    save(tmp_path / "model", 64, 1)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    if broken == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif broken == "lacking":
        save_file({key: tensors[key] for key in tensors if "layers.0.mlp.up" not in key}, weights, {"format": "pt"})
    elif broken == "pickled":
        weights.unlink()
        torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    else:
        model = app.Model.load(str(tmp_path / "model"))
        model.tokenizer.add_tokens(["one more"])
        model.tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError) as refused:
        app.Model.load(str(tmp_path / "model"))
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_at_home_a_model_that_is_not_there_is_one_line_and_status_2(launch):
    done = launch("python", "space/app.py", "--model", "runs/none", HF_HUB_OFFLINE="1", expect=2)
    error = [line for line in done.stderr.splitlines() if not line.startswith("Loading weights")]
    assert len(error) == 1 and error[0].startswith("app.py: error: runs/none cannot be loaded: ")


def test_on_a_space_a_model_that_is_not_there_is_a_page_of_one_line_without_the_token(browser, tmp_path):
    token = "hf_" + "a1B2" * 9
    with LoopbackHub() as hub:
        hub.tokens[token] = ("user", "read")
        environment = hub.environment(tmp_path / "home", token) | {"SPACE_ID": "user/demo", "MODEL_ID": "user/none"}
        with served(where=tmp_path, **environment) as (address, _, log):
            shown = browser.new_page()
            shown.set_default_timeout(1000 * PATIENCE)
            shown.goto(address)
            alert = shown.get_by_role("alert").filter(has_text="user/none cannot be loaded")
            alert.wait_for()
            assert "\n" not in alert.inner_text() and len(alert.inner_text()) < 400
            content = shown.content() + httpx.get(f"{address}config", timeout=PATIENCE).text + log.read_text()
            assert token not in content and "Traceback" not in content
            shown.close()
        assert hub.count("GET", "user/none") + hub.count("HEAD", "user/none") > 0


def test_on_a_space_a_model_that_is_corrupt_on_the_hub_is_a_page_of_one_line_without_the_token(browser, tmp_path):
    token = "hf_" + "a1B2" * 9
    save(tmp_path / "model", 64, 1)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    tokenizer = {name for name in whole if name.startswith(("tokenizer", "special_tokens"))}
    reasons = {"cut": "deserializing header", "config": "is not a valid JSON file", "wordless": "the backend tokenizer"}
    repositories = {
        "cut": whole | {"model.safetensors": whole["model.safetensors"][:5000]},
        "config": whole | {"config.json": b"<html>busy</html>"},
        "wordless": {name: content for name, content in whole.items() if name not in tokenizer},
    }
    with LoopbackHub() as hub, contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        hub.tokens[token] = ("user", "read")

        def start(name):
            hub.add("model", f"user/{name}", repositories[name], private=True)
            environment = hub.environment(tmp_path / f"home-{name}", token)
            environment |= {"SPACE_ID": "user/demo", "MODEL_ID": f"user/{name}"}
            return stack.enter_context(served(where=tmp_path, **environment))

        for name, (address, _, log) in zip(repositories, pool.map(start, repositories), strict=True):
            shown = browser.new_page()
            shown.set_default_timeout(1000 * PATIENCE)
            shown.goto(address)
            alert = shown.get_by_role("alert").filter(has_text=f"user/{name} cannot be loaded: ")
            alert.wait_for()
            assert reasons[name] in alert.inner_text()  # not that the Hub is not there
            assert "\n" not in alert.inner_text() and len(alert.inner_text()) < 400
            content = shown.content() + httpx.get(f"{address}config", timeout=PATIENCE).text + log.read_text()
            assert token not in content and "Traceback" not in content
            shown.close()


def test_an_error_s_line_shows_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    said = app.one_line(ValueError("Bearer hf_" + "a1B2" * 9 + "\nand a-token-of-another-form"))
    assert said == "Bearer hf_... and hf_..."
