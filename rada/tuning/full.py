"""Full fine-tuning: both towers and the head, on images, resumable at any step.

The head gives gradients to the features, and so to the towers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from rada.checks import check_ints, check_not_negative, check_one_of, check_positive, check_same
from rada.clip import RAdaCLIP
from rada.data.images import to_rgb
from rada.data.source import Images
from rada.distributed import gather, gather_mean, own_rows, ranks, replicated
from rada.extras import require
from rada.files import replacing
from rada.losses import LOSSES
from rada.precision import loss_scaler
from rada.tuning.parallel import load_state, load_weights, sharded, whole_state, whole_weights

PARALLEL = ("ddp", "fsdp")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STATE = "resume.pt"
FORMAT = "rada-full"
MAX_LOGIT_SCALE = 100.0  # CLIP's limit of the exponentiated scale


@dataclass(frozen=True)
class FullTuning:
    """The settings of full fine-tuning. Defaults: FLYP's for ImageNet (arXiv 2212.00638), but for batch and warm-up.

    epochs: passes over the images. Default 10.
    batch_size: images per optimizer step. Default 32.
    accumulate: forward passes per step, each over batch_size / accumulate images. Exact for "cross-entropy";
        "contrastive" sees the classes of one pass only.
    lr, head_lr: highest rates of towers and head. Defaults 1e-5 and 1e-3.
    weight_decay: AdamW's, of weights alone: gains, biases and the logit scale have none. Default 0.1.
    warmup: share of the steps over which the rates rise linearly; a cosine to 0 follows. Default 0.1.
    loss: "cross-entropy" (default) or SigLIP's "sigmoid" over all classes, or FLYP's "contrastive" over the classes of
        a batch. See `rada.losses`.
    alpha: weight of the head's penalty. Default 0.1.
    precision: "fp32" (default), or autocast to "bf16" or "fp16", that with a gradient scaler. Weights stay float32.
    clip_norm: largest norm of the gradient; None (default): no limit.
    checkpoint_activations: compute the towers' activations again in the backward pass. Default False.
    crop: least and largest share of an image's area that a random crop keeps. Default (0.08, 1.0).
    flip: flip half of the images. Default True.
    """

    epochs: int = 10
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-5
    head_lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    loss: str = "cross-entropy"
    alpha: float = 0.1
    precision: str = "fp32"
    clip_norm: float | None = None
    checkpoint_activations: bool = False
    crop: tuple[float, float] = (0.08, 1.0)
    flip: bool = True

    def __post_init__(self):
        check_ints(1, epochs=self.epochs, batch_size=self.batch_size, accumulate=self.accumulate)
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: got {self.accumulate}; it takes a divisor of batch_size {self.batch_size}")
        check_positive(lr=self.lr, head_lr=self.head_lr)
        check_not_negative(weight_decay=self.weight_decay, alpha=self.alpha)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: got {self.warmup!r}; it takes a share of the steps, 0 to below 1")
        check_one_of(LOSSES, loss=self.loss)
        check_one_of(PRECISIONS, precision=self.precision)
        if self.clip_norm is not None:
            check_positive(clip_norm=self.clip_norm)
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop: got {self.crop!r}; it takes two shares, 0 < least <= largest <= 1")

    def rate(self, step: int, steps: int) -> float:
        """The factor of both rates at a step, from 0: linear warm-up, then a cosine to 0."""
        warmup = round(self.warmup * steps)
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


class Augmented(Dataset):
    """Images under random crops and flips, which depend on (seed, epoch, index) alone: not on workers or resumes."""

    def __init__(self, images: Images, transform: Callable, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        own = int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(own)
            return self.transform(self.images[index]), index


def train_transform(model: RAdaCLIP, crop: tuple[float, float], flip: bool) -> Callable:
    """Random crops to the size of the image tower, and flips, before the model's evaluation transform.

    That transform finds images of its size: its own resize and crop leave them as they are.
    Raises ValueError for a model without a transform.
    """
    T = require("torchvision.transforms", "clip", "fine-tuning")
    if model.preprocess is None:
        raise ValueError("model: it came without an image transform; fine-tuning takes one")
    size = model.model.visual.image_size
    random_crop = T.RandomResizedCrop(size, scale=crop, interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([to_rgb, random_crop, *([T.RandomHorizontalFlip()] if flip else []), model.preprocess])


def parameter_groups(model: RAdaCLIP, tuning: FullTuning) -> list[dict[str, Any]]:
    """AdamW's groups: towers and head, each with decayed weights and undecayed gains, biases and scalars."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("head."), parameter.dim() >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": tuning.head_lr if head else tuning.lr,
            "weight_decay": tuning.weight_decay if decayed else 0.0,
        }
        for (head, decayed), parameters in groups.items()
    ]


