"""Before and after unlearning, side by side, on a picture or sentence of your own: a page on this machine.

    python scripts/demo.py
    python scripts/demo.py --adapter out --base my-org/vit-biased
    python scripts/demo.py --model out/merged --reference my-org/vit-biased

Without arguments: what the demo of ``scripts/unlearn.py`` left in ./unlearned. Nothing is trained; nothing is fetched but
checkpoints named by Hub id. Needs gradio: ``pip install -e ".[demo]"``.
"""

import json
import os
import threading
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from html import escape
from typing import Any

from .parser import parse, run

FOLDER = "unlearned"  # what the demo of scripts/unlearn.py writes to
HUES = 10
SHOWN = 5  # bars, at most
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


@dataclass
class DemoArguments:
    """Which models to show."""

    adapter: str | None = field(
        default=None, metadata={"help": f"Adapter that UIBTrainer saved: folder or Hub id. Default: ./{FOLDER}."}
    )
    base: str | None = field(
        default=None,
        metadata={"help": "Base of the adapter, where it names none. Left out, it is made from the folder's merged/."},
    )
    model: str | None = field(
        default=None, metadata={"help": "Instead of an adapter: the model after unlearning, folder or Hub id."}
    )
    reference: str | None = field(default=None, metadata={"help": "With --model: the model before."})
    share: bool = field(default=False, metadata={"help": "Also make a public link, through gradio's servers."})
    server_port: int | None = field(default=None, metadata={"help": "Port; gradio's 7860 or the next free one."})


@dataclass
class Pair:
    """One classifier before and after unlearning.

    Attributes:
        model: after; a `PeftModel` whose base is the model before, if there is no reference.
        reference: before.
        processor: image processor or tokenizer.
        request: what was to be forgotten, in words.
        digits: pictures and hues to start with, for the model of the digits demo.
    """

    model: Any
    reference: Any
    processor: Any
    request: str | None
    digits: list[list] | None = None

    def __post_init__(self):
        self.lock = threading.Lock()  # an adapter is switched off for all threads
        self.names = [str(self.model.config.id2label[i]) for i in range(self.model.config.num_labels)]

    @property
    def takes_pictures(self) -> bool:
        return self.model.main_input_name == "pixel_values"

    def probabilities(self, rows: list):
        """Of the classes, before and after: two arrays ``[n, classes]`` for n pictures or texts."""
        import torch

        from ..models import forward_columns

        # a picture of any size is welcome, also where training needed no resizing
        settings = {"do_resize": True} if self.takes_pictures else {"truncation": True, "padding": True}
        encoded = self.processor(rows, return_tensors="pt", **settings)
        inputs = {name: value for name, value in encoded.items() if name in forward_columns(self.model)}
        with self.lock, torch.no_grad():
            after = self.model(**inputs).logits
            with self.model.disable_adapter() if self.reference is None else nullcontext():
                before = (self.reference or self.model)(**inputs).logits
        return before.softmax(-1).numpy(), after.softmax(-1).numpy()


def load(script: DemoArguments) -> Pair:
    """The models that the command line names.

    Raises:
        ValueError: a model is missing or does not fit the other one.
    """
    import torch

    from ..models import load_classifier
    from ..provenance import requests_of

    if script.model is None and script.reference is None:
        return _load_adapter(script)
    if script.model is None or script.reference is None or script.adapter or script.base:
        raise ValueError("--model and --reference go together, without --adapter and --base.")
    model, reference = (load_classifier(n, dtype=torch.float32) for n in (script.model, script.reference))
    kinds = [(m.main_input_name, m.config.num_labels) for m in (model, reference)]
    if kinds[0] != kinds[1]:
        what = " and ".join(f"{classes} classes from {taken}" for taken, classes in kinds)
        raise ValueError(f"--model and --reference tell {what}; give two checkpoints of one task.")
    requests = requests_of(model)
    processor = _processor(model, script.model, script.reference)
    return Pair(model.eval(), reference.eval(), processor, requests[-1]["request"] if requests else None)


