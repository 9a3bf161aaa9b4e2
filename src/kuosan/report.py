"""A run's report: one HTML page that needs nothing else, and the same numbers as JSON."""

from __future__ import annotations

import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

from kuosan import figures
from kuosan.measurements import measurements_of
from kuosan.plain import plain
from kuosan.progress import duration
from kuosan.runs import Run


class ReportError(ValueError):
    """A report that cannot be written: says what is missing and how to get it."""


def write_report(run: Run, budget: float = 90.0) -> Path:
    """Measure a run and write RUN/report.html, one page without any other file, and RUN/report.json with its numbers.

    The bound and the quality of evaluation.json are used where they are of this step.

    Args:
        run: a trained run, or one with a checkpoint at least.
        budget: about how many seconds sampling and the bound may take; a first small batch is timed, and it decides how
            many samples there are (at least some, however slow). The page states the counts.

    Raises:
        ReportError: the extra "report" is not installed, or the budget is not positive.
    """
    if not budget > 0:
        raise ReportError(f"budget is a time in seconds and must be positive, got {budget}")
    environment = _environment()
    begun = time.monotonic()
    measurements = measurements_of(run, budget)
    numbers, pictures = measurements.everything()
    numbers["provenance"]["report_seconds"] = round(time.monotonic() - begun, 1)
    numbers = plain(numbers)
    (run.folder / "report.json").write_text(json.dumps(numbers, indent=2, ensure_ascii=False), "utf-8")
    template = environment.get_template(measurements.page)
    page = template.render(r=numbers, p=pictures, recipe=run.recipe.to_toml(), number=figures.marked(numbers))
    path = run.folder / "report.html"
    path.write_text(page, "utf-8")
    return path


def _environment() -> Any:
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ReportError(f"a report needs {error.name}: pip install 'kuosan[report]'") from error
    pages = jinja2.FunctionLoader(lambda name: (resources.files("kuosan") / name).read_text("utf-8"))
    how: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=pages, autoescape=True, **how)
    environment.filters["duration"] = duration
    return environment
