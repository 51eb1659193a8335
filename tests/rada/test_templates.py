"""Prompt templates by name, and their ensembles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rada.templates import COOP_TEMPLATES, DEFAULT_TEMPLATES, expand_templates, fill


def test_templates_that_are_no_names_stay():
    assert expand_templates(DEFAULT_TEMPLATES) == DEFAULT_TEMPLATES
    assert expand_templates("a {class}!") == ("a {class}!",)
    with pytest.raises(ValueError, match="templates: got 'imagenet-8'"):
        expand_templates(["imagenet-8"])


def test_a_name_stands_for_templates():
    pytest.importorskip("open_clip")
    every = expand_templates("imagenet-80")
    best = expand_templates(["imagenet-7", "OxfordPets", "a {}."])
    assert (len(every), len(set(every))) == (80, 80)
    assert every[0] == "a bad photo of a {}."
    assert len(best) == 9
    assert set(best[:7]) < set(every)
    assert best[7:] == ("a photo of a {}, a type of pet.", "a {}.")
    assert fill(expand_templates("DescribableTextures")[0], "dotted") == "dotted texture."
    assert all(expand_templates(name) == (template,) for name, template in COOP_TEMPLATES.items())


def test_an_ensemble_is_the_mean_of_unit_vectors():
    """Zero-shot with several templates, on the demo's towers."""
    pytest.importorskip("open_clip")
    from rada.models import ModelSpec

    def features(templates):
        extractor = ModelSpec("demo", templates=expand_templates(templates)).open(torch.device("cpu"))
        return extractor.classes(["cat", "red apple"]).text

    single = torch.stack([features(name) for name in ("OxfordPets", "EuroSAT")])
    assert torch.allclose(features(["OxfordPets", "EuroSAT"]), F.normalize(single.mean(0), dim=-1), atol=1e-5)
