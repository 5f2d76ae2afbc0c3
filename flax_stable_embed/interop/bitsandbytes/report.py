"""Reports how each moment was converted: copied exactly, decoded or rounded."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ...optim.states.describe import aligned

How = Literal["exact", "decoded", "encoded", "absent"]


class Converted(NamedTuple):
    """How one moment of one parameter was converted: a row of `ConversionReport`, which describes the fields."""

    path: str
    key: int | str
    moment: str
    how: How
    error: float


@dataclass(frozen=True)
class ConversionReport:
    """Reports how each moment was converted; prints as a table.

    Attributes:
        rows: One `(path, key, moment, how, error)` for every moment of every parameter. `path` is our path, `key` is
            torch's key and `moment` is the field of our state. `how` is "exact" (nothing changed), "decoded" (codes
            became the fp32 numbers that they stand for), "encoded" (rounded again, because blocks, map or precision
            differ) or "absent" (the source has no such moment, and the result is zeros). `error` is the largest change
            of an element, relative to the largest magnitude in its block, or in the moment where there are no blocks.
    """

    rows: tuple[Converted, ...]

    @property
    def exact(self) -> bool:
        """Whether no number was rounded. Maps that differ by a few float32 roundings count as the same."""
        return all(row.how != "encoded" for row in self.rows)

    @property
    def largest_error(self) -> float:
        """The largest error over all moments."""
        return max((row.error for row in self.rows), default=0.0)

    def __str__(self) -> str:
        table = [Converted._fields, *((r.path, str(r.key), r.moment, r.how, f"{r.error:.1e}") for r in self.rows)]
        return "\n".join(aligned(table))
