"""The report: drawn from what is stored, figures with something on them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

pytest.importorskip("jinja2")
pyplot = pytest.importorskip("matplotlib.image")

from rada.experiment import run  # noqa: E402
from rada.report import write_report  # noqa: E402
from rada.runs import load_results  # noqa: E402
from rada.settings import Settings  # noqa: E402
from rada.tuning import Tuning  # noqa: E402
from rada_kernels import Options  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on features with confusions to repair, and an image put beside its first example."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(12, 16)).astype(np.float32)
    labels = np.arange(12).repeat(16)
    noise = rng.normal(size=(len(labels), 16)) * np.where(np.arange(16) < 4, 3, 0.4)
    root = tmp_path_factory.mktemp("report")
    np.savez(root / "data.npz", image_features=(text[labels] + noise).astype(np.float32), labels=labels,
             text_features=text, logit_scale=20.0, class_names=[f"<class> {i}" for i in range(12)])  # fmt: skip
    settings = Settings(
        data=f"features:{root / 'data.npz'}",
        shots=8,
        seeds=(1, 2),
        protocol="base-new",
        methods=("rada", "rada+adapter", "linear-probe"),
        curve=(4,),
        tuning=Tuning(epochs=3),
        head=Options(num_heads=4),
        device="cpu",
        backend="torch",
    )
    results = run(settings, root / "run")
    from PIL import Image

    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(root / "run" / "examples" / "1.png")
    results["examples"][0]["image"] = "examples/1.png"
    (root / "run" / "results.json").write_text(json.dumps(results))
    return root / "run"


def test_every_figure_is_there_and_not_empty(folder):
    page = write_report(folder).read_text()
    shown = re.findall(r'<img src="([^"]+)"', page)
    assert {"methods", "epochs", "gain", "example-1", "shots"} <= {name[8:-4] for name in shown}
    for name in shown:
        pixels = pyplot.imread(folder / name)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.02  # not one colour
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50


def test_the_page_refers_to_nothing_outside_its_folder(folder):
    page = write_report(folder).read_text()
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert links
    assert all((folder / link).is_file() for link in links)
    assert "http" not in page
    assert "&lt;class&gt; " in page  # names are escaped


def test_the_page_states_the_numbers(folder):
    page, results = write_report(folder).read_text(), load_results(folder)
    for entry in results["methods"].values():
        assert entry["label"] in page
        for row in entry["seeds"]:
            assert f"<td>{row['base']:.2f}</td>" in page
    assert f"{results['methods']['rada']['summary']['h_of_means']:.2f}" in page
    assert results["methods"]["linear-probe"]["seeds"][0]["new"] is None
    assert "<td>–</td>" in page
    assert results["environment"]["packages"]["torch"] in page


def test_the_page_states_the_gain_and_its_interval(folder):
    page, delta = write_report(folder).read_text(), load_results(folder)["methods"]["rada"]["delta"]
    for name in ("base", "new", "h"):
        assert f"Δ {delta[name]['mean']:+.2f}<br>" in page
        assert f"<small>{delta[name]['low']:+.2f} to {delta[name]['high']:+.2f}</small>" in page
    assert "bootstrap over classes and seeds" in page


def test_the_gain_figure_counts_base_and_new_apart(folder):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from rada.plots import STYLE, gain_figure

    gain = load_results(folder)["gain"]
    gain.update(repaired_images={"base": 12344.0, "new": 16.0}, broken_images={"base": 12.0, "new": 10014.0})
    with matplotlib.rc_context(STYLE):
        figure = gain_figure(gain)
        FigureCanvasAgg(figure).draw()
        right = figure.axes[1]
        assert right.get_title("left") == "base: 12344 repaired, 12 newly wrong\nnew: 16 repaired, 10014 newly wrong"
        assert right.get_tightbbox().x1 <= figure.bbox.x1  # the title is not cut off


def test_a_run_of_another_format_is_refused(folder, tmp_path):
    results = load_results(folder)
    results["format_version"] = 1
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="format_version: got 1"):
        write_report(tmp_path)


def test_an_interrupted_run_has_a_report_too(folder, tmp_path):
    results = load_results(folder)
    for entry in results["methods"].values():
        entry.update(seeds=[], summary=None, delta=None)
    results.update(status="interrupted", step=None, shot_curve={})
    for key in ("epochs", "gain", "examples"):
        del results[key]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "not complete" in write_report(tmp_path).read_text()


def test_the_stored_mask_explains_the_logit(folder):
    """The strips of an example add up to the head's own logits."""
    import torch

    from rada.checkpoint import load_checkpoint
    from rada.problem import prepare

    results = load_results(folder)
    trained = load_checkpoint(folder / "seed-1", device="cpu", backend="reference")
    settings = Settings(data=results["settings"]["data"], shots=8, seeds=(1,), protocol="base-new", device="cpu")
    problem = prepare(settings)
    group = problem.groups["base"]
    with torch.no_grad():
        logits = trained.head(group.features, *group.classes)
    names = list(group.class_names)
    for example in results["examples"]:
        arrays = np.load(folder / example["arrays"])
        pair = [names.index(example["true"]), names.index(example["confused"])]
        sums = torch.from_numpy((arrays["mask"] * arrays["rational"]).sum(-1))
        assert (logits[:, pair] - sums).abs().amax(1).min() < 1e-3  # of one of the test images


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "other"}'])
def test_a_folder_without_a_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=r"results\.json"):
        write_report(tmp_path)
