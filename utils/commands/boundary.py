"""How every command is made from a typed function, and how it ends: in one line, with an exit status."""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from cyclopts import App, Parameter
from cyclopts.config import Dict
from cyclopts.exceptions import CycloptsError, MissingArgumentError

#: Ended by Ctrl-C, as shells count it; words that make no call, as argparse counts it.
STOPPED, MISUSED = 130, 2
_EPILOGUE = (
    "--config FILE.yaml gives options from a file, one `name: value` a line; those typed count more. --debug shows "
    "where an error arose. Research code, not for clinical use."
)


class Command:
    """A function as a command: its arguments are the options, its docstring is the help.

    Calling it takes a command's words, or those of this process, and returns the exit status: 0, what the function
    returns, 1 after an error, 2 for words that make no call, 130 after Ctrl-C. An error is said in one line, its
    traceback only with ``--debug``. Whatever was finished is stored, and the same command goes on from there.
    """

    def __init__(self, function: Callable[..., int | None], name: str) -> None:
        self.function = function
        self.__doc__ = function.__doc__
        self.app = App(
            name=name,
            default_command=function,
            default_parameter=Parameter(negative=(), consume_multiple=True, allow_repeating=True),
            help_format="plaintext",
            help_epilogue=_EPILOGUE,
            version_flags=[],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
            suppress_keyboard_interrupt=False,
        )
        self.app["--help"].show = False

    def __call__(self, arguments: Sequence[str] | None = None) -> int:
        """Run it with a command's words, or those of this process; returns the exit status."""
        words = list(sys.argv[1:] if arguments is None else arguments)
        debug = "--debug" in words
        words = [word for word in words if word != "--debug"]
        try:
            with _plain_warnings(debug):
                return self._call(words)
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from what is finished", file=sys.stderr)
            return STOPPED
        except CycloptsError as error:
            return _said(f"{_misused(error, words)}; {self.app.name[0]} --help lists the options", MISUSED)
        except (OSError, ValueError, RuntimeError, FloatingPointError, KeyError, ImportError) as error:
            if debug:
                traceback.print_exc()
            return _said(_told(error), 1)

    def _refuse_fractions(self, words: list[str]) -> None:
        """An option that counts takes no fraction, which the library would round.

        Raises:
            ValueError: the option and what was given.
        """
        counts = self._counting()
        option = ""
        for word in words:
            name, _, value = word.partition("=") if word.startswith("--") else (option, "", word)
            option = name
            if option in counts and re.fullmatch(r"[+-]?\d*\.\d*[1-9]\d*", value):
                raise ValueError(f"{option} takes a whole number, not {value}")

    def _counting(self) -> set[str]:
        """Options that take whole numbers and nothing else."""
        return {name for own in self.app.assemble_argument_collection() if _counts(own.hint) for name in own.names}

    def _refuse_fractions_in(self, file: Path, options: Mapping[str, Any]) -> None:
        """The same of a configuration file.

        Raises:
            ValueError: the file, the option and what stands there.
        """
        counts = self._counting()
        for name, given in options.items():
            for value in given if isinstance(given, list) else [given]:
                option = f"--{str(name).replace('_', '-')}"
                if option in counts and isinstance(value, float) and not value.is_integer():
                    raise ValueError(f"{file}: {name} takes a whole number, not {value}")

    def _refuse_empty(self, words: list[str]) -> None:
        """An option that takes values has one; the library would take none for an empty list, and the default counts.

        Raises:
            ValueError: it has none.
        """
        lists = {name for own in self.app.assemble_argument_collection() if _takes_many(own.hint) for name in own.names}
        for word, after in zip(words, [*words[1:], "--"]):
            if word in lists and after.startswith("--"):
                raise ValueError(f"{word} needs at least one value")

    def _call(self, words: list[str]) -> int:
        self._refuse_empty(words)
        self._refuse_fractions(words)
        self.app.config = ()
        words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        if "--config" in words:
            place = words.index("--config")
            if place + 1 == len(words):
                raise ValueError("--config needs the path of a YAML file")
            file = Path(words[place + 1])
            del words[place : place + 2]
            given = _read_config(file)
            self._refuse_fractions_in(file, given)
            options = {name: _as_words(value) for name, value in given.items()}
            # not below the name of the command: a file holds the options of one
            self.app.config = (Dict(options, source=str(file), use_commands_as_keys=False),)
        return self.app(words) or 0

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The arguments of the call that these words make, defaults included.

        Raises:
            CycloptsError: they make none.
        """
        _, bound, _ = self.app.parse_args(list(arguments))
        bound.apply_defaults()
        return dict(bound.arguments)


@contextmanager
def _plain_warnings(debug: bool) -> Iterator[None]:
    """Inside, a warning is a line of its own without the code that it came from; ``debug`` leaves them as they are."""
    usual = warnings.formatwarning
    if not debug:
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def command(name: str) -> Callable[[Callable[..., int | None]], Command]:
    """Make a function the command ``name``, for instance ``python -m utils train``."""
    return lambda function: Command(function, name)


def _read_config(file: Path) -> dict[str, Any]:
    """The options in a configuration file.

    Raises:
        FileNotFoundError, ValueError: it is not there, no YAML, or holds something else; the message names it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--config: there is no file {file}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is no YAML: {error}; write one `name: value` a line") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{file} holds no options; write one `name: value` a line")
    return content


def _as_words(value: Any) -> Any:
    """A value of a configuration file; names and values below an option, as of ``set:``, as it takes them typed."""
    return [f"{name}={own}" for name, own in value.items()] if isinstance(value, Mapping) else value


def _takes_many(hint: Any) -> bool:
    """Whether an option takes a list of any length."""
    return any(get_origin(kind) in (tuple, list) for kind in (hint, *get_args(hint)))


def _counts(hint: Any) -> bool:
    """Whether an option takes whole numbers and nothing else, one or several of them."""
    kinds = [kind for kind in get_args(hint) if kind not in (type(None), ...)] if get_args(hint) else [hint]
    return all(kind is int or (get_origin(kind) is tuple and _counts(kind)) for kind in kinds)


def _misused(error: CycloptsError, words: Sequence[str]) -> str:
    """What is wrong with a command's words; of an option that is not there at all, that it is needed."""
    name = error.argument.name if isinstance(error, MissingArgumentError) and error.argument else ""
    if name.startswith("--") and not any(word.split("=")[0] == name for word in words):
        return f"{name} is needed"
    negative = re.search(r'Unknown option: "?(-\.?\d[^\s"]*?)"?[.\s]', f"{error} ")
    return f"{negative[1]} is negative, which this option does not take" if negative else str(error).rstrip(".")


def _told(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"there is no entry {error} where one is needed; is a stored file damaged?"
    return str(error)


def _said(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
