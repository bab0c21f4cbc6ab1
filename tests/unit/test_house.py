"""The house: which package may import which, and the names under which users know its parts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

from utils.commands.verbs import VERBS, main

FLOORS = ("core", "data", "attacks", "evaluation", "training", "experiments", "reporting", "commands")
#: Modules beside the packages, which users know by these names, and the floor of each.
BESIDE = {"grad_cam": "evaluation", "optuna_search": "experiments", "utils_funcs": "commands", "__main__": "commands"}
#: Earlier names of the verbs, kept runnable.
EARLIER = {
    "prepare": "prepare",
    "fit": "train",
    "robustness": "robustness",
    "spot_check": "spot-check",
    "compare_recipes": "recipes",
    "cross_validate": "folds",
    "reproduce": "reproduce",
    "figures": "figures",
    "readme": "pages",
    "optuna_search": "search",
}


def modules() -> dict[str, Path]:
    """Dotted name -> file of all modules of the project's packages."""
    files = [path for folder in ("utils", "models") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of the project that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def floor(module: str) -> int:
    """Number of a module's floor, from 0."""
    first = module.split(".")[1]
    if first in FLOORS:
        return FLOORS.index(first)
    return FLOORS.index("commands" if first in EARLIER and first not in BESIDE else BESIDE[first])


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a higher floor, as ``from -> to``."""
    pairs = [(one, other) for one, others in graph.items() for other in sorted(others)]
    inside = [(one, other) for one, other in pairs if one.startswith("utils.") and other.startswith("utils.")]
    named = [(one, other) for one, other in inside if not other.endswith("__init__")]
    return [f"{one} -> {other}" for one, other in named if floor(other) > floor(one)]


def graph() -> dict[str, set[str]]:
    """Module -> modules that it imports."""
    known = {name: path for name, path in modules().items() if not name.endswith("__init__")}
    return {name: imports(path, set(known)) - {name} for name, path in known.items()}


def test_no_module_imports_a_higher_floor() -> None:
    # the search's file is its earlier command as well, and calls the verb only when it is run
    allowed = {"utils.optuna_search -> utils.commands.search"}
    assert set(upward(graph())) <= allowed


def test_an_import_of_a_higher_floor_would_be_seen() -> None:
    assert upward({"utils.data.sets": {"utils.reporting.plots"}}) == ["utils.data.sets -> utils.reporting.plots"]
    assert upward({"utils.reporting.plots": {"utils.data.sets"}}) == []


def test_no_circles() -> None:
    links = graph()
    links["utils.optuna_search"].discard("utils.commands.search")
    assert list(TopologicalSorter(links).static_order())  # raises CycleError


def test_models_need_nothing_of_utils() -> None:
    used = {name: others for name, others in graph().items() if name in ("models.def_models", "models.weight_files")}
    assert not [other for others in used.values() for other in others if other.startswith("utils")]


def test_each_package_says_what_lives_there() -> None:
    for name in FLOORS:
        assert ast.get_docstring(ast.parse((ROOT / "utils" / name / "__init__.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize(("module", "verb"), EARLIER.items())
def test_earlier_names_lead_to_the_same_command(module: str, verb: str) -> None:
    command = import_module(f"utils.commands.{VERBS[verb][0]}").main
    if module != "optuna_search":
        assert import_module(f"utils.{module}").main is command
    text = (ROOT / "utils" / f"{module}.py").read_text(encoding="utf-8")
    assert f"utils.commands.{VERBS[verb][0]} import main" in text and "sys.exit(main())" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys) -> None:
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"Usage: python -m utils {verb}" in said and "not for clinical use" in " ".join(said.split())


def test_verbs_are_listed_and_unknown_ones_refused(capsys) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(verb in said for verb in VERBS)
    assert main(["predikt"]) == 2
    assert "no verb 'predikt'; did you mean predict? there are prepare" in capsys.readouterr().err
    assert main(["xyz"]) == 2 and "no verb 'xyz'; there are prepare" in capsys.readouterr().err


def test_the_page_of_the_code_lists_the_verbs_and_the_packages() -> None:
    page = (ROOT / "utils" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \| (.+) \|$", page, re.M) == [(verb, said) for verb, (_, said) in VERBS.items()]
    assert re.findall(r"^\| \d \| `(\w+)` \|", page, re.M) == list(FLOORS)


def test_the_package_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "utils"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "python -m utils VERB" in done.stdout


def test_nothing_names_the_file_of_an_attack() -> None:
    """A new attack is one file in its folder, found by itself."""
    known = modules()
    kinds = {name for name in known if name.startswith("utils.attacks.kinds.") and not name.endswith("__init__")}
    named = {name: imports(path, set(known)) & kinds for name, path in known.items()}
    assert len(kinds) >= 7 and not {name: found for name, found in named.items() if found}


#: Lines of a file, of a class, and of a function without its docstring.
LONGEST_FILE, LONGEST_CLASS, LONGEST_FUNCTION = 400, 200, 60


def _lengths(path: Path) -> list[tuple[str, int, int]]:
    """Name, lines and limit of a file and of everything in it."""
    text = path.read_text(encoding="utf-8")
    found = [(path.name, len(text.splitlines()), LONGEST_FILE)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            found.append((node.name, node.end_lineno - node.lineno + 1, LONGEST_CLASS))
        elif isinstance(node, ast.FunctionDef):
            first = node.body[0]
            said = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
            found.append((node.name, node.end_lineno - node.lineno + 1 - said, LONGEST_FUNCTION))
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_is_longer_than_a_reader_takes_in(module: str) -> None:
    if not module.startswith("models.templates."):
        assert not [entry for entry in _lengths(modules()[module]) if entry[1] > entry[2]]
