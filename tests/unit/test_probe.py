"""The last layer by logistic regression: what it answers, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.def_models import build_model
from tests.toy import toy_images
from utils.evaluation.metrics import predict
from utils.evaluation.probe import STRENGTH, fit_head, last_linear


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("backbone", ["dino_v2", "resnet34"])
def test_a_fitted_head_answers_new_images_and_leaves_the_rest_alone(backbone: str, k: int) -> None:
    torch.manual_seed(0)
    model = build_model(backbone, num_classes=k, image_size=56)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fit_head(model, toy_images(256, seed=1, k=k)) is model
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    layer = last_linear(model)
    assert changed == {name for name, value in model.named_parameters() if value is layer.weight or value is layer.bias}
    new = toy_images(256, seed=2, k=k)
    assert (predict(model, new).argmax(1) == new.labels).float().mean() > 1.5 / k


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.usefixtures("small_backbone")
def test_its_probabilities_are_those_of_scikit_learn(k: int) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    torch.manual_seed(0)
    model, images = build_model("small", num_classes=k, image_size=32), toy_images(96, seed=1, k=k)
    features = torch.cat([model.eval().features(batch) for batch, _ in images.batches(32)]).detach().numpy()
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, class_weight="balanced"))
    wanted = reference.fit(features, images.labels.numpy()).predict_proba(features)
    found = predict(fit_head(model, images), images).softmax(1).numpy()
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.usefixtures("small_backbone")
def test_a_class_without_images_is_not_answered() -> None:
    model, images = build_model("small", num_classes=4, image_size=32), toy_images(96, seed=1, k=4)
    known = images.subset(torch.nonzero(images.labels != 2)[:, 0])
    assert predict(fit_head(model, known), images).softmax(1)[:, 2].max() < 0.01
    with pytest.raises(ValueError, match="one class"):
        fit_head(model, images.subset(torch.nonzero(images.labels == 2)[:, 0]))


@pytest.mark.usefixtures("small_backbone")
def test_a_head_without_a_linear_layer_is_refused() -> None:
    model = build_model("small", image_size=32)
    model.backbone.out = nn.Identity()
    with pytest.raises(ValueError, match="no linear layer"):
        fit_head(model, toy_images(32, seed=1))
