"""Trains on any number of processes, with parameters and 8-bit moments sharded over a mesh of all their devices.

Only one line depends on the number of processes: the one that joins them. A process may be killed at any moment. The
training then continues from its last checkpoint, on any number of processes, with the losses that it would have had.
This holds because stochastic rounding draws the same numbers on every mesh.

    python examples/multihost.py                                          2 processes with 4 virtual CPU devices each
    python examples/multihost.py --kill-at 70                             the second one is killed before step 70 ...
    python examples/multihost.py --resume --processes 4                   ... and the training continues with four

On a TPU pod or a GPU cluster every host runs `python examples/multihost.py --worker`, and the line marked below becomes
`jax.distributed.initialize()`, which finds its arguments by itself.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

DEVICES = 8  # in all processes together
BATCH, FEATURES, HIDDEN = 256, 64, 1024


# --- the training, which every process runs--------------------------------------------------------------------------


def train(args) -> None:
    """Runs the training in one process."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import flax_stable_embed as fse

    jax.distributed.initialize(args.coordinator, args.processes, args.process)  # on a pod: jax.distributed.initialize()
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((jax.device_count() // 2, 2), ("data", "model"), axis_types=auto)
    specs = {"up": P("data", "model"), "down": P("model", "data"), "out": P("data", None)}
    shapes = {"up": (FEATURES, HIDDEN), "down": (HIDDEN, FEATURES), "out": (FEATURES, 1)}

    def initial(key):
        keys = jax.random.split(key, len(shapes))
        return {name: jax.random.normal(k, s) / s[0] ** 0.5 for k, (name, s) in zip(keys, shapes.items())}

    def predict(params, x):
        return (x + jax.nn.gelu(x @ params["up"]) @ params["down"]) @ params["out"]

    def batch(step):
        """Returns inputs and targets, which depend only on the step. Every process makes its own part."""
        rng = np.random.default_rng(step)
        x = rng.standard_normal((BATCH, FEATURES), np.float32)
        y = np.sin(x[:, :1]) * x[:, 1:2]
        place = NamedSharding(mesh, P("data"))
        return tuple(jax.make_array_from_callback(a.shape, place, lambda at, a=a: a[at]) for a in (x, y))

    def on_mesh(x):
        return x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, NamedSharding(mesh, P()))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, x, y):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((predict(p, x) - y) ** 2))(params)
        params, state = fse.fused_update(tx, grads, state, params)
        return params, state, loss

    tx = fse.adamw8bit(3e-3, state_format=fse.StateFormat(rounding="stochastic"))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.jit(initial, out_shardings=shardings)(jax.random.key(0))
    state = jax.tree.map(on_mesh, tx.init(params))  # the step count is made on one device
    checkpoints = ocp.CheckpointManager(args.dir.absolute() / "checkpoints")
    start = checkpoints.latest_step() or 0
    if start:
        tree = {"params": params, "state": state}  # restored with these shardings, whatever they were when it was saved
        saved = checkpoints.restore(start, args=ocp.args.StandardRestore(tree))
        params, state = saved["params"], saved["state"]

    losses = Losses(args.dir, start) if jax.process_index() == 0 else None
    for step in range(start + 1, args.steps + 1):
        if step == args.kill_at and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        params, state, loss = train_step(params, state, *batch(step))
        if losses:
            losses.add(step, float(loss))
        if step % args.checkpoint_every == 0:
            checkpoints.save(step, args=ocp.args.StandardSave({"params": params, "state": state}))
            checkpoints.wait_until_finished()  # the next step overwrites the arrays that are being saved
    checkpoints.close()
    if losses:
        moments = [x for name in ("mu", "nu") for x in getattr(state[0], name).values()]
        here = sum(x.addressable_shards[0].data.nbytes for x in moments)
        print(
            f"{jax.process_count()} processes, {jax.device_count()} devices: loss {losses.last:.4f} after {args.steps}"
        )
        print(f"moments: {sum(x.nbytes for x in moments):,} bytes, {here:,} of them on each device")


class Losses:
    """The losses of all steps, one per line. Steps after the checkpoint run again."""

    def __init__(self, folder: Path, start: int):
        self.path = folder / "losses.jsonl"
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        self.last = json.loads(kept[-1])["loss"] if kept else float("nan")
        self.path.write_text("".join(kept))

    def add(self, step: int, loss: float) -> None:
        """Appends a loss."""
        self.last = loss
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")


# --- many processes on this machine, instead of many hosts ----- ------------------------------------------------------


def launch(args) -> int:
    """Starts the processes and waits for them. If one dies, the others are stopped."""
    if not args.resume:
        shutil.rmtree(args.dir / "checkpoints", ignore_errors=True)
        (args.dir / "losses.jsonl").unlink(missing_ok=True)
    args.dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES // args.processes}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    given = [a for a in sys.argv[1:] if a != "--resume"]
    command = [sys.executable, __file__, *given, "--worker", "--coordinator", coordinator]
    command += ["--processes", str(args.processes)]
    workers = [subprocess.Popen([*command, "--process", str(i)], env=environment) for i in range(args.processes)]
    while None in (ends := [worker.poll() for worker in workers]) and not any(ends):
        time.sleep(0.05)
    died = any(ends)
    for worker in workers:
        worker.kill()  # it may still wait for a process that died
        worker.wait()
    if died:
        print("A process died. Run it with --resume to continue after the last checkpoint.", file=sys.stderr)
    return int(died)


def main() -> int:
    """Runs the launcher or one of its workers."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    option = parser.add_argument
    option("--processes", type=int, choices=[1, 2, 4], default=2)
    option("--steps", type=int, default=100)
    option("--checkpoint-every", type=int, default=20, metavar="STEPS")
    option("--dir", type=Path, default=Path("runs/multihost"), help="folder for losses and checkpoints")
    option("--resume", action="store_true", help="continue after the last checkpoint")
    option("--kill-at", type=int, metavar="STEP", help="the second process is killed before this step")
    option("--worker", action="store_true", help="run as one of the processes")
    option("--coordinator", help="address of the first process")
    option("--process", type=int, help="number of this process")
    args = parser.parse_args()
    if args.worker:
        return train(args) or 0
    return launch(args)


if __name__ == "__main__":
    sys.exit(main())
