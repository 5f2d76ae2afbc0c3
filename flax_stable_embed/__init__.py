"""Stable embeddings and 8-bit optimizers for JAX: Flax modules and optax transforms."""

from importlib.metadata import version as _version

from . import linen as linen
from . import nnx as nnx
from . import ops as ops
from .optim._engine import Row as Row
from .optim._rules import Rule as Rule
from .optim._rules import StateFormat as StateFormat
from .optim._rules import where as where
from .optim._transform import chain as chain
from .optim._transform import fused_update as fused_update
from .optim.adam import ScaleByAdam8bitState as ScaleByAdam8bitState
from .optim.adam import adam8bit as adam8bit
from .optim.adam import adamw8bit as adamw8bit
from .optim.adam import scale_by_adam8bit as scale_by_adam8bit
from .optim.describe import StateReport as StateReport
from .optim.describe import describe as describe

__version__ = _version("flax-stable-embed")
