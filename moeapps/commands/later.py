# SPDX-License-Identifier: Apache-2.0
"""A quick start: what other packages import for parts that a run may never use is imported on first use.

`import lightning` costs four CPU seconds where one would do. torchmetrics imports all its domains, and for them
torchvision (metrics of images), scipy.signal (to give one package back an old name) and matplotlib (``plot`` of a
metric); timm imports all its models. Lightning and torch's optimizers import ``torch._dynamo``, the compiler, which
brings sympy and triton, to ask whether something was compiled.

`start_quickly` has such a package imported while its own ``import`` statements, and no others, are given stand-ins. A
stand-in imports what it stands for when it is called or an attribute is read, and asks nothing of an ``isinstance``:
while a package is not imported, nothing is an instance of its classes. Afterwards ``import`` is as it was, and
``sys.modules`` never holds a stand-in, so that everybody else who imports one of these packages gets it. What is not
installed, or broken, is told where it is used.
"""

from __future__ import annotations

import builtins
import functools
import gc
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# package or module -> what it need not import before it is used
WAITING: dict[str, tuple[str, ...]] = {
    "lightning": ("torch._dynamo",),
    "torchmetrics": ("torchvision", "matplotlib", "scipy.signal"),
    "torchvision": ("torch._dynamo",),
    "timm": ("torch._dynamo",),  # timm.data subclasses torchvision's transforms, and keys tables by its enum
    "torch_geometric": ("torch._dynamo", "torch_geometric.llm", "requests"),
    "tensorboard.compat.tensorflow_stub.io.gfile": ("boto3", "botocore"),  # to write to a bucket
    "torch.utils.flop_counter": ("triton",),  # it asks whether an operation is a kernel of triton's
}
OLD_NAMES = "srmrpy"
"""Where this is installed, torchmetrics must give scipy.signal the old name that it needs."""
COMPILER = "torch._dynamo"
_paused = False
KEPT = "__dynamo_disable"
"""Where a function that ``torch._disable_dynamo`` marked keeps what is called in its place."""


class Later:
    """Stands for ``path``, which is imported when it is used.

    Args:
        path: dotted name of a module, or of something in it.
        module: the module that must be imported before anything can be an instance of it.
        waits: whether calls too are put off: true while the importer itself is imported.
    """

    def __init__(self, path: str, module: str, waits: Callable[[], bool]) -> None:
        self._path, self._module, self._waits = path, module, waits

    def _real(self) -> Any:
        return pkgutil.resolve_name(self._path)

    def __getattr__(self, name: str) -> Any:
        if "_waits" not in self.__dict__:  # copy and pickle ask before it is made
            raise AttributeError(name)
        if not self._waits():
            return getattr(self._real(), name)
        if name.startswith("__"):  # typing and functools ask for these; nobody writes them down
            raise AttributeError(name)
        return Later(f"{self._path}.{name}", self._module, self._waits)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what this stands for, at once or, while it waits, later."""
        if self._waits():
            return LaterCall(self, args, kwargs)
        return self._real()(*args, **kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        return self._module in sys.modules and isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._module in sys.modules and issubclass(subclass, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        """A class that derives from this derives from the real one, which is imported for it."""
        return (self._real(),)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Copies and pickles are of what this stands for."""
        return pkgutil.resolve_name, (self._path,)

    def __repr__(self) -> str:
        return f"<{self._path}, imported when it is used>"