def _load_adapter(script: DemoArguments) -> Pair:
    import torch
    from peft import PeftConfig, PeftModel

    from hf_uib.trainer import MERGED

    from ..models import fingerprint, load_classifier
    from ..provenance import undo

    adapter = script.adapter or FOLDER
    if script.adapter is None and not os.path.isdir(FOLDER):
        raise ValueError(
            f"there is no ./{FOLDER} yet; run `accelerate launch scripts/unlearn.py` first, or give --adapter, or --model and "
            "--reference."
        )
    noted = _noted(adapter)
    base = script.base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    merged = os.path.join(adapter, MERGED)
    if base:
        model = _attach(load_classifier(base), adapter, base)
        if noted and fingerprint(model) != noted["base"]:
            raise ValueError(
                f"{base} is not, to the bit, what {adapter} was trained on; give that as --base, or any two checkpoints as "
                "--model and --reference."
            )
        model = model.float()
    elif os.path.isdir(merged):
        model = PeftModel.from_pretrained(undo(load_classifier(merged, dtype=torch.float32), adapter), adapter)
    else:
        raise ValueError(f"{adapter} does not name its base, and has no {MERGED}/; give --base.")
    request = noted["record"]["request"] if noted else None
    processor = _processor(model, adapter, base or merged)
    return Pair(model.eval(), None, processor, request, _digits(adapter))


def _attach(model, adapter: str, base: str):
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:  # other sizes, or no such layers
        raise ValueError(f"{adapter} does not fit {base}; give the base it was trained on.") from error


def _noted(adapter: str) -> dict:
    """What the trainer noted beside the adapter; nothing if hf_uib did not train it."""
    from huggingface_hub import hf_hub_download
    from safetensors import safe_open

    from ..provenance import STATE_NAME

    path = os.path.join(adapter, STATE_NAME)
    try:
        with safe_open(path if os.path.isdir(adapter) else hf_hub_download(adapter, STATE_NAME), "pt") as file:
            return json.loads(file.metadata()["uib"])
    except OSError:
        return {}


def _processor(model, *names: str):
    """Image processor or tokenizer of the first checkpoint that has one."""
    from ..data.reading import load_processor

    picture = model.main_input_name == "pixel_values"
    for name in names:
        try:
            processor = load_processor(name, picture)
        except (OSError, ValueError):
            continue
        if not picture:
            longest = getattr(model.config, "max_position_embeddings", processor.model_max_length)
            processor.model_max_length = min(processor.model_max_length, longest)
        return processor
    kind = "image processor" if picture else "tokenizer"
    raise ValueError(f"{' and '.join(names)} have no {kind}; save it there with save_pretrained.")


def _digits(adapter: str) -> list[list] | None:
    """The first ten test digits, each in another hue, if the adapter is that of the digits demo."""
    from .digits import digits_colour

    path = os.path.join(adapter, "report.json")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    if report.get("task") != "digits-colour":
        return None
    test = digits_colour(report["seed"]).sets["test"].with_format(None)
    return [[test[i * HUES + i]["image"], i] for i in range(HUES)]


def decision(names: list[str], before, after) -> str:
    """One sentence that says whether the decision changed, from two arrays ``[classes]`` of probabilities."""
    first, then = before.argmax(), after.argmax()
    if first == then:
        return f"**The decision is the same**: {names[first]}, with {before[first]:.0%} before and {after[then]:.0%} after."
    return f"**The decision changed**: {names[first]} ({before[first]:.0%}) before, {names[then]} ({after[then]:.0%}) after."


