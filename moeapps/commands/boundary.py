# SPDX-License-Identifier: Apache-2.0
"""Where errors meet people: what a user can cause is told in a line or two, with exit code 2; all else is a defect.

Told are the errors that files, options, data and machines cause, wherever they arise: while preparing, in a step, in a
worker process, inside a library. The kinds that only wrong code raises (TypeError, KeyError, AttributeError ...) go on
as they came, with their traceback. ``--debug`` or MOEAPPS_DEBUG=1 shows the traceback of every error.

Standard library only, so that help answers at once.
"""

from __future__ import annotations

import linecache
import os
import re
import select
import sys
import sysconfig
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

# The codes of a shell for a program that a signal has ended: 128 + its number.
INTERRUPTED, TERMINATED, NO_READER = 130, 143, 141
_ROOTS = (ValueError, OSError, RuntimeError, ImportError, EOFError, MemoryError, OverflowError, IndexError)
# Errors of libraries that derive from Exception alone: looked up where the library is loaded, never imported for it.
_OF_LIBRARIES = (
    ("yaml", "YAMLError"),
    ("pickle", "PickleError"),
    ("zipfile", "BadZipFile"),
    ("tarfile", "TarError"),
    ("zlib", "error"),
    ("struct", "error"),
    ("csv", "Error"),
    ("safetensors", "SafetensorError"),
    ("lightning.fabric.utilities.exceptions", "MisconfigurationException"),
)
_WORKER = re.compile(r"Caught (\w+) in (DataLoader worker process \d+|replica \d+[^.]*)\.\nOriginal Traceback")
_LONGEST = 600
_GUARDED: ContextVar[bool] = ContextVar("moeapps_guarded", default=False)


def without_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """Return the words of a command line without ``--debug``, and whether tracebacks are wanted."""
    wanted = "--debug" in words or bool(os.environ.get("MOEAPPS_DEBUG"))
    return [word for word in words if word != "--debug"], wanted


def told_kinds() -> tuple[type[BaseException], ...]:
    """Return the kinds of errors that a user can cause."""
    modules = ((sys.modules.get(module), name) for module, name in _OF_LIBRARIES)
    return (*_ROOTS, *(getattr(module, name) for module, name in modules if hasattr(module, name)))


def guarded(work: Callable[[], int], *, debug: bool = False) -> int:
    """Run a command; tell what a user can cause on stderr, and turn signals into the codes of a shell.

    Args:
        work: runs it, gives its exit code.
        debug: let errors pass with their traceback.

    Returns:
        Exit code: what ``work`` gave, 2 for an error that was told, 130 after Ctrl-C, 143 after SIGTERM, 141 where
        nobody reads the output any more (``moeapps --help | head -3``).
    """
    if _GUARDED.get():  # the outermost tells
        return work()
    token = _GUARDED.set(True)
    try:
        code = work()
        sys.stdout.flush()  # else a reader that is gone is met when Python ends, which cannot be silent
        return code
    except SystemExit as stop:
        return _code(stop)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except told_kinds() as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return NO_READER
        # A label or id beyond a table is found by torch; an index that is wrong in our own code is a defect.
        if debug or (isinstance(error, IndexError) and not _of_library(_frames(error)[-1][0])):
            raise
        from moeapps.text import lines

        print(f"error: {lines(sentence(error))}", file=sys.stderr)
        return 2
    finally:
        _GUARDED.reset(token)


