"""The scripts of examples/, each in a process of its own, with small settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from rada.inference import PredictOptions, predict
from tests.rada.predictions import checkpoint_of, contents, rows, saved

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CHECKPOINT = ["head.json", "head.safetensors", "classes.npz"]


def python(*arguments: object, cwd: Path = ROOT) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(script: str, *arguments: object) -> str:
    return python(EXAMPLES / script, *arguments)


def accuracies(output: str) -> list[float]:
    return [
        float(number) for number in re.findall(r"(?:accuracy|zero-shot:|adapted:|zero_shot:|rada:) ([\d.]+) %", output)
    ]


def test_the_readme_names_every_script_and_each_is_short():
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert sorted(re.findall(r"^\| \[(\w+\.py)\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.M)) == scripts
    assert all(len((EXAMPLES / script).read_text().splitlines()) <= 60 for script in scripts)


def test_plain_loop_learns():
    before, *after = accuracies(run("plain_loop.py", "--epochs", 5))
    assert len(after) == 5
    assert after[-1] > before + 3


@pytest.mark.skipif(find_spec("accelerate") is None, reason="it takes accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_loop_learns(precision):
    before, *after = accuracies(run("accelerate_loop.py", "--epochs", 5, "--mixed-precision", precision))
    assert len(after) == 5
    assert after[-1] > before + 3


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("ray") and find_spec("pandas")), reason="it takes ray[data]")
def test_ray_predicts_what_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # of the cluster of one that it starts
    checkpoint_of().save(tmp_path / "head")
    values = saved(tmp_path, rows())
    arguments = ("--checkpoint", tmp_path / "head", "--features", values, "--rows-per-shard", 40)
    assert f"{len(rows())} rows in 4 shards, 0 bad" in run("ray_predict.py", *arguments, "--output", tmp_path / "ray")
    predict(tmp_path / "head", tmp_path / "one", PredictOptions(rows_per_shard=40), features=values)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


@pytest.mark.slow
def test_own_data_writes_a_run(tmp_path):
    output = run("own_data.py", "--epochs", 2, "--output", tmp_path / "shapes")
    assert "shapes" in output
    assert (tmp_path / "shapes" / "results.json").is_file()
    assert all((tmp_path / "shapes" / "seed-1" / name).is_file() for name in CHECKPOINT)


@pytest.mark.slow
def test_own_loop_checkpoint_serves_the_command_line(tmp_path):
    zero_shot, trained = accuracies(run("own_loop_checkpoint.py", "--epochs", 5, "--output", tmp_path / "mine"))
    assert trained > zero_shot
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64), "white").save(image)
    predictions = tmp_path / "predictions.jsonl"
    python("-m", "rada", "predict", "--checkpoint", tmp_path / "mine", "--images", image, "--output", predictions)
    assert len(predictions.read_text().splitlines()) == 1


@pytest.mark.slow
def test_hugging_face_learns_four_colours():
    pytest.importorskip("transformers")
    last = run("hugging_face.py").splitlines()[-1]
    assert last.endswith("['red', 'green', 'blue', 'yellow']")


@pytest.mark.slow
def test_full_stores_the_towers_and_resumes(tmp_path):
    arguments = ("full.py", "--epochs", 1, "--output", tmp_path)
    first = accuracies(run(*arguments))
    assert len(first) == 3
    assert all((tmp_path / name).is_file() for name in [*CHECKPOINT, "towers.safetensors", "resume.pt"])
    assert accuracies(run(*arguments)) == first  # nothing is left to train


@pytest.mark.slow
def test_test_time_adapts_every_image():
    output = run("test_time.py", "--images", 8, "--views", 16)
    assert len(accuracies(output)) == 2
    assert output.count("of 8 images") == 2


@pytest.mark.slow
def test_the_lines_of_the_settings_page_run(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "settings.md").read_text(), re.M | re.S)
    assert len(blocks) == 6
    python("-c", "\n".join(blocks), cwd=tmp_path)
    assert (tmp_path / "runs" / "head" / "head.json").is_file()
    assert (tmp_path / "runs" / "towers" / "towers.safetensors").is_file()
