"""Exported heads: their numbers, in a process that has torch alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from rada import RAdaHead
from rada.adapter import AdaptedHead
from rada.checkpoint import Checkpoint, load_checkpoint
from rada.classification import Classes
from rada.cli import main
from rada.export import METADATA, SUMS, export_head
from rada_kernels.backends import cpu

pytest.importorskip("safetensors")
NAMES, WIDTH = tuple("abcdefg"), 32
BATCHES = (0, 1, 2, 5, 300)  # beside the two rows of the export: none, one, and several of any tile
SERVE = """
import json, sys, torch
from pathlib import Path
sys.modules["rada"] = sys.modules["rada_kernels"] = None  # to import them is an error
folder, compiled, key, *libraries = sys.argv[1:]
for library in libraries:
    torch.ops.load_library(library)
batches, logits, told = torch.load(f"{folder}/batches.pt"), {}, {}
for path in Path(folder).glob("*.pt2"):
    metadata, name = {key: ""}, path.stem
    if compiled == "True":
        program = torch._inductor.aoti_load_package(str(path))
        metadata = program.get_metadata()
    else:
        program = torch.export.load(path, extra_files=metadata).module()
    with torch.no_grad():
        logits[name] = [program(batch) for batch in batches]
    told[name] = json.loads(metadata[key])
torch.save(logits, f"{folder}/logits.pt")
print(json.dumps(told))
"""


def checkpoint(adapted: bool = False, bias: float | None = None, dtype=torch.float32) -> Checkpoint:
    torch.manual_seed(0)
    head = RAdaHead(WIDTH, 4, temperature=0.5, queries=("image", "rational"), dtype=dtype)
    torch.nn.init.normal_(head.out_proj.weight, std=0.3)
    model = AdaptedHead(head) if adapted else head
    classes = Classes(F.normalize(torch.randn(len(NAMES), WIDTH, dtype=dtype), dim=-1), 20.0, bias)
    return Checkpoint(model.eval(), classes, NAMES, "ViT", loss="cross-entropy" if bias is None else "sigmoid")


def check(trained: Checkpoint, batches: list, logits: list) -> None:
    for features, found in zip(batches, logits, strict=True):
        with torch.no_grad():
            expected = trained.head(features, *trained.classes)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["program", "package"])
@pytest.mark.parametrize("backend", SUMS)
def test_it_gives_the_heads_logits_in_a_process_without_this_library(backend, compiled, tmp_path):
    if backend == "cpu" and cpu.MISSING:
        pytest.skip(cpu.MISSING)
    checkpoints = {"sigmoid": checkpoint(adapted=True, bias=-3.0)}
    if not compiled:
        checkpoints["softmax"] = checkpoint()
    told = {
        name: export_head(trained, tmp_path / f"{name}.pt2", backend=backend, compiled=compiled)
        for name, trained in checkpoints.items()
    }
    libraries = [tmp_path / "rada_cpu.so"] if backend == "cpu" else []
    assert set(tmp_path.iterdir()) == {*(tmp_path / f"{name}.pt2" for name in checkpoints), *libraries}
    batches = [torch.randn(size, WIDTH) for size in BATCHES]
    torch.save(batches, tmp_path / "batches.pt")
    arguments = [sys.executable, "-I", "-c", SERVE, tmp_path, compiled, METADATA, *libraries]
    done = subprocess.run(list(map(str, arguments)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(told))
    for name, metadata in told.items():
        assert (metadata["class_names"], metadata["probabilities"]) == (list(NAMES), name)
    for name, logits in torch.load(tmp_path / "logits.pt").items():
        check(checkpoints[name], batches, logits)


def test_a_stored_checkpoint_is_exported_by_the_command(tmp_path, capsys):
    checkpoint().save(tmp_path / "run")
    program = tmp_path / "head.pt2"
    arguments = ["export", "--checkpoint", str(tmp_path / "run"), "--output", str(program)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert "image features [B, 32] to logits of 7 classes" in " ".join(capsys.readouterr().out.split())
    features = torch.randn(3, WIDTH)
    trained = load_checkpoint(tmp_path / "run", device="cpu")
    check(trained, [features], [torch.export.load(program).module()(features)])
    with pytest.raises(SystemExit):
        main(arguments)
    assert "exists; --overwrite replaces it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "head.onnx"}, r"output: got '.*head.onnx'; it takes a file ending in .pt2"),
        ({"backend": "triton"}, "backend: got 'triton'; it takes one of"),
        ({"dtype": torch.float64}, "checkpoint: got a head of torch.float64"),
    ],
)
def test_what_cannot_be_exported_is_named(arguments, message, tmp_path):
    trained = checkpoint(dtype=arguments.pop("dtype", torch.float32))
    output = tmp_path / arguments.pop("output", "head.pt2")
    with pytest.raises(ValueError, match=message):
        export_head(trained, output, **arguments)
    assert not list(tmp_path.iterdir())
