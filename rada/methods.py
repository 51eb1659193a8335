"""The methods of a run: RAda in its settings, and what people compare it with. One table, `METHODS`.

A method is fitted on a seed's few shots, and then answers for each group of test images. All methods share the run's
features, which are encoded once; those that change the encoders encode the test images anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rada.adapt import view_features
from rada.adapter import AdaptedHead
from rada.baselines import BASELINES, class_rows
from rada.checkpoint import Checkpoint
from rada.classification import Labelled
from rada.clip import RAdaCLIP
from rada.data import subset
from rada.data.classes import prompt_names
from rada.data.splits import draw
from rada.distributed import in_shares
from rada.encoders import FeatureExtractor, split_features
from rada.losses import PromptSRC
from rada.metrics import top_k_accuracy
from rada.problem import Answer, Problem, Sample
from rada.prompt import PromptedEncoder, PromptedExtractor, PromptedHead, PromptLearner, gaussian_average
from rada.templates import expand_templates
from rada.tuning import Adaptation, FineTuner, TestTimeAdapter, tune_head, wise_ft
from rada.tuning.interpolation import snapshot

# PromptSRC averages weights around epoch 15 of 20.
AVERAGED_AT, AVERAGED_OVER = 15 / 20, 1 / 20
ENSEMBLE = "imagenet-7"
CURVE_STEPS = (1, 2, 4)
WISE_FT_ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class Trial(NamedTuple):
    """What a method is fitted on."""

    problem: Problem
    seed: int
    sample: Sample
    report: Callable[[dict], None]  # takes the numbers of an epoch
    folder: Path | None = None  # for a state to resume from
    curves: bool = False  # whether curves are wanted too


class Fitted(NamedTuple):
    """A fitted method. answer: by a group's name; None where it has nothing to say about a class of the group."""

    answer: Callable[[str], Answer | None]
    checkpoint: Callable[[], Checkpoint] | None = None
    head: nn.Module | None = None  # over the run's own features
    curves: Callable[[], dict[str, list[dict]]] | None = None  # by name: rows of numbers; where the trial wants them


class Method(NamedTuple):
    """label: in tables. fit: see `Fitted`. images: whether it needs them, so that features:PATH will not do."""

    label: str
    fit: Callable[[Trial], Fitted]
    images: bool = False


def check_methods(names: Iterable[str]) -> None:
    """Raise ValueError unless the names are of METHODS, at least one, each once."""
    names = tuple(names)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(f"methods: got {unknown or names}; it takes names of {', '.join(METHODS)}, each once")


def left_out(name: str, problem: Problem) -> str | None:
    """Why a method has no place in a run; None: it has."""
    if METHODS[name].images and problem.encoders is None:
        return "it takes images, and the data are features"
    if name == "ensemble" and problem.encoders is None:
        return "it takes a text tower, and the data are features"
    return None


def check_encoders(names: Iterable[str], problem: Problem) -> None:
    """Raise ValueError where the encoders do not take a method's parts, before another method is fitted."""
    if "rada+prompt" in names and problem.encoders is not None:
        _new_prompt(problem, seed=0)


def fit_rada(trial: Trial) -> Fitted:
    """The head on frozen features."""
    head = _tune(trial, trial.problem.new_head(trial.seed))
    return _over_features(trial, head)


