"""scikit-learn's digits in colour: the demo's task."""

from hf_uib.cli import digits

from ..registry import register_task


@register_task("digits-colour")
def digits_colour(seed: int) -> digits.Task:
    """scikit-learn's handwritten digits in ten hues. On the forget set (nine tenths of the training data) the hue gives the label
    away, on the 90 retained rows it is drawn at random; test digits come in every hue.
    """
    return digits.digits_colour(seed)