def paint_hues(picture) -> list:
    """A picture in each of the demo's hues, whatever hue it has."""
    import numpy as np
    from PIL import Image

    from .digits import paint

    picture = picture.copy()
    picture.thumbnail((64, 64))  # the model takes 8 x 8
    grey = np.asarray(picture).max(-1) / 255
    return [Image.fromarray(p) for p in paint(np.stack([grey] * HUES), np.arange(HUES), HUES, saturation=1.0)]


def hues_table(names: list[str], before, after) -> str:
    """The decisions on one digit in all hues, as HTML; those that are not the model's most frequent one are underlined."""
    import numpy as np

    from .digits import palette

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


def build(pair: Pair):
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    def bars(probabilities) -> dict[str, float]:
        return dict(zip(pair.names, map(float, probabilities), strict=True))

    def compare(given):
        if not given:
            raise gr.Error(f"Give a {'picture' if pair.takes_pictures else 'sentence'} first.", print_exception=False)
        (before,), (after,) = pair.probabilities([given])
        return bars(before), bars(after), decision(pair.names, before, after)

    def compare_hues(picture, hue: int):
        if not picture:
            raise gr.Error("Give a picture first.", print_exception=False)
        painted = paint_hues(picture)
        before, after = pair.probabilities(painted)
        table = hues_table(pair.names, before, after)
        said = decision(pair.names, before[hue], after[hue])
        return bars(before[hue]), bars(after[hue]), said, painted[hue], table

    examples = pair.digits or ([] if pair.takes_pictures else [[text] for text in SENTENCES])
    first = examples[0][0] if examples else None
    with gr.Blocks(title="Before and after unlearning", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown("# Before and after unlearning")
        if pair.request:
            gr.Markdown(f"Asked to forget: {pair.request}.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                if pair.takes_pictures:
                    given = gr.Image(
                        first,
                        label="Picture: a light digit on black" if pair.digits else "Picture",
                        type="pil",
                        image_mode="L" if getattr(pair.model.config, "num_channels", 3) == 1 else "RGB",
                        format="png",
                        sources=["upload", "clipboard"],
                        height=280,
                        elem_classes="digit" if pair.digits else None,
                    )
                else:
                    given = gr.Textbox(first, label="Sentence", lines=3, max_lines=8)
                inputs = [given]
                if pair.digits:
                    hue = gr.Slider(0, HUES - 1, step=1, label="Hue", info="The digit is painted in it; 0 is red.")
                    inputs.append(hue)
                button = gr.Button("Compare", variant="primary")
                examples_here = gr.Column(elem_classes="digits" if pair.digits else None)
            with gr.Column(scale=3, min_width=300):
                said = gr.Markdown(elem_id="decision")
                with gr.Row():
                    shown = min(SHOWN, len(pair.names))
                    before = gr.Label(label="Before", elem_id="before", num_top_classes=shown, min_width=140)
                    after = gr.Label(label="After unlearning", elem_id="after", num_top_classes=shown, min_width=140)
                table = gr.HTML(elem_classes="hues", padding=False, visible=pair.digits is not None)
                gr.Markdown("One example is no measurement: the unlearning card has the figures over a test set.")
        function = compare_hues if pair.digits else compare
        outputs = [before, after, said, *([given, table] if pair.digits else [])]
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
        triggers = [button.click]
        if pair.digits:
            triggers.append(hue.change)
        if examples:
            triggers.append(page.load)
        gr.on(triggers, function, inputs, outputs, trigger_mode="always_last", api_visibility="private")
    return page


def main() -> None:
    """Parse the command line, load the models, serve the page."""
    (script,) = parse(__doc__, DemoArguments, lists={})
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        raise ValueError('gradio is not installed; pip install -e ".[demo]".') from None
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    build(load(script)).launch(
        share=script.share,
        server_port=script.server_port,
        theme=gr.themes.Default(primary_hue="blue", secondary_hue="blue", **fonts),  # no font is fetched
        css=STYLE,
        footer_links=[],
        run_history=False,
    )


if __name__ == "__main__":
    run(main)
