"""Declares the parts of a step around the update rule: weight decay, norms over a parameter, step size."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from ..storage.rules import Rule
from ..trees import Mask


class Tail(NamedTuple):
    """Weight decay and scaling around the update rule: `u += weight_decay * p` where the mask allows, `u *= step_size`.

    AdamW is Adam's method with `Tail(weight_decay=...)`. LAMB adds `Tail(rescale=...)`.

    Attributes:
        gradient_scale: A traced scalar that multiplies the gradient before everything else; None for 1.
        step_size: A number or a traced scalar; None for a transform that does not scale by a learning rate.
        weight_decay: A number, a traced scalar or a schedule; None for none.
        mask: Pytree of booleans with the structure of the parameters, or a prefix of it. Weights decay where it is
            True. None means everywhere.
        coupled: Whether the decay is added to the gradient, before the rule, instead of to the direction.
        gradient_ratio: `(g, p) -> ratio`, from the decayed gradient and the parameter in float32. The gradient is
            multiplied by it.
        gradient_mask: Pytree of booleans that says where `gradient_ratio` applies.
        rescale: `(u, p) -> u`, from the decayed direction and the parameter, before the step size.
        clip: `(u, p) -> u` as bitsandbytes clips: before a decoupled decay, and only where moments are not in 8 bits.
    """

    gradient_scale: Any = None
    step_size: Any = None
    weight_decay: Any = None
    mask: Mask = None
    coupled: bool = False
    gradient_ratio: Callable[[Array, Array], Array] | None = None
    gradient_mask: Mask = None
    rescale: Callable[[Array, Array], Array] | None = None
    clip: Callable[[Array, Array], Array] | None = None

    @property
    def mask_name(self) -> str:
        """The argument that gives `mask`, as the optax optimizers call it."""
        return "weight_decay_mask" if self.coupled else "mask"

    @property
    def needs_params(self) -> bool:
        hooks = self.gradient_ratio, self.rescale, self.clip
        return self.weight_decay is not None or any(hook is not None for hook in hooks)

    def of_leaf(self, rule: Rule, *, decays: bool, in_gradient: bool) -> "Tail":
        """Returns the tail of one parameter: with the settings of its rule, without the parts that masks exclude."""
        step_size, decay = self.step_size, self.weight_decay if decays else None
        if rule.lr_scale != 1:
            step_size = rule.lr_scale if step_size is None else rule.lr_scale * step_size
        if rule.weight_decay is not None:
            decay = rule.weight_decay
        if isinstance(decay, int | float) and decay == 0:
            decay = None
        hook = self.gradient_ratio if in_gradient else None
        return self._replace(step_size=step_size, weight_decay=decay, gradient_ratio=hook)
