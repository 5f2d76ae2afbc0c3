"""bitsandbytes: the same optimizers with its formulas and defaults, and its checkpoints in and out."""

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
