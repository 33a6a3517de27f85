# SPDX-License-Identifier: Apache-2.0
"""What a stranger's config, run folder or checkpoint cannot do: import code of its own, or any that was not named."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moeapps.cli import main
from moeapps.commands.tasks import extend_path, run_folder_of
from moeapps.commands.trust import FREE, Trust, TrustError, class_paths, given_run, take_trust
from tests.toy import FAST, TOY

# Leaves a mark where it is imported; its class would be taken for a network.
CODE = """
from pathlib import Path
Path(r"{mark}").touch()
from torch import nn
class Net(nn.Identity): pass
def build(facts=None) -> nn.Module: return Net()
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "imported"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that Python imports from, as from a working directory."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture(autouse=True)
def _lines_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line writes its lines where the first test had its errors shown; let it begin anew."""
    monkeypatch.setattr(logging.getLogger("moeapps"), "handlers", [])


def plant(file: Path, mark: Path) -> Path:
    """Write a module that leaves its mark."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(CODE.format(mark=mark))
    importlib.invalidate_caches()
    return file


def a_run(folder: Path, net: Any, checkpoint: Any = None) -> Path:
    """Write a run folder whose config names a network."""
    config = yaml.safe_load(Path("tests/toy.yaml").read_text())
    config["model"]["init_args"]["net"] = net
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save(checkpoint or {"state_dict": {}}, folder / "checkpoints" / "best.ckpt")
    return folder