def _reader_is_gone() -> bool:
    """Whether it is the output's pipe that broke; then the rest of the output goes nowhere."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # no file: a test or a notebook has it
        return False
    asked = select.poll()
    asked.register(number, select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in asked.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return gone


def _code(stop: SystemExit) -> int:
    """A parser's own code; Lightning ends a training that a signal stops by SystemExit, too."""
    if type(stop).__name__ == "SIGTERMException":
        return TERMINATED
    if isinstance(stop.__context__, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(stop.code, int) or stop.code is None:
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 2


def sentence(error: BaseException) -> str:
    """Return what to tell of an error: its own text if that was written for people, else the text and its place."""
    text = _text(error)
    if _written_for_people(error):
        return text
    return f"{text}\nraised {_place(error)}; --debug shows the traceback"


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{_shown(error.filename)}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    text, where = str(error).strip(), ""
    if text == "No supported gpu backend found!":
        return "--trainer.accelerator gpu: no GPU that torch can use is found here; leave it out, or give cpu"
    if match := _WORKER.match(text):
        # The traceback of the worker ends with the error: "Kind: text", the text over one line or several.
        end = list(re.finditer(rf"^(?:[\w.]+\.)?{match[1]}(?:: |$)", text, re.MULTILINE))
        text, where = (text[end[-1].end() :] if end else text).strip(), f" (in {match[2]})"
    if text.startswith("Error(s) in loading state_dict"):
        return _other_network(text)
    if not isinstance(error, UsageError):
        text = " ".join(text.split())
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    if isinstance(error, ModuleNotFoundError):
        return f"{text}; install the package that has it, or correct the class path{where}"
    return (text or type(error).__name__) + where


def _other_network(text: str) -> str:
    """Torch lists every tensor that does not fit; the first of each kind says what is wrong."""
    lines = [line.strip().rstrip(".").strip() for line in text.splitlines()[1:]]
    shown = [line if len(line) <= _LONGEST // 4 else f"{line[: _LONGEST // 4]} ..." for line in lines[:2]]
    more = f"; {len(lines) - 2} more" if len(lines) > 2 else ""
    return f"the weights are of another network: {'; '.join(shown)}{more}. Give the model options of their run"


class UsageError(ValueError):
    """Wrong usage or configuration; the command line prints its text alone and exits with 2."""


def _written_for_people(error: BaseException) -> bool:
    """Whether code of ours, of a task or of Lightning raised it in so many words, here or in a worker."""
    if isinstance(error, UsageError) or type(error).__name__ == "MisconfigurationException":
        return True
    if isinstance(error, OSError) and error.filename is not None:
        return True
    if _WORKER.match(str(error)):
        found = re.findall(r'^ *File "([^"]+)", line (\d+), in ', str(error), re.MULTILINE)
        file, line = found[-1] if found else ("", "0")
        return not _of_library(file) and linecache.getline(file, int(line)).lstrip().startswith("raise")
    frames = _frames(error)
    if not frames:
        return False
    file, line, _ = frames[-1]
    return not _of_library(file) and linecache.getline(file, line).lstrip().startswith("raise")


def _place(error: BaseException) -> str:
    """The last line of our own or of a user's code that it went through."""
    frames = _frames(error)
    own = [frame for frame in frames if not _of_library(frame[0])] or frames
    if not own:
        return "outside of any code of ours"
    file, line, function = own[-1]
    return f"at {_shown(file)}:{line} ({function})"


def _frames(error: BaseException) -> list[tuple[str, int, str]]:
    found: list[tuple[str, int, str]] = []
    step = error.__traceback__
    while step is not None:
        frame: FrameType = step.tb_frame
        found.append((frame.f_code.co_filename, step.tb_lineno, frame.f_code.co_name))
        step = step.tb_next
    return found


def _of_library(file: str) -> bool:
    """Whether a file is part of Python or of an installed package other than ours."""
    package = Path(__file__).resolve().parents[1]
    if Path(file).is_relative_to(package) or Path(file).is_relative_to(package.parent / "tasks"):
        return False
    paths = sysconfig.get_paths()
    places = {paths["stdlib"], paths["purelib"], paths["platlib"]}
    return file.startswith("<") or "site-packages" in file or any(Path(file).is_relative_to(place) for place in places)


def _shown(path: object) -> str:
    """A path as short as can be: relative where it lies in the working directory."""
    found = Path(os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path))
    return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)
