"""Rational Adaptation of vision-language models: the head, encoders, tuning in its settings, inference.

    import rada

    results = rada.train("folder:photos", "ViT-B-16", pretrained="openai", methods=("rada", "rada+adapter"), shots=16,
                         output="runs/photos")                # what `python -m rada train` does, and what it returns
    results = rada.train(source, encoders, loss=my_loss, callbacks=[print])       # objects of one's own, in memory

    source: a name as `rada.load_source` takes it, or a `rada.data.Source` of one's own.
    model: a name as `rada.models.ModelSpec` takes it, or a `rada.FeatureExtractor` around any `rada.encoders.Encoder`;
        None for features.
    loss: a callable of logits, labels and penalties, see `rada.losses.Loss`. callbacks: each takes the numbers of every
        epoch of every method and seed. output: the run's folder. Every other argument is a field of
        `rada.settings.Settings`.

A loop of one's own trains a `RAdaCLIP`, or a `RAdaHead` by `rada.tuning.tune_head`; `rada.save` writes a checkpoint
that `python -m rada evaluate` and `predict` take, and `rada.load` reads it: `rada.load(folder).open_model()` gives the
encoders, `.head` and `.classes` the rest. `rada.plots` draws figures.

Importing it imports torch alone; open_clip, Pillow, safetensors and pyarrow are imported where they are used.
"""

from rada.checkpoint import Checkpoint, load_head, save_head
from rada.checkpoint import load_checkpoint as load
from rada.checkpoint import save_model as save
from rada.clip import RAdaCLIP
from rada.data import load_source
from rada.encoders import FeatureExtractor
from rada.experiment import train
from rada.fused import RAdaHead
from rada.version import __version__

__all__ = [
    "Checkpoint",
    "FeatureExtractor",
    "RAdaCLIP",
    "RAdaHead",
    "__version__",
    "load",
    "load_head",
    "load_source",
    "save",
    "save_head",
    "train",
]
