# SPDX-License-Identifier: Apache-2.0
"""Words of configs and flags, checked before anything heavy is imported: all of ours are right, wrong ones are told."""

from __future__ import annotations

import importlib
import inspect
import re
import resource
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeapps.cli import RUN_COMMANDS, main
from moeapps.commands.boundary import UsageError
from moeapps.commands.families import abstract_sentence
from moeapps.commands.names import KEYS, check, read_config
from moeapps.commands.run import Cli, quiet
from moeapps.commands.signatures import Definition, Missing, options, resolve, trainer_options
from tests.systems import BASELINES, BASES, OTHERS, PAPERS, base_of, flags, name
from tests.toy import TOY

read_once = cache(read_config)


def system_of(overlay: Path) -> list[Path]:
    """The bases an overlay outside of baselines/ and paper/ fits, told from the classes that both name."""
    own = [base for base in BASES if overlay.stem == base.stem or overlay.stem.startswith(f"{base.stem}_")]
    if overlay.parent.name in ("debug", "stages") and own:
        return [max(own, key=lambda base: len(base.stem))]
    named = set(re.findall(r"tasks\.\w+", overlay.read_text()))
    return [base for base in BASES if named <= set(re.findall(r"tasks\.\w+", base.read_text()))] if named else []


PAIRS = [(base_of(overlay), overlay) for overlay in (*BASELINES, *PAPERS)]
PAIRS += [(base, overlay) for overlay in OTHERS for base in system_of(overlay)]


