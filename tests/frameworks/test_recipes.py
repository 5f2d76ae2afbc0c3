"""Runs the code in docs/frameworks.md, with the names that each framework has in scope at that place."""

import contextlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

import flax_stable_embed as fse
from tests.frameworks.tools import by_path
from tests.tools import is_codes

PAGE = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text()
BLOCKS = [
    pytest.param(section.partition("\n")[0], code, id=f"{section.partition(chr(10))[0]} {n}")
    for section in PAGE.split("\n## ")
    for n, code in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
]
PARAMS = {
    "wte": {"embedding": jnp.ones((512, 64))},
    "mlp": {"kernel": jnp.ones((64, 512)), "gating_einsum": jnp.ones((64, 512))},
    "norm": {"kernel": jnp.ones(4096)},
}
CONFIG = {"opt_type": "adamw8bit", "adam_b1": 0.9, "adam_b2": 0.95, "adam_eps": 1e-8, "adam_eps_root": 0.0}
SCOPES = {
    "MaxText": {"config": SimpleNamespace(**CONFIG, adam_weight_decay=0.1), "get_adamw_mask": lambda config: None},
    "EasyLM": {"PartitionSpec": PartitionSpec, "partition_rules": ((".*", PartitionSpec(None)),)},
    "EasyDeL": {"state": SimpleNamespace(init_tx=lambda tx: tx)},
    "tunix": {"peft_trainer": SimpleNamespace(PeftTrainer=lambda model, tx, config: tx), "model": None, "config": None},
    "gemma and kauldron": {"konfig": SimpleNamespace(imports=contextlib.nullcontext), "cfg": SimpleNamespace()},
    "transformers": {
        "TrainState": SimpleNamespace(create=lambda apply_fn, params, tx: tx),
        "model": SimpleNamespace(params=PARAMS, __call__=None),
        "decay_mask_fn": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    },
    "levanter": {"components": [], "b1": 0.9, "b2": 0.95, "eps": 1e-8},
}
RESULTS = {
    "MaxText": "base_opt",
    "T5X": "optimizer_def",
    "EasyLM": "tx",
    "EasyDeL": "state",
    "tunix": "trainer",
    "gemma and kauldron": "cfg.optimizer",
    "transformers": "state",
    "levanter": "components[0]",
}
TABLE = {}


@pytest.fixture(autouse=True)
def t5x(monkeypatch):
    rules = SimpleNamespace(_RULES=TABLE)
    module = ModuleType("t5x")
    module.optimizers = SimpleNamespace(OptaxStatePartitionRules=rules, OptaxWrapper=lambda tx: tx)
    monkeypatch.setitem(sys.modules, "t5x", module)


@pytest.mark.parametrize(("title", "code"), BLOCKS)
def test_the_code_of_the_page_runs(title, code, capsys):
    scope = {"fse": fse, "learning_rate_schedule": optax.constant_schedule(1e-3)} | SCOPES.get(title, {})
    exec(compile(code if not code.startswith("elif") else f"if False: ...\n{code}", title, "exec"), scope)
    if title == "EasyLM" and "partition_rules" in code:
        assert scope["partition_rules"][0] == ("absmax", PartitionSpec())
    elif title in RESULTS:
        state = by_path(jax.eval_shape(eval(RESULTS[title], scope).init, PARAMS))
        codes = {re.sub(".*mu/", "", path) for path, x in state.items() if is_codes(x) and "mu/" in path}
        assert codes - {"norm/kernel"} == {"mlp/kernel", "mlp/gating_einsum"}
        assert "norm/kernel" not in codes
    if title == "T5X":
        assert fse.ScaleByAdam8bitState in TABLE


def test_every_framework_of_the_page_is_tested():
    assert RESULTS.keys() == SCOPES.keys() | {"T5X"}
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert [title for title in titles if title in RESULTS] == list(RESULTS)
    assert set(titles) - RESULTS.keys() == {"The state on a mesh", "Flax", "Any other"}
    anchors = {title.lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors
