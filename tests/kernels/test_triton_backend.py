"""What the triton backend says of itself where no kernel runs: predicate, import, shapes, launch configurations."""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from rada_kernels.backends import triton as backend
from rada_kernels.dispatch import choose_backend
from rada_kernels.logit_reduction import config as reduction
from rada_kernels.mask_attention import config as attention
from rada_kernels.options import QUERIES, Options, Params
from rada_kernels.rational_projection import config as projection
from rada_kernels.triton_common import device as devices
from rada_kernels.triton_common.call import Call, Shapes
from rada_kernels.triton_common.config import (
    BLOCKS,
    AttentionConfig,
    GemmConfig,
    PairBlock,
    config_key,
    kernels_version,
    write_tuned,
)
from rada_kernels.triton_common.device import INTERPRETER, KIB, Device
from rada_kernels.triton_common.state import Attended, Projections
from rada_kernels.triton_common.target import Gpu, Target, Usage, fit

HEAD_WIDTHS = (1, 9, 16, 32, 48, 64, 72, 80, 96, 128, 144, 160, 192, 256)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def interpreted(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize(
    ("dtype", "width", "heads", "part"),
    [
        (torch.float64, 64, 2, "dtype torch.float64"),
        (torch.float32, 1024, 64, "num_heads 64: it takes at most 32"),
        (torch.float32, 2056, 8, "head width 257: it takes a whole number up to 256"),
        (torch.float32, 65, 2, "head width 32.5"),
    ],
)
def test_the_predicate_names_what_it_does_not_take(interpreted, dtype, width, heads, part):
    usable, reason = backend.usable(dtype, CPU, width, heads)
    assert not usable
    assert part in reason


@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_every_head_width_is_taken(interpreted, head_width):
    for dtype in backend.DTYPES:
        assert backend.usable(dtype, CPU, 8 * head_width, 8) == (True, "Triton kernels, interpreted")


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    usable, reason = backend.usable(torch.float32, CPU, 64, 2)
    assert not usable
    assert "device cpu" in reason


def test_an_old_gpu_is_named(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    usable, reason = backend.usable(torch.float16, CUDA, 64, 2)
    assert not usable
    assert "7.5: it takes 8.0 or newer" in reason


def test_a_gpu_is_told_what_was_never_tried(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.usable(torch.float16, CUDA, 64, 2) == (True, f"Triton kernels, {backend.STATUS}")


def test_a_number_becomes_a_scalar_without_a_copy_from_the_host():
    """A copy would wait for the device, and a CUDA graph could not be captured."""
    from codegen.launches import TorchCalls

    from rada_kernels import Params
    from rada_kernels.api import on_device

    image, calls = torch.empty(2, 4, device="meta"), []
    with TorchCalls(calls):
        params = on_device(Params(*[None] * 12, logit_scale=20.0, logit_bias=-3.0), image)
    assert [call.name for call in calls] == ["full", "full"]
    assert params.logit_scale.device.type == params.logit_bias.device.type == "meta"


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1030", "gfx1201"])
def test_what_spills_on_rdna_is_left_to_torch(arch, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(backend, "gpu", lambda index: Device(arch, 64 * KIB))
    device = torch.device("cuda", 0)
    usable, reason = backend.usable(torch.float32, device, 64, 2)
    assert not usable
    assert "float32 on RDNA" in reason
    assert backend.usable(torch.bfloat16, device, 64 * 8, 8)[0]
    usable, reason = backend.usable(torch.bfloat16, device, 72 * 8, 8)
    assert not usable
    assert "head width 72 on RDNA: it takes at most 64" in reason
    monkeypatch.setattr(backend, "gpu", lambda index: Device("gfx942", 64 * KIB))
    assert backend.usable(torch.float32, device, 256 * 8, 8)[0]


@pytest.fixture
def sm_90(monkeypatch):
    """A GPU that torch believes in and no kernel ever meets."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("RADA_SELF_CHECK", "0")


def test_every_open_clip_model_is_served_by_the_kernels(sm_90):
    """With the released eight heads, "auto" on a GPU takes triton for every configuration that open_clip knows."""
    factory = pytest.importorskip("open_clip.factory")
    widths = {name: config["embed_dim"] for name, config in factory._MODEL_CONFIGS.items()}
    assert len(widths) > 100
    assert {1152, 1280, 1536} <= {*widths.values()}, "SO400M SigLIP, bigG, gopt-SigLIP 2"
    served = {
        (name, dtype): choose_backend("auto", dtype, torch.device("cuda", 0), width, 8)[0]
        for name, width in widths.items()
        for dtype in backend.DTYPES
    }
    assert {*served.values()} == {"triton"}, [key for key, name in served.items() if name != "triton"]


def test_a_missing_gpu_is_an_answer(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    usable, reason = backend.usable(torch.float16, CUDA, 64, 2)
    assert not usable
    assert "torch finds no CUDA or ROCm device" in reason


def test_without_triton_the_package_works_and_says_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch, rada_kernels\n"
        "print(rada_kernels.usable_backends(torch.float32, torch.device('cuda'), 64, 2)['triton'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "(False, 'Triton is not installed')", run.stderr


@pytest.mark.parametrize(
    ("version", "taken"), [("3.6.0", False), ("3.7.1", False), ("3.8.0", True), ("3.10.0+git", True)]
)
def test_descriptors_wait_for_a_launcher_that_takes_them_in_tuples(version, taken, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    assert Device("sm_90", 227 * KIB).descriptors == taken
    assert not Device("sm_80", 163 * KIB).descriptors


def test_kernels_keep_to_what_older_triton_compiles():
    """Before 3.8 a field of a compiled-in dataclass is a plain value: no string among arguments, no list of them."""
    folder = Path(backend.__file__).parents[1]
    sources = [*folder.glob("*/triton/*.py"), *folder.glob("triton_common/*.py")]
    assert len(sources) > 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("tl.zeros", "tl.zeros_like"), f"{source}:{node.lineno}"
                strings = [a for a in node.args if isinstance(a, ast.Attribute) and a.attr == "PRECISION"]
                assert not strings, f"{source}:{node.lineno}: {called}"


@pytest.mark.parametrize(("setting", "nvidia", "amd"), [("highest", "ieee", "ieee"), ("high", "tf32", "bf16x3")])
def test_float32_products_follow_torch(setting, nvidia, amd):
    assert SM_90.device.precision(torch.float32, setting) == nvidia
    assert Device("gfx942", 64 * KIB).precision(torch.float32, setting) == amd
    assert SM_90.device.precision(torch.bfloat16, setting) == "ieee"


# The architectures that kernels are compiled for, with the shared memory of a program.
DEVICES = {
    name: Device(name, kib * KIB)
    for name, kib in {
        "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx1100": 64,
    }.items()
}  # fmt: skip
ALL = pytest.mark.parametrize("device", [*DEVICES.values(), INTERPRETER], ids=lambda device: device.name)


def shapes(device: Device, dtype: torch.dtype, head_width: int = 64) -> Shapes:
    return Shapes.of(Options(), 8 * head_width, dtype, device, "highest")


def projection_of(target: Target, dtype: torch.dtype = torch.bfloat16) -> GemmConfig:
    return projection.forward_config(target, shapes(target.device, dtype), 1000)


def test_a_tuned_configuration_is_preferred(tuned_file):
    own = projection_of(SM_90)
    tuned_file({KEY: GOOD})
    assert projection_of(SM_90) == GemmConfig(**GOOD) != own
    assert projection_of(SM_90, torch.float16) == own
    assert projection_of(Target(SM_90.device, configs={})) == own, "of its own"


def test_a_call_asks_for_a_configuration_once_for_each_tuned_file(tuned_file):
    target, asked = Target(SM_90.device), []

    def configure(target: Target, of: Shapes, classes: int) -> GemmConfig:
        asked.append(classes)
        return projection.forward_config(target, of, classes)

    def configured(classes: int) -> GemmConfig:
        features = torch.empty(1, 512, dtype=torch.bfloat16, device="meta")
        params = Params(*[features] * 12, logit_scale=features)
        return Call(features, features, params, Options(), target, purpose=(classes,)).config(configure, classes)

    own = configured(1000)
    assert configured(1000) is own
    tuned_file({KEY: GOOD})
    assert configured(1000) == GemmConfig(**GOOD) != own
    assert configured(10) == projection.forward_config(SM_90, shapes(SM_90.device, torch.bfloat16), 10)
    assert asked == [1000, 1000, 10]


@pytest.fixture
def tuned_file(tmp_path, monkeypatch):
    """write(content) makes a new file what RADA_TUNED names."""
    numbers = itertools.count()

    def write(content) -> str:
        path = tmp_path / f"tuned-{next(numbers)}.json"
        if isinstance(content, str):
            path.write_text(content)
        else:
            write_tuned(path, content)
        monkeypatch.setenv("RADA_TUNED", str(path))
        return str(path)

    return write


SM_90 = Target(Device("sm_90", 227 * KIB))
KEY = "rational_projection_fwd sm_90 bfloat16 512 2"
GOOD = {"BR": 128, "BC": 128, "BD": 32, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{", ["Expecting property name", "it takes a file that bench/autotune.py wrote"]),
        ("[]", ["got []; it takes an object"]),
        ([], ["configs: got []; it takes an object"]),
        ({KEY: 3}, [f"{KEY}: got 3; it takes an object"]),
        ({"projection": {KEY: GOOD}}, [f"projection: {KEY}: got {GOOD}; it takes one of (16, 32"]),
        (
            {KEY: GOOD | {"BX": 16}},
            [f"{KEY}: got BR, BC, BD, num_warps, num_stages, BX; it takes BR, BC, BD, num_warps"],
        ),
        ({KEY: {"BR": 64}}, [f"{KEY}: got BR; it takes BR, BC, BD, num_warps, num_stages"]),
        ({KEY: GOOD | {"BR": 48}}, [f"{KEY}: BR: got 48; it takes one of (16, 32"]),
        ({KEY: GOOD | {"BR": 4096}}, [f"{KEY}: BR: got 4096; it takes one of (16, 32"]),
        ({KEY: GOOD | {"BR": 64.0}}, [f"{KEY}: BR: got 64.0; it takes one of (16, 32"]),
        ({KEY: GOOD | {"num_warps": 3}}, ["num_warps: got 3; it takes one of (1, 2, 4"]),
        ({KEY: GOOD | {"num_stages": 0}}, ["num_stages: got 0; it takes one of (1, 2, 3"]),
    ],
)
def test_a_wrong_tuned_file_is_named(tuned_file, content, parts):
    path = tuned_file(content)
    with pytest.raises(ValueError, match=f"^RADA_TUNED: {re.escape(path)}: ") as error:
        projection_of(SM_90)
    for part in parts:
        assert part in str(error.value)


def test_a_missing_tuned_file_is_named(monkeypatch):
    monkeypatch.setenv("RADA_TUNED", "/nowhere/tuned.json")
    with pytest.raises(ValueError, match=r"^RADA_TUNED: /nowhere/tuned.json: .*No such file"):
        projection_of(SM_90)


@pytest.mark.parametrize(
    ("kernels", "told"), [({"kernels": "0a1b"}, "of version 0a1b"), ({}, "it tells of no version")]
)
def test_a_file_tuned_for_other_kernels_is_ignored_with_one_warning(tuned_file, kernels, told):
    """Whatever it holds: fields may have had other names."""
    path = tuned_file(json.dumps({**kernels, "configs": {KEY: {"BX": 7}}}))
    with pytest.warns(UserWarning, match=rf"^RADA_TUNED: {re.escape(path)} is ignored: {told}") as caught:
        assert projection_of(SM_90) == projection_of(SM_90) == projection_of(Target(SM_90.device, configs={}))
    assert len(caught) == 1


def test_a_tuned_file_is_of_the_kernels_and_triton(monkeypatch):
    triton = pytest.importorskip("triton")
    here = kernels_version()
    assert kernels_version.__wrapped__() == here
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert kernels_version.__wrapped__() != here
    monkeypatch.undo()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + b"#" * (path.parent.name == "triton"))
    assert kernels_version.__wrapped__() != here


def usages(table: dict):
    """usage_of by the product of a configuration's blocks and its stages: (shared bytes, spilled bytes)."""
    asked = []

    def usage_of(config):
        asked.append(config)
        return Usage(*table[config])

    return usage_of, asked


def attention_config(rows, classes, stages=1):
    return AttentionConfig(rows, classes, 4, stages)


def test_a_configuration_that_fits_is_taken_as_it_is():
    usage_of, asked = usages({attention_config(64, 64, 2): (1000, 0)})
    assert fit(attention_config(64, 64, 2), usage_of, 1000) == attention_config(64, 64, 2)
    assert len(asked) == 1
    assert fit(attention_config(64, 64, 2), lambda config: None, 0) == attention_config(64, 64, 2), "nothing is known"


def test_beyond_shared_memory_stages_go_first_then_the_largest_block():
    table = {
        attention_config(128, 64, 2): (4000, 0),
        attention_config(128, 64, 1): (3000, 0),
        attention_config(64, 64, 1): (2000, 0),
        attention_config(32, 64, 1): (1000, 0),
    }
    usage_of, asked = usages(table)
    assert fit(attention_config(128, 64, 2), usage_of, 1000) == attention_config(32, 64, 1)
    assert asked == [*table]


def test_spills_halve_the_largest_block_and_the_fewest_are_taken_where_all_spill():
    table = {
        attention_config(64, 32, 2): (900, 40),
        attention_config(32, 32, 2): (800, 8),
        attention_config(16, 32, 2): (700, 16),
        attention_config(16, 16, 2): (600, 24),
    }
    usage_of, _ = usages(table)
    assert fit(attention_config(64, 32, 2), usage_of, 1000) == attention_config(32, 32, 2)
    usage_of, asked = usages(table | {attention_config(16, 32, 2): (700, 0)})
    assert fit(attention_config(64, 32, 2), usage_of, 1000) == attention_config(16, 32, 2)
    assert len(asked) == 3


def test_what_the_next_step_needs_is_not_halved():
    table = {attention_config(64, 64): (900, 8), attention_config(64, 32): (800, 8), attention_config(64, 16): (700, 0)}
    usage_of, _ = usages(table)
    assert fit(attention_config(64, 64), usage_of, 1000, keep=("BM",)) == attention_config(64, 16)


def test_a_device_that_is_too_small_is_named():
    usage_of, _ = usages({attention_config(32, 32, 2): (4000, 0), attention_config(32, 32): (3000, 0)})
    with pytest.raises(ValueError, match=r"AttentionConfig\(BM=32.* takes 3000 bytes of shared memory; got 1000"):
        fit(attention_config(32, 32, 2), usage_of, 1000, keep=("BM", "BN"))


class FakeKernel:
    """A kernel as Triton has it: warmup compiles what it has not, `run` of that loads it and says what it spills."""

    arg_names = ("half", "x", "K", "S", "C")

    def __init__(self, shared_bytes, spills):
        self.shared_bytes, self.spills, self.compiled, self.launched = shared_bytes, spills, {}, []

    def warmup(self, *, grid, C, S, maxnreg=None, dO_blocks=(), **arguments):
        from triton.runtime.errors import OutOfResources

        shared, kernel = self.shared_bytes(C), self

        class Compiled:
            metadata = types.SimpleNamespace(shared=shared)

            @property
            def run(self):
                if shared > 1000:
                    raise OutOfResources(shared, 1000, "shared memory")
                self.n_spills = kernel.spills(C)

            def __getitem__(self, grid):
                return lambda *arguments: kernel.launched.append((grid, arguments))

        return self.compiled.setdefault((C, S, maxnreg, dO_blocks), Compiled())


def test_a_gpu_compiles_once_halves_and_launches_what_fits():
    pytest.importorskip("triton")
    kernel = FakeKernel(lambda c: 10 * c.BM * c.num_stages, lambda c: 4 * (c.BN > 32))
    target = Gpu(Device("sm_90", 1000), configs={})
    config, fitted = attention_config(64, 64, 2), attention_config(32, 32, 1)

    def launch(image: torch.Tensor, K: int = 7, S: str = "bfloat16", **more) -> dict:
        purpose = "test", K, S, *more
        call = Call(image, image, Params(*[image] * 12, logit_scale=image), Options(1), target, purpose)
        return call.launch(
            kernel,
            config,
            lambda c: ((c.BM,), {"K": K}),
            tensors=lambda c: {"half": image[: c.BM]},
            x=image,
            S=S,
            **more,
        )

    images = [torch.empty(64, 2) for _ in range(2)]
    for image in images:
        launched = launch(image)
    assert [c for c, *_ in kernel.compiled] == [
        config,  # beyond 1000 bytes
        attention_config(64, 64, 1),  # spills
        attention_config(32, 64, 1),  # spills
        fitted,
    ]
    for image, (grid, (half, x, *rest)) in zip(images, kernel.launched, strict=True):
        assert grid[:3] == (32, 1, 1)
        assert x is image, "each call its own"
        assert half.data_ptr() == image.data_ptr()
        assert (len(half), *rest) == (32, 7, "bfloat16", fitted)
    assert launched["x"] is images[1]
    launch(images[0], K=8)
    assert len(kernel.compiled) == 4, "another number is served by the same code"
    launch(images[0], S="float16")
    assert len(kernel.compiled) == 8, "what is compiled in is not"
    launch(images[0], maxnreg=128)
    assert len(kernel.compiled) == 12, "nor are launch options"
    launch(images[0], dO_blocks=("descriptor",))
    assert len(kernel.compiled) == 16, "nor pointers in place of descriptors"


@ALL
def test_every_table_serves_every_case(device):
    """Blocks are powers of two from 16 on, and contracted ones waste little."""
    target = Target(device, configs={})
    dtypes = [dtype for dtype in backend.DTYPES if not (device.family == "rdna" and dtype == torch.float32)]
    for dtype, head_width, classes in itertools.product(dtypes, HEAD_WIDTHS, (1, 20, 33, 257, 1000, 65536)):
        call = target, shapes(device, dtype, head_width)
        made = [
            attention.forward_config(*call, classes),
            attention.queries_bwd_config(*call, classes),
            attention.keys_bwd_config(*call, classes),
            projection.weight_bwd_config(*call),
        ]
        contracted = [
            projection.forward_config(*call, classes),
            projection.rows_bwd_config(*call),
            reduction.forward_config(*call, classes),
            reduction.backward_config(*call, classes),
        ]
        assert all(-8 * head_width % config.BD <= max(head_width, 15) for config in contracted)
        made += contracted
        for config in made:
            assert all(size in BLOCKS for size in config.blocks.values()), config


@ALL
def test_few_classes_have_small_blocks(device):
    target = Target(device, configs={})
    for dtype, (classes, block) in itertools.product(backend.DTYPES[1:], {10: 16, 16: 32, 31: 32, 32: 64}.items()):
        call = target, shapes(device, dtype), classes
        assert block >= attention.forward_config(*call).BM, "K rows and the image query's"
        assert max(16, 1 << (classes - 1).bit_length()) >= attention.keys_bwd_config(*call).BN


@ALL
def test_the_row_tile_does_not_depend_on_the_precision(device):
    """It may change between a forward and its backward pass, which takes the tile from the same table."""
    target, tiles = Target(device, configs={}), {}
    for precision in ("highest", "high"):
        cases = itertools.product(backend.DTYPES[1:], HEAD_WIDTHS, (1, 16, 17, 64, 1000))
        tiles[precision] = [
            attention.forward_config(target, Shapes.of(Options(), 8 * e, d, device, precision), k).BM
            for d, e, k in cases
        ]
    assert tiles["highest"] == tiles["high"]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sm_80", "mma"), ("sm_87", "mma"), ("sm_89", "mma"), ("sm_90", "wgmma"), ("sm_100", "wgmma"),
        ("sm_103", "wgmma"), ("sm_110", "wgmma"), ("sm_121", "mma"), ("sm_130", "mma"), ("gfx90a", "cdna"),
        ("gfx950", "cdna"), ("gfx1030", "rdna"), ("gfx1201", "rdna"), ("interpreter", "interpreter"),
    ],
)  # fmt: skip
def test_an_unknown_architecture_is_served_as_its_family(name, family):
    device = Device(name, 99 * KIB)
    assert device.family == family
    assert config_key("x", device, torch.bfloat16, 64) == f"x {name} bfloat16 64", "tuned for one device"


@pytest.mark.parametrize(
    ("hip", "properties", "device"),
    [
        (
            None,
            {"major": 12, "minor": 1, "shared_memory_per_block_optin": 101376, "multi_processor_count": 48},
            ("sm_121", 101376, 48),
        ),
        # ROCm's properties have no shared_memory_per_block_optin.
        (
            "6.4",
            {
                "gcnArchName": "gfx90a:sramecc+:xnack-",
                "shared_memory_per_block": 65536,
                "multi_processor_count": 104,
            },
            ("gfx90a", 65536, 104),
        ),
    ],
)
def test_what_is_asked_of_a_device(hip, properties, device, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(**properties))
    assert devices.gpu.__wrapped__(0) == Device(*device)


@pytest.mark.parametrize("classes", [1, 2, 7, 10, 47, 100, 101, 1000, 65536])
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_pairs_of_images_and_classes_fill_a_tile(rows, classes):
    many = PairBlock.of(rows, classes, rows)
    assert many.tiles(1, classes) * many.BK <= classes * 9 / 8, "few empty rows"
    for batch in (2, 3, 5, 31, 512):
        assert PairBlock.of(batch, classes, rows) == many, "a last batch is served by the same code"
    assert PairBlock.of(1, classes, rows) == PairBlock(1, rows), "one image by its own"


@pytest.mark.parametrize("queries", [QUERIES, ("image",), ("text",)], ids="+".join)
@pytest.mark.parametrize("classes", [9, 40, 131])
def test_the_fake_has_the_shapes_of_what_is_saved(queries, classes, interpreted):
    """What empty_saved says from shapes alone comes back from its tensors, row tile and all."""
    image, text, options = torch.empty(3, 64), torch.empty(classes, 64), Options(2, queries=queries)
    of = Shapes.of(options, 64, torch.float32, INTERPRETER, "highest")
    tensors = backend.empty_saved(image, text, options, save=True)
    again = backend.Saved.of(tensors, tile=attention.forward_config(Target(INTERPRETER), of, classes).BM)
    shape = [t.shape for t in Attended.empty(image, classes, options, again.attended.tile, save=True)[:-1]]
    assert [t.shape for t in again.attended[:-1]] == shape
    expected = Projections.empty(image, text, options, save=True)
    assert [t.shape for t in again.projected[:-2]] == [t.shape for t in expected[:-2]]
    assert again.attended.combined.shape == (3, classes, 64)
    score_rows = classes * (queries != ("image",)) + ("image" in queries)
    assert again.attended.m.shape[-1] == -(-score_rows // again.attended.tile)
    assert backend.empty_saved(image, text, options, save=False) == []


@pytest.mark.parametrize("dtype", backend.DTYPES, ids=str)
def test_the_output_weights_gradient_is_summed_in_float32(dtype):
    from rada_kernels.logit_reduction.triton.backward import _product

    left, right = torch.randn(8, 4000).to(dtype), torch.randn(4000, 8).to(dtype)
    assert torch.equal(_product(left, right), left.float() @ right.float())
    on_gpu = _product(left.to("meta"), right.to("meta"))
    assert on_gpu.dtype == torch.float32


@pytest.mark.parametrize("multiprocessors", [48, 108, 132, 148, 304])
@pytest.mark.parametrize("row_tiles", [1, 7, 50, 517])
def test_row_splits_are_two_programs_for_a_multiprocessor(row_tiles, multiprocessors):
    """At most, and no row is left out."""
    programs = 48  # of all rows
    split = projection.row_split(row_tiles, programs, multiprocessors)
    splits = -(-row_tiles // split)
    assert splits == 1 or splits * programs <= 2 * multiprocessors
    assert splits == 1 or split >= 8
    assert row_tiles < 500 or (splits + 1) * programs > 1.5 * multiprocessors


def specialisations(launch) -> tuple:
    """What Triton compiles a kernel for: constants, and of numbers that it looks at whether they are 1 or whole 16s."""
    key = [launch.name, launch.arguments["num_warps"], launch.arguments["num_stages"]]
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            key.append(value)
        elif isinstance(value, int) and not parameter.do_not_specialize:
            key.append((value == 1, value % 16 == 0))
    return tuple(key)


def variants(sizes) -> dict[str, set]:
    """By kernel of a step: what is compiled for these numbers of images and classes."""
    from codegen.launches import Recorder, record_launches
    from workloads import Workload

    recorder, compiled = Recorder(SM_90.device, configs={}), {}
    for batch, classes in sizes:
        load = Workload("size", batch, classes, 512, 8)
        for launch in record_launches(load, "step-features", torch.bfloat16, recorder):
            compiled.setdefault(launch.name, set()).add(specialisations(launch))
    return compiled


@pytest.mark.parametrize("classes", [(40, 56), (80, 101), (150, 256), (397, 512), (1000, 2049)], ids=str)
def test_shapes_do_not_compile_anew(classes):
    """Nor does a last batch, of 32 or of 8 images: one set of kernels for each step of K; one image has its own."""
    pytest.importorskip("triton")
    compiled = variants(itertools.product((32, 17, *range(2, 9)), classes))
    assert len(compiled) == 13 + (classes[0] > 512)
    assert {name: len(found) for name, found in compiled.items() if len(found) > 1} == {}
    alone = variants((1, k) for k in classes)
    assert {name for name in alone if alone[name] != compiled[name]} <= OF_PAIRS
    assert all(len(found) == 1 for found in alone.values())


OF_PAIRS = {
    "rational_projection_fwd", "logit_reduction_fwd", "logit_reduction_bwd",
    "rational_projection_bwd_weight", "rational_projection_bwd_rows",
}  # fmt: skip


def test_twenty_sizes_have_five_sets_of_kernels():
    """Of steps of K; beyond the budget, 100 images of 1000 classes, nobody asks where the largest |M - 1| is."""
    pytest.importorskip("triton")
    compiled = variants(itertools.product((8, 17, 32, 100), (64, 101, 397, 1000, 2049)))
    assert len(compiled) == 14
    beyond_budget = {"rational_projection_fwd": 4}
    assert {name: len(found) for name, found in compiled.items() if len(found) > 3} == beyond_budget
