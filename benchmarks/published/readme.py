"""Writes the generated parts and the pictures of the documentation, from the files in `results/`.

    python -m benchmarks readme

A part is the text between `<!-- NAME: where it comes from -->` and `<!-- /NAME -->` on any page. `PARTS` has the names.
A page gets a part by having its marks. The parts of the main example are written by
`python examples/report.py FILE --publish NAME`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..counted import chips, collectives, compiled, gradients, instructions, lookups, state
from ..harness import report
from ..measured import embedding, gpu, models, steps
from ..tried import changes, errors, finetuning, quality_report, rounding, switch, weights
from . import goals, paths, pictures, roofline

BY_THE_EXAMPLE = ("language_model", "linear", "weights_trained")
MARKS = re.compile(r"^(<!-- (\w+): [^\n]*-->\n)(?:.*?\n)??(<!-- /\2 -->)", re.DOTALL | re.MULTILINE)


def results_of(module: Any) -> Any:
    """Returns the results of one benchmark, from its file."""
    return json.loads(module.FILE.read_text())


def quality() -> str:
    """Returns the ladder, the figure and, folded, the other tables of `python -m benchmarks quality`."""
    results = results_of(quality_report)
    figure = "![Losses by learning rate, and the ladder](../benchmarks/results/quality.png)"
    (_, ladder), *others = quality_report.tables(results).items()
    summary = f"<details><summary>{', '.join(title for title, _ in others)}</summary>"
    folded = [summary, *(table for _, table in others), "</details>"]
    return "\n\n".join([*quality_report.about(results), ladder, figure, *folded])


PARTS: dict[str, Callable[[], str]] = {
    "headline": lambda: state.headline(results_of(state)),
    "paths": paths.markdown,
    "goals": lambda: goals.markdown(steps.newest()),
    "gpu": lambda: "\n\n".join(map(gpu.markdown, gpu.everywhere())),
    "compiled": lambda: compiled.markdown(results_of(compiled)),
    "instructions": lambda: instructions.markdown(results_of(instructions)),
    "gradients": lambda: gradients.markdown(results_of(gradients)),
    "lookups": lambda: lookups.markdown(results_of(lookups)),
    "models": lambda: models.markdown(results_of(models)),
    "benchmarks": lambda: steps.markdown(steps.newest()),
    "embedding": lambda: embedding.markdown(results_of(embedding)),
    "quality": quality,
    "rounding": lambda: rounding.markdown(results_of(rounding)),
    "weights": lambda: weights.markdown(results_of(weights)),
    "weights_bytes": weights.markdown_of_bytes,
    "finetuning": lambda: finetuning.markdown(results_of(finetuning)),
    "small_gradients": lambda: weights.markdown_of_small(results_of(weights)),
    "changes": lambda: changes.markdown(results_of(changes)),
    "switch": lambda: switch.markdown(results_of(switch)),
    "state": lambda: state.markdown(results_of(state)),
    "collectives": lambda: collectives.markdown(results_of(collectives)),
    "chips": lambda: chips.markdown(results_of(chips)),
    "errors": lambda: errors.markdown(steps.newest()["errors"]),
}


def parts_of(text: str) -> list[str]:
    """Returns the names of the parts in a text, in their order."""
    return [found[2] for found in MARKS.finditer(text)]


def replace_parts(text: str) -> str:
    """Returns `text` with its parts up to date. A name that is not in `PARTS` is an error."""

    def part(found: re.Match) -> str:
        opening, name, closing = found.groups()
        if name in BY_THE_EXAMPLE:
            return found[0]
        if name not in PARTS:
            raise ValueError(f"There is no part named {name!r}. The names are: {', '.join(PARTS)}.")
        return f"{opening}{PARTS[name]()}\n{closing}"

    return MARKS.sub(part, text)


def pages() -> list[Path]:
    """Returns the pages that have a generated part."""
    places = ("*.md", "docs/**/*.md", "flax_stable_embed/**/*.md", "examples/*.md")
    found = [path for place in places for path in sorted(report.ROOT.glob(place))]
    found = [path for path in found if "_build" not in path.parts]  # the built site
    return [path for path in found if set(parts_of(path.read_text())) - {*BY_THE_EXAMPLE}]


def rendered() -> dict[Path, str]:
    """Returns every page with generated parts as it should be."""
    return {path: replace_parts(path.read_text()) for path in pages()}


def write() -> None:
    """Brings all pages and pictures up to date."""
    drawn = [roofline.draw(gpu.everywhere(), results_of(compiled)), *pictures.draw()]
    for path, text in rendered().items():
        path.write_text(text)
        drawn.append(path)
    for path in drawn:
        print(f"Wrote {path.relative_to(report.ROOT)}.")


def main(arguments: list[str]) -> None:
    """Writes pages and pictures."""
    report.parser("readme", __doc__).parse_args(arguments)
    write()
