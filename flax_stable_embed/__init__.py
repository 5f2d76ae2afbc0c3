"""Stable embeddings and 8-bit optimizers for JAX: Flax modules and optax transforms."""

from importlib.metadata import version as _version

from . import interop as interop
from . import linen as linen
from . import nnx as nnx
from . import ops as ops
from .ops.rows import SparseRows as SparseRows
from .optim._report import Row as Row
from .optim._rules import Rule as Rule
from .optim._rules import StateFormat as StateFormat
from .optim._rules import where as where
from .optim._transform import chain as chain
from .optim._transform import fused_update as fused_update
from .optim.abstract_state import abstract_state as abstract_state
from .optim.adagrad import ScaleByAdagrad8bitState as ScaleByAdagrad8bitState
from .optim.adagrad import adagrad8bit as adagrad8bit
from .optim.adagrad import scale_by_adagrad8bit as scale_by_adagrad8bit
from .optim.adam import ScaleByAdam8bitState as ScaleByAdam8bitState
from .optim.adam import adam8bit as adam8bit
from .optim.adam import adamw8bit as adamw8bit
from .optim.adam import scale_by_adam8bit as scale_by_adam8bit
from .optim.ademamix import ScaleByAdemamix8bitState as ScaleByAdemamix8bitState
from .optim.ademamix import ademamix8bit as ademamix8bit
from .optim.ademamix import scale_by_ademamix8bit as scale_by_ademamix8bit
from .optim.convert_state import convert_state as convert_state
from .optim.describe import StateReport as StateReport
from .optim.describe import describe as describe
from .optim.global_norm import clip_by_global_norm as clip_by_global_norm
from .optim.global_norm import global_norm as global_norm
from .optim.lamb import lamb8bit as lamb8bit
from .optim.lamb import scale_by_lamb8bit as scale_by_lamb8bit
from .optim.lars import lars8bit as lars8bit
from .optim.lars import scale_by_lars8bit as scale_by_lars8bit
from .optim.lion import ScaleByLion8bitState as ScaleByLion8bitState
from .optim.lion import lion8bit as lion8bit
from .optim.lion import scale_by_lion8bit as scale_by_lion8bit
from .optim.max_norm import with_max_norm as with_max_norm
from .optim.percentile_clipping import PercentileClippingState as PercentileClippingState
from .optim.percentile_clipping import percentile_clipping as percentile_clipping
from .optim.quantize_state import QuantizedState as QuantizedState
from .optim.quantize_state import quantize_state as quantize_state
from .optim.rmsprop import ScaleByRmsprop8bitState as ScaleByRmsprop8bitState
from .optim.rmsprop import rmsprop8bit as rmsprop8bit
from .optim.rmsprop import scale_by_rmsprop8bit as scale_by_rmsprop8bit
from .optim.row_sparse import RowSparseState as RowSparseState
from .optim.row_sparse import row_sparse as row_sparse
from .optim.row_value_and_grad import row_value_and_grad as row_value_and_grad
from .optim.row_value_and_grad import sum_microbatches as sum_microbatches
from .optim.sgd import ScaleBySgd8bitState as ScaleBySgd8bitState
from .optim.sgd import scale_by_sgd8bit as scale_by_sgd8bit
from .optim.sgd import sgd8bit as sgd8bit
from .optim.stochastic_rounding import StochasticRoundState as StochasticRoundState
from .optim.stochastic_rounding import stochastic_round_updates as stochastic_round_updates

__version__ = _version("flax-stable-embed")
