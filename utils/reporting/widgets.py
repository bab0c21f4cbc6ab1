"""Explore attack strength: a slider where a kernel runs, a strip of images everywhere else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure
from torch import nn

from utils.attacks.attack import Attack
from utils.core.reproducibility import generator
from utils.data.cases import Case, Reading, read_cases, unreadable
from utils.data.sets import ImageSet
from utils.evaluation.attacker import predict_batch
from utils.experiments.answer_records import Answer
from utils.experiments.prediction import Predictor, Seen, answer_case, attacked_at
from utils.reporting.answers import plot_answer, told
from utils.reporting.slices import plot_attack_strip

#: Set by ``utils.reporting.notebooks``: outside a browser, a widget's messages can also stall the notebook.
HEADLESS = "MRI_HEADLESS"


def attack_strip(
    model: nn.Module,
    images: ImageSet,
    index: int,
    *,
    epsilons: Sequence[float],
    attack: Attack | None = None,
    note: str = "",
) -> Figure:
    """One image at several radii, with perturbation and class probabilities.

    Args:
        index: which image of ``images``.
        epsilons: radii in [0, 1].
        attack: None is PGD-20.
    """
    attack = attack or Attack()
    device = next(model.parameters()).device
    chosen = torch.tensor([index])
    image, label = images.pixels(chosen, device), images.labels[chosen].to(device)
    attacked = [attack(model, image, label, eps=eps, draws=generator("strip")) for eps in epsilons]
    probabilities = [predict_batch(model, one).softmax(1)[0].tolist() for one in attacked]
    pictures = [one[0].cpu() for one in attacked]
    return plot_attack_strip(
        image[0].cpu(),
        pictures,
        probabilities,
        epsilons,
        images.classes,
        label=int(label),
        attack=attack.title,
        note=note,
    )


def attack_explorer(model: nn.Module, images: ImageSet, *, max_eps: float = 8 / 255, note: str = ""):
    """A slider for the radius and one for the image; moving either attacks again, beside the untouched slice.

    Args:
        max_eps: right end of the slider, in [0, 1].

    Returns:
        an ipywidgets box; None where ``HEADLESS`` is set in the environment, because nobody is there to move it.
    """
    if os.environ.get(HEADLESS):
        return None
    import ipywidgets

    strength = ipywidgets.FloatSlider(
        value=1.0, min=0, max=255 * max_eps, step=0.25, description="eps (/255)", continuous_update=False
    )
    number = ipywidgets.IntSlider(value=0, min=0, max=len(images) - 1, description="image", continuous_update=False)

    def show(eps: float, index: int) -> None:
        from IPython.display import display

        display(attack_strip(model, images, index, epsilons=[0, eps / 255], note=note))

    output = ipywidgets.interactive_output(show, {"eps": strength, "index": number})
    return ipywidgets.VBox([strength, number, output])


def answer_explorer(predictor: Predictor, reading: Reading, *, force: bool = False):
    """An upload button: what is uploaded is answered below it; a slider attacks it within a radius.

    Returns:
        an ipywidgets box; None where ``HEADLESS`` is set in the environment, because nobody is there to upload.
    """
    if os.environ.get(HEADLESS):
        return None
    import ipywidgets
    from IPython.display import display

    upload = ipywidgets.FileUpload(description="upload a scan", multiple=False)
    strength = ipywidgets.FloatSlider(
        value=0.0, min=0, max=8, step=0.25, description="eps (/255)", continuous_update=False
    )
    output = ipywidgets.Output()
    found: list[tuple[Case, Answer, Seen]] = []

    def show(cases: Sequence[tuple[Case, Answer, Seen]]) -> None:
        with output:
            output.clear_output(wait=True)
            for _, answer, seen in cases:
                print(f"{answer.case}:", *told(answer), sep="\n  ")
                display(plot_answer(answer, seen, predictor.classes))

    def uploaded(change: dict) -> None:
        for file in change["new"]:
            found[:] = _answers_to(predictor, reading, file["name"], bytes(file["content"]), force=force)
            strength.value = 0.0
            show(found)

    def attacked(change: dict) -> None:
        if found and change["new"]:
            pairs = [(case, attacked_at(predictor, case, own, seen, change["new"] / 255)) for case, own, seen in found]
            show([(case, answer, seen) for case, (answer, seen) in pairs])

    upload.observe(uploaded, names="value")
    strength.observe(attacked, names="value")
    return ipywidgets.VBox([upload, strength, output])


def _answers_to(
    predictor: Predictor, reading: Reading, name: str, content: bytes, *, force: bool
) -> list[tuple[Case, Answer, Seen]]:
    """Answers about an uploaded file; one that cannot be read is answered so."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / Path(name).name
        file.write_bytes(content)
        try:
            cases = list(read_cases(file, reading))
        except (OSError, ValueError, ImportError) as error:
            cases = [unreadable(Path(name).name, [file], error)]
        return [(case, *answer_case(predictor, case, force=force)) for case in cases]
