"""In: a command line. Out: an exit code, and on standard output what a person or a program asked for.

Everything heavy is imported inside the commands, so that --help and a typing error answer at once.
Exit codes: 0 done, 1 a bundle is not what it says, 2 bad input, 3 target not available, 4 constraint cannot be met,
5 a bundle is worse than its baseline allows, 130 interrupted with results kept.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from hirelc_deploy.errors import COMMAND, HirelcError, InputError, fullest, printable
from hirelc_deploy.version import __version__

if TYPE_CHECKING:
    pass


app = typer.Typer(
    name="hirelc-deploy",
    help="A trained vision model in, the fastest file its device can run within an allowed accuracy drop out.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

targets_app = typer.Typer(rich_markup_mode=None)
app.add_typer(targets_app, name="targets")


WORSE = 5
"""Exit code of `verify --against` where accuracy or latency is worse than allowed."""

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""


DISK_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENAMETOOLONG})
"""What any write may meet at any time, and no check beforehand can rule out."""


MUCH = 1_000_000_000
"""Bytes that are free on a disk which is not the full one."""


def main() -> None:
    """Run the command line of this process.

    Answers have a stream of their own, as a model file may close or replace the standard output. With --json that
    holds the JSON alone: whatever else writes there, in C too or when the process ends, writes to the standard error.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries warn their own developers, between our lines
    warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)  # at the end, as is meant
    _open_streams()
    answers = sys.stdout
    try:
        encoding = "utf-8" if "--json" in sys.argv else answers.encoding
        answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", 1, encoding, answers.errors)
        if "--json" in sys.argv:
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        code = run(sys.argv[1:], answers)
        answers.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not complain while it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), answers.fileno())
        code = 0
    sys.exit(code)


def _open_streams() -> None:
    """Have somewhere to print, whatever the caller closed, and print names of any alphabet in any locale.

    A closed descriptor would be that of the next file which is opened, and what libraries print would go into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as we run
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run(arguments: Sequence[str], answers: TextIO | None = None) -> int:
    """Run one command and return its exit code; the one place where errors become a sentence on standard error.

    Args:
        answers: Where answers go; the standard output if nothing is said, which holds nothing else with --json.
    """
    if "--json" not in arguments:
        with answering_on(answers) if answers else contextlib.nullcontext():
            return _run(arguments)
    with answering_on(answers or sys.stdout), contextlib.redirect_stdout(sys.stderr):
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        _check_text(arguments)
        code = app(list(arguments), prog_name=app.info.name, standalone_mode=False)
    except HirelcError as error:
        return fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.TyperException as error:  # an option or command that does not exist, or a value it cannot take
        context = getattr(error, "ctx", None)
        command = context.command_path if context else app.info.name
        return fail(f"{error.format_message().rstrip('.')}; `{command} --help` says what it takes.", 2)
    except OSError as error:
        if (trouble := _trouble(error, arguments)) is None:
            raise
        return fail(trouble, 2)
    except SystemExit:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # typer's, for a reader that has gone
            raise BrokenPipeError from None
        raise
    if code == INTERRUPTED:
        return fail("interrupted; what was finished is kept, and the same command resumes.", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _check_text(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise InputError(
                f"{printable(argument)}: holds bytes that are no text here, which runtimes do not take in names of "
                "files; set LC_ALL=C.UTF-8, or give the file another name."
            )


def _trouble(error: OSError, arguments: Sequence[str]) -> str | None:
    """Return what is wrong with which disk, and what to do; None where the error is of another kind.

    The file that an error names may be the one that was only read.
    """
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:
        return "there is no folder for files that are needed for a while; TMPDIR names one to write to."
    if error.errno not in DISK_TROUBLE:
        return None
    place = error.filename2 or error.filename
    what_to_do = "what was finished is kept: make room, and run the same again."
    if error.errno == errno.ENAMETOOLONG:
        return f"{str(place)[:80]}...: the name is too long; give a shorter --out."
    if error.errno != errno.ENOSPC:
        said = "your quota there is used up" if error.errno == errno.EDQUOT else error.strerror
        return f"{place or 'the disk'}: {said}; {what_to_do}"
    return f"{_full_disk(place, temporary, arguments)}; {what_to_do}"


def _full_disk(place: object, temporary: Path, arguments: Sequence[str]) -> str:
    outs = [Path(value) for option, value in itertools.pairwise(arguments) if option == "--out"]
    folder, free = fullest([*outs, temporary, Path.cwd()])
    if free > MUCH:
        return f"{place or 'what is printed'}: its disk is full"
    what = " (files that are needed for a while; TMPDIR names another folder)" if folder not in outs else ""
    state = f"is full, {free / 1e6:.1f} MB are free" if free else "is full or takes no more files, 0.0 MB are free"
    return f"the disk of {folder}{what} {state}"


def fail(sentence: str, code: int) -> int:
    """Print one sentence on standard error, and below it the commands it ends in, if any; return `code`."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", sentence)  # libraries colour their messages
    first, *commands = (" ".join(printable(part).split()) for part in plain.split(COMMAND))
    print("\n  ".join([f"hirelc-deploy: {first}", *commands]), file=sys.stderr)
    return code


_answers: list[TextIO] = []


@contextlib.contextmanager
def answering_on(stream: TextIO) -> Iterator[None]:
    """Let `show` write to this stream and not to the standard output."""
    _answers.append(stream)
    try:
        yield
    finally:
        _answers.pop()


def show(value: dict[str, Any], as_json: bool, text: str) -> None:
    """Print what a program reads, or what a person does."""
    from hirelc_deploy.runs import json_text

    print(json_text(value, indent=2) if as_json else text, file=_answers[-1] if _answers else None)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())
