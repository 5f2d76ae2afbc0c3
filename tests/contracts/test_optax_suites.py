"""Runs optax's own test suites, which are in its wheel, on our optimizers.

A suite has a list of the names of its optimizers. We execute its source up to the first test class. Then we reduce the
list to the names for which we have an 8-bit optimizer, and replace these optimizers by ours. Then we execute the rest,
which generates the tests from the list. So tests that optax skips for an optimizer are skipped for ours, and learning
rates are the same. Everything is stored in 8 bits, even parameters of two or three elements.
"""

import ast
import functools
import importlib.util
import itertools
import os
import re
import types
import warnings
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import pytest

import flax_stable_embed as fse
from tests.cases import OPTIMIZERS
from tests.tools import REPRESENTATIVE, is_codes, may_straddle, moments

NAMESAKES = {case.theirs.__name__: case for case in OPTIMIZERS}
STATES = tuple({case.state for case in OPTIMIZERS})
RECORD: list[bool] = []  # per parameter and `init` of the test: is it in 8 bits or complex?


def in_8bit(case):
    """Returns the case's factory with everything in 8 bits. Every `init` adds to RECORD."""

    @functools.wraps(case.ours)
    def factory(*args, **kwargs):
        tx = case.ours(*args, **kwargs | {"rules": ((".*", 8),), "state_format": fse.StateFormat(min_size=0)})

        def init(params):
            state = tx.init(params)
            (found,) = [x for x in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(x)]
            if all(getattr(found, m) is None for m in moments(case)):
                RECORD.append(True)  # SGD without momentum: there is nothing to store
                return state
            for p, *stored in zip(*map(jax.tree.leaves, (params, *(getattr(found, m) for m in moments(case))))):
                if hasattr(p, "dtype"):  # and is not the placeholder of `optax.tree.map_params`
                    RECORD.append(jnp.iscomplexobj(p) or all(map(is_codes, stored)))
            return state

        return optax.GradientTransformationExtraArgs(init, tx.update)

    return factory


def _is_ours(x):
    return isinstance(x, STATES)


def wrapped_in_8bit(factory):
    """Returns a factory of optax whose transform stores its moments in 8 bits. Every `init` adds to RECORD."""

    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        options = {"rules": ((".*", 8),), "state_format": fse.StateFormat(min_size=0)}
        tx = fse.quantize_state(factory(*args, **kwargs), **options)

        def init(params):
            state = tx.init(params)
            leaves = jax.tree.leaves(params)
            if leaves and all(
                hasattr(p, "dtype") for p in leaves
            ):  # and are not the placeholder of `optax.tree.map_params`
                stored = any(is_codes(x) for x in jax.tree.leaves(state.inner) if hasattr(x, "dtype"))
                RECORD.append(stored or any(map(jnp.iscomplexobj, leaves)))
            return state

        return optax.GradientTransformationExtraArgs(init, tx.update)

    return wrapped


class Redirect:
    """A module of optax whose optimizers are replaced by `lead(name, optimizer)`, by default our 8-bit ones."""

    def __init__(self, module, lead=None):
        self._module, self._lead = module, lead or to_namesake

    def __getattr__(self, name):
        return self._lead(name, getattr(self._module, name))


def to_namesake(name, found):
    case = NAMESAKES.get(name)
    return in_8bit(case) if case is not None and found is case.theirs else found


def run_source(module_name, prepare):
    """Executes a test module, calls `prepare(namespace)` before its first class, and returns the namespace."""
    path = Path(importlib.util.find_spec(module_name).origin)
    body = ast.parse(path.read_text()).body
    cut = next(i for i, node in enumerate(body) if isinstance(node, ast.ClassDef))
    namespace = {"__name__": module_name, "__file__": str(path)}

    def execute(nodes):
        # One module sets XLA_FLAGS and builds other optimizers of optax, some of which warn.
        with mock.patch.dict(os.environ), warnings.catch_warnings(action="ignore"):
            exec(compile(ast.Module(nodes, type_ignores=[]), str(path), "exec"), namespace)

    execute(body[:cut])
    prepare(namespace)
    execute(body[cut:])
    return namespace


def ours_of(entries):
    return [entry for entry in entries if entry["opt_name"] in NAMESAKES]


def prepare_alias(namespace):
    namespace["_OPTIMIZERS_UNDER_TEST"] = tuple(ours_of(namespace["_OPTIMIZERS_UNDER_TEST"]))
    namespace["alias"] = Redirect(namespace["alias"])


def prepare_wrapped(namespace):
    entries = tuple(filter(keeps_moments, namespace["_OPTIMIZERS_UNDER_TEST"]))
    names = {entry["opt_name"] for entry in entries}
    namespace["_OPTIMIZERS_UNDER_TEST"] = entries
    lead = lambda name, found: wrapped_in_8bit(found) if name in names else found  # noqa: E731
    namespace["alias"] = Redirect(namespace["alias"], lead)


def keeps_moments(entry, module=optax):
    """Whether `quantize_state` accepts it with these hyper-parameters. For example, sgd needs momentum."""
    try:
        fse.quantize_state(getattr(module, entry["opt_name"])(**entry["opt_kwargs"]))
    except (ValueError, DeprecationWarning):
        return False
    return True


