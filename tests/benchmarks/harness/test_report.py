"""Tests that files of results have distinct names."""

import json

from benchmarks.harness import report


def test_results_are_named_by_device_and_commit_or_date(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    env = {"platform": "cpu", "device": "AMD EPYC", "commit": "4dec047", "date": "2026-01-02 03:04 UTC"}
    path = report.save({"environment": env}, None)
    assert path == tmp_path / "cpu-amd-epyc-4dec047.json"
    assert json.loads(path.read_text()) == {"environment": env}
    assert report.save({"environment": env | {"commit": None}}, None).name == "cpu-amd-epyc-2026-01-02.json"
