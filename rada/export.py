"""A trained head over its classes as one file that serves without this library, see docs/serving.md.

export_head("runs/emoji/seed-1", "head.pt2")

program = torch.export.load("head.pt2").module()   # in any process with torch
logits = program(image_features)                    # [B, K]
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rada.adapter import AdaptedHead
from rada.checkpoint import Checkpoint, load_checkpoint
from rada.checks import check_one_of
from rada.files import replacing
from rada.losses import LOSSES, SigmoidLoss
from rada_kernels.backends import cpu, reference

METADATA = "rada.json"  # its name in an exported program, and its key in a compiled package
SUFFIX = ".pt2"


SUMS = {
    "reference": lambda image, text, params, options: reference.masked_similarity(image, text, params, options)[0],
    "cpu": lambda image, text, params, options: cpu.forward(image, text, params, options, save=False)[0],
}


class ServedHead(nn.Module):
    """Logits [B, K] float32 of image features [B, D] float32, by a checkpoint's head over its classes.

    Text features are adapted and the logit scale and bias are numbers: all of it is fixed but the image features.
    backend: of SUMS.
    """

    def __init__(self, trained: Checkpoint, backend: str):
        super().__init__()
        text, self.scale, self.bias = trained.classes
        self.adapter: nn.Module = nn.Identity()
        if isinstance(trained.head, AdaptedHead):
            self.adapter, text = trained.head.image_adapter, trained.head.text_adapter(text)
        self.head, self.sums = trained.rada, SUMS[backend]
        self.register_buffer("text", text.detach())
        self.text: Tensor
        self.requires_grad_(False)

    def forward(self, image_features: Tensor) -> Tensor:
        params = self.head.params(torch.tensor(self.scale, device=self.text.device))
        logits = self.scale * self.sums(self.adapter(image_features), self.text, params, self.head.options)
        return logits if self.bias is None else logits + self.bias


def export_head(
    checkpoint: str | os.PathLike | Checkpoint,
    output: str | os.PathLike,
    *,
    backend: str = "reference",
    compiled: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a trained head as a program: image features [B, D] float32, of any B, to logits [B, K] float32.

    checkpoint: a folder, as `rada.load` takes it, or a Checkpoint whose head is on `device` and float32. Adapters and
        SigLIP's bias are in the program; encoders, a prompt and an autocast of the run are not.
    output: a path ending in .pt2.
    backend: "reference" (default): operators of torch's own alone, in memory that grows with B·K²; or "cpu": this
        library's C++ operator, which a process takes from rada_cpu.so, a copy of which is written beside `output`.
    compiled: an AOTInductor package, for `torch._inductor.aoti_load_package` and for C++, in place of a program for
        `torch.export.load`. It takes a C++ compiler here and this machine's instruction set there. Default False.
    device: where the program runs.

    Returns the metadata, which the file holds as JSON too: class_names, embed_dim, probabilities ("softmax", or
    "sigmoid" of each logit), backbone, encoders ("frozen", "prompted" or "fine-tuned"), backend, the head's options.
    Raises ValueError, FileNotFoundError or FileExistsError naming what is wrong.
    """
    output = Path(output)
    if output.suffix != SUFFIX:
        raise ValueError(f"output: got {str(output)!r}; it takes a file ending in {SUFFIX}")
    if output.exists() and not overwrite:
        raise FileExistsError(f"output: {output} exists; --overwrite replaces it")
    check_one_of(SUMS, backend=backend)
    trained = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint, device=device)
    if trained.classes.text.dtype != torch.float32:
        raise ValueError(f"checkpoint: got a head of {trained.classes.text.dtype}; it takes torch.float32")
    if backend == "cpu":
        works, reason = cpu.usable(
            torch.float32, trained.device, trained.rada.embed_dim, trained.rada.options.num_heads
        )
        if not works:
            raise ValueError(f"backend: 'cpu' cannot serve here ({reason}); it takes 'reference'")
    program, metadata = _program(trained, backend), _metadata(trained, backend)
    if backend == "cpu":
        with replacing(output.with_name(cpu.LIBRARY.name)) as partial:
            shutil.copyfile(cpu.LIBRARY, partial)
    text = json.dumps(metadata, ensure_ascii=False)
    with replacing(output) as partial:
        if compiled:
            from torch._inductor import aoti_compile_and_package

            options = {"aot_inductor.metadata": {METADATA: text}}
            aoti_compile_and_package(program, package_path=str(partial), inductor_configs=options)
        else:
            torch.export.save(program, partial, extra_files={METADATA: text})
    return metadata


def _program(trained: Checkpoint, backend: str) -> torch.export.ExportedProgram:
    served = ServedHead(trained, backend).eval()
    features = served.text.new_zeros(2, trained.rada.embed_dim)  # 0 and 1 would stand for themselves
    with torch.no_grad():
        program = torch.export.export(served, (features,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    program.graph.eliminate_dead_code()  # the penalty's
    program.graph_module.recompile()
    return program


def _metadata(trained: Checkpoint, backend: str) -> dict[str, Any]:
    return {
        "class_names": list(trained.class_names),
        "embed_dim": trained.rada.embed_dim,
        "probabilities": "sigmoid" if LOSSES[trained.loss] is SigmoidLoss else "softmax",
        "backbone": trained.backbone,
        "encoders": "fine-tuned" if trained.towers is not None else "frozen" if trained.prompt is None else "prompted",
        "backend": backend,
        **asdict(trained.rada.options),
    }
