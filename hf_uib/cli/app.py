"""Before and after unlearning, side by side, on a picture or sentence of your own: a page on this machine.

    hf-uib app
    hf-uib app --adapter out --base my-org/vit-biased
    hf-uib app --model out/merged --reference my-org/vit-biased

Without arguments: what `hf-uib demo` left in ./unlearned. Nothing is trained, and nothing is fetched but checkpoints that are named
by Hub id. Needs gradio: pip install "gradio>=6".
"""

import os
from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from .comparison import HUES, AppArguments, Comparison, load
from .digits import paint, palette
from .outputs import quiet
from .parser import parse

MOST_BARS = 5
SENTENCES = [
    "The crew was friendly, and we landed early.",
    "Nobody told us why the flight was late.",
    "The seat was fine. The food was not.",
]
STYLE = """
.gradio-container {max-width: 1080px !important; margin: auto}
.digit img {width: 100%; height: 100%; padding-top: 2rem; object-fit: contain !important; image-rendering: pixelated}
.digits .gallery:not(.container) {display: grid; grid-template-columns: repeat(5, 1fr); gap: .5rem}
.digits .container {width: auto !important; height: auto !important; max-height: none !important}
.digits img {display: block; width: 100% !important; height: auto !important; image-rendering: pixelated}
.digits button > span {display: block}
#decision * {font-size: 1.15rem}
:is(#before, #after) h2 {font-size: 1.4rem !important; text-align: center}
.hues table {width: 100%; table-layout: fixed; border-collapse: collapse; margin: 0}
.hues :is(table, tbody, tr) {border: 0 !important}
.hues caption {text-align: left; padding-bottom: .5rem}
.hues th, .hues td {border: 0 !important; padding: .35rem 0 !important; text-align: center !important}
.hues th {width: 3.6rem; text-align: left !important; font-weight: 400}
.hues td.other {font-weight: 700; text-decoration: underline}
"""


def main(arguments: list[str]) -> None:
    """`hf-uib app ARGUMENTS`: load the models, serve the page."""
    (job,) = parse("app", __doc__, arguments, AppArguments, lists={}, launched=False)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        raise ValueError('gradio is not installed; pip install "gradio>=6".') from None
    quiet()
    logging.disable_progress_bar()
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    build(load(job)).launch(
        share=job.share,
        server_port=job.server_port,
        theme=gr.themes.Default(primary_hue="blue", secondary_hue="blue", **fonts),  # no font is fetched
        css=STYLE,
        footer_links=[],
        run_history=False,
    )


def decision(names: list[str], before: np.ndarray, after: np.ndarray) -> str:
    """One sentence that says whether the decision changed, from two arrays ``[classes]`` of probabilities."""
    first, then = before.argmax(), after.argmax()
    if first == then:
        return f"**The decision is the same**: {names[first]}, with {before[first]:.0%} before and {after[then]:.0%} after."
    return f"**The decision changed**: {names[first]} ({before[first]:.0%}) before, {names[then]} ({after[then]:.0%}) after."


def paint_hues(picture: Image.Image) -> list[Image.Image]:
    """A picture in each of the demo's hues, whatever hue it has."""
    picture = picture.copy()
    picture.thumbnail((64, 64))  # the model takes 8 x 8
    grey = np.asarray(picture).max(-1) / 255
    return [Image.fromarray(p) for p in paint(np.stack([grey] * HUES), np.arange(HUES), HUES, saturation=1.0)]


def hues_table(names: list[str], before: np.ndarray, after: np.ndarray) -> str:
    """The decisions on one digit in all hues, as HTML; those that are not the model's most frequent one are underlined.

    Args:
        before, after: probabilities ``[hues, classes]``.
    """
    rows, counts = [], []
    for title, answers in (("Before", before.argmax(-1)), ("After", after.argmax(-1))):
        usual = np.bincount(answers).argmax()
        cells = "".join(f"<td{'' if a == usual else ' class=other'}>{escape(names[a])}</td>" for a in answers)
        rows.append(f"<tr><th>{title}</th>{cells}</tr>")
        counts.append(int((answers != usual).sum()))
    colours = [",".join(str(round(255 * c)) for c in colour) for colour in palette(HUES, 1.0)]
    swatches = "".join(f'<td style="background: rgb({colour})">&nbsp;</td>' for colour in colours)
    caption = f"The same digit in all {HUES} hues: {counts[0]} decisions before differ from the usual one, {counts[1]} after."
    return f"<table><caption>{caption}</caption><tr><th>Hue</th>{swatches}</tr>{''.join(rows)}</table>"


