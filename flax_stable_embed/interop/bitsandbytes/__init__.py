"""Optimizers with bitsandbytes' formulas and defaults, and conversion of its checkpoints in both directions.

Optimizers: `two_states.py` has Adam, AdamW, LAMB and AdEMAMix. `one_state.py` has the optimizers with one moment.
Both use `formula.py`.

Checkpoints: `embedding.py` converts embeddings, `optimizer_state.py` converts optimizer states. The second one is built
from these files, in the order in which it uses them:

    layout.py       finds the 8-bit transform in `tx` and how it stores each parameter
    pairs.py        checks the user's `order` and `transpose`: which parameter of torch is which of ours
    slots.py        says which field of our state holds `state1` and `state2`
    tensors.py      turns tensors of torch, and of safetensors files, into numpy arrays
    conversion.py   converts one moment of one parameter
    flat_blocks.py  decodes and encodes as bitsandbytes does, in blocks of the flattened tensor
    report.py       lists which moments were copied exactly and which were rounded
"""

from .embedding import dump_embedding as dump_embedding
from .embedding import load_embedding as load_embedding
from .one_state import adagrad8bit as adagrad8bit
from .one_state import lars8bit as lars8bit
from .one_state import lion8bit as lion8bit
from .one_state import rmsprop8bit as rmsprop8bit
from .one_state import sgd8bit as sgd8bit
from .optimizer_state import dump_optimizer_state as dump_optimizer_state
from .optimizer_state import load_optimizer_state as load_optimizer_state
from .report import ConversionReport as ConversionReport
from .two_states import adam8bit as adam8bit
from .two_states import adamw8bit as adamw8bit
from .two_states import ademamix8bit as ademamix8bit
from .two_states import lamb8bit as lamb8bit