class LaterCall(Later):
    """Stands for the value of a call that was put off: torchmetrics decorates with one of matplotlib's functions."""

    def __init__(self, called: Later, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__(called._path, called._module, called._waits)
        self._called, self._args, self._kwargs = called, args, kwargs

    @functools.cached_property
    def _value(self) -> Any:
        return self._called._real()(*self._args, **self._kwargs)

    def _real(self) -> Any:
        return self._value

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._real, ()


@contextmanager
def put_off(packages: Sequence[str], importer: str) -> Iterator[None]:
    """Give one package stand-ins for packages that are not imported yet, for as long as this context lasts.

    Args:
        packages: dotted names; what lies below them too.
        importer: package or module whose ``import`` statements this is for.
    """
    real_import, over = builtins.__import__, False

    def importing(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        own = f"{(globals or {}).get('__name__', '')}.".startswith(f"{importer}.")
        package = next((p for p in packages if name == p or name.startswith(f"{p}.")), None)
        if level or package is None or not own or package in sys.modules:
            return real_import(name, globals, locals, fromlist or (), level)
        return Later(name if fromlist else name.partition(".")[0], package, lambda: not over)

    builtins.__import__ = importing
    try:
        yield
    finally:
        builtins.__import__ = real_import
        over = True


def start_quickly() -> None:
    """From now on packages wait for what they may never use; torch is imported, and what is there already stays."""
    if not any(isinstance(finder, Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, Waiting())
        if COMPILER not in sys.modules:
            WithoutCompiler().begin()


@contextmanager
def without_collector() -> Iterator[None]:
    """Import and build without Python's search for cycles, which reads all there is so far again and again.

    What is built then stays and is left out of later searches, until the end of the block (`collect_again`).
    """
    global _paused
    if not gc.isenabled() or gc.get_freeze_count():  # somebody has plans of his own, or it is off already
        yield
        return
    _paused = True
    gc.disable()
    try:
        yield
    finally:
        collect_again()
        gc.unfreeze()


def collect_again() -> None:
    """Let Python search for cycles again, in what is made from now on, if `without_collector` made it stop."""
    global _paused
    if _paused:
        gc.freeze()
        gc.enable()
    _paused = False


class Waiting(MetaPathFinder):
    """Finds the packages of `WAITING` as all others do, and has them imported with stand-ins."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """Find one of these packages; None for all others."""
        if fullname not in WAITING:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is None or spec.loader is None:
            return spec
        packages = WAITING[fullname]
        if find_spec(OLD_NAMES) is not None:
            packages = tuple(name for name in packages if name != "scipy.signal")
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with put_off(packages, fullname), methods_without_compiler():
                run(module)

        loader.exec_module = exec_module
        return spec


class WithoutCompiler(MetaPathFinder):
    """torch's optimizers and dispatch modes, which import the compiler to tell it that it must not trace them.

    They do without until somebody imports it, which is seen here first; then all is as torch made it.
    """

    def __init__(self) -> None:
        self._filled: list[Any] = []
        self._over = False

    def begin(self) -> None:
        """From now on nothing of torch imports the compiler only to be left alone by it."""
        torch: Any = import_module("torch")
        from torch.optim import Optimizer
        from torch.utils._python_dispatch import TorchDispatchMode

        self._mark = torch._disable_dynamo
        self._code = self._mark(begin_nothing).__code__
        for kind in [*_family(Optimizer), *_family(TorchDispatchMode)]:
            for function in list(vars(kind).values()):
                if getattr(function, "__code__", None) is self._code:
                    self._fill(function)
            step = vars(kind).get("step")
            if getattr(getattr(step, "__code__", None), "co_name", "") == "_use_grad":
                kind.step = _without_graph_breaks(step)
        torch._disable_dynamo = self._marked
        sys.meta_path.insert(0, self)

    def _marked(self, function: Any = None, recursive: bool = True) -> Any:
        """``torch._disable_dynamo`` for what is defined meanwhile."""
        if function is None:
            return functools.partial(self._marked, recursive=recursive)
        return self._fill(self._mark(function, recursive))

    def _fill(self, marked: Any) -> Any:
        """Put the function itself where torch keeps what the compiler made of it."""
        vars(marked.__wrapped__)[KEPT] = marked.__wrapped__
        self._filled.append(marked.__wrapped__)
        return marked

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        """Find nothing; when the compiler is imported, leave torch as it was."""
        if fullname != COMPILER or self._over:
            return
        torch: Any = import_module("torch")
        self._over = True  # it stays among the finders, which are being gone through
        torch._disable_dynamo = self._mark
        for function in self._filled:
            vars(function).pop(KEPT, None)


def begin_nothing() -> None:
    """Has torch show what its marks look like."""


def _family(kind: type[Any]) -> Iterator[type[Any]]:
    """A class and all below it."""
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)


def _without_graph_breaks(step: Any) -> Callable[..., Any]:
    """An optimizer's ``step`` under the gradient mode that it asks for, without the breaks that a compiler needs."""
    import torch

    plain = step.__wrapped__

    @functools.wraps(plain)
    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if COMPILER in sys.modules:
            return step(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, *args, **kwargs)

    return stepping


@contextmanager
def methods_without_compiler() -> Iterator[None]:
    """Let classes that are made meanwhile keep the compiler out of methods of theirs without importing it."""
    from moeapps.moe.eager import runs_eagerly

    torch: Any = import_module("torch")
    real = torch.compiler.disable

    def disable(function: Any = None, recursive: bool = True, **kwargs: Any) -> Any:
        plain = function is not None and recursive and COMPILER not in sys.modules
        return runs_eagerly(function) if plain else real(function, recursive, **kwargs)

    torch.compiler.disable = disable
    try:
        yield
    finally:
        torch.compiler.disable = real