def prepare_wrapped_contrib(namespace):
    """Keeps the optimizers of optax.contrib and drops wrappers. The wrapped optimizers are tested in `alias`."""
    entries = [entry for entry in namespace["_MAIN_OPTIMIZERS_UNDER_TEST"] if entry["wrapper_name"] is None]
    entries = tuple(entry for entry in entries if keeps_moments(entry, optax.contrib))
    names = {entry["opt_name"] for entry in entries}
    namespace["_MAIN_OPTIMIZERS_UNDER_TEST"] = namespace["_ALL_OPTIMIZERS_UNDER_TEST"] = entries
    lead = lambda name, found: wrapped_in_8bit(found) if name in names else found  # noqa: E731
    namespace["contrib"] = Redirect(namespace["contrib"], lead)


def prepare_contrib(namespace):
    """Keeps optimizers of optax.contrib that we have in 8 bits, with their wrappers. Adds those of `alias`."""
    main, everything = (ours_of(namespace[f"_{which}_OPTIMIZERS_UNDER_TEST"]) for which in ("MAIN", "ALL"))
    own = {entry["opt_name"] for entry in main if entry["wrapper_name"] is None}
    joining = [
        entry | {"wrapper_name": None, "wrapper_kwargs": None}
        for entry in _alias["_OPTIMIZERS_UNDER_TEST"]
        if entry["opt_name"] not in own
    ]
    namespace["_MAIN_OPTIMIZERS_UNDER_TEST"] = tuple(main + joining)
    namespace["_ALL_OPTIMIZERS_UNDER_TEST"] = tuple(everything + joining)
    namespace |= {name: Redirect(namespace[name]) for name in ("alias", "contrib")}


def prepare_sharding(namespace):
    # It compares versions as text, so it would take JAX 0.10 to be older than 0.7, and skip.
    namespace["jax"] = types.SimpleNamespace(**vars(jax) | {"__version__": "1"})
    namespace["OPTIMIZERS"] = {name: in_8bit(case)(learning_rate=1.0) for name, case in NAMESAKES.items()}


COVERED = "test_state_shape", "test_preserve_dtype", "test_gradient_accumulation", "test_optimizers_can_be_wrapped"


def is_covered(name, test):
    """Whether `make test` leaves a test out, because another suite has it or it does not depend on the formula.

    Tests that optimize real parameters run for all optimizers. The representatives run all tests of one suite.
    """
    parameters = getattr(test, "__x_params_repr__", "")
    found = re.match(r"\(opt_name='(\w+)'", parameters)
    if found is None or found[1] not in NAMESAKES:
        return False
    joined = "wrapper_name=None" in parameters and NAMESAKES[found[1]].theirs.__module__.startswith("optax._src.alias")
    formula_alone = not name.startswith(COVERED) and "complex" not in parameters
    return joined or (not formula_alone and NAMESAKES[found[1]].name not in REPRESENTATIVE)


def suite(test_class, only="test", without="test of nothing", unless="no parameters", one_in=1):
    """Returns the class without tests that use no optimizer. Each test checks that it made 8-bit states.

    Tests whose parameters match `unless` are left out too. `make test` runs every `one_in`-th test, unless it is
    covered elsewhere.
    """
    number = itertools.count()

    def checked(test):
        @functools.wraps(test)
        def run(self):
            RECORD.clear()
            test(self)
            assert RECORD and all(RECORD)

        return run

    for name, test in list(vars(test_class).items()):
        if not name.startswith("test"):
            continue
        out = re.search(unless, getattr(test, "__x_params_repr__", ""))
        if out or name.startswith(without) or not name.startswith(only):
            delattr(test_class, name)
            continue
        slow = next(number) % one_in or is_covered(name, test)
        setattr(test_class, name, pytest.mark.slow(checked(test)) if slow else checked(test))
    test_class.__module__ = __name__
    return test_class


_alias = run_source("optax._src.alias_test", prepare_alias)
_contrib = run_source("optax.contrib._common_test", prepare_contrib)
_sharding = run_source("optax._src.sharding_test", prepare_sharding)

# We refuse `mu_dtype`, and the test of microbatches has no optimizer.
AliasTest = suite(_alias["AliasTest"], without="test_explicit_dtype")
ContribTest = suite(_contrib["ContribTest"], one_in=2)
ShardingTest = may_straddle(suite(_sharding["ShardingTest"], without="test_microbatch"))  # arrays of shape (1, 8)
# Transforms of optax inside `quantize_state`.
_wrapped = run_source("optax._src.alias_test", prepare_wrapped)
WrappedTest = suite(_wrapped["AliasTest"], only="test_optimization", one_in=9)
# Momo chooses the lengths of its steps by its moments, and stops 6 to 9 percent before the end of Rosenbrock's valley.
# schedule_free evaluates at parameters that it reads from its own state, which is `state.inner` here.
_wrapped_contrib = run_source("optax.contrib._common_test", prepare_wrapped_contrib)
WrappedContribTest = suite(
    _wrapped_contrib["ContribTest"], only="test_optimizers", unless="momo.*rosenbrock|schedule_free_adamw", one_in=9
)


@pytest.mark.parametrize(("test_class", "of_each"), [(AliasTest, 16), (ContribTest, 14), (ShardingTest, 3)])
def test_every_suite_has_tests_for_every_optimizer(test_class, of_each):
    tests = [name for name in dir(test_class) if name.startswith("test")]
    assert len(tests) >= of_each * len(NAMESAKES)
