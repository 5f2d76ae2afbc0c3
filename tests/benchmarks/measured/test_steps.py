"""Tests that the benchmark of single steps fills every row and counts bytes exactly. Times are not checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.harness.shapes import QUICK, SHAPES
from benchmarks.measured.steps import main
from benchmarks.tried import errors

ROOT = Path(__file__).parents[3]
CONTENDERS = [
    ("optax.adamw", "update"),
    *(
        (f"fse.adamw8bit {codec}", path)
        for codec in ("root", "dynamic", "linear")
        for path in ("fused_update", "update")
    ),
    ("bitsandbytes AdamW8bit", "step"),
    ("torchao AdamW8bit", "step"),
]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The results and the output of `python -m benchmarks steps --quick`."""
    out = tmp_path_factory.mktemp("benchmarks") / "quick.json"
    command = [sys.executable, "-m", "benchmarks", "steps", "--quick", "--out", str(out)]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(out.read_text()), run.stdout


@pytest.mark.slow
def test_quick_run_fills_every_row(quick):
    results, printed = quick
    assert [entry["name"] for entry in results["shapes"]] == list(QUICK)
    for entry in results["shapes"]:
        assert [(row["contender"], row["path"]) for row in entry["rows"]] == CONTENDERS
        assert f"{entry['name']} {'x'.join(map(str, entry['shape']))}" in printed
        for row in entry["rows"]:
            if "skip" in row:
                assert row["path"] == "step" and row["skip"] == "not installed"
                continue
            assert row["rounds"] == 3
            for low, middle, high in (row["ms"], row["ratio"]):
                assert 0 < low <= middle <= high
            assert row["gb_per_s"] > 0 and row["compile_s"] > 0
        assert entry["rows"][0]["ratio"] == [1.0, 1.0, 1.0]
    assert results["errors"] == errors.measure()


@pytest.mark.slow
def test_environment_names_the_machine_and_not_its_paths(quick):
    results, _ = quick
    env = results["environment"]
    for key in ("date", "command", "device", "cpu", "cores", "threads", "versions", "copy_gb_per_s"):
        assert env[key], key
    assert env["command"] == "python -m benchmarks steps --quick"
    assert env["versions"]["jax"] == jax.__version__
    assert str(Path.home()) not in json.dumps(results) and str(ROOT) not in json.dumps(results)


@pytest.mark.slow
def test_bytes_of_state_are_exact(quick):
    results, _ = quick
    rows = {(e["name"], r["contender"], r["path"]): r for e in results["shapes"] for r in e["rows"] if "skip" not in r}
    for (name, contender, path), row in rows.items():
        n = SHAPES[name].size
        state = row["state_bytes_per_parameter"] * n
        if contender == "optax.adamw":
            assert state == pytest.approx(8 * n + 4, abs=1e-6)  # two moments in fp32, and the count
        elif contender.startswith("fse"):
            # the count; the format, 12 bytes times the codec's number; one scale in fp32 for each fp32 moment
            other = 4 + 12 * (1 + ["root", "dynamic", "linear"].index(contender.split()[1]))
            scales = {"bert_layernorm": 2, "lora_up": 2 * 16 * 16}[name]
            codes = 8 * n if name == "bert_layernorm" else 2 * n
            assert state == pytest.approx(codes + 4 * scales + other, abs=1e-6), (name, contender, path)
        else:  # blocks of 256, from 4096 elements on, and in torchao only if 256 divides the size
            in_8_bits = n >= 4096 and (contender.startswith("bitsandbytes") or n % 256 == 0)
            moments = 2 * n + 2 * 4 * -(-n // 256) if in_8_bits else 8 * n
            step = 4 if contender.startswith("torchao") else 0  # a Python number in bitsandbytes
            assert state == pytest.approx(moments + step, abs=1e-6), (name, contender)


@pytest.mark.slow
def test_bytes_of_temporaries_are_integers_and_only_for_compiled_steps(quick):
    results, _ = quick
    for entry in results["shapes"]:
        for row in entry["rows"]:
            if row["path"] == "step":
                assert row.get("temp_bytes_per_parameter") is None
                continue
            temporaries = row["temp_bytes_per_parameter"] * entry["parameters"]
            assert temporaries >= 0 and temporaries == pytest.approx(round(temporaries), abs=1e-6)


@pytest.mark.slow
def test_update_and_fused_update_of_a_codec_store_the_same(quick):
    results, _ = quick
    for entry in results["shapes"]:
        rows = [row for row in entry["rows"] if row["contender"].startswith("fse")]
        for fused, update in zip(rows[::2], rows[1::2]):
            assert (fused["path"], update["path"]) == ("fused_update", "update")
            for key in ("stored", "state_bytes_per_parameter"):
                assert fused[key] == update[key]


@pytest.mark.slow
def test_the_table_shows_only_numbers_of_the_file(quick, tmp_path, capsys):
    results, _ = quick
    results["shapes"][0]["rows"][0] |= {"ms": [1.0, 2.0, 3.0], "state_bytes_per_parameter": 123.456}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    main(["--table", str(file)])
    table = capsys.readouterr().out
    assert "| optax.adamw | `update` | 2 (1 to 3), 1.00x |" in table and "123.456" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 * (len(CONTENDERS) + 2)
    assert {line.count("|") for line in lines} == {3 + len(QUICK)}
