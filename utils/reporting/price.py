"""What hardening and voting cost, in sentences that are computed from the records beside which they stand."""

from __future__ import annotations

from collections.abc import Mapping

from utils.core.radii import radius_label
from utils.evaluation.robustness import SuiteRecord, WorstCase
from utils.evaluation.vote import VoteAttack
from utils.experiments.records import HARDENED, display_name
from utils.training.record import Record, VoteRecord

#: A recall that falls by more than this is named by itself.
STEEP = 0.1
#: A vote in which one member has more than this share of the weights is that member.
ALONE = 0.99


def recalls_of(record: WorstCase, eps: float = 0.0) -> dict[str, float | None]:
    """Class -> recall 0..1 over images under the worst case at ``eps``; None where a class has no image.

    Args:
        record: see :func:`utils.reporting.robustness_figures.worst_cases`.

    Raises:
        ValueError: that radius was not measured.
    """
    radii, metrics = record.curve.epsilons, record.metrics_at(eps)
    if metrics is None:
        raise ValueError(f"{radius_label(eps)} was not measured; there are {', '.join(map(radius_label, radii))}")
    found = next(iter(metrics.values())).image
    return found.recall if found else {}


def price_of_hardening(records: Mapping[str, WorstCase]) -> list[str]:
    """A sentence for each pair of a plain and a hardened model: recall of each class before and after, without attack.

    Args:
        records: title -> worst case, see :func:`utils.reporting.robustness_figures.worst_cases`.
    """
    pairs = [(title.removesuffix(HARDENED), title) for title in records if title.endswith(HARDENED)]
    return [_price(plain, records[plain], records[hard]) for plain, hard in pairs if plain in records]


def _price(title: str, before: WorstCase, after: WorstCase) -> str:
    old, new = recalls_of(before), recalls_of(after)
    pairs = [(name, first, new[name]) for name, first in old.items()]
    known = [(name, 100 * first, 100 * last) for name, first, last in pairs if first is not None and last is not None]
    changes = ", ".join(f"{name} {first:.1f} → {last:.1f}" for name, first, last in known)
    lost = [(name, first, last) for name, first, last in known if first - last > 100 * STEEP]
    falls = " and ".join(f"{name} from {first:.1f} to {last:.1f} %" for name, first, last in lost)
    told = f"recall falls for {falls}" if lost else f"no recall falls by more than {100 * STEEP:.0f} points"
    n = after.curve.n_images
    return f"{title}, hardening: {told} (without attack, {n} test images; recall in %: {changes})."


def price_of_vote(record: WorstCase, attack: VoteAttack) -> str:
    """Whether a vote is better than its best member on the same images, radius by radius.

    Args:
        record: worst case of a vote.
        attack: what is known of its members on the same images.
    """
    curve, members = record.curve, attack.members
    best = [list(members)[values.index(max(values))] for values in zip(*members.values())]
    rows = list(zip(curve.epsilons, curve.robust_accuracy, best))
    better = [eps for step, (eps, value, name) in enumerate(rows) if value > members[name][step] + 1e-9]
    shown = ", ".join(
        f"{_at(eps)} {100 * value:.1f} against {100 * members[name][step]:.1f} ({display_name(name)})"
        for step, (eps, value, name) in enumerate(rows)
    )
    where = " and ".join(map(_at, better))
    if not better:
        told = "the vote is not better than its best member at any radius"
    elif len(better) == len(rows):
        told = "the vote is better than its best member at every radius"
    else:
        told = f"the vote is better than its best member {where} and not elsewhere"
    n = curve.n_images
    by = ", ".join(attack.members_by)
    return (
        f"On the same {n} images, the vote attacked in {len(attack.alone)} ways and each member by {by}, {told} "
        f"(robust accuracy in %: {shown})."
    )


def _at(eps: float) -> str:
    return "without attack" if eps == 0 else f"at {radius_label(eps)}"


def weights_of_vote(members: list[str], weights: list[float]) -> str:
    """What the weights that the validation patients gave to a weighted vote make of it."""
    heaviest = max(range(len(members)), key=weights.__getitem__)
    if weights[heaviest] > ALONE:
        name = display_name(members[heaviest])
        return f"The weighted vote is one member: the weight of {name} is {weights[heaviest]:.3f}."
    shares = "; ".join(f"{display_name(name)} {weight:.3f}" for name, weight in zip(members, weights))
    return f"Weights of the weighted vote: {shares}."


def price_sentences(records: Mapping[str, Record | SuiteRecord]) -> list[str]:
    """All that the records tell of what hardening and voting cost.

    Args:
        records: title -> record of a trained model or of the vote, or of a suite.
    """
    found_of = {title: own.worst_case if isinstance(own, Record) else own for title, own in records.items()}
    worst = {title: found for title, found in found_of.items() if found is not None}
    said = price_of_hardening(worst)
    for title, own in worst.items():
        if own.vote:
            said.append(price_of_vote(own, own.vote))
        record = records[title]
        if isinstance(record, VoteRecord) and "weighted" in record.vote.weights:
            said.append(weights_of_vote(record.vote.members, record.vote.weights["weighted"]))
    return said
