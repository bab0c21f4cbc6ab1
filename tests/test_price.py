from __future__ import annotations

import pytest

from utils.evaluation.masking import verdict_of
from utils.experiments.records import comparison_table, display_name
from utils.reporting.pages import price
from utils.reporting.price import price_of_hardening, price_of_vote, price_sentences, recalls_of, weights_of_vote


def _worst(recall: dict[str, float | None], robust: tuple[float, float] = (0.5, 0.4)) -> dict:
    curve = {"epsilons": [0.0, 2 / 255], "robust_accuracy": list(robust), "n_images": 80, "n_subjects": 20}
    levels = {"3 classes": {"image": {"recall": recall}}}
    return {"curve": curve, "metrics": [levels, {"3 classes": {"image": {"recall": dict.fromkeys(recall, 0.0)}}}]}


def _vote(robust: tuple[float, float], **members: list[float]) -> dict:
    best = [max(values) for values in zip(*members.values())]
    return _worst({"CN": 1.0}, robust) | {"vote": {"members": members, "best member": best}}


def test_a_recall_that_falls_is_named_with_both_numbers() -> None:
    plain, hard = _worst({"CN": 0.5, "MCI": 0.7, "AD": None}), _worst({"CN": 0.9, "MCI": 0.075, "AD": None})
    (said,) = price_of_hardening({"ResNet34": plain, "ResNet34_atk": hard, "DINOv2_atk": hard})
    assert said.startswith("ResNet34, hardening: recall falls for MCI from 70.0 to 7.5 % (without attack, 80 test")
    assert "CN 50.0 → 90.0, MCI 70.0 → 7.5)" in said and "AD" not in said
    (said,) = price_of_hardening({"A": plain, "A_atk": plain})
    assert "no recall falls by more than 10 points" in said
    with pytest.raises(ValueError, match="4/255 was not measured; there are 0/255, 2/255"):
        recalls_of(plain, 4 / 255)


def test_a_vote_is_held_against_the_best_member_of_each_radius() -> None:
    said = price_of_vote(_vote((0.5, 0.3), A_atk=[0.6, 0.1], B=[0.4, 0.3]))
    assert "not better than its best member at any radius" in said and "On the same 80 images" in said
    assert "without attack 50.0 against 60.0 (A, hardened), at 2/255 30.0 against 30.0 (B)" in said
    said = price_of_vote(_vote((0.5, 0.4), A_atk=[0.6, 0.1], B=[0.4, 0.3]))
    assert "better than its best member at 2/255 and not elsewhere" in said
    assert "at every radius" in price_of_vote(_vote((0.7, 0.4), A_atk=[0.6, 0.1], B=[0.4, 0.3]))


def test_a_weighted_vote_of_one_member_is_called_so() -> None:
    assert weights_of_vote(["A_atk", "B_atk"], [1e-8, 1 - 1e-8]) == (
        "The weighted vote is one member: the weight of B, hardened is 1.000."
    )
    assert weights_of_vote(["A_atk", "B"], [0.25, 0.75]) == "Weights of the weighted vote: A, hardened 0.250; B 0.750."


def test_the_list_of_a_document_holds_all_sentences() -> None:
    vote = {"vote": {"members": ["ResNet34_atk"], "weights": {"weighted": [1.0]}}}
    vote |= {"worst_case": _vote((0.5, 0.3), ResNet34_atk=[0.6, 0.1])}
    records = [{"title": title, "worst_case": _worst({"CN": 0.5})} for title in ("ResNet34", "ResNet34_atk")]
    lines = price([*records, vote]).splitlines()
    assert len(lines) == 3 and all(line.startswith("- ") for line in lines)
    assert price_sentences({"ResNet34": {"test": {}}}) == []


def test_a_comparison_says_on_how_many_images() -> None:
    test = {"image": {"n": 80, "accuracy": 0.5, "balanced_accuracy": 0.25}, "patient": None}
    curve = {"epsilons": [0.0, 0.005, 2 / 255], "robust_accuracy": [0.5, 0.4, 0.3]}
    table = comparison_table({"ResNet34_atk": {"test": test, "robustness": {"FGSM": curve}}})
    row = table.loc["ResNet34, hardened"]
    assert row["images"] == 80 and row["clean"] == 50 and (row["FGSM, 0.005"], row["FGSM, 2/255"]) == (40, 30)


def test_names_in_words() -> None:
    assert display_name("ResNet34_atk") == "ResNet34, hardened" and display_name("DINOv2") == "DINOv2"
    assert display_name("PGD-20 from DINOv2_atk, x") == "PGD-20 from DINOv2, hardened, x"
    assert display_name("my_atk_model") == "my_atk_model"


def test_a_verdict_counts_checks_and_names_those_that_failed() -> None:
    checks = [{"question": "a, b", "passed": True}, {"question": "c", "name": "steps", "passed": False}]
    assert verdict_of(None) == "unchecked"
    assert verdict_of({"checks": checks[:1]}) == "gradient checks 1/1"
    assert verdict_of({"checks": checks}).endswith("1/2: steps")