def refused(words: list[str], mark: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command, which must be refused before any import; return what it says."""
    capsys.readouterr()
    assert main(words) == 2
    assert not mark.exists()
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("command", "path"), [("test", "version_0.evil.Net"), ("predict", "evil.Net"), ("fit", "deep.er.evil.build")]
)
def test_code_inside_of_a_run_is_never_imported(
    place: Path,
    mark: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = place / "version_0" if path.startswith("version") else place
    plant((place / Path(*path.split(".")[:-1])).with_suffix(".py"), mark)
    a_run(run, {"class_path": path})
    torch.save({"state_dict": {}}, run / "checkpoints" / "last.ckpt")

    for trust in ([], ["--trust", path.partition(".")[0]]):
        message = refused([command, "--run", str(run), *trust], mark, capsys)
        assert f"names {path}, which lies in the run folder {run}: code of a run is never imported" in message


def test_code_below_a_folder_of_runs_is_never_imported(
    place: Path, mark: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEAPPS_RUNS", str(place / "results"))
    plant(place / "results" / "toy" / "base" / "evil.py", mark)
    plant(place / "linked.py", mark).unlink()
    (place / "linked.py").symlink_to(place / "results" / "toy" / "base" / "evil.py")
    for path in ("results.toy.base.evil.Net", "linked.Net"):
        message = refused(["fit", *FAST, "--model.net", path], mark, capsys)
        assert f"names {path}, which lies in the run folder {place / 'results'}" in message


@pytest.mark.parametrize(
    "hparams",
    [
        {"_class_path": "version_0.evil.Net"},
        {"_class_path": "tests.toy.ToyTask", "net": {"class_path": "version_0.evil.Net"}},
        {"_class_path": "tests.toy.ToyTask", "net": "{class_path: version_0.evil.Net}"},
        {"_class_path": "tests.toy.ToyTask", "optimizer": {"class_path": "version_0.evil.build"}},
    ],
    ids=["the task", "a part", "YAML in a text", "a function"],
)
def test_class_paths_of_a_checkpoint_are_checked_before_any_import(
    place: Path, mark: Path, capsys: pytest.CaptureFixture[str], hparams: dict[str, Any]
) -> None:
    run = place / "version_0"
    plant(run / "evil.py", mark)
    a_run(run, None, {"state_dict": {}, "hyper_parameters": hparams})

    message = refused(["test", *TOY, "--ckpt_path", str(run / "checkpoints" / "best.ckpt")], mark, capsys)
    assert f"{run / 'checkpoints' / 'best.ckpt'} names version_0.evil." in message
    assert len(message.splitlines()) <= 2


@pytest.mark.parametrize(
    "path",
    ["os.system", "torch.os.system", "subprocess.Popen", "builtins.exec", "runpy.run_path"],
)
def test_python_itself_is_no_part_of_a_model(mark: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    for words in (["--model.net", path], ["--trainer.callbacks+=" + path]):
        message = refused(["fit", *FAST, *words], mark, capsys)
        assert "is not imported: files name classes of models and data; --trust" in message, message


def test_code_elsewhere_is_named_in_one_line_before_it_is_imported(
    place: Path, mark: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = plant(place / "mine.py", mark)
    trust = Trust()

    with caplog.at_level("INFO", logger="moeapps"):
        for _ in range(2):
            trust.admit({"my.yaml": {"net": {"class_path": "mine.Net"}}, "other.yaml": {"net": "torch.nn.Identity"}})

    assert caplog.messages == [f"named in my.yaml, imported now: mine ({file}); --trust none would refuse it"]
    assert not mark.exists()
    assert "mine" not in sys.modules


def test_what_was_named_is_imported_then(place: Path, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(place / "mine_too.py", mark)

    assert main(["fit", *FAST, "--model.net", "mine_too.build"]) == 2  # of no parameters, but it was built

    assert mark.exists()
    assert "named in the command line, tests/toy.yaml" in capsys.readouterr().err.replace(" and ", ", ")


def test_trust_decides_otherwise(place: Path, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(place / "foreign.py", mark)
    words = ["fit", *FAST, "--model.net", "foreign.Net"]

    said = refused([*words, "--trust", "none"], mark, capsys)
    assert f"is not imported; --trust allows {', '.join(FREE)}. If you trust its code: --trust tests" in said
    said = refused([*words, "--trust=tests"], mark, capsys)
    assert "foreign.Net is not imported; --trust allows " in said
    assert "If you trust its code: --trust tests,foreign" in said
    assert main([*words, "--trust", "tests,foreign"]) == 2  # imported, and no network of ours
    assert mark.exists()


def test_a_hidden_class_path_is_refused_by_the_parser(
    place: Path, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(place / "hidden.py", mark)
    (tmp_path / "net.yaml").write_text("class_path: hidden.Net")
    (tmp_path / "over.yaml").write_text(f"model: {{init_args: {{net: {tmp_path / 'net.yaml'}}}}}")

    said = refused(["fit", *FAST, "--config", str(tmp_path / "over.yaml")], mark, capsys)
    assert "error" in said


def test_an_error_is_explained_without_an_import(place: Path, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(place / "blown.py", mark)
    for words in (["--model", "blown.Nett"], ["--model.net.class_path=blown.Net", "--model.net.init_args.x=1"]):
        refused(["fit", *FAST, *words, "--trust", "tests"], mark, capsys)


def test_comparing_runs_imports_nothing_of_them(place: Path, mark: Path, tmp_path: Path) -> None:
    run = a_run(place / "version_0", {"class_path": "version_0.evil.Net"})
    plant(run / "evil.py", mark)
    plant(run / "metrics" / "sitecustomize.py", mark)
    row = {"domain": "a", "role": "seen", "metric": "accuracy", "value": 0.5, "n": 3, "direction": "max"}
    (run / "metrics" / "test.json").write_text(
        json.dumps({"header": {"system": "toy", "name": "version_0.evil.Net"}, "rows": [row]})
    )
    code = (
        "import sys\nseen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(args) if event == 'import' else None)\n"
        "from moeapps.cli import main\n"
        f"code = main(['xeval', {str(run)!r}])\n"
        f"assert code == 0 and not [a for a in seen if 'evil' in str(a) or {str(run)!r} in str(a)], (code, seen)\n"
        "assert not {'lightning', 'jsonargparse'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not mark.exists()


@pytest.mark.parametrize("words", [["--trust"], ["--trust="], ["--trust", "a/b"], ["--trust", "jsonargparse"]])
def test_wrong_words_of_trust_are_told(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["fit", *FAST, *words]) == 2
    assert "is not allowed" in capsys.readouterr().err


def test_class_paths_are_found_wherever_they_stand() -> None:
    value = {
        "a": "one.Two",
        "b": ["--x=three.four.Five", "{class_path: six.Seven}", "some/path.yaml", "eight.Nine/ten", "plain text. No"],
        "eleven.Twelve": 1,
        "c": ("x: thirteen.F",),
    }
    assert list(class_paths(value)) == ["one.Two", "three.four.Five", "six.Seven", "eleven.Twelve", "thirteen.F"]


def test_a_data_file_in_a_config_is_no_code(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (place / "data").mkdir()
    (place / "data" / "x.csv").touch()
    (place / "runs").mkdir()
    with caplog.at_level("INFO", logger="moeapps"):
        Trust().admit({"a.yaml": ["data.csv", "test.json", "runs.best", "val.seen.mean", "3.14", "v1.2"]})
    assert not caplog.messages


def test_words_of_trust() -> None:
    assert take_trust(["fit", "--trust", "none", "--x"]) == (["fit", "--x"], frozenset())
    assert take_trust(["--trust=a,b.c"]) == ([], frozenset({"a", "b.c"}))
    assert take_trust(["fit"]) == (["fit"], None)
    assert given_run(["fit", "--run", "x"]) == given_run(["--run=x"]) == Path("x")
    with pytest.raises(TrustError):
        take_trust(["--trust", ""])


def test_a_project_of_the_users_own_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert run_folder_of(tmp_path / "mine.py") is None
    (tmp_path / "run.json").touch()
    assert run_folder_of(tmp_path / "mine.py") == tmp_path


def test_a_working_directory_inside_of_a_run_is_not_imported_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "version_3"
    run.mkdir()
    for folder, found in ((tmp_path, True), (run, False)):
        monkeypatch.setattr(sys, "path", ["/nowhere"])
        monkeypatch.chdir(folder)
        extend_path()
        assert (str(folder) in sys.path) is found


@pytest.mark.parametrize("first", ["", "/nowhere"], ids=["as at a prompt or in a notebook", "as in a program"])
def test_code_of_the_working_directory_is_found_while_a_file_elsewhere_is_read(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "module_of_mine.py").touch()
    monkeypatch.setattr(sys, "path", [first, *sys.path[1:]])
    monkeypatch.chdir(tmp_path)
    extend_path()
    monkeypatch.chdir(tmp_path / "elsewhere")  # as the parser does for the file's folder

    found = importlib.util.find_spec("module_of_mine")

    assert found is not None
    assert found.origin == str(tmp_path / "module_of_mine.py")