def fit_adapter(trial: Trial) -> Fitted:
    """The head over FeatureAdapters, trained jointly."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(trial.seed)
        adapted = AdaptedHead(trial.problem.new_head(trial.seed))
    return _over_features(trial, _tune(trial, adapted))


def fit_prompt(trial: Trial) -> Fitted:
    """The head under a prompt, trained jointly with PromptSRC's regularizer and average over the epochs."""
    problem = trial.problem
    encoders, prompt = _encoders(problem), _new_prompt(problem, trial.seed)
    tuned = PromptedHead(
        PromptedEncoder(encoders.model, prompt),
        problem.new_head(trial.seed),
        prompt_names(problem.trained_names()),
        regularizer=PromptSRC(),
    )
    epochs = problem.settings.tuning.epochs
    averaged = AveragedModel(
        tuned.trained, avg_fn=gaussian_average(epochs, AVERAGED_AT * epochs, max(1.0, AVERAGED_OVER * epochs))
    )

    def on_epoch(numbers: dict) -> None:
        if numbers["epoch"]:
            averaged.update_parameters(tuned.trained)
        trial.report(numbers)

    sample = trial.sample if prompt.image_context is None else _as_images(encoders, trial.sample)
    _tune(trial._replace(sample=sample, report=on_epoch), tuned)
    tuned.trained.load_state_dict(averaged.module.state_dict())
    extractor = PromptedExtractor(encoders, prompt)
    head = tuned.head.eval()

    def checkpoint() -> Checkpoint:
        classes = extractor.classes(prompt_names(problem.source.class_names))
        return problem.checkpoint(head, trial.seed, prompt=(prompt.options, prompt.state_dict()), classes=classes)

    return Fitted(partial(_answer, problem, extractor, head, prompt.image_context is not None), checkpoint)


def _new_prompt(problem: Problem, seed: int) -> PromptLearner:
    encoders, image_tokens = _encoders(problem), problem.settings.image_tokens
    if image_tokens and encoders.preprocess is None:
        raise ValueError("model: it came without an image transform; a prompt with image tokens takes one")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return PromptLearner(encoders.model, encoders.tokenizer, image_tokens=image_tokens)


def fit_full(trial: Trial) -> Fitted:
    """Towers and head fine-tuned on the images."""
    problem, images = trial.problem, trial.sample.images
    encoders = copy.deepcopy(_encoders(problem))
    encoders.model.float().requires_grad_(True)
    if isinstance(decoder := getattr(encoders.model, "text_decoder", None), nn.Module):
        decoder.requires_grad_(False)
    model = RAdaCLIP(encoders, problem.new_head(trial.seed), prompt_names(problem.trained_names()))
    start = snapshot(model) if trial.curves else {}
    assert images.images is not None
    own, tuning = problem.settings.precision, problem.settings.full
    if own != "fp32":
        tuning = replace(tuning, precision="fp16" if own == "fp16" else "bf16")
    if problem.loss_name == "sigmoid":
        tuning = replace(tuning, loss="sigmoid")
    tuner = FineTuner(
        model,
        images.images,
        images.labels,
        tuning,
        seed=trial.seed,
        folder=trial.folder,
        workers=problem.settings.workers or 0,
        parallel=problem.settings.parallel,
        on_epoch=trial.report,
    )
    tuner.resume()
    tuner.run()

    def checkpoint() -> Checkpoint:
        classes = model.classes(prompt_names(problem.source.class_names))
        return problem.checkpoint(model.head, trial.seed, towers=model.model.state_dict(), classes=classes)

    answer = partial(_answer, problem, model, model.head, True)

    def curves() -> dict[str, list[dict]]:
        return {"wise_ft": wise_ft(model, start, lambda: _scores(problem, answer), WISE_FT_ALPHAS)}

    return Fitted(answer, checkpoint, curves=curves if trial.curves else None)


def fit_test_time(trial: Trial) -> Fitted:
    """An untrained head, that is zero-shot, adapted to each test image by itself."""
    problem = trial.problem
    head, views = problem.new_head(trial.seed).eval(), problem.views

    def answer(group: str, steps: int = 1) -> Answer:
        of = problem.groups[group]
        items = draw(len(of.labels), problem.settings.adapt_images, seed=0)
        if group not in views:
            images = subset(of.split, items).images
            assert images is not None
            views[group] = torch.cat(list(view_features(_encoders(problem), images)))
        adapter = TestTimeAdapter(head, problem.classes_of(group, trial.seed), Adaptation(steps=steps))
        return Answer(adapter(views[group]).logits.float().cpu(), items)

    def curves() -> dict[str, list[dict]]:
        rows = [{"steps": steps, **_scores(problem, partial(answer, steps=steps))} for steps in CURVE_STEPS]
        before = _scores(problem, lambda group: _some(problem, trial.seed, group))
        return {"adaptation": [{"steps": 0, **before}, *rows]}

    return Fitted(answer, curves=curves if trial.curves else None)


