"""What became of each moment on its way from one library to the other."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ...optim.states.describe import aligned

How = Literal["exact", "decoded", "encoded", "absent"]


class Converted(NamedTuple):
    """One moment of one parameter.

    `how` is "exact": the same codes and scales, or the same fp32 numbers; "decoded": codes became the fp32 numbers that
    they stand for; "encoded": rounded anew, because blocks, map or precision differ; "absent": there was none, and it
    is zeros.
    """

    path: str  # ours
    key: int | str  # torch's
    moment: str  # the field of our state
    how: How
    error: float  # the largest change, in parts of the largest magnitude in its block (without blocks, in the moment)


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, moment by moment; prints as a table.

    Attributes:
        rows: one `(path, key, moment, how, error)` for every moment of every parameter.
    """

    rows: tuple[Converted, ...]

    @property
    def exact(self) -> bool:
        """Whether no number was rounded; maps that differ in last digits count as the same."""
        return all(row.how != "encoded" for row in self.rows)

    @property
    def largest_error(self) -> float:
        """The largest error of all moments."""
        return max((row.error for row in self.rows), default=0.0)

    def __str__(self) -> str:
        table = [Converted._fields, *((r.path, str(r.key), r.moment, r.how, f"{r.error:.1e}") for r in self.rows)]
        return "\n".join(aligned(table))
