"""The generated parts of the documentation: `python -m benchmarks readme` writes them from the files in `results/`.

A part stands between `<!-- name: where it comes from -->` and `<!-- /name -->`. The main example brings its own:
`python examples/report.py FILE --publish NAME`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import (
    chips,
    collectives,
    compiled,
    embedding,
    errors,
    goals,
    gpu,
    lookups,
    models,
    pictures,
    quality_report,
    report,
    roofline,
    rounding,
    state,
    switch,
)

ROOT = report.HOME.parent
RESULTS = report.HOME / "results"


def newest() -> dict:
    """The newest results of a full run of `python -m benchmarks`."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    return max((r for r in found if "shapes" in r), key=lambda r: r["environment"]["date"])


def quality() -> str:
    """The ladder, the figure and, folded, the other tables of `python -m benchmarks.quality`, once it has run."""
    file = RESULTS / "quality.json"
    if not file.exists():
        return "No results yet: `python -m benchmarks.quality` makes them."
    results = json.loads(file.read_text())
    figure = "![Losses by learning rate, and the ladder](../benchmarks/results/quality.png)"
    (_, ladder), *others = quality_report.tables(results).items()
    summary = f"<details><summary>{', '.join(title for title, _ in others)}</summary>"
    folded = [summary, *(table for _, table in others), "</details>"]
    return "\n\n".join([*quality_report.about(results), ladder, figure, *folded])


def of(module: Any) -> Callable[[], str]:
    """The tables of one benchmark, from its own file of results."""
    return lambda: module.markdown(json.loads(module.FILE.read_text()))


PARTS: dict[tuple[str, str], Callable[[], str]] = {
    ("docs/performance.md", "goals"): lambda: goals.markdown(newest()),
    ("docs/results.md", "gpu"): lambda: "\n\n".join(map(gpu.markdown, gpu.everywhere())),
    ("docs/results.md", "compiled"): of(compiled),
    ("docs/results.md", "lookups"): of(lookups),
    ("docs/results.md", "models"): of(models),
    ("docs/results.md", "benchmarks"): lambda: report.markdown(newest()),
    ("docs/results.md", "embedding"): of(embedding),
    ("docs/quality.md", "quality"): quality,
    ("docs/quality.md", "rounding"): of(rounding),
    ("docs/quality.md", "switch"): of(switch),
    ("docs/rules.md", "state"): state.markdown,
    ("docs/results.md", "collectives"): of(collectives),
    ("docs/results.md", "chips"): of(chips),
    ("flax_stable_embed/ops/blockwise/README.md", "errors"): lambda: errors.markdown(newest()["errors"]),
}


def replace_part(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of `name`."""
    marks = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marks.search(text):
        raise ValueError(f"no marks of {name!r} in the text: <!-- {name}: ... --> and <!-- /{name} -->")
    return marks.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def rendered() -> dict[Path, str]:
    """Every file with generated parts, as it should be."""
    texts: dict[Path, str] = {}
    for (name, part), make in PARTS.items():
        path = ROOT / name
        texts[path] = replace_part(texts.get(path, path.read_text()), part, make())
    return texts


def write() -> None:
    """Brings all of them up to date."""
    for path, text in rendered().items():
        path.write_text(text)
        print(f"written: {path.relative_to(ROOT)}")
    roofline.draw(gpu.everywhere(), json.loads(compiled.FILE.read_text()))
    pictures.draw()
    print(f"written: {roofline.FILE.relative_to(ROOT)} and pictures in {pictures.FOLDER.relative_to(ROOT)}")