@pytest.fixture
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of ours is read for many pairs: once is enough."""
    monkeypatch.setattr("moeapps.commands.names.read_config", read_once)


@pytest.mark.usefixtures("_read_once")
@pytest.mark.parametrize("base", BASES, ids=name)
def test_no_word_of_ours_is_refused(base: Path) -> None:
    check(["fit", *flags(base)])
    for own, overlay in PAIRS:
        if own == base:
            check(["fit", *flags(base, overlay)])


@pytest.mark.usefixtures("_read_once")
@pytest.mark.parametrize("base", BASES, ids=name)
def test_an_overlay_of_another_system_is_told_with_its_owner(base: Path) -> None:
    for overlay in [file for file in (*BASELINES, *PAPERS) if base_of(file) != base]:
        with pytest.raises(UsageError, match=rf"{overlay}.* is an overlay for {base_of(overlay).stem}, "):
            check(["fit", *flags(base, overlay)])


@pytest.mark.parametrize("overlay", [*BASELINES[::9], *PAPERS[::3]], ids=name)
def test_an_overlay_without_its_base_names_the_base(overlay: Path) -> None:
    if resolve_all(overlay):  # it is a whole config
        return
    wanted = f"moeapps fit --config {base_of(overlay)} --config {overlay}"
    with pytest.raises(UsageError, match=re.escape(wanted)):
        check(["fit", *flags(overlay)])


def resolve_all(overlay: Path) -> bool:
    said = yaml.safe_load(overlay.read_text())
    return all("class_path" in said.get(part, {}) for part in ("model", "data"))


def test_options_read_off_the_sources_are_those_of_the_parser() -> None:
    """For every class and preset that a config names: jsonargparse takes none that we would refuse, and all we tell."""
    from moeapps.commands.messages import option_names

    paths = sorted({path for file in Path("configs").rglob("*.yaml")
                    for path in re.findall(r"class_path: *((?:tasks|moeapps)\.[\w.]+)", file.read_text())})  # fmt: skip
    read = 0
    for path in paths:
        found = resolve(path)
        assert isinstance(found, Definition), path
        known = options(found)
        if known is None:
            continue
        module, _, word = path.rpartition(".")
        read += 1
        taken = set(option_names(getattr(importlib.import_module(module), word)))
        # A factory's first argument is given by the program (facts, a width): no option, but no harm either.
        assert taken <= set(known), path
        assert len(set(known) - taken) <= 1, (path, set(known) - taken)
    assert read > 0.8 * len(paths)  # 148 of 170; the others pass options on in ways that only the parser follows


def test_options_of_the_trainer_are_those_of_the_installed_one() -> None:
    import inspect

    import lightning as L

    assert list(trainer_options()) == [key for key in inspect.signature(L.Trainer.__init__).parameters if key != "self"]


@pytest.mark.parametrize("command", RUN_COMMANDS)
def test_every_key_of_a_command_is_known(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0

    shown = set(re.findall(r"^  (?:-\w, )?--(\w+)", capsys.readouterr().out, re.MULTILINE))
    assert {"model", "data", "trainer", "system", "name"} <= shown
    assert shown - {"help", "print_config", "help_"} <= set(KEYS[command])


WRONG: list[tuple[str, str]] = [
    ("modle: 1", r"wrong\.yaml, line 1: unknown key 'modle'; did you mean 'model'\?\nallowed: "),
    ("trainer: {max_epoch: 3}", r"line 1: unknown key 'trainer\.max_epoch'; did you mean 'max_epochs'\?\nallowed: "),
    ("\nmodel:\n  init_args:\n    nett: 3", r"line 4: model: unknown option 'nett' of ToyTask; did you mean 'net'\?\n"),
    ("model: {init_args: {net: {init_args: {moe: {init_args: {topk: 1}}}}}}",
     r"model\.net\.moe: unknown option 'topk' of point_moe; did you mean 'top_k'\?\nallowed: num_experts, top_k, "),
    ("model: {init_args: {optimizer: {lrr: 1}}}", r"model\.optimizer: unknown option 'lrr' of OptimizerConfig; "),
    ("model: {init_args: {optimizer: {groups: [{patern: x}]}}}", r"unknown option 'patern' of ParamGroup; "),
    ("model: {init_args: {net: {class_path: tests.toy.ToyNett}}}", r"did you mean 'tests\.toy\.ToyNet'\?\ntests\.toy "),
    ("model: {init_args: {net: {class_path: tests.toyy.ToyNet}}}", r"there is no module 'tests\.toyy'$"),
    ("data: {init_args: {mixing: stirred}}", r"data\.mixing: given 'stirred', allowed: 'concat', 'balanced', 'one_dom"),
    ("model: {init_args: {optimizer: {lr: null}}}", r"line 1: model\.optimizer\.lr: given null, allowed: float; "),
    ("data:\n  init_args:\n    batch_size:", r"line 3: data\.batch_size: given null, allowed: int; leave it out"),
    ("data: {init_args: {mixing: null}}", r"data\.mixing: given null, allowed: Literal\["),
    ("model:\n  init_args:", r"line 2: model\.init_args: given null, allowed: options with values; leave it out"),
    ("name:\nsystem: toy", r"line 1: name: given null, allowed: str; leave it out"),
    ("model: [1", r"wrong\.yaml, line 1: while parsing a flow sequence: expected "),
    ("a: 1\nb: [}", r"wrong\.yaml, line 2: while parsing "),
    ("- a\n- b", r"wrong\.yaml holds list .*; a config is keys with values"),
    ("a: !!python/object:os.system x", r"wrong\.yaml, line 1: .*could not determine a constructor"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "told"), WRONG)
def test_a_wrong_word_of_a_file_is_told_with_its_line(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=told) as caught:
        check(["fit", *TOY, "--config", str(file)])
    assert len(str(caught.value).splitlines()) <= 2


def test_a_package_is_the_users_where_the_working_directory_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)
        assert resolve("tests.toy.ToyNett") is None  # somebody else's: for the parser to say

    assert isinstance(resolve("tests.toy.ToyNett"), Missing)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.net.widht", "3"], "model.net: unknown option 'widht' of ToyNet; did you mean 'width'?"),
        (["--model.init_args.net.init_args.widht=3"], "model.net: unknown option 'widht' of ToyNet"),
        (["--trainer.max_epoch", "3"], "unknown key 'trainer.max_epoch'; did you mean 'max_epochs'?"),
        (["--foo", "1"], "unknown key 'foo'\nallowed: "),
        (["--data.mixing", "stirred"], "data.mixing: given 'stirred', allowed: 'concat'"),
        (["--model", "tests.toy.ToyTusk"], "model: no class 'tests.toy.ToyTusk'; did you mean 'tests.toy.ToyTask'?"),
        (["--model.net", "tasks.nobody.model.Net"], "there is no task package tasks.nobody; there are: adaptation, "),
        (["configs/home.yaml"], "'configs/home.yaml' stands alone; a config is given with --config: moeapps fit"),
    ],
)
def test_a_wrong_flag_is_told(words: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(told)}"):
        check(["fit", *TOY, *words])


@pytest.mark.parametrize(
    "words",
    [
        ["--model.net.width", "3"],
        ["--model.init_args.net.init_args.width=3", "--name", "model.nett"],
        ["--model.schedule", "OneCycle", "--model.schedule.pct_start", "0.1"],
        ["--model.net.moe", "moeapps.moe.presets.dense", "--model.net.moe.expansion", "2"],
        ["--trainer.callbacks+=BiasBalancing", "--trainer.callbacks.rate=1"],
        ["--data.predict", "null"],
        ["--print_config"],
        ["--model.help", "tests.toy.ToyTask"],
        ["--config", "{trainer: {max_epochs: 1}}"],
        ["--system=configs.yaml"],
    ],
)
def test_right_flags_pass(words: list[str]) -> None:
    check(["fit", *TOY, *words])


def test_an_inherited_option_is_read_where_it_is_written(tmp_path: Path) -> None:
    """The module of a task need not import what its base class names."""
    overlay = tmp_path / "a.yaml"
    overlay.write_text("model: {init_args: {optimizer: {lrr: 1}}}")
    for base in BASES:
        with pytest.raises(UsageError, match="unknown option 'lrr' of OptimizerConfig"):
            check(["fit", *flags(base, overlay)])


def test_a_class_of_a_later_file_brings_its_own_options(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    said: dict[str, Any] = {"class_path": "moeapps.moe.presets.dense", "init_args": {"expansion": 2.0}}
    file.write_text(yaml.safe_dump({"model": {"init_args": {"net": {"init_args": {"moe": said}}}}}))
    check(["fit", *TOY, "--config", str(file)])
    said["init_args"] = {"top_k": 2}
    file.write_text(yaml.safe_dump({"model": {"init_args": {"net": {"init_args": {"moe": said}}}}}))
    with pytest.raises(UsageError, match="unknown option 'top_k' of dense"):
        check(["fit", *TOY, "--config", str(file)])


def test_a_file_that_is_no_text_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "bytes.yaml"
    file.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(UsageError, match=r"bytes\.yaml, line 2: a byte that is not UTF-8"):
        check(["fit", *TOY, "--config", str(file)])


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    """Nine levels of ten aliases each: a billion values out of 500 bytes."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 9)]
    file = tmp_path / "bomb.yaml"
    file.write_text("model:\n  init_args:\n    net:\n" + "\n".join("      " + line for line in lines))
    with pytest.raises(UsageError):
        check(["fit", *TOY, "--config", str(file)])


