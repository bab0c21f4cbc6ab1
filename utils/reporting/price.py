"""What hardening and voting cost, in sentences that are computed from the records beside which they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.core.radii import radius_label
from utils.experiments.records import HARDENED, display_name

Record = Mapping[str, Any]
#: A recall that falls by more than this is named by itself.
STEEP = 0.1
#: A vote in which one member has more than this share of the weights is that member.
ALONE = 0.99


def recalls_of(record: Record, eps: float = 0.0) -> dict[str, float | None]:
    """Class -> recall 0..1 over images under the worst case at ``eps``; None where a class has no image.

    Args:
        record: see :func:`utils.reporting.robustness_figures.worst_cases`.

    Raises:
        ValueError: that radius was not measured.
    """
    radii = record["curve"]["epsilons"]
    if eps not in radii:
        raise ValueError(f"{radius_label(eps)} was not measured; there are {', '.join(map(radius_label, radii))}")
    return next(iter(record["metrics"][radii.index(eps)].values()))["image"]["recall"]


def price_of_hardening(records: Mapping[str, Record]) -> list[str]:
    """A sentence for each pair of a plain and a hardened model: recall of each class before and after, without attack.

    Args:
        records: title -> worst case, see :func:`utils.reporting.robustness_figures.worst_cases`.
    """
    pairs = [(title.removesuffix(HARDENED), title) for title in records if title.endswith(HARDENED)]
    return [_price(plain, records[plain], records[hard]) for plain, hard in pairs if plain in records]


def _price(title: str, before: Record, after: Record) -> str:
    old, new = recalls_of(before), recalls_of(after)
    known = [name for name in old if old[name] is not None and new[name] is not None]
    changes = ", ".join(f"{name} {100 * old[name]:.1f} → {100 * new[name]:.1f}" for name in known)
    lost = [name for name in known if old[name] - new[name] > STEEP]
    falls = " and ".join(f"{name} from {100 * old[name]:.1f} to {100 * new[name]:.1f} %" for name in lost)
    told = f"recall falls for {falls}" if lost else f"no recall falls by more than {100 * STEEP:.0f} points"
    n = after["curve"]["n_images"]
    return f"{title}, hardening: {told} (without attack, {n} test images; recall in %: {changes})."


def price_of_vote(record: Record) -> str:
    """Whether a vote is better than its best member on the same images, radius by radius.

    Args:
        record: worst case of a vote, which holds its members' on the same images.
    """
    curve, members = record["curve"], record["vote"]["members"]
    best = [max(members, key=lambda name, step=step: members[name][step]) for step in range(len(curve["epsilons"]))]
    rows = list(zip(curve["epsilons"], curve["robust_accuracy"], best))
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
    n = curve["n_images"]
    return (
        f"On the same {n} images, vote and members each attacked on their own, {told} (robust accuracy in %: {shown})."
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


def price_sentences(records: Mapping[str, Record]) -> list[str]:
    """All that the records tell of what hardening and voting cost.

    Args:
        records: title -> record of a trained model or of the vote, or worst case.
    """
    worst = {title: {**record, **record.get("worst_case", {})} for title, record in records.items()}
    worst = {title: record for title, record in worst.items() if "curve" in record}
    found = price_of_hardening(worst)
    for title, record in worst.items():
        if record.get("vote", {}).get("best member"):
            found.append(price_of_vote(record))
        own = records[title].get("vote", {})
        if "weights" in own:
            found.append(weights_of_vote(own["members"], own["weights"]["weighted"]))
    return found
