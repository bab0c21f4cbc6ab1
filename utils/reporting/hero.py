"""The picture of the README: a slice that an attack turns, before and after hardening."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from utils.attacks.attack import Attack
from utils.core.paths import write_json
from utils.core.radii import radius_label
from utils.core.reproducibility import environment_facts, generator
from utils.data.sets import DataSplits, ImageSet
from utils.data.workspace import Workspace, pick_device
from utils.evaluation.attacker import predict_batch
from utils.experiments.records import HARDENED, display_name, title_of
from utils.reporting.slices import plot_hero
from utils.reporting.style import save_figure
from utils.reporting.sweep import EPSILONS, frame, save_animation, sweep, turned_at
from utils.training.checkpoints import WEIGHTS, load_checkpoint
from utils.training.record import Record

#: How the slice of the picture is chosen, written into its record.
HERO_RULE = (
    "of {n} test images spread over patients, those that all shown models get right without attack and of which "
    "{attack} at {eps} fools the plain model{but}; of these {found} the one in the middle by how much probability the "
    "true class loses"
)


def hero(models: Mapping[str, torch.nn.Module], test: ImageSet, eps: float) -> tuple[ImageSet, dict[str, Any]]:
    """The test slice of the picture, and what each model says of it before and after PGD-20 made to fool that model.

    Args:
        models: title -> model, the plain one first; a second one is to be right still.
        eps: radius in [0, 1].

    Returns:
        a set of this one image, and what is shown beside it, with the attacked images (1 x H x W) in ``attacked``.

    Raises:
        ValueError: the attack turns no diagnosis at this radius.
    """
    attack, device = Attack(), pick_device()
    few = test.balanced_subset(64)
    pixels, labels = few.pixels(slice(None), device), few.labels.to(device)
    attacked = {
        title: attack(model.to(device), pixels, labels, eps=eps, draws=generator("hero"))
        for title, model in models.items()
    }
    answers = {
        title: [predict_batch(model, images).softmax(1).cpu() for images in (pixels, attacked[title])]
        for title, model in models.items()
    }
    plain, *others = models
    suited = torch.stack([before.argmax(1) == few.labels for before, _ in answers.values()]).all(0)
    suited &= answers[plain][1].argmax(1) != few.labels
    for title in others:
        suited &= answers[title][1].argmax(1) == few.labels
    if not suited.any():
        only = " alone" if others else ""
        raise ValueError(f"{attack.title} turns no right diagnosis of {plain}{only} at {radius_label(eps)}")
    place = torch.nonzero(suited)[:, 0]
    lost = torch.stack([answers[plain][turn][place, few.labels[place]] for turn in (0, 1)])
    middle = int(place[(lost[0] - lost[1]).argsort()[len(place) // 2]])
    but = f" and not {display_name(others[0])}" if others else ""
    shown = {
        "rule": HERO_RULE.format(
            n=len(few), attack=attack.title, eps=radius_label(eps), but=but, found=f"{len(place)} images"
        ),
        "attack": {"title": attack.title, "eps": eps},
        "image": few.paths[middle],
        "label": int(few.labels[middle]),
        "probabilities": {title: [chances[middle].tolist() for chances in own] for title, own in answers.items()},
        "attacked": {title: images[middle].cpu() for title, images in attacked.items()},
    }
    return few.subset(torch.tensor([middle])), shown


def hero_figure(image: ImageSet, shown: Mapping[str, Any], record: Record) -> Figure:
    """The picture of :func:`hero`.

    Args:
        record: of the plain model.
    """
    rows = {
        display_name(title).replace(", ", ",\n"): (shown["attacked"][title], chances)
        for title, chances in shown["probabilities"].items()
    }
    eps = shown["attack"]["eps"]
    whose = " and its hardened twin, each" if len(rows) > 1 else ""
    title = f"{display_name(title_of(record))}{whose} attacked by {shown['attack']['title']} at {radius_label(eps)}"
    note = "; ".join(filter(None, [_unseen(record), record.note]))
    return plot_hero(
        image.pixels(slice(None), "cpu")[0],
        rows,
        record.classes,
        label=shown["label"],
        eps=eps,
        title=title,
        note=note,
    )


def save_hero(workspace: Workspace, title: str, splits: DataSplits, eps: float) -> list[Path]:
    """Draw :func:`hero` with a trained model, beside its hardened twin where there is one.

    Writes ``assets/hero.png`` and ``assets/hero.json``, and ``assets/attack_sweep.gif``, the same slice at other radii.
    """
    titles = [title, f"{title}{HARDENED}"]
    titles = titles if (workspace.checkpoint(titles[1]) / WEIGHTS).is_file() else titles[:1]
    loaded = {
        name: load_checkpoint(workspace.checkpoint(name), classes=splits.classes, fingerprint=splits.fingerprint)
        for name in titles
    }
    image, shown = hero({name: model for name, (model, _) in loaded.items()}, splits.test, eps)
    record = loaded[title][1]
    figure = hero_figure(image, shown, record)
    told = {
        name: {
            "model": {"title": name, **own.model.plain()},
            "training": {
                "objective": own.trained.objective.plain(),
                "config": own.trained.config.plain(),
                "start": own.trained.start,
                "best_epoch": own.trained.best_epoch,
            },
            "probabilities": shown["probabilities"][name],
        }
        for name, (_, own) in loaded.items()
    }
    facts = told.pop(title) | ({"hardened": told[titles[1]]} if told else {})
    facts |= {key: shown[key] for key in ("rule", "attack", "image", "label")}
    facts |= {"classes": record.classes, "data": splits.info, "note": record.note, "environment": environment_facts()}
    target = workspace.root / "assets" / "hero.json"
    swept = sweep({name: model for name, (model, _) in loaded.items()}, image)
    facts["sweep"] = {"epsilons": EPSILONS} | {name: chances.tolist() for name, (_, chances) in swept.items()}
    write_json(target, facts)
    animation = target.with_name("attack_sweep.gif")
    return [save_figure(figure, target.with_suffix(".png")), target, _animate(swept, record, shown, animation)]


def _animate(
    swept: Mapping[str, tuple[torch.Tensor, torch.Tensor]], record: Record, shown: Mapping[str, Any], target: Path
) -> Path:
    label = shown["label"]
    turned = [f"{display_name(title)} {turned_at(chances, label)}" for title, (_, chances) in swept.items()]
    notes = ["; ".join(turned), "; ".join(filter(None, [_unseen(record), record.note]))]
    options: dict[str, Any] = {"label": label, "attack": shown["attack"]["title"], "notes": notes}
    frames = [frame(swept, step, record.classes, eps=eps, **options) for step, eps in enumerate(EPSILONS)]
    return save_animation(frames, target)


def _unseen(record: Record) -> str:
    unseen = record.data is not None and record.data.protocol == "patient" and record.data.verified
    return "a slice of a patient that no model has seen" if unseen else ""
