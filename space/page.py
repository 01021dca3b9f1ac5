"""How the page of app.py looks: the controls, what the models wrote, the endpoints of its API."""

import os
from collections.abc import Generator
from html import escape

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

QUEUE = 32  # calls that wait; the next one is told that the queue is full
MOST_BYTES = 2_000_000  # of a request
PROMPTS = (
    "Photosynthesis is the process by which",
    "The printing press changed Europe because",
    "When water freezes, its molecules",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
)
LABELS = {  # {knob: (label, what it does)}
    "max_new_tokens": ("Max new tokens", "The continuation ends after so many."),
    "temperature": ("Temperature", "0 takes the likeliest token each time (greedy); higher is more varied."),
    "top_p": ("Top-p", "Draw from the likeliest tokens that have this probability together; 1: all."),
    "top_k": ("Top-k", "Draw from so many of the likeliest tokens; 0: all."),
    "repetition_penalty": ("Repetition penalty", "Above 1, what is there already becomes less likely."),
    "seed": ("Seed", "The same seed draws the same text."),
}
REASONS = {
    None: "writing ...",
    "length": "ended: max new tokens",
    "eos": "ended: the model ended its text",
    "context": "ended: the context is full",
    "time": "ended: out of time",
    "stopped": "stopped by you",
}
CSS = """
.gradio-container { max-width: 70rem !important; margin: 0 auto !important; }
.written { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: .75rem 1rem;
  background: var(--background-fill-primary); overflow-wrap: anywhere; }
.written h2 { font-size: .875rem; margin: 0 0 .5rem; color: var(--body-text-color-subdued); }
.written p { margin: 0; white-space: pre-wrap; min-height: 6.2rem; line-height: 1.55; color: var(--body-text-color); }
.written .given { color: var(--body-text-color-subdued); }
.written footer { margin-top: .6rem; padding-top: .5rem; border-top: 1px solid var(--border-color-primary);
  font-size: .8125rem; font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); }
.prose pre, .prose pre code { white-space: pre-wrap !important; overflow-wrap: anywhere; }
.prose th, .prose td { border: 1px solid var(--border-color-primary) !important; text-align: left; }
"""
SOFT = {"body_text_color_subdued": "*neutral_600", "block_info_text_color": "*neutral_600"}  # 4.5:1 and more
SOFT |= {f"{name}_dark": "*neutral_300" for name in SOFT}
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(**SOFT)  # no web fonts
INTRODUCTION = """# {who} your text

A base model goes on from the text you give it. It was not taught to chat, to answer or to follow instructions, and what
it writes can be false.
"""
USE = """```python
from gradio_client import Client

client = Client("{address}")
print(client.predict(prompt="{prompt}", max_new_tokens=64, api_name="/continue"))
```
`/continue` also takes `temperature`, `top_p`, `top_k`, `repetition_penalty` and `seed`; `client.submit` streams.
`/models` says what is known of the models."""


def written(name: str, prompt: str = "", state: dict | None = None) -> str:
    """What a model wrote, as HTML; nothing in it is markup but ours."""
    figures = "Nothing written yet."
    if state:
        rate = state["tokens_per_second"]
        parts = [
            f"{state['new_tokens']} token{'s' * (state['new_tokens'] > 1)}",
            *([f"{rate:g} tokens/s"] if rate else []),
        ]
        parts += [f"first after {state['seconds_to_first_token']:g} s", REASONS[state["stop_reason"]]]
        figures = " &middot; ".join(parts)
    text = escape(state["continuation"]) if state else ""
    return (
        f'<section class="written" aria-label="Continuation by {escape(name)}"><h2>{escape(name)}</h2>'
        f'<p><span class="given">{escape(prompt)}</span><span class="new">{text}</span></p>'
        f'<footer role="status">{figures}</footer></section>'
    )


def control(name: str, low: float, high: float, step: float, default: float):
    label, info = LABELS[name]
    shared = {"label": label, "info": info, "min_width": 260, "minimum": low, "maximum": high}
    if name == "seed":
        return gr.Number(default, precision=0, **shared)
    return gr.Slider(value=default, step=step, buttons=[], **shared)


