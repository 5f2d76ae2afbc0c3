"""What happens around the rule: weight decay, trust ratio, step size."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from ..storage.rules import Rule


class Tail(NamedTuple):
    """What an optimizer does around its method: `u += weight_decay * p` where the mask allows, then `u *= step_size`.

    coupled: the decay is added to the gradient instead, before the rule.
    gradient_hyper: `(g, p) -> more hyper-parameters`, from the whole decayed gradient and parameter in float32.
    rescale: `(u, p) -> u`, from the whole decayed direction and parameter, before the step size.
    clip: `(u, p) -> u` as bitsandbytes clips: from the whole direction before a decoupled decay, and only where moments
        are not in 8 bits.
    """

    step_size: Any = None
    weight_decay: Any = None
    mask: Any = None  # a pytree of booleans, or a prefix of one; None allows all
    coupled: bool = False
    gradient_hyper: Callable[[Array, Array], dict[str, Any]] | None = None
    gradient_mask: Any = None  # where `gradient_hyper` applies
    rescale: Callable[[Array, Array], Array] | None = None
    clip: Callable[[Array, Array], Array] | None = None

    @property
    def mask_name(self) -> str:
        """The argument that gives `mask`, as optax's namesakes call it."""
        return "weight_decay_mask" if self.coupled else "mask"

    @property
    def needs_params(self) -> bool:
        hooks = self.gradient_hyper, self.rescale, self.clip
        return self.weight_decay is not None or any(hook is not None for hook in hooks)


def _tail_of(tail: Tail, rule: Rule, decays: bool, in_gradient: bool) -> Tail:
    """The tail for one parameter: what its rule sets, and what masks leave out."""
    step_size, decay = tail.step_size, tail.weight_decay if decays else None
    if rule.lr_scale != 1:
        step_size = rule.lr_scale if step_size is None else rule.lr_scale * step_size
    if rule.weight_decay is not None:
        decay = rule.weight_decay
    if isinstance(decay, int | float) and decay == 0:
        decay = None
    hook = tail.gradient_hyper if in_gradient else None
    return tail._replace(step_size=step_size, weight_decay=decay, gradient_hyper=hook)
