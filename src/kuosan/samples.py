"""Samples as files: drawn in batches, written as they come, shared by the processes of torchrun."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kuosan.plain import plain
from kuosan.progress import Progress
from kuosan.runs import Run
from kuosan.solvers import check_seeds
from kuosan.training.processes import joined

#: Samples that a sheet shows.
SHEET = 256


def save_samples(
    run: Run,
    seeds: Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
    out: Path | None = None,
    batch_size: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Draw samples and write each as a file, a sheet of the first ones, and samples.json.

    No more than a batch is held in memory. Under torchrun the processes share the seeds; what each sample is does not
    depend on how many there are.

    Args:
        seeds: one for each sample; default 0, 1, 2, ..., as many as is usual for the run.
        classes: which ones, in turn; by default all.
        out: a folder, or the file of a single sample; default RUN/samples.
        batch_size: samples at once; default the run's own.
        settings: of :meth:`Run.sampler <kuosan.runs.Run.sampler>`.

    Returns:
        What samples.json holds: how they were drawn, the sheet, and each file with its seed.
    """
    out = out or run.folder / "samples"
    single = out.suffix == run.medium.suffix  # the other file gets a name like it
    folder = out.parent if single else out
    with joined() as processes:
        sampler = run.sampler(**settings)
        seeds = check_seeds(range(run.usual_count(sampler)) if seeds is None else seeds)
        if single and len(seeds) > 1:
            raise ValueError(f"{out} is one file, and there are {len(seeds)} samples: give a folder")
        labels = run.labels_of(sampler, len(seeds))
        if classes is not None:
            labels = torch.tensor(classes)[torch.arange(len(seeds)) % len(classes)]
        how = {"run": str(run.folder), "step": run.step} | sampler.how
        files: list[dict[str, Any]] = []
        named = zip(run.names(sampler, seeds, labels), run.asked(sampler, labels, len(seeds)), strict=True)
        for seed, (name, asked) in zip(seeds, named, strict=True):
            file = out if single else folder / f"{name}{run.medium.suffix}"
            files.append({"file": str(file), "seed": seed} | asked)
        mine = range(processes.rank, len(seeds), processes.size)
        progress = Progress("samples") if processes.first else None
        done = 0
        if mine:
            shared = run.share(sampler, mine)
            own = None if labels is None else labels[list(mine)]
            for batch in run.batches(shared, [seeds[i] for i in mine], own, batch_size):
                for one in batch:
                    at = files[mine[done]]
                    notes = how | {k: v for k, v in at.items() if k != "file"}
                    run.medium.save(one, Path(at["file"]), notes)
                    done += 1
                if progress:
                    progress(done, len(mine))
        processes.any(False)  # all have written theirs
        result: dict[str, Any] = how | {"sheet": "", "samples": files}
        if processes.first:
            shown = [Path(one["file"]) for one in files[:SHEET]]
            columns = run.columns(sampler, labels)
            notes = how | {"seeds": seeds[:SHEET]}
            if single:
                result["sheet"] = str(out)
            else:
                result["sheet"] = str(run.sheet(sampler, shown, columns, folder / "sheet", notes))
            (out.with_suffix(".json") if single else folder / "samples.json").write_text(
                json.dumps(plain(result), indent=2, ensure_ascii=False), "utf-8"
            )
    return result