class FineTuner:
    """Full fine-tuning of a RAdaCLIP whose towers require gradients.

    model: a RAdaCLIP (`freeze=False`) with an evaluation transform.
    images, labels: N PIL images, decoded when indexed, and their classes [N].
    tuning, seed: see `FullTuning`; the seed decides order, crops and flips.
    folder: keeps the state to resume from, `resume.pt`; None: nothing is kept.
    save_every: steps between two saved states; 0: at the end of each epoch alone.
    workers: processes that decode images. Default 0: none.
    parallel: with several ranks (`rada.distributed.processes`), "ddp" (default): each has the whole model; or "fsdp":
        shards of it. A batch is split over the ranks, and the weights are those of one process up to rounding.
    on_epoch: called with each epoch's numbers: epoch, lr, loss, penalty, train_accuracy (while training, in percent).

    On one machine and number of threads a killed and resumed run gives the weights of an uninterrupted one, on the CPU
    bit for bit. It may go on with another number of ranks; each reads the folder, rank 0 alone writes to it. With
    shards `model` has the start's weights, on the CPU, until the end.
    """

    def __init__(
        self,
        model: RAdaCLIP,
        images: Images,
        labels: Tensor,
        tuning: FullTuning,
        *,
        seed: int = 0,
        folder: Path | None = None,
        save_every: int = 0,
        workers: int = 0,
        parallel: str = "ddp",
        on_epoch: Callable[[dict], None] | None = None,
    ) -> None:
        if len(images) != len(labels) or not len(labels):
            raise ValueError(
                f"labels: got {len(labels)} for {len(images)} images; it takes one per image, at least one"
            )
        if model.head.shares_classes:
            raise ValueError(
                "model: got a head that shares its classes (shard_classes); fine-tuning splits a batch over the "
                "processes, and takes a head without"
            )
        self.model, self.labels, self.tuning, self.seed = model, labels, tuning, seed
        self.folder, self.save_every, self.workers = folder, save_every, workers
        self.on_epoch = on_epoch or (lambda numbers: None)
        self.data = Augmented(images, train_transform(model, tuning.crop, tuning.flip), seed)
        self.device = model.logit_scale.device
        self.loss = LOSSES[tuning.loss](tuning.alpha)
        self.steps_per_epoch = math.ceil(len(labels) / tuning.batch_size)
        self.steps = tuning.epochs * self.steps_per_epoch
        self.step = 0
        self.sums = {"loss": 0.0, "penalty": 0.0, "hits": 0.0}
        self.rows: list[dict] = []
        if tuning.checkpoint_activations:
            model.model.set_grad_checkpointing(True)
        self.trained, self.module = self._parallel(parallel)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.trained, tuning))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: tuning.rate(step, self.steps))
        self.scaler = loss_scaler(self.device, PRECISIONS[tuning.precision])

    def _parallel(self, parallel: str) -> tuple[RAdaCLIP, nn.Module]:
        """The model whose weights this rank trains, and what is called for its logits."""
        check_one_of(PARALLEL, parallel=parallel)
        if parallel == "ddp" or ranks()[1] == 1:
            return self.model, replicated(self.model)
        if self.tuning.precision == "fp16":
            raise ValueError("precision: got 'fp16' with parallel 'fsdp'; it takes 'fp32' or 'bf16', or parallel 'ddp'")
        shards = sharded(self.model.cpu(), self.device)
        return shards, shards

    def run(self) -> list[dict]:
        """Train to the end, from where the state is; returns the numbers of every epoch.

        Raises ValueError where the loss is no longer finite, naming the step; the weights are then those of the step
        before, and the saved state is older.
        """
        from tqdm import tqdm

        self.trained.train()
        with tqdm(total=self.steps, initial=self.step, desc="fine-tune", unit="step", leave=False) as bar:
            while self.step < self.steps:
                for images, index in self._batches():
                    self._take_step(images.to(self.device), self.labels[index].to(self.device))
                    bar.update(1)
                    ended = self.step % self.steps_per_epoch == 0
                    if ended:
                        self._finish_epoch()
                    if self.folder and (ended or (self.save_every and self.step % self.save_every == 0)):
                        self.save()
        if self.trained is not self.model:
            load_weights(self.model, whole_weights(self.trained))
            self.model.to(self.device)
        self.model.eval()
        return self.rows

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the epoch that the run is in: this rank's images of each batch, and the batch's indices."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        order = torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(len(self.labels)))
        batches = order.split(self.tuning.batch_size)[done:]
        own = [torch.cat([own_rows(part) for part in self._parts(batch)]) for batch in batches]
        # A generator of its own: the default one would lose a draw with every loader, and a resumed run makes one more.
        loader = DataLoader(
            self.data,
            batch_sampler=[[(epoch, i) for i in indices.tolist()] for indices in own],
            num_workers=self.workers,
            generator=torch.Generator(),
        )
        for (images, _), batch in zip(loader, batches, strict=True):
            yield images, batch

    def _parts(self, batch: Tensor) -> tuple[Tensor, ...]:
        """What goes through the model at once."""
        return batch.split(math.ceil(len(batch) / self.tuning.accumulate))

    def _take_step(self, images: Tensor, labels: Tensor) -> None:
        self._backward(images, labels)
        if self.tuning.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(
                [p for group in self.optimizer.param_groups for p in group["params"]], self.tuning.clip_norm
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        scale = self.trained.model.logit_scale
        if scale.requires_grad:
            with torch.no_grad():
                scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        self.step += 1

    def _backward(self, images: Tensor, labels: Tensor) -> None:
        """The gradients of a batch, from this rank's images and all labels, its parts one after the other."""
        parts, size = self._parts(labels), ranks()[1]
        dtype = PRECISIONS[self.tuning.precision]
        for part, own in zip(parts, images.split([len(own_rows(part)) for part in parts]), strict=True):
            with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
                loss, penalty, hits = self._loss(own, part)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"lr: got {self.tuning.lr}; the loss is not finite at step {self.step + 1} of {self.steps}; it "
                    "takes a smaller one, or images and weights without NaN and infinities"
                )
            self.scaler.scale(loss * (size * len(part) / len(labels))).backward()
            self.sums["loss"] += loss.item() * len(part)
            self.sums["penalty"] += penalty.item() * len(part)
            self.sums["hits"] += hits.item()

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of images of which these are some, all labels, its penalty, and how many images are recognised."""
        contrastive = self.tuning.loss == "contrastive"
        logits, penalty = self.module(images, return_penalty=True, class_ids=labels if contrastive else None)
        logits, penalty = gather(logits, len(labels)), gather_mean(penalty, len(labels))
        targets, found = labels, logits.argmax(-1)
        if contrastive:  # logits [B, B]
            targets, found = torch.arange(len(labels), device=logits.device), labels[found]
        return self.loss(logits, targets, penalty), penalty, (found == labels).sum()

    def _finish_epoch(self) -> None:
        count = len(self.labels)
        self.rows.append(
            {
                "epoch": self.step // self.steps_per_epoch,
                "lr": self.optimizer.param_groups[0]["lr"],
                "loss": self.sums["loss"] / count,
                "penalty": self.sums["penalty"] / count,
                "train_accuracy": 100 * self.sums["hits"] / count,
            }
        )
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.on_epoch(self.rows[-1])

    def save(self) -> None:
        """Write the state to the folder; it appears whole or not at all. Every rank calls it."""
        state = {
            "format": FORMAT,
            "run": self._run(),
            "step": self.step,
            "sums": self.sums,
            "rows": self.rows,
            "model": whole_weights(self.trained),
            "optimizer": whole_state(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": _random_state(self.device),
        }
        if ranks()[0] == 0:
            with replacing(Path(self.folder or "") / STATE) as partial:
                torch.save(state, partial)

    def resume(self) -> bool:
        """Take up the state in the folder; False where there is none.

        Raises ValueError naming the setting that differs from the run that saved it, or a file that is no state.
        """
        path = Path(self.folder or "") / STATE
        if self.folder is None or not path.is_file():
            return False
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # a broken file may raise anything
            raise ValueError(f"{path}: not a state to resume from ({type(error).__name__}: {error})") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"{path}: not a state to resume from, which has the entry format = {FORMAT!r}")
        check_same(self._run(), state["run"], f"the run to resume in {path}")
        self.step, self.sums, self.rows = state["step"], state["sums"], state["rows"]
        load_weights(self.trained, state["model"])
        load_state(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        _set_random_state(state["random"], self.device)
        return True

    def _run(self) -> dict[str, Any]:
        """What a run to resume must agree on."""
        tuning = {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.tuning).items()
        }
        return {
            **tuning,
            "seed": self.seed,
            "images": len(self.labels),
            "labels": self.labels.tolist(),
            "class_names": list(self.model.class_names),
            "backbone": self.model.backbone,
        }


def _random_state(device: torch.device) -> dict[str, Any]:
    """Of what draws in training: dropout in the towers, and a user's own images, from wherever they draw.

    Orders and crops depend on the seed alone.
    """
    name, keys, *rest = cast(tuple, np.random.get_state())
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)
