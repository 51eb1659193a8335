"""Test-time training, image after image against episodes in parallel: python bench/episodes.py

Methods, all with TPT's settings (a tenth of the V views kept, one step of AdamW on the output layer):

    loop       image after image through RAdaHead and autograd, as TPT is written: forward and backward over all V
               views, the kept ones indexed out of the logits
    lean-loop  the same, but with the views selected first, without gradients: backward over the kept ones alone
    single     TestTimeAdapter, one episode at a time: it does less, and batches nothing
    parallel   TestTimeAdapter

loop / single is what doing less gains, single / parallel what batching gains. Before anything is timed, the logits of
all methods are compared. Exit status 1 where they differ from the loop's by more than TOLERANCE of the largest logit.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from timing import Clock, run_rounds, summarize
from torch import Tensor

from rada import RAdaHead
from rada.classification import Classes
from rada.tuning.test_time import Adaptation, TestTimeAdapter

TOLERANCE = 1e-5
LOGIT_SCALE = 100.0


def make_task(images: int, views: int, classes: int, width: int, trained: bool) -> tuple[RAdaHead, Classes, Tensor]:
    """A head, K classes, and features [N, V, D] of views whose predictions are uncertain.

    Where they are certain, gradients are as small as AdamW's eps, and their rounding decides the step of any method.
    """
    torch.manual_seed(0)
    head = RAdaHead(width)
    if trained:
        torch.nn.init.normal_(head.out_proj.weight, std=0.02)
    text = torch.randn(classes, width)
    image = 0.12 * text[torch.arange(images) % classes] + torch.randn(images, width)
    return head.eval(), Classes(text, LOGIT_SCALE), image.unsqueeze(1) + 0.7 * torch.randn(images, views, width)


def make_loop(head: RAdaHead, classes: Classes, views: Tensor, *, lean: bool) -> Callable[[], Tensor]:
    """A call that adapts to image after image and returns the logits [N, K]."""
    settings, head = Adaptation(), copy.deepcopy(head)
    head.requires_grad_(False).out_proj.requires_grad_(True)
    initial = copy.deepcopy(head.out_proj.state_dict())

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log()).sum(-1)

    def least(logits: Tensor) -> Tensor:
        return entropy(logits.softmax(-1)).argsort()[: settings.kept(len(logits))]

    def adapt(image: Tensor) -> Tensor:  # [V, D]
        head.out_proj.load_state_dict(initial)
        optimizer = torch.optim.AdamW(head.out_proj.parameters(), settings.lr, weight_decay=settings.weight_decay)
        if lean:
            with torch.no_grad():
                kept = least(head(image, *classes))
            logits = head(image[kept], *classes)
        else:
            logits = head(image, *classes)
            logits = logits[least(logits)]
        entropy(logits.softmax(-1).mean(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            return head(image[:1], *classes)

    return lambda: torch.cat([adapt(image) for image in views])


def make_methods(head: RAdaHead, classes: Classes, views: Tensor) -> dict[str, Callable[[], Tensor]]:
    single, parallel = TestTimeAdapter(head, classes, episode_bytes=1), TestTimeAdapter(head, classes)
    return {
        "loop": make_loop(head, classes, views, lean=False),
        "lean-loop": make_loop(head, classes, views, lean=True),
        "single": lambda: single(views).logits,
        "parallel": lambda: parallel(views).logits,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--classes", default="100,1000", help="numbers of classes K, one after the other; default: %(default)s")
    add("--views", type=int, default=64, help="views per image V; default: %(default)s")
    add("--width", type=int, default=512, help="feature width D; default: %(default)s")
    add("--images", type=int, default=16, help="images per call N; default: %(default)s")
    add("--trained", action="store_true", help="start from an output layer that is not zero")
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--seconds", type=float, default=30.0, help="time for the rounds of one K; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    equal = True
    for count in map(int, options.classes.split(",")):
        head, classes, views = make_task(options.images, options.views, count, options.width, options.trained)
        methods = make_methods(head, classes, views)
        logits = {name: run() for name, run in methods.items()}
        samples: dict[str, list[float]] = {}
        run_rounds(methods, samples, Clock(), budget_s=options.seconds)
        loop = summarize(samples["loop"]).median
        images, start = options.images, "a trained output layer" if options.trained else "a zero output layer"
        sizes = f"K = {count}, V = {options.views}, D = {options.width}, N = {images}"
        print(f"{sizes}, {torch.get_num_threads()} threads, backend {head.backend_for(views[0])}, from {start}")
        for name in methods:
            time = summarize(samples[name])
            low, median, high = (1e3 * t / images for t in (time.q20, time.median, time.q80))
            error = float((logits[name] - logits["loop"]).abs().max() / logits["loop"].abs().max())
            equal &= error <= TOLERANCE
            print(
                f"  {name:9} {median:9.2f} ms/image ({low:.2f} to {high:.2f})  {1e3 / median:8.1f} images/s  "
                f"× loop {loop / time.median:5.2f}  difference {error:.1e}",
                flush=True,
            )
    return int(not equal)


if __name__ == "__main__":
    raise SystemExit(main())
