"""Predictions by a shortlist of classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rada.cli import main
from rada.inference import PredictOptions, Predictor, predict
from tests.rada.predictions import NAMES, ROWS, SMALL, checkpoint_of, rows, table_of

pytest.importorskip("pyarrow")


def test_a_shortlist_of_all_classes_is_the_full_head(checkpoint, features, tmp_path):
    for name, shortlist in (("full", 0), ("listed", len(NAMES))):
        done = predict(checkpoint, tmp_path / name, replace(SMALL, shortlist=shortlist), features=features)
        assert done["agreed"] == done["compared"]
        assert bool(done["compared"]) == bool(shortlist)
    full, listed = table_of(tmp_path / "full"), table_of(tmp_path / "listed")
    assert full["classes"] == listed["classes"]
    torch.testing.assert_close(torch.tensor(full["probabilities"]), torch.tensor(listed["probabilities"]))


def test_the_best_of_a_shortlist_and_how_often_it_is_the_full_heads():
    trained = checkpoint_of()
    with torch.no_grad():  # a head that chooses otherwise than zero-shot
        trained.rada.out_proj.weight.mul_(20)
    predictor, images = Predictor(trained), torch.from_numpy(rows()).float()
    options = PredictOptions("topk", top_k=5, shortlist=2)
    agreed = 0
    for start in range(0, ROWS, 8):
        batch = images[start : start + 8]
        results, _ = predictor(batch, options)
        best = torch.from_numpy(results["classes"]).long()
        assert best.shape == (len(batch), 2)
        listed = trained.classes.zero_shot(batch).topk(2).indices
        assert torch.equal(best.sort(1).values, listed.sort(1).values)
        with torch.no_grad():
            agreed += int((trained.head(batch, *trained.classes).argmax(1) == best[:, 0]).sum())
    assert predictor.compared == min(ROWS, 256)
    assert predictor.agreed == agreed < ROWS


def test_what_a_shortlist_cannot_be(checkpoint, features, tmp_path, capsys):
    with pytest.raises(ValueError, match="what: got 'logits' with a shortlist; it takes topk"):
        PredictOptions("logits", shortlist=3)
    arguments = ["predict", "--checkpoint", str(checkpoint), "--features", str(features)]
    for m, code, said in ((99, 2, f"shortlist: got 99; it takes at most {len(NAMES)}"), (2, 0, "sampled images")):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--output", str(tmp_path / str(m)), "--shortlist", str(m)])
        assert ended.value.code == code
        output = capsys.readouterr()
        assert said in " ".join((output.out + output.err).split())
    assert not (tmp_path / "99").exists()
