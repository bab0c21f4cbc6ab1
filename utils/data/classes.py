"""What class folders of any data set mean, and the order of classes."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Dementia stages by severity. Every label, table and confusion matrix uses this order.
CLASSES = ("Non", "VeryMild", "Mild", "Moderate")


#: What class folders are called, by severity: letters only, without an ending such as "demented".
_HEALTHY = (
    "non no not un nondem noad nonad noalzheimer noalzheimers nonalzheimer nonalzheimers cn nc nl hc ctrl "
    "noalzheimerdisease noalzheimersdisease normal normals control controls "
    "healthy healthycontrol healthycontrols normalcontrol normalcontrols normalcognition cognitivelynormal "
    "cognitivenormal cognitivelyhealthy cognitivelyun cognitivelyintact nocognitive nci"
)
#: "No Alzheimer's" is healthy; a "non-Alzheimer dementia" is another dementia.
_OTHER_DEMENTIA = re.compile(r"non?(ad|alzheimers?(disease)?)(type)?(dementia|demented)")


_SEVERITY = (
    set(_HEALTHY.split()),
    {"smc", "scd", "significantmemoryconcern", "subjectivememorycomplaint", "subjectivecognitivedecline"},
    {"emci", "earlymci", "earlymildcognitive"},
    {"mci", "mildcognitive"},
    {"lmci", "latemci", "latemildcognitive"},
    {"converted"},
    {"verymild"},
    {"mild"},
    {"moderate"},
    {"severe"},
    {"ad", "dementia", "demented", "alzheimer", "alzheimers", "alzheimerdisease", "alzheimersdisease"},
)


def canonical_class(folder_name: str) -> str:
    """The name of ``CLASSES`` that a folder name means, or the folder name itself.

    >>> canonical_class("Very_Mild_Demented"), canonical_class("No Impairment"), canonical_class("CN")
    ('VeryMild', 'Non', 'CN')
    """
    known = {"no": "Non", **{name.lower(): name for name in CLASSES}}
    return known.get(_class_key(folder_name), folder_name)


def check_class_name(name: str, where: str) -> str:
    """A class name out of a table, which becomes the name of a folder.

    Args:
        where: file and place, for the message.

    Raises:
        ValueError: it is empty, hidden, or would lead out of that folder.
    """
    if not name.strip() or name[0] in "._" or set(name) & set("/\\\0"):
        raise ValueError(f"{where} has the label {name!r}, which can be no folder's name")
    return name


def healthy_class(classes: Sequence[str]) -> str | None:
    """The one class that means no dementia, such as Non, CN, NC, Normal or Control; None where none or several do.

    >>> healthy_class(("AD", "CN", "MCI")), healthy_class(("apple", "pear"))
    ('CN', None)
    """
    found = [name for name in classes if severity(name) == 0]
    return found[0] if len(found) == 1 else None


def healthy_place(classes: Sequence[str], remedy: str = "") -> int:
    """Place of :func:`healthy_class`.

    Args:
        remedy: what the message says to do.

    Raises:
        ValueError: none is known to mean healthy.
    """
    name = healthy_class(classes)
    if name is None:
        raise ValueError(f"none of the classes {', '.join(classes)} is known to mean healthy{remedy}")
    return list(classes).index(name)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _class_key(name: str) -> str:
    letters = _letters(name)
    return re.sub(r"(demented|dementia|impairment|impaired)$", "", letters) or letters


def severity(name: str) -> int | None:
    """Rank of a class name, 0 for no dementia; None where it is not known."""
    if _OTHER_DEMENTIA.fullmatch(_letters(name)):
        return None
    key = _class_key(name)
    return next((rank for rank, known in enumerate(_SEVERITY) if key in known), None)


def class_order(names: set[str]) -> tuple[str, ...]:
    """Class names by severity where all are known, else by the alphabet, numbers by their value."""
    ranks = {name: severity(name) for name in names}
    if None in ranks.values():
        return tuple(sorted(names, key=_by_value))
    return tuple(sorted(names, key=lambda name: (ranks[name], name)))


def _by_value(name: str) -> list[tuple[int, int, str]]:
    """Order in which 2 comes before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def chosen_order(found: tuple[str, ...], chosen: Sequence[str] | None) -> tuple[str, ...]:
    """The order that somebody chose, or the one found.

    Raises:
        ValueError: not the same names.
    """
    if chosen is None:
        return found
    order = tuple(name if name in found else canonical_class(name) for name in chosen)
    if sorted(order) != sorted(found):
        raise ValueError(f"classes must be {', '.join(found)} in an order of your choice, not {', '.join(chosen)}")
    return order
