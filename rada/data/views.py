"""Views of images: each image as it is, and random crops of it, as test-time training takes them."""

from __future__ import annotations

import numpy as np
import torch

from rada.checks import check_ints
from rada.data.images import to_rgb
from rada.data.source import Images
from rada.extras import require

VIEWS = 64


class ImageViews:
    """V views of each of N images, drawn when indexed: item n · V is image n as it is, the next V - 1 are augmented.

    An augmented view is a random crop (8 % to all of the area, aspect ratio 3/4 to 4/3) scaled to `size`, mirrored with
    probability 1/2, and with `augmix` mixed from chains of torchvision's AugMix. These are TPT's; it leaves AugMix
    off for ImageNet and its variants.

    images: N PIL images. count: V. size: height and width in pixels of the augmented views.
    seed: of the views; an item depends on it and on its index alone. Pickles to workers as its images do.

    Raises ImportError without torchvision, ValueError for a count below 1.
    """

    def __init__(
        self, images: Images, size: tuple[int, int], count: int = VIEWS, *, augmix: bool = False, seed: int = 0
    ) -> None:
        check_ints(1, views=count)
        transforms = require("torchvision.transforms", "clip", "an augmented view")
        self.images, self.count, self.seed = images, count, seed
        steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        self._augment = transforms.Compose(steps + [transforms.AugMix()] * augmix)
        self._decoded: tuple = (None, None)  # the image that the last item was a view of

    def __len__(self) -> int:
        return len(self.images) * self.count

    def __getitem__(self, index: int):
        number, view = divmod(index, self.count)
        if self._decoded[0] != number:
            self._decoded = number, to_rgb(self.images[number])
        image = self._decoded[1]
        if view == 0:
            return image
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0]))
            return self._augment(image)
