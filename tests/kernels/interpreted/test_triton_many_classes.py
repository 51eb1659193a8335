"""Above 512 classes in bfloat16, interpreted: scores against 0, and once more where that leaves the range."""

from __future__ import annotations

import pytest
import torch

from rada_kernels import Params
from rada_kernels.mask_attention import reference
from rada_kernels.mask_attention.triton.forward import combine_rows, mask_attention_fwd
from rada_kernels.rational_projection.config import forward_config
from rada_kernels.rational_projection.triton.forward import rational_projection_fwd
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.config import PairBlock
from rada_kernels.triton_common.device import KIB, Device
from rada_kernels.triton_common.state import Projections
from rada_kernels.triton_common.target import Target
from tests.kernels.interpreted.test_triton_operator import on_target
from tests.kernels.truth import assert_as_good_as_reference, make_case

CLASSES, WIDTH, HEADS = 530, 32, 2
SM_90, SM_80 = Device("sm_90", 227 * KIB), Device("sm_80", 163 * KIB)
SM_100 = Device("sm_100", 227 * KIB)


class Launched(Target):
    """A device's launches, interpreted, by name."""

    def __init__(self, device: Device):
        super().__init__(device, configs={})
        self.names: list[str] = []
        self.grid: tuple[int, ...] = ()

    def run(self, kernel, grid, arguments):
        self.names.append(kernel.fn.__name__)
        self.grid = grid
        super().run(kernel, grid, arguments)


class Scores:
    """Queries, keys and values of an image, in bfloat16, and the attention of them."""

    def __init__(self, classes: int = CLASSES, device: Device = SM_90, queries=("image", "text", "rational")):
        case = make_case(1, classes, WIDTH, HEADS, queries=queries).cast(torch.bfloat16)
        params = Params(*case.layers, logit_scale=case.scale.float())
        self.call = Call(case.image, case.text, params, case.options, Launched(device))
        self.image = torch.randn(1 * ("image" in queries), WIDTH)
        self.text = torch.randn(classes * ("text" in queries), WIDTH)
        self.all = torch.randn(2 + ("rational" in queries), 1, classes, WIDTH)

    def shifted(self, head: int, by: float) -> None:
        """Adds a number in base 2 to every score of a head: one column of keys is 1, of queries that number."""
        columns = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        for queries in (self.image, self.text, self.all[2:]):
            queries[..., columns.start] = by
        self.all[0, ..., columns.start] = 1
        for rows in (self.image, self.text, self.all[0], self.all[2:]):
            rows[..., columns.start + 1 : columns.stop] *= 0.5

    def attended(self):
        rows = [rows.bfloat16() for rows in (self.image, self.text, self.all)]
        batch, classes, _ = self.call.sizes
        inverse = torch.ones(batch), torch.ones(classes)
        nothing = (torch.empty(0, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int32))
        projected = Projections(*rows[:2], *inverse, rows[2], *nothing)
        return mask_attention_fwd(self.call, projected, save=True)

    def truth(self) -> torch.Tensor:
        image, text, everything = (rows.bfloat16().double() for rows in (self.image, self.text, self.all))
        query = {"image": image[:, None], "text": text[None], "rational": everything[2:].squeeze(0)}
        query = {name: query[name] for name in self.call.options.queries}
        return reference.mask_attention(query, everything[0], everything[1], HEADS, 0.6931471805599453)

    def check(self):
        """The tensors of the attention, whose values are right."""
        attended = self.attended()
        mine, truth = combine_rows(self.call, attended).double(), self.truth()
        by_head = (mine - truth).unflatten(-1, (HEADS, -1)), truth.unflatten(-1, (HEADS, -1))
        error, size = (part.abs().amax((1, 3)) for part in by_head)  # of each image and head
        assert (error <= 0.02 * size).all(), (error, size)
        return attended


