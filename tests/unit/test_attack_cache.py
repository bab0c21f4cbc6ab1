"""The key of an evaluation changes with everything that its numbers depend on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from models.def_models import build_model
from utils.evaluation.attack_cache import describe_module


def double(images: torch.Tensor) -> torch.Tensor:
    return 2 * images


def triple(images: torch.Tensor) -> torch.Tensor:
    return 3 * images


SCALE = 2.0


def scaled(images: torch.Tensor) -> torch.Tensor:
    return images * SCALE


class Net(nn.Module):
    offset = 0.5

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 2)
        self.shift = torch.zeros(4)
        self.register_buffer("scale", torch.ones(4), persistent=False)
        self.settings = {"rates": [1.0, 2.0], "names": ("a", "b")}
        self.grid = np.arange(4)
        self.order = [0, 1, 2]
        self.before: Callable[[torch.Tensor], torch.Tensor] = double

    def helper(self, images: torch.Tensor) -> torch.Tensor:
        return images + 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(self.helper(scaled(self.before(images))) * self.scale + self.shift + self.offset)


class Edited(Net):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(self.helper(self.before(images)) * self.scale + self.shift).round()


Edited.__qualname__ = "Net"


class EditedHelper(Net):
    def helper(self, images: torch.Tensor) -> torch.Tensor:
        return images + 2


EditedHelper.__qualname__ = "Net"


def _closing_over(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda images: images * value


def _change(change: Callable[[Net], object]) -> Net:
    net = Net()
    change(net)
    return net


def _patched(net: Net, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    net.forward = how


class OtherOffset(Net):
    offset = 0.6


OtherOffset.__qualname__ = "Net"


CHANGES = {
    "whole numbers in a list": lambda: _change(lambda net: net.order.reverse()),
    "value of the class": OtherOffset,
    "weight": lambda: _change(lambda net: net.body.weight.data.add_(1e-3)),
    "plain tensor": lambda: _change(lambda net: net.shift.add_(1e-3)),
    "buffer that is not saved": lambda: _change(lambda net: net.scale.mul_(1.5)),
    "number in a list in a dictionary": lambda: _change(lambda net: net.settings["rates"].__setitem__(1, 2.5)),
    "another key": lambda: _change(lambda net: net.settings.update(more=1)),
    "array": lambda: _change(lambda net: net.grid.__setitem__(0, 9)),
    "function": lambda: _change(lambda net: setattr(net, "before", triple)),
    "partial": lambda: _change(lambda net: setattr(net, "before", partial(torch.mul, other=2.0))),
    "partial of another number": lambda: _change(lambda net: setattr(net, "before", partial(torch.mul, other=3.0))),
    "closure": lambda: _change(lambda net: setattr(net, "before", _closing_over(2.0))),
    "closure over another number": lambda: _change(lambda net: setattr(net, "before", _closing_over(3.0))),
    "forward of the class": Edited,
    "a method that forward calls": EditedHelper,
    "forward of the instance": lambda: _change(lambda net: _patched(net, double)),
    "another forward of the instance": lambda: _change(lambda net: _patched(net, triple)),
}


def test_every_change_gives_another_key() -> None:
    keys = {name: describe_module(make()) for name, make in {"as it was": Net, **CHANGES}.items()}
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize(("name", "value"), [("SCALE", 2.5), ("scaled", triple)])
def test_what_forward_looks_up_counts_too(name: str, value: object, monkeypatch) -> None:
    before = describe_module(Net())
    monkeypatch.setitem(globals(), name, value)
    assert describe_module(Net()) != before


def test_an_edit_of_a_base_class_counts(monkeypatch) -> None:
    class Leaf(Net):
        pass

    before = describe_module(Leaf())
    monkeypatch.setattr(Net, "helper", EditedHelper.helper)
    assert describe_module(Leaf()) != before


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_model_has_the_same_key(name: str) -> None:
    assert describe_module(CHANGES[name]()) == describe_module(CHANGES[name]())


def test_modes_and_gradients_do_not_count() -> None:
    one, other = Net().eval(), Net().train()
    other.body.weight.grad = torch.ones(2, 4)
    assert describe_module(one) == describe_module(other)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet34", "dino_v2"])
def test_a_fresh_process_comes_to_the_same_key(backbone: str) -> None:
    code = (
        "import torch; from models.def_models import build_model; "
        "from utils.evaluation.attack_cache import describe_module; "
        f"torch.manual_seed(3); print(describe_module(build_model('{backbone}', image_size=42)))"
    )
    torch.manual_seed(3)
    here = describe_module(build_model(backbone, image_size=42))
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip().splitlines()[-1] == here