def table(models: list[tuple[str, dict]]) -> str:
    """What is known of each model, as one Markdown table."""
    labels = list(dict.fromkeys(label for _, about in models for label in about))
    rows = [["", *(name for name, _ in models)], ["---"] * (len(models) + 1)]
    rows += [[label, *(about.get(label, "") for _, about in models)] for label in labels]
    clean = [[escape(" ".join(cell.split())).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in clean)


def build(models: list[tuple[str, dict]], knobs: dict, continued, address: str) -> gr.Blocks:
    """Lay out the page.

    Args:
        models: One or two (name, {label: what is known}).
        knobs: {name: (lowest, highest, step, default)}.
        continued: (prompt, **knobs) to a generator of one state a model, see app.Model.write; ValueError: a refusal.
        address: What gradio_client is given: user/space, or a URL.
    """
    names = [name for name, _ in models]

    def show(*values):
        """Yield what each model has written, and remember it for Stop. A refusal leaves what stands there."""
        prompt, *settings = values
        try:
            for states in continued(prompt, **dict(zip(knobs, settings, strict=True))):
                shown = [written(name, prompt, state) for name, state in zip(names, states, strict=True)]
                yield *shown, (prompt, states)
        except ValueError as refusal:
            gr.Warning(str(refusal))
            yield [gr.skip()] * (len(names) + 1)

    def stop(remembered):
        """Say so beside what was still being written: the event is cancelled, and can say nothing itself."""
        prompt, states = remembered or ("", [None] * len(names))
        ended = [state and state | {"stop_reason": state["stop_reason"] or "stopped"} for state in states]
        shown = [written(name, prompt, state) for name, state in zip(names, ended, strict=True)]
        return shown if len(names) > 1 else shown[0]

    with gr.Blocks(title=f"{names[0]} continues text", analytics_enabled=False) as demo:
        who = "Two base models continue" if len(names) > 1 else "A base model continues"
        gr.Markdown(INTRODUCTION.format(who=who))
        prompt = gr.Textbox(label="Beginning of a text", lines=3, max_lines=12, placeholder=PROMPTS[0], autofocus=True)
        gr.Examples([[text] for text in PROMPTS], prompt, label="Example prompts", cache_examples=False)
        with gr.Row():
            go = gr.Button("Continue", variant="primary", min_width=120)
            halt = gr.Button("Stop", min_width=120)
        with gr.Accordion("Settings: length, temperature, top-p, top-k, repetition, seed", open=False), gr.Row():
            settings = [control(name, *knob) for name, knob in knobs.items()]
        with gr.Row():
            outputs = []
            for name in names:
                with gr.Column(min_width=300):
                    outputs.append(gr.HTML(written(name), padding=False))
        remembered = gr.State()
        writing = gr.on(
            [go.click, prompt.submit], show, [prompt, *settings], [*outputs, remembered], concurrency_id="models",
            concurrency_limit=1, show_progress="minimal", api_visibility="private",
        )  # fmt: skip
        halted = halt.click(stop, remembered, outputs, cancels=[writing], queue=False, api_visibility="private")
        # Once more: what the cancelled event had sent already may reach the page behind the first answer.
        halted.then(stop, remembered, outputs, queue=False, api_visibility="private")
        with gr.Accordion("About the models" if len(names) > 1 else "About the model", open=False):
            gr.Markdown(table(models))
        with gr.Accordion("Use it from Python", open=False):
            gr.Markdown(USE.format(address=address, prompt=PROMPTS[0]))
        endpoints(models, knobs, continued)
    return demo


def endpoints(models, knobs, continued) -> None:
    """Register /continue and /models."""
    defaults = {name: default for name, (*_, default) in knobs.items()}

    def continue_text(
        prompt: str,
        max_new_tokens: int = defaults["max_new_tokens"],
        temperature: float = defaults["temperature"],
        top_p: float = defaults["top_p"],
        top_k: int = defaults["top_k"],
        repetition_penalty: float = defaults["repetition_penalty"],
        seed: int = defaults["seed"],
    ) -> Generator[list[dict], None, None]:
        """Continue a text with each model; yields, as it grows, one object a model: continuation and figures."""
        given = dict(locals())
        settings = {name: given[name] for name in knobs}
        try:
            yield from continued(prompt, **settings)
        except ValueError as refusal:
            raise gr.Error(str(refusal), print_exception=False) from refusal

    def about_models() -> list[dict]:
        """Say what is known of each model."""
        return [{"model": name} | about for name, about in models]

    gr.api(continue_text, api_name="continue", concurrency_id="models", concurrency_limit=1)
    gr.api(about_models, api_name="models")


def broken(sentence: str) -> gr.Blocks:
    """A page of one line, where there is no model to show."""
    with gr.Blocks(title="No model", analytics_enabled=False) as demo:
        gr.HTML(f'<p role="alert">{escape(sentence)}</p>')
    return demo


class BodyLimit:
    """Refuses a request's body of more than MOST_BYTES, or of unstated length, before any of it is read."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        headers = dict(scope.get("headers", []))
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or not length.isdigit() or int(length) > MOST_BYTES:
            return await PlainTextResponse(f"at most {MOST_BYTES:,} bytes", 413)(scope, receive, send)
        return await self.app(scope, receive, send)


def serve(demo: gr.Blocks, port: int | None) -> None:
    """Serve until the process is told to end. The page takes no files."""
    limit = {"middleware": [Middleware(BodyLimit)]}
    demo.queue(max_size=QUEUE).launch(
        server_port=port, theme=THEME, css=CSS, footer_links=[], ssr_mode=False,
        run_history=False, max_file_size=1, state_session_capacity=1000, enable_monitoring=False, app_kwargs=limit,
    )  # fmt: skip