@pytest.mark.parametrize("device", [SM_90, SM_80, SM_100], ids=lambda device: device.name)
@pytest.mark.parametrize("classes", [513, 576])  # the image's row among others, and in a tile of its own
def test_scores_against_zero(device, classes, poisoned_empty):
    """A tile without a class has no maximum."""
    scores = Scores(classes, device)
    attended = scores.check()
    tiles = -(-classes // attended.tile)
    assert (attended.m[..., :tiles] == 0).all()
    assert (attended.m[..., tiles:] == -float("inf")).all()
    assert scores.call.target.names[-1] == "_mask_attention_fwd_again_kernel"


@pytest.mark.parametrize("device", [SM_90, SM_100], ids=lambda device: device.name)
@pytest.mark.parametrize(("by", "again"), [(40.0, False), (80.0, True), (-5.0, False), (-12.0, True), (-300.0, True)])
def test_scores_beyond_the_range_are_taken_again(by, again, device, poisoned_empty):
    """Of one head; the other keeps its zero. Sums of exp2(score) up to 2**64, and means from 2**-8 on, are in range."""
    scores = Scores(device=device)
    scores.shifted(1, by)
    attended = scores.check()
    assert (attended.m[:, :, 0] == 0).all()
    assert (attended.m[:, :, 1] != 0).all() if again else (attended.m[:, :, 1] == 0).all()
    assert attended.m.isfinite().all()


@pytest.mark.parametrize("device", [SM_90, SM_100], ids=lambda device: device.name)
@pytest.mark.parametrize("kind", ["image", "text", "rational"])
def test_one_query_kind_beyond_the_range(kind, device, poisoned_empty):
    scores = Scores(device=device)
    {"image": scores.image, "text": scores.text, "rational": scores.all[2]}[kind].mul_(100)
    scores.check()


@pytest.mark.parametrize("device", [SM_90, SM_100], ids=lambda device: device.name)
@pytest.mark.parametrize("queries", [("text",), ("image", "rational"), ("image",)], ids="+".join)
def test_query_subsets(queries, device, poisoned_empty):
    scores = Scores(queries=queries, device=device)
    scores.check()
    scores.all[0] *= 100
    scores.check()


@pytest.mark.parametrize("device", [SM_90, SM_100], ids=lambda device: device.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value, device):
    """In the head that has it, and nowhere else."""
    scores = Scores(device=device)
    scores.all[0, 0, 7, 3] = value
    rows = combine_rows(scores.call, scores.attended()).unflatten(-1, (HEADS, -1))
    assert rows[:, :, 1].isfinite().all()
    assert rows[:, :, 0].isnan().all()
    assert scores.truth().unflatten(-1, (HEADS, -1))[:, :, 0].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "width", "device"),
    [
        (torch.bfloat16, 24, SM_90),
        pytest.param(torch.bfloat16, 24, SM_100, marks=pytest.mark.slow),
        pytest.param(torch.float16, 16, SM_90, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_step(dtype, width, device, poisoned_empty):
    """Loads by descriptors, in two pieces of which the second is padded; float16 keeps the running maximum."""
    case = make_case(1, 530, width, 1, clear_gates=True, penalty="mse")
    assert_as_good_as_reference(case, on_target(Target(device, configs={})), dtype)


@pytest.mark.parametrize("queries", [("image", "text", "rational"), ("image", "text")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_layers_in_a_program_are_those_of_a_program_each(dtype, queries, poisoned_empty):
    """Blocks are the same, and so is every bit."""
    case = make_case(3, CLASSES, WIDTH, HEADS, queries=queries).cast(dtype)
    params, targets = Params(*case.layers, logit_scale=case.scale.float()), [Launched(SM_90), Launched(SM_100)]
    calls = [Call(case.image, case.text, params, case.options, target) for target in targets]
    config = calls[0].config(forward_config, CLASSES)
    together, apart = (rational_projection_fwd(call, save=True, config=config) for call in calls)
    tiles, features = PairBlock.of(3, CLASSES, config.BR).tiles(3, CLASSES), 6
    layers = 2 + ("rational" in queries)
    assert [target.grid[0] for target in targets] == [features + tiles, features + layers * tiles]
    for mine, other in zip(together, apart, strict=True):
        assert torch.equal(mine, other)