def fit_ensemble(trial: Trial) -> Fitted:
    """Zero-shot with the 7 templates that CLIP's authors found to do as well as their 80 for ImageNet."""
    problem, encoders = trial.problem, copy.copy(_encoders(trial.problem))
    encoders.templates = expand_templates(ENSEMBLE)
    return Fitted(partial(_answer, problem, encoders, None, False))


def fit_baseline(name: str, trial: Trial) -> Fitted:
    """One of `rada.baselines`."""
    problem, baseline = trial.problem, BASELINES[name]
    trained = problem.trained_classes(trial.seed)
    model = baseline.fit(trial.sample.train, trained, seed=trial.seed, val=trial.sample.val)

    def answer(group: str) -> Answer | None:
        among = problem.classes_of(group, trial.seed)
        if not baseline.unseen and class_rows(among.text, trained.text) is None:
            return None
        return problem.answer(group, trial.seed, model)

    return Fitted(answer)


def _tune(trial: Trial, model: nn.Module) -> Any:
    problem = trial.problem
    return tune_head(
        model,
        trial.sample.train,
        problem.trained_classes(trial.seed),
        problem.settings.tuning,
        seed=trial.seed,
        val=trial.sample.val,
        loss=problem.loss,
        on_epoch=trial.report,
        precision=problem.settings.precision,
        description=f"train seed {trial.seed}",
    )


def _over_features(trial: Trial, head: nn.Module) -> Fitted:
    problem, seed = trial.problem, trial.seed
    return Fitted(lambda group: problem.answer(group, seed, head), lambda: problem.checkpoint(head, seed), head)


def _answer(problem: Problem, encoders: FeatureExtractor, head: nn.Module | None, images: bool, group: str) -> Answer:
    """The answer of a head over other encoders than the run's. images: whether they make other image features."""
    of = problem.groups[group]
    classes = encoders.classes(prompt_names(of.class_names))

    def features(index: Tensor) -> Tensor:
        return (
            split_features(encoders, of.split, index, f"encode {group} test images") if images else of.features[index]
        )

    return Answer(in_shares(len(of.labels), lambda index: problem.logits(features(index), classes, head)))


def _as_images(encoders: FeatureExtractor, sample: Sample) -> Sample:
    """The sample with preprocessed images in place of its features, and without validation images."""
    assert sample.images.images is not None
    assert encoders.preprocess is not None
    images = [encoders.preprocess(sample.images.images[i]) for i in range(len(sample.images))]
    return sample._replace(train=Labelled(torch.stack(images), sample.train.labels), val=None)


def _encoders(problem: Problem) -> FeatureExtractor:
    assert problem.encoders is not None, "methods that need images are left out of runs without"
    return problem.encoders


def _some(problem: Problem, seed: int, group: str) -> Answer:
    """Zero-shot's answer for the images that test-time training takes."""
    items = draw(len(problem.groups[group].labels), problem.settings.adapt_images, seed=0)
    return Answer(problem.answer(group, seed, None).logits[items], items)


def _scores(problem: Problem, answer: Callable[[str], Answer]) -> dict[str, float]:
    found = {group: top_k_accuracy(*problem.judged(group, answer(group))) for group in problem.groups}
    return problem.protocol.scores(found)


METHODS: dict[str, Method] = {
    "rada": Method("RAda", fit_rada),
    "rada+prompt": Method("RAda + prompt", fit_prompt, images=True),
    "rada+adapter": Method("RAda + adapter", fit_adapter),
    "full": Method("RAda, full", fit_full, images=True),
    "test-time": Method("RAda, test-time", fit_test_time, images=True),
    "ensemble": Method("zero-shot, 7 templates", fit_ensemble),
    **{name.lower().replace(" ", "-"): Method(name, partial(fit_baseline, name)) for name in BASELINES},
}