def test_a_wrong_word_is_told_without_torch_in_two_seconds_of_cpu() -> None:
    code = (
        "import sys; from moeapps.cli import main; code = main(['fit', '--config', 'configs/unimoe_audio.yaml', "
        "'--model.net.dimm', '3']); sys.exit(code != 2 or any(m in sys.modules for m in ('torch', 'lightning')))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_a_file_may_add_to_the_callbacks_of_files_before_it(tmp_path: Path) -> None:
    first, more = tmp_path / "first.yaml", tmp_path / "more.yaml"
    first.write_text("trainer: {callbacks: [{class_path: moeapps.training.callbacks.BiasBalancing}]}")
    more.write_text("trainer: {callbacks+: [{class_path: moeapps.training.callbacks.ExpertReport}]}")
    words = ["fit", *TOY, "--config", str(first), "--config", str(more)]

    check(words)

    quiet()
    kinds = [type(callback).__name__ for callback in Cli(words[1:], run=False).trainer.callbacks]
    assert kinds[:2] == ["BiasBalancing", "ExpertReport"]
    more.write_text("trainer: {calbacks+: [{class_path: moeapps.training.callbacks.ExpertReport}]}")
    with pytest.raises(UsageError, match="did you mean 'callbacks'"):
        check(words)


# Families of classes, one of which a config names ------------------------------------------------------------------

FAMILY = {
    "__init__": "",
    "source": """
        from abc import ABC, abstractmethod


        class Source(ABC):
            @abstractmethod
            def items(self, domain: str) -> list[int]: ...


        class Halfway(Source):
            title = "nothing made of it yet"
    """,
    "drawn": """
        from decks.source import Halfway


        class Drawn(Halfway):
            def __init__(self, count: int = 3) -> None:
                self.count = count

            def items(self, domain: str) -> list[int]:
                return []
    """,
    "scanned": """
        from decks.source import Source


        class Scanned(Source):
            def __init__(self, folder: str) -> None:
                self.folder = folder

            def items(self, domain: str) -> list[int]:
                return []
    """,
    "data": """
        from decks.drawn import Drawn
        from decks.source import Source


        class Data:
            def __init__(self, source: Source | None = None) -> None:
                self.source = source or Drawn()
    """,
}


@pytest.fixture
def _cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "decks").mkdir()
    for module, text in FAMILY.items():
        (tmp_path / "decks" / f"{module}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


DECKS = ["--model", "tests.toy.ToyTask", "--data", "decks.data.Data"]


@pytest.mark.usefixtures("_cards")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data.source.count", "3"],
         "data.source.count: no class is named for data.source, so it has no options yet\n"
         "name one that has 'count' first: --data.source decks.drawn.Drawn"),
        (["--data.source.weight", "3"],
         "data.source.weight: no class is named for data.source, so it has no options yet, and no class has 'weight'\n"
         "there are: decks.drawn.Drawn, decks.scanned.Scanned"),
        (["--data.source", "decks.drawn.Drawn", "--data.source.folder", "x"],
         "data.source: unknown option 'folder' of Drawn; decks.scanned.Scanned has it, if named first\nallowed: count"),
        (["--data.source", "decks.source.Halfway"],
         "data.source: decks.source.Halfway is what such classes have in common and cannot be made itself; "
         "name one of decks.drawn.Drawn"),
    ],
)  # fmt: skip
def test_where_a_class_stands_for_others_those_that_have_the_option_are_named(words: list[str], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(["fit", *DECKS, *words])
    assert str(caught.value) == told


MIXED = """
    from abc import ABC, abstractmethod
    from collections import OrderedDict


    class Given:
        def items(self, domain: str) -> list[int]:
            return []


    class Asks(ABC):
        @abstractmethod
        def items(self, domain: str) -> list[int]: ...

        @abstractmethod
        async def wait(self) -> None: ...


    class Waits(Given, Asks):
        async def wait(self) -> None: ...


    class Unasked(Asks, Given):
        async def wait(self) -> None: ...


    class Marked:
        @abstractmethod
        def items(self) -> None: ...


    class OrderedDict(OrderedDict):
        pass
"""


@pytest.mark.usefixtures("_cards")
def test_a_class_is_called_abstract_where_python_calls_it_so(tmp_path: Path) -> None:
    (tmp_path / "decks" / "mixed.py").write_text(textwrap.dedent(MIXED))
    module = importlib.import_module("decks.mixed")
    for kind in ("Given", "Asks", "Waits", "Unasked", "Marked", "OrderedDict"):
        told = abstract_sentence(f"decks.mixed.{kind}")
        assert (told is not None) == inspect.isabstract(getattr(module, kind)), kind


@pytest.mark.usefixtures("_cards")
@pytest.mark.parametrize("words", [["--data.source", "decks.scanned.Scanned", "--data.source.folder", "x"], []])
def test_a_class_of_the_family_that_is_named_first_is_taken(words: list[str]) -> None:
    check(["fit", *DECKS, *words])
