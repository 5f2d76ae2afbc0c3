"""Embedding lookups with torch's options, and the initializers and checks that the Linen and NNX modules share."""

from ..dtypes import at_least_float32 as at_least_float32
from .gather import Mode as Mode
from .gather import Sharding as Sharding
from .initializers import Initializer as Initializer
from .initializers import is_pretrained as is_pretrained
from .initializers import pretrained as pretrained
from .initializers import xavier_uniform as xavier_uniform
from .initializers import zero_padding_row as zero_padding_row
from .layer_norm import NORM_EPSILON as NORM_EPSILON
from .layer_norm import normalize as normalize
from .lookup import lookup as lookup
from .lookup import normalized_lookup as normalized_lookup
from .lookup import renormed_rows as renormed_rows
from .lookup import table_for_logits as table_for_logits
from .options import Method as Method
from .options import check_norm_options as check_norm_options
from .options import check_options as check_options
