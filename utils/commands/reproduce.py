"""Run the notebooks in order."""

from __future__ import annotations

import time
from typing import Annotated

from cyclopts import Parameter

from utils.commands.boundary import command
from utils.core.paths import ROOT
from utils.reporting.gallery import write_gallery
from utils.reporting.notebook_plan import Order, plan
from utils.reporting.notebooks import run


@command("python -m utils reproduce")
def main(*, order: Annotated[Order, Parameter(name="*")] = Order()) -> None:  # noqa: B008 - frozen
    """Run the notebooks in order: by default all of them, small, on phantoms, in a few minutes."""
    order = order.filled()
    begun = time.perf_counter()
    steps = plan(order)
    folder, jobs = order.out or ROOT, order.jobs or 1
    together = f", {jobs} at a time" if jobs > 1 else ""
    print(f"{len(steps)} notebooks{together}, profile {order.profile}, results in {folder}")
    if order.profile == "quick":
        print("one to four minutes a notebook on two CPU cores; each training says how long it will take")
    run(steps, out=order.out, jobs=jobs)
    minutes = (time.perf_counter() - begun) / 60
    page = write_gallery(folder)
    notebooks = order.out / "notebooks" if order.out else ROOT / "models"
    print(f"done in {minutes:.1f} minutes. Figures: {page}  notebooks: {notebooks}")
