"""In: the metric of answers, and of the same answers against other images. Out: whether the model knows anything."""

from __future__ import annotations

from collections.abc import Sequence

from hirelc_deploy.tasks.contract import Task

LEAST_IMAGES = 16
"""With fewer, chance alone may make a good model look like a guess."""

LEAST_GAIN = 0.05
"""Of what lies between guessing and no error at all. A trained model gains 0.3 and more, one with its classes in
another order next to nothing."""

SHOWN = 6  # class names in the sentence


def guesses(task: Task, value: float, guessed: float, images: int) -> bool:
    """Return whether a metric is no better than that of the same answers against the targets of other images.

    This is the statistic of a permutation test (Good 2005). Metrics without a known best value are not judged.
    """
    if images < LEAST_IMAGES or (task.metric.higher_is_better and task.metric.scale != 100):
        return False
    best = 1.0 if task.metric.higher_is_better else 0.0
    return abs(best - guessed) > 1e-9 and (value - guessed) / (best - guessed) < LEAST_GAIN


def doubt(task: Task, value: float, guessed: float, classes: Sequence[str]) -> str:
    """Return the sentence that tells a user so."""
    names = ", ".join(classes[:SHOWN]) + (", ..." if len(classes) > SHOWN else "")
    order = f", and whether the model's classes come in this order: {names}" if classes else ""
    return (
        f"the uncut model guesses: {task.metric.name} {value:.4g} on the selection split, and {guessed:.4g} when its "
        f"answers are held against other images; check weights and preprocessing{order}."
    )
