"""Loggers of a run's epochs, for `rada.experiment.run`: tensorboard's event files, and W&B."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rada.extras import require


def tensorboard_writer() -> Any:
    """A writer of event files. Raises ImportError without tensorboard."""
    writer = require("torch.utils.tensorboard", "tensorboard", "--tensorboard").SummaryWriter
    return lambda folder: writer(str(folder))


def wandb_writer(project: str = "rada") -> Any:
    """A writer of W&B runs, one per method and seed. Raises ImportError without wandb."""
    wandb = require("wandb", "wandb", "--wandb")

    @contextmanager
    def writer(folder: Path) -> Iterator[SimpleNamespace]:
        output, method, seed = folder.parents[2], *folder.parts[-2:]
        run = wandb.init(project=project, name=f"{output.name}/{method}/{seed}", dir=str(output), reinit=True)
        try:
            yield SimpleNamespace(add_scalar=lambda name, value, step: run.log({name: value}, step=step))
        finally:
            run.finish()

    return writer
