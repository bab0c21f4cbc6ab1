from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.core.radii import GRIDS, NORMS, check_eps, parse_radius, radius_label, warn_if_negligible


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), ("0.0314", 0.0314), (".5/255", 0.5 / 255), (" 2 / 255 ", 2 / 255), ("0", 0.0), ("1e-3", 1e-3)],
)
def test_both_notations_are_read(text: str, value: float) -> None:
    assert parse_radius(text) == value


@pytest.mark.parametrize("text", ["", "8", "x", "8/0", "-1/255", "nan", "inf", "1/2/3", "8/255/", "2e400"])
def test_what_is_no_radius_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"8/255|k/255"):
        parse_radius(text)


def test_an_l2_radius_is_a_length() -> None:
    assert parse_radius("3.5", "l2") == 3.5
    with pytest.raises(ValueError, match="norm must be one of"):
        parse_radius("1", "l1")
    for wrong in (-1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError):
            check_eps(wrong, "l2")


@given(st.integers(0, 255 * 4))
def test_quarters_of_grey_levels_are_shown_as_such_and_read_back(quarters: int) -> None:
    eps = quarters / 4 / 255
    assert radius_label(eps).endswith("/255")
    if quarters < 400:
        assert parse_radius(radius_label(eps)) == pytest.approx(eps)


def test_each_norm_has_its_own_grid_and_labels() -> None:
    assert set(GRIDS) == set(NORMS) and all(grid[0] == 0 and list(grid) == sorted(grid) for grid in GRIDS.values())
    assert [radius_label(eps) for eps in GRIDS["linf"]] == [
        "0/255",
        "0.5/255",
        "1/255",
        "0.005",
        "2/255",
        "4/255",
        "8/255",
    ]
    assert radius_label(0.25, "l2") == "L2 0.25"


def test_a_radius_that_cannot_matter_warns() -> None:
    with pytest.warns(UserWarning, match="too small to change an answer"):
        warn_if_negligible([0.0, 0.0314 / 255])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_negligible([0.0, 0.5 / 255, 8 / 255])
        warn_if_negligible(GRIDS["l2"], "l2")
