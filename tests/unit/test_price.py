from __future__ import annotations

from collections.abc import Sequence

import pytest

from utils.evaluation.masking import Check, verdict_of
from utils.evaluation.robustness import SuiteRecord
from utils.experiments.records import comparison_table, display_name
from utils.reporting.pages import price
from utils.reporting.price import price_of_hardening, price_of_vote, price_sentences, recalls_of, weights_of_vote
from utils.training.record import RuleScores, parse_record


def _worst(recall: dict[str, float | None], robust: tuple[float, float] = (0.5, 0.4), **more: object) -> SuiteRecord:
    told = {"title": "x", "classes": [*recall], "data": {"source": "phantom", "protocol": "patient"}, **more}
    clean, attacked = ({"3 classes": {"image": _scores(own), "patient": None}} for own in (recall, {"CN": 0.0}))
    content = {"curve": _curve([0.0, 2 / 255], robust), "metrics": [clean, attacked], "interval": [None, None]}
    content |= {"panel": None, "answers": {"probability": [], "right": []}}
    return SuiteRecord.model_validate(content | told)


def _curve(epsilons: list[float], robust: Sequence[float]) -> dict:
    shared = {"title": "FGSM", "attacks": [], "threat": {"title": "L-inf"}, "n_images": 80, "n_subjects": 20}
    lists = {"rounded_accuracy": [None] * len(epsilons), "max_norm": [0.0] * len(epsilons)}
    lists |= {"broken_by": [-1] * 80}
    return (
        shared | lists | {"epsilons": epsilons, "robust_accuracy": [*robust], "first_broken": [-1] * 80, "seconds": 1.0}
    )


def _scores(recall: dict[str, float | None]) -> dict:
    return {"n": 80, "accuracy": 0.5, "balanced_accuracy": 0.25, "macro_f1": 0.3, "auroc": None, "recall": recall}


def _vote(robust: tuple[float, float], **members: list[float]) -> SuiteRecord:
    best = [max(values) for values in zip(*members.values())]
    alone = {"rule": "soft", "alone": {}, "joint": [], "transfer_only": [], "oracle": []}
    return _worst({"CN": 1.0}, robust, vote=alone | {"members": members, "best_member": best})


def _price_of(record: SuiteRecord) -> str:
    return price_of_vote(record, record.vote)


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
    said = _price_of(_vote((0.5, 0.3), A_atk=[0.6, 0.1], B=[0.4, 0.3]))
    assert "not better than its best member at any radius" in said and "On the same 80 images" in said
    assert "without attack 50.0 against 60.0 (A, hardened), at 2/255 30.0 against 30.0 (B)" in said
    said = _price_of(_vote((0.5, 0.4), A_atk=[0.6, 0.1], B=[0.4, 0.3]))
    assert "better than its best member at 2/255 and not elsewhere" in said
    assert "at every radius" in _price_of(_vote((0.7, 0.4), A_atk=[0.6, 0.1], B=[0.4, 0.3]))


def test_a_weighted_vote_of_one_member_is_called_so() -> None:
    assert weights_of_vote(["A_atk", "B_atk"], [1e-8, 1 - 1e-8]) == (
        "The weighted vote is one member: the weight of B, hardened is 1.000."
    )
    assert weights_of_vote(["A_atk", "B"], [0.25, 0.75]) == "Weights of the weighted vote: A, hardened 0.250; B 0.750."


def test_the_list_of_a_document_holds_all_sentences() -> None:
    whose = {"classes": ["CN"], "data": {"source": "phantom", "protocol": "patient"}}
    config, objective = {"learning_rate": 1e-3, "precision": "fp32", "seed": 0}, {"name": "standard"}
    training = {
        "config": config,
        "start": "scratch",
        "best_epoch": 0,
        "selected_by": "x",
        "seconds": 1.0,
        "history": [],
    }
    model = {"model": {"backbone": "resnet34", "num_classes": 4, "image_size": 32}} | whose
    worst = _worst({"CN": 0.5}).plain()
    plain = model | {"training": training | {"objective": objective}, "worst_case": worst}
    hardened = model | {"training": training | {"objective": {"name": "trades"}}, "worst_case": worst}
    vote = {"rule": "soft", "members": ["ResNet34_atk"], "weights": {"weighted": [1.0]}}
    of_vote = whose | {"vote": vote, "worst_case": _vote((0.5, 0.3), ResNet34_atk=[0.6, 0.1]).plain()}
    lines = price([parse_record(one, "x") for one in (plain, hardened, of_vote)]).splitlines()
    assert len(lines) == 3 and all(line.startswith("- ") for line in lines)
    assert price_sentences({"ResNet34": parse_record(model, "x")}) == []


def test_a_comparison_says_on_how_many_images() -> None:
    curve = _curve([0.0, 0.005, 2 / 255], [0.5, 0.4, 0.3])
    content = {"test": {"image": _scores({}), "patient": None}, "robustness": {"FGSM": curve}}
    table = comparison_table({"ResNet34_atk": RuleScores.model_validate(content)})
    row = table.loc["ResNet34, hardened"]
    assert row["images"] == 80 and row["clean"] == 50 and (row["FGSM, 0.005"], row["FGSM, 2/255"]) == (40, 30)


def test_names_in_words() -> None:
    assert display_name("ResNet34_atk") == "ResNet34, hardened" and display_name("DINOv2") == "DINOv2"
    assert display_name("PGD-20 from DINOv2_atk, x") == "PGD-20 from DINOv2, hardened, x"
    assert display_name("my_atk_model") == "my_atk_model"


def test_a_verdict_counts_checks_and_names_those_that_failed() -> None:
    checks = [
        Check(question="a, b", measured="1", passed=True),
        Check(question="c", measured="2", passed=False, name="steps"),
    ]
    assert verdict_of(None) == "unchecked"
    assert verdict_of(checks[:1]) == "gradient checks 1/1"
    assert verdict_of(checks).endswith("1/2: steps")
