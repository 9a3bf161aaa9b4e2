"""The one training loop: plain PyTorch, the same run whether it was interrupted or not."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kuosan.denoiser import Denoiser
from kuosan.objectives import Objective
from kuosan.progress import Progress
from kuosan.recipe import Training
from kuosan.seeds import stream
from kuosan.training.batches import Draws, draws
from kuosan.training.checkpoint import Checkpoint, CheckpointStore
from kuosan.training.ema import EMA
from kuosan.training.processes import Processes


class TrainingError(RuntimeError):
    """Training cannot go on: says where, and what to try."""


class Interrupted(Exception):
    """Ctrl-C or a request to stop; the state was saved."""


class Source(Protocol):
    """Training examples as the loop sees them."""

    shape: tuple[int, ...]

    def __len__(self) -> int: ...

    def arranged(self, index: Tensor) -> Tensor:
        """The same examples in an order in which neighbours make the cheapest parts of a batch."""
        ...

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """(x_0, condition or None) of these examples; x_0 float32 in the model's units, or int64 tokens."""
        ...

    def untold(self, condition: Tensor, keep: Tensor) -> Tensor:
        """A condition of which training now and then leaves out an example's, where keep (B,) is false."""
        ...


def learning_rate(settings: Training, step: int) -> float:
    """The learning rate of step ``step`` (from 0): a linear rise over ``warmup``, then the decay towards 0."""
    rise = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    done = max(0.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[settings.decay]
    return settings.learning_rate * rise * fall


@dataclass
class Trainer:
    """One training run: a model, its objective, its data and where its state is kept.

    Args:
        model: a :class:`~kuosan.denoiser.Denoiser` or any module that the objective takes; trained in place.
        objective: its loss.
        source: the examples.
        settings: the recipe's ``training`` section.
        seed: of order, times, noise and dropout.
        store: checkpoints.
        log: the file that metrics are appended to, one JSON object a line.
        processes: of which this is one.
        on_sample: called with the step at intervals, on the first process, with the averaged weights in place.
        device: where the network is.
    """

    model: nn.Module
    objective: Objective
    source: Source
    settings: Training
    seed: int
    store: CheckpointStore
    log: Path
    processes: Processes = field(default_factory=Processes)
    on_sample: Callable[[int], None] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self):
        self.model.to(self.device)
        if self.settings.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = EMA(self.model, self.settings.ema)
        self.optimizer = _optimizer(self.model, self.settings)
        self.step = 0
        self.seconds = 0.0
        self._stop = False
        self.board = _board(self.log.parent) if self.settings.tensorboard and self.processes.first else None

    # -- state --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        moments = {}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for p, state in self.optimizer.state.items():
            for key, value in state.items():
                moments[f"{names[id(p)]}/{key}"] = torch.as_tensor(value)
        if self.processes.first:
            tensors = {
                "weights": self.model.state_dict(),
                "ema": self.ema.average,
                "optimizer": moments,
                "times": self.objective.times.state(),
            }
            self.store.save(self.step, tensors, {"seconds": self.seconds})

    def restore(self, checkpoint: Checkpoint) -> None:
        self.step, self.seconds = checkpoint.step, checkpoint.state["seconds"]
        self.model.load_state_dict(checkpoint.tensors["weights"])
        self.ema.restore(checkpoint.tensors["ema"])
        self.objective.times.restore(checkpoint.tensors["times"])
        moments = checkpoint.tensors["optimizer"]
        for name, p in self.model.named_parameters():
            kept = {key.rsplit("/", 1)[1]: value for key, value in moments.items() if key.rsplit("/", 1)[0] == name}
            if kept:
                self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in kept.items()}

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the last step, from the newest checkpoint if there is one.

        Raises:
            TrainingError: the loss or its gradient is not finite.
            Interrupted: Ctrl-C or a request to stop; the state is saved.
        """
        checkpoint = self.store.load()
        if checkpoint is not None:
            self.restore(checkpoint)
            self._say(f"going on from step {self.step} of {self.settings.steps}")
        self._truncate_log()
        with _Signals(self):
            self._train()

    def _train(self) -> None:
        settings, processes = self.settings, self.processes
        model = self.model
        if settings.compile:
            assert isinstance(model, Denoiser)
            model = model.around(torch.compile(model.network))  # type: ignore[arg-type]
        loss_of: nn.Module = _Loss(model, self.objective).train()
        if processes.size > 1:
            loss_of = DistributedDataParallel(loss_of)
        progress = Progress("step") if processes.first else None
        begun, begun_at = time.monotonic(), self.step
        seconds_before = self.seconds
        loss = math.nan
        while self.step < settings.steps:
            value = self._one_step(loss_of)
            self.step += 1
            self.seconds = seconds_before + time.monotonic() - begun
            loss = value if math.isnan(loss) else 0.98 * loss + 0.02 * value
            speed = (self.step - begun_at) * settings.batch_size / (self.seconds - seconds_before)
            if processes.first:
                self._write(loss=value, speed=speed)
                assert progress is not None
                progress(self.step, settings.steps, f"loss {loss:.4f}  {speed:,.0f} examples/s")
            stop = processes.any(self._stop)
            last = self.step == settings.steps
            if stop or last or self.step % settings.checkpoint_every == 0:
                self.save()
            if stop and not last:
                raise Interrupted(
                    f"stopped at step {self.step} of {settings.steps}; the same command goes on from there"
                )
            if self.on_sample and settings.sample_every and (last or self.step % settings.sample_every == 0):
                paused = time.monotonic()
                if processes.first:
                    with self.ema.swapped_in(self.model):
                        self.on_sample(self.step)
                begun += time.monotonic() - paused

    def _one_step(self, loss_of: nn.Module) -> float:
        settings, processes = self.settings, self.processes
        whole = draws(
            self.seed,
            self.step,
            settings.batch_size,
            len(self.source),
            self.objective.noise_shape(self.model, self.source.shape),
            self.objective.times,
            getattr(self.model, "process", None),
            settings.label_drop,
        )
        whole = replace(whole, index=self.source.arranged(whole.index))
        mine = processes.part(settings.batch_size)
        share = (mine.stop - mine.start) // settings.accumulate
        if share * settings.accumulate != mine.stop - mine.start:
            raise TrainingError(f"accumulate = {settings.accumulate} does not divide each process's share of the batch")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step)
        torch.manual_seed(stream("dropout", self.seed, processes.rank, self.step).initial_seed())
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for micro in range(settings.accumulate):
            rows = slice(mine.start + micro * share, mine.start + (micro + 1) * share)
            waits = processes.size > 1 and micro < settings.accumulate - 1
            with loss_of.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss = self._loss(loss_of, whole.part(rows))
                (loss * whole.weight[rows].to(loss)).mean().div(settings.accumulate).backward()
            losses.append(loss.detach().float())
        every = processes.gather(torch.cat(losses)).cpu()
        mean = float((every * whole.weight.to(every)).mean())
        if not math.isfinite(mean):
            raise TrainingError(self._not_finite(every, whole))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(
                f"the gradient is not finite at step {self.step}, though the loss is ({mean:.4g}). Nothing of this "
                "step was kept. Try a lower training.learning_rate or training.precision = float32; look for a square "
                "root or a division at 0 in the network"
            )
        self.objective.times.update(whole.t, every)
        self.optimizer.step()
        self.ema.update(self.model, self.step)
        return mean

    def _loss(self, loss_of: nn.Module, part: Draws) -> Tensor:
        x_0, condition = self.source.batch(part.index)
        x_0, noise, t = x_0.to(self.device), part.noise.to(self.device), part.t
        if condition is not None:
            condition = self.source.untold(condition, part.keep_label).to(self.device)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")
        with half:
            return loss_of(x_0, condition, t, noise, self.step)

    # -- words --------------------------------------------------------------------------------------------------------

    def _not_finite(self, losses: Tensor, whole: Draws) -> str:
        bad = (~torch.isfinite(losses)).nonzero().flatten()
        which = ", ".join(f"example {int(whole.index[i])} at t = {float(whole.t[i]):.4f}" for i in bad[:4])
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        return (
            f"the loss is not finite at step {self.step}: {which}{more}. Nothing of this step was kept. Try a lower "
            "training.learning_rate, training.precision = float32, or a larger process.t_min; look at those examples"
        )

    def _say(self, message: str) -> None:
        if self.processes.first:
            print(message, file=sys.stderr, flush=True)

    def _write(self, **values: float) -> None:
        record = {"step": self.step, **values, "learning_rate": learning_rate(self.settings, self.step - 1)}
        record["seconds"] = self.seconds
        with self.log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name in ("loss", "speed", "learning_rate"):
                self.board.add_scalar(name, record[name], self.step)

    def _truncate_log(self) -> None:
        """Drop the lines of steps after the checkpoint: they will be done, and written, again."""
        if not self.processes.first or not self.log.exists():
            return
        kept = []
        for line in self.log.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the last line of a killed run
            if record["step"] <= self.step:
                kept.append(line + "\n")
        aside = self.log.with_suffix(".new")
        aside.write_text("".join(kept))
        os.replace(aside, self.log)


class _Loss(nn.Module):
    """The objective of a model as one module: what DistributedDataParallel has to be around for gradients to meet."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x_0: Tensor, condition: Tensor | None, t: Tensor, noise: Tensor, step: int) -> Tensor:
        return self.objective(self.model, x_0, condition, t=t, noise=noise, step=step)


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("training.tensorboard needs TensorBoard: pip install kuosan[tensorboard]") from None
    return SummaryWriter(str(folder / "tensorboard"))


class _Signals:
    """While training, Ctrl-C and a polite kill let the step end and the state be saved; a second Ctrl-C does not."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.before: dict[int, object] = {}

    def __enter__(self):
        def stop(number, frame):
            if self.trainer._stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.trainer._stop = True

        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not in the main thread: someone else handles signals
                self.before[number] = signal.signal(number, stop)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _optimizer(network: nn.Module, settings: Training) -> torch.optim.AdamW:
    trained = [p for p in network.parameters() if p.requires_grad]
    decays = [p for p in trained if p.ndim >= 2]
    others = [p for p in trained if p.ndim < 2]
    groups = [{"params": decays, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2))
