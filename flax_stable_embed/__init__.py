"""8-bit optimizers and stable embeddings for JAX: optax transforms and Flax modules.

Replace `optax.adamw` by `adamw8bit` to store optimizer moments in 8 bits, and `nn.Embed` by `linen.StableEmbed` or
`nnx.StableEmbed`. `describe(tx, params)` lists how the moments of each parameter are stored, and why.
"""

from importlib.metadata import version as _version

from . import experimental as experimental
from . import interop as interop
from . import linen as linen
from . import nnx as nnx
from . import ops as ops
from .ops.embedding.rows import SparseRows as SparseRows
from .optim.fused_update import fused_update as fused_update
from .optim.methods.adagrad import ScaleByAdagrad8bitState as ScaleByAdagrad8bitState
from .optim.methods.adagrad import adagrad8bit as adagrad8bit
from .optim.methods.adagrad import scale_by_adagrad8bit as scale_by_adagrad8bit
from .optim.methods.adam import ScaleByAdam8bitState as ScaleByAdam8bitState
from .optim.methods.adam import adam8bit as adam8bit
from .optim.methods.adam import adamw8bit as adamw8bit
from .optim.methods.adam import scale_by_adam8bit as scale_by_adam8bit
from .optim.methods.ademamix import ScaleByAdemamix8bitState as ScaleByAdemamix8bitState
from .optim.methods.ademamix import ademamix8bit as ademamix8bit
from .optim.methods.ademamix import scale_by_ademamix8bit as scale_by_ademamix8bit
from .optim.methods.lamb import lamb8bit as lamb8bit
from .optim.methods.lamb import scale_by_lamb8bit as scale_by_lamb8bit
from .optim.methods.lars import lars8bit as lars8bit
from .optim.methods.lars import scale_by_lars8bit as scale_by_lars8bit
from .optim.methods.lion import ScaleByLion8bitState as ScaleByLion8bitState
from .optim.methods.lion import lion8bit as lion8bit
from .optim.methods.lion import scale_by_lion8bit as scale_by_lion8bit
from .optim.methods.rmsprop import ScaleByRmsprop8bitState as ScaleByRmsprop8bitState
from .optim.methods.rmsprop import rmsprop8bit as rmsprop8bit
from .optim.methods.rmsprop import scale_by_rmsprop8bit as scale_by_rmsprop8bit
from .optim.methods.sgd import ScaleBySgd8bitState as ScaleBySgd8bitState
from .optim.methods.sgd import scale_by_sgd8bit as scale_by_sgd8bit
from .optim.methods.sgd import sgd8bit as sgd8bit
from .optim.microbatches import microbatch_mean as microbatch_mean
from .optim.rows.catch_up import RowSparseState as RowSparseState
from .optim.rows.global_norm import clip_by_global_norm as clip_by_global_norm
from .optim.rows.global_norm import global_norm as global_norm
from .optim.rows.max_norm import with_max_norm as with_max_norm
from .optim.rows.row_sparse import row_sparse as row_sparse
from .optim.rows.row_value_and_grad import row_value_and_grad as row_value_and_grad
from .optim.rows.row_value_and_grad import sum_microbatches as sum_microbatches
from .optim.states.abstract_state import abstract_state as abstract_state
from .optim.states.adapt_state import AdaptedValue as AdaptedValue
from .optim.states.adapt_state import AdaptReport as AdaptReport
from .optim.states.adapt_state import adapt_state as adapt_state
from .optim.states.checksums import checksums as checksums
from .optim.states.checksums import verify_checksums as verify_checksums
from .optim.states.convert_state import convert_state as convert_state
from .optim.states.describe import StateReport as StateReport
from .optim.states.describe import describe as describe
from .optim.states.reset_moments import reset_moments as reset_moments
from .optim.storage.rules import Rule as Rule
from .optim.storage.rules import where as where
from .optim.storage.state_format import StateFormat as StateFormat
from .optim.transforms.chain import chain as chain
from .optim.transforms.in_place import in_place as in_place
from .optim.transforms.percentile_clipping import PercentileClippingState as PercentileClippingState
from .optim.transforms.percentile_clipping import percentile_clipping as percentile_clipping
from .optim.transforms.quantize_state import QuantizedState as QuantizedState
from .optim.transforms.quantize_state import quantize_state as quantize_state
from .optim.transforms.split_weights import SplitWeightsState as SplitWeightsState
from .optim.transforms.split_weights import from_master_weights as from_master_weights
from .optim.transforms.split_weights import master_weights as master_weights
from .optim.transforms.split_weights import split_weights as split_weights
from .optim.transforms.stochastic_rounding import StochasticRoundState as StochasticRoundState
from .optim.transforms.stochastic_rounding import stochastic_round_updates as stochastic_round_updates

__version__ = _version("flax-stable-embed")