def build(pair: Comparison):
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    examples = pair.digits or ([] if pair.takes_images else [[text] for text in SENTENCES])
    with gr.Blocks(title="Before and after unlearning", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown("# Before and after unlearning")
        if pair.request:
            gr.Markdown(f"Asked to forget: {pair.request}.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                inputs = _inputs(pair, examples[0][0] if examples else None)
                button = gr.Button("Compare", variant="primary")
                examples_here = gr.Column(elem_classes="digits" if pair.digits else None)
            with gr.Column(scale=3, min_width=300):
                outputs = _outputs(pair)
        function = _compare_hues(pair) if pair.digits else _compare(pair)
        if pair.digits:
            outputs = [*outputs[:3], inputs[0], outputs[3]]
        triggers: list[Any] = [button.click]
        if pair.digits:
            triggers.append(inputs[1].change)
        if examples:
            with examples_here:
                gr.Examples(
                    examples,
                    inputs,
                    outputs,
                    function,
                    label="Digits of the test set" if pair.digits else "Made-up examples",
                    run_on_click=True,
                    visible_columns=[0],
                    api_visibility="private",
                )
            triggers.append(page.load)
        gr.on(triggers, function, inputs, outputs, trigger_mode="always_last", api_visibility="private")
    return page


def _inputs(pair: Comparison, first) -> list:
    """Picture or sentence and, for the digits, the hue."""
    import gradio as gr

    if not pair.takes_images:
        return [gr.Textbox(first, label="Sentence", lines=3, max_lines=8)]
    picture = gr.Image(
        first,
        label="Picture: a light digit on black" if pair.digits else "Picture",
        type="pil",
        image_mode="L" if getattr(pair.model.config, "num_channels", 3) == 1 else "RGB",
        format="png",
        sources=["upload", "clipboard"],
        height=280,
        elem_classes="digit" if pair.digits else None,
    )
    if not pair.digits:
        return [picture]
    return [picture, gr.Slider(0, HUES - 1, step=1, label="Hue", info="The digit is painted in it; 0 is red.")]


def _outputs(pair: Comparison) -> list:
    """Bars before and after, the sentence that compares them and the table of hues."""
    import gradio as gr

    sentence = gr.Markdown(elem_id="decision")
    with gr.Row():
        bars = min(MOST_BARS, len(pair.names))
        before = gr.Label(label="Before", elem_id="before", num_top_classes=bars, min_width=140)
        after = gr.Label(label="After unlearning", elem_id="after", num_top_classes=bars, min_width=140)
    table = gr.HTML(elem_classes="hues", padding=False, visible=pair.digits is not None)
    gr.Markdown("One example is no measurement: the unlearning card has the figures over a test set.")
    return [before, after, sentence, *([table] if pair.digits else [])]


def _bars(pair: Comparison, probabilities: np.ndarray) -> dict[str, float]:
    return dict(zip(pair.names, map(float, probabilities), strict=True))


def _compare(pair: Comparison) -> Callable[[Any], tuple]:
    import gradio as gr

    def compare(given):
        if not given:
            raise gr.Error(f"Give a {'picture' if pair.takes_images else 'sentence'} first.", print_exception=False)
        (before,), (after,) = pair.probabilities([given])
        return _bars(pair, before), _bars(pair, after), decision(pair.names, before, after)

    return compare


def _compare_hues(pair: Comparison) -> Callable[[Any, int], tuple]:
    import gradio as gr

    def compare(picture, hue: int):
        if not picture:
            raise gr.Error("Give a picture first.", print_exception=False)
        painted = paint_hues(picture)
        before, after = pair.probabilities(painted)
        table = hues_table(pair.names, before, after)
        sentence = decision(pair.names, before[hue], after[hue])
        return _bars(pair, before[hue]), _bars(pair, after[hue]), sentence, painted[hue], table

    return compare
