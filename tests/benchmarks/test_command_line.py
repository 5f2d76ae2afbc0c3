"""Tests the command line that runs every benchmark by its name."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks.__main__ import BENCHMARKS, main

FOLDERS = Path(command_line.__file__).parent


def test_the_list_names_every_benchmark_and_how_its_numbers_are_obtained(capsys):
    main(["--list"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "obtained", "measures", "takes"]
    assert [line.split()[:2] for line in lines] == [[name, b.folder] for name, b in BENCHMARKS.items()]
    assert max(map(len, lines)) <= 120


def test_every_module_with_a_main_is_in_the_list():
    found = {p.stem: p.parent.name for p in FOLDERS.glob("*/*.py") if "\ndef main(arguments" in p.read_text()}
    assert found == {name: b.folder for name, b in BENCHMARKS.items()}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_a_help_text(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"python -m benchmarks {name}" in capsys.readouterr().out


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(SystemExit, match=r"no benchmark named 'compield'. The names are: all, steps, .*compiled"):
        main(["compield"])


def test_a_benchmark_runs_by_its_name(monkeypatch):
    given = []
    monkeypatch.setattr(import_module("benchmarks.counted.chips"), "main", given.append)
    main(["chips", "--quick"])
    assert given == [["--quick"]]


@pytest.mark.parametrize("quick", [False, True])
def test_all_runs_each_benchmark_in_its_own_process_and_publishes_full_runs(quick, monkeypatch, capsys):
    ran = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(command_line.subprocess, "run", lambda command: ran.append(command[1:]) or done)
    main(["all", *["--quick"] * quick])
    names = [name for name, b in BENCHMARKS.items() if b.in_all]
    expected = [["-m", "benchmarks", name, *["--quick"] * quick] for name in names]
    assert ran == expected + ([] if quick else [["-m", "benchmarks", "readme"]])


def test_all_ends_with_the_first_failure(monkeypatch, capsys):
    monkeypatch.setattr(command_line.subprocess, "run", lambda command: subprocess.CompletedProcess([], 3))
    with pytest.raises(SystemExit) as end:
        main(["all"])
    assert end.value.code == 3 and "steps" in capsys.readouterr().out


def test_the_module_runs_from_a_shell():
    command = [sys.executable, "-m", "benchmarks", "--list"]
    assert (
        "collectives" in subprocess.run(command, cwd=FOLDERS.parent, capture_output=True, text=True, check=True).stdout
    )


def test_files_of_results_are_json():
    assert all(json.loads(path.read_text()) for path in (FOLDERS / "results").glob("*.json"))
