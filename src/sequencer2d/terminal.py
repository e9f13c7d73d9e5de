"""What the verbs share at the terminal: options, bars of progress, our log, and names that are safe to show."""

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text


class VerbParser(ArgumentParser):
    """Options are written with hyphens; errors are one line and exit with 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"{self.prog}: {' '.join(message.split())} (options: {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def parse_args(self, args: Sequence[str], **kwargs: Any) -> Namespace:  # type: ignore[override]
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args([*map(_underscored, args[:end]), *args[end:]], **kwargs)

    def options_first(self, arguments: list[str]) -> list[str]:
        """The arguments with options and their values moved ahead of the others, which may then stand anywhere."""
        options, others = [], []
        rest = iter(arguments)
        for argument in rest:
            action = self._option_string_actions.get(_underscored(argument))
            if argument == "--":
                others += [argument, *rest]
            elif action is not None and action.nargs != 0:
                options += [argument, *islice(rest, 1)]
            else:
                (options if argument.startswith("-") and argument != "-" else others).append(argument)
        return options + others

    def format_help(self, *arguments: Any, **options: Any) -> str:
        text = super().format_help(*arguments, **options)
        return re.sub(r"--[a-z][\w.]*", lambda option: option[0].replace("_", "-"), text)


def _underscored(argument: str) -> str:
    """`--optim.learning-rate=1e-3` as jsonargparse wants it: `--optim.learning_rate=1e-3`."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return f"--{option[2:].replace('-', '_')}{equals}{value}"


def log_to_screen(level: int = logging.INFO) -> None:
    """Our own messages, without time and level, on standard error; Lightning's only from warnings on."""
    logger = logging.getLogger("sequencer2d")
    logger.addHandler(_handler(Console(stderr=True)))
    logger.setLevel(level)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def _handler(console: Console) -> RichHandler:
    return RichHandler(console=console, show_time=False, show_level=False, show_path=False)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on standard error, if that is a terminal; the function moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f} {what}/s" if task.speed else "")

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with rate and remaining time for each thing that is done, below our log; on standard error, at a terminal.

    The log is there in any case, and goes back to what it was before.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    handler = _handler(console)
    logger = logging.getLogger("sequencer2d")
    level, tasks = logger.level, {}
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what)
                bars.update(tasks[what], completed=done, total=total or None)

            yield show
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def printable(text: str) -> str:
    """Names of files may hold what is no text, or would command the terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)
