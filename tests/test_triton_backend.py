"""What the triton backend says of itself where no kernel runs: predicate, import, shapes, launch configurations."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import types

import pytest
import torch

from rada_kernels import launch
from rada_kernels.backends import triton as backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def interpreted(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize(
    ("dtype", "width", "heads", "part"),
    [
        (torch.float64, 64, 2, "dtype torch.float64"),
        (torch.float32, 2048, 16, "embed_dim 2048: it takes at most 1536"),
        (torch.float32, 1024, 64, "num_heads 64: it takes at most 32"),
        (torch.float32, 64, 8, "head width 8: it takes one of 16, 32, 48"),
        (torch.float32, 65, 2, "head width 32.5"),
    ],
)
def test_the_predicate_names_what_it_does_not_take(interpreted, dtype, width, heads, part):
    usable, reason = backend.usable(dtype, CPU, width, heads)
    assert not usable
    assert part in reason


@pytest.mark.parametrize("head_width", backend.HEAD_WIDTHS)
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
    from launches import _TorchCalls

    from rada_kernels import Params
    from rada_kernels.api import _on_device

    image, calls = torch.empty(2, 4, device="meta"), []
    with _TorchCalls(calls):
        params = _on_device(Params(*[None] * 12, logit_scale=20.0, logit_bias=-3.0), image)
    assert [call.name for call in calls] == ["full", "full"]
    assert params.logit_scale.device.type == params.logit_bias.device.type == "meta"


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


def test_float32_products_follow_torch():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, nvidia, amd in (("highest", "ieee", "ieee"), ("high", "tf32", "bf16x3")):
            torch.set_float32_matmul_precision(setting)
            assert launch.product_precision(torch.float32, launch.Device.named("sm_90")) == nvidia
            assert launch.product_precision(torch.float32, launch.Device.named("gfx942")) == amd
            assert launch.product_precision(torch.bfloat16, launch.Device.named("sm_90")) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_tuned_configuration_is_preferred(tmp_path, monkeypatch):
    device = launch.Device.named("sm_90")
    own = launch.projection_config(device, torch.bfloat16, 512, 32, 1000)
    tuned = {"BR": 128, "BC": 128, "BD": 64, "num_warps": 8, "num_stages": 2}
    path = tmp_path / "tuned.json"
    key = launch.config_key(device, torch.bfloat16, 512, 1)
    path.write_text(json.dumps({"projection": {key: tuned}}))
    monkeypatch.setenv("RADA_TUNED", str(path))
    assert launch.projection_config(device, torch.bfloat16, 512, 32, 1000) == launch.GemmConfig(**tuned) != own
    assert launch.projection_config(device, torch.float16, 512, 32, 1000) == own


@pytest.fixture
def tuned_file(tmp_path, monkeypatch):
    """write(content) makes a new file what RADA_TUNED names."""
    numbers = itertools.count()

    def write(content) -> str:
        path = tmp_path / f"tuned-{next(numbers)}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("RADA_TUNED", str(path))
        return str(path)

    return write


SM_90 = launch.Device.named("sm_90")
KEY = launch.config_key(SM_90, torch.bfloat16, 512, 1)
GOOD = {"BR": 128, "BC": 128, "BD": 64, "num_warps": 8, "num_stages": 2}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{", ["Expecting property name", "it takes a file that bench/tune.py wrote"]),
        ([], ["got []; it takes an object"]),
        ({"projections": {}}, ["got 'projections'; it takes one of", "projection", "attention"]),
        ({"projection": {KEY: 3}}, [f"projection: {KEY}: got 3; it takes an object"]),
        ({"projection": {KEY: GOOD | {"BX": 16}}}, [f"projection: {KEY}: got 'BX'; it takes one of BR, BC, BD"]),
        ({"projection": {KEY: {"BR": 64}}}, [f"projection: {KEY}: BC: got None; it takes one of (16, 32"]),
        ({"projection": {KEY: GOOD | {"BR": 48}}}, [f"projection: {KEY}: BR: got 48; it takes one of (16, 32"]),
        ({"projection": {KEY: GOOD | {"BR": 4096}}}, [f"projection: {KEY}: BR: got 4096; it takes one of (16, 32"]),
        ({"projection": {KEY: GOOD | {"BR": 64.0}}}, [f"projection: {KEY}: BR: got 64.0; it takes one of (16, 32"]),
        ({"projection": {KEY: GOOD | {"num_warps": 3}}}, ["num_warps: got 3; it takes one of (1, 2, 4"]),
        ({"projection": {KEY: GOOD | {"num_stages": 0}}}, ["num_stages: got 0; it takes one of (1, 2, 3"]),
    ],
)
def test_a_wrong_tuned_file_is_named(tuned_file, content, parts):
    path = tuned_file(content)
    with pytest.raises(ValueError, match=f"^RADA_TUNED: {re.escape(path)}: ") as error:
        launch.projection_config(SM_90, torch.bfloat16, 512, 32, 1000)
    for part in parts:
        assert part in str(error.value)


def test_a_missing_tuned_file_is_named(monkeypatch):
    monkeypatch.setenv("RADA_TUNED", "/nowhere/tuned.json")
    with pytest.raises(ValueError, match=r"^RADA_TUNED: /nowhere/tuned.json: .*No such file"):
        launch.projection_config(SM_90, torch.bfloat16, 512, 32, 1000)


def test_tuned_configurations_that_do_not_go_together_are_named(tuned_file):
    reduction = launch.config_key(SM_90, torch.bfloat16, 512, 64, 0, 1, 0)
    path = tuned_file({"reduction": {reduction: GOOD | {"BR": 64, "BD": 128}}})
    part = re.escape(
        f"{path}: reduction: {reduction}: BD: got 128; beside the other configurations it takes one of (16, 32, 64)"
    )
    with pytest.raises(ValueError, match=part):
        launch.reduction_config(SM_90, torch.bfloat16, 32, 100, 512, 64, False, False)
    direct = launch.config_key(SM_90, torch.bfloat16, 32, 64)
    tuned_file({"direct": {direct: {"BM": 16, "BN": 32, "num_warps": 2, "num_stages": 1}}})
    with pytest.raises(ValueError, match=r"BM: got 16; .* it takes one of \(32,\)"):
        launch.direct_config(SM_90, torch.bfloat16, 20, 64)


def configurations(device, dtype, head_width, classes=(1, 20, 33, 257, 1000, 65536)):
    """(request, configuration) of every kernel, as they are launched."""
    made = []

    def note(request, heuristic):
        config = launch.tuned_or_heuristic(request, heuristic)
        made.append((request, request.fitted(config)))
        return config

    width = 8 * head_width
    with launch.choosing_by(note):
        for count in classes:
            launch.attention_config(device, dtype, count, head_width)
            form = launch.attention_form(device, dtype, count, head_width)
            for backward in (False, True):
                for batch in (1, 64):
                    joined = form != "streaming"
                    launch.reduction_config(device, dtype, batch, count, width, head_width, joined, backward)
            if form == "joined":
                launch.joined_config(device, dtype, count, head_width)
            if form == "direct":
                launch.direct_config(device, dtype, count, head_width)
            if count <= launch.direct_bwd_classes(device, dtype, head_width):
                launch.direct_bwd_config(device, dtype, count, head_width)
            launch.projection_config(device, dtype, width, 64, count)
        launch.queries_bwd_config(device, dtype, head_width)
        launch.keys_bwd_config(device, dtype, head_width)
        launch.weight_bwd_config(device, dtype, width)
        launch.rows_bwd_config(device, dtype, width)
    return made


@pytest.mark.parametrize("arch", launch.SHARED_BYTES)
def test_shipped_configurations_fit_as_they_are(arch):
    """The heuristics' numbers are what is launched: nothing has to be made smaller on the architecture they are for."""
    device = launch.Device.named(arch)
    for dtype, head_width in itertools.product(backend.DTYPES, backend.HEAD_WIDTHS):
        roomy = launch.Device(arch, 1 << 30)
        for (request, config), (_, wish) in zip(
            configurations(device, dtype, head_width), configurations(roomy, dtype, head_width), strict=True
        ):
            assert config == wish, request
            assert request.shared_bytes(config) <= device.shared_bytes


@pytest.mark.parametrize("arch", sorted(launch.SHARED_BYTES.keys() - {"sm_100"}))  # its barriers do not fit 48 KiB
@pytest.mark.parametrize("kib", [48, 64])
def test_configurations_shrink_to_small_devices(arch, kib):
    """Stages first, then blocks; what goes together still does."""
    device = launch.Device(arch, kib * launch.KIB)
    for dtype, head_width in itertools.product((torch.bfloat16, torch.float32), backend.HEAD_WIDTHS):
        # Four blocks of 32 classes in float32 are 64 KiB where a head is wider than 64.
        direct = (1, 20) if dtype == torch.bfloat16 or head_width <= 64 else ()
        made = configurations(device, dtype, head_width, (*direct, 33, 257, 1000))
        assert {request.kernel for request, _ in made} >= set(launch.KERNELS) - {"direct", "direct_bwd", "joined"}
        for request, config in made:
            assert request.shared_bytes(config) <= device.shared_bytes, request
    config = launch.GemmConfig(256, 256, 64, 8, 4)
    request = launch.Request("projection", device, torch.bfloat16, (512, 1))
    fitted = request.fitted(config)
    assert fitted.num_stages == 1, "stages first"
    assert fitted.BR * fitted.BC < 256 * 256
    assert request.shared_bytes(fitted) <= device.shared_bytes < request.shared_bytes(config)


@pytest.mark.parametrize("arch", [*launch.SHARED_BYTES, "interpreter"])
def test_forms_of_the_attention_follow_one_another(arch, monkeypatch):
    """What the direct backward kernel finds, the direct forward kernel left; and the precision may change between."""
    device = launch.INTERPRETER if arch == "interpreter" else launch.Device.named(arch)
    for dtype, head_width in itertools.product(backend.DTYPES, backend.HEAD_WIDTHS):
        forms = {}
        for precision in ("highest", "high"):
            monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
            sizes = device, dtype, head_width
            assert launch.direct_bwd_classes(*sizes) <= launch.direct_classes(*sizes)
            forms[precision] = [launch.attention_form(device, dtype, k, head_width) for k in (1, 16, 17, 64, 128)]
        assert forms["highest"] == forms["high"]
        assert forms["high"][-1] == "streaming"


def test_a_device_that_is_too_small_is_named():
    """Direct blocks hold all K classes. 48 KiB is less than any device has that the predicate takes."""
    device = launch.Device("sm_86", 48 * launch.KIB)
    with pytest.raises(
        ValueError, match=r"direct_bwd sm_86-float32-32-128: got a device with 49152 bytes .* takes 86016"
    ):
        launch.direct_bwd_config(device, torch.float32, 32, 128)


@pytest.mark.parametrize(
    ("name", "served_as"),
    [
        ("sm_80", "sm_80"), ("sm_87", "sm_86"), ("sm_88", "sm_86"), ("sm_103", "sm_100"), ("sm_110", "sm_100"),
        ("sm_121", "sm_120"), ("sm_130", "sm_120"), ("gfx90a", "gfx942"), ("gfx950", "gfx942"), ("gfx1030", "gfx1100"),
        ("gfx1201", "gfx1100"), ("interpreter", "interpreter"),
    ],
)  # fmt: skip
def test_an_unknown_architecture_is_served_as_its_nearest_relative(name, served_as):
    shared = 128 * launch.KIB
    for dtype, head_width in itertools.product(backend.DTYPES, backend.HEAD_WIDTHS):
        mine = configurations(launch.Device(name, shared), dtype, head_width)
        theirs = configurations(launch.Device(served_as, shared), dtype, head_width)
        assert [config for _, config in mine] == [config for _, config in theirs]
        assert all(name in request.key for request, _ in mine), "what is tuned is tuned for one device"
    if name.startswith("sm"):
        assert launch.Device.named(name).shared_bytes == launch.SHARED_BYTES[served_as]


@pytest.mark.parametrize(
    ("hip", "properties", "device"),
    [
        (None, {"major": 12, "minor": 1, "shared_memory_per_block_optin": 101376}, ("sm_121", 101376)),
        # ROCm's properties have no shared_memory_per_block_optin.
        ("6.4", {"gcnArchName": "gfx90a:sramecc+:xnack-", "shared_memory_per_block": 65536}, ("gfx90a", 65536)),
    ],
)
def test_what_is_asked_of_a_device(hip, properties, device, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(**properties))
    assert launch._cuda_device.__wrapped__(0) == launch.Device(*device)


@pytest.mark.parametrize("classes", [1, 2, 7, 10, 47, 100, 101, 1000, 65536])
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_pairs_of_images_and_classes_fill_a_tile(rows, classes):
    many = launch.pair_block(rows, classes, rows)
    assert -(-classes // many["BK"]) * many["BK"] <= classes * 33 / 32, "few empty rows"
    for batch in (1, 2, 5, 31, 512):
        pairs = launch.pair_block(batch, classes, rows)
        assert pairs["BI"] * pairs["BK"] == rows
        assert pairs == many or pairs["BI"] < 2 * batch, "a last batch is served by the same code, one image by its own"


@pytest.mark.parametrize("arch", launch.SHARED_BYTES)
def test_blocks_fit_one_another(arch):
    """Contracted blocks end where a head does."""
    device = launch.Device.named(arch)
    for dtype, width, classes in itertools.product(backend.DTYPES, backend.HEAD_WIDTHS, (1, 33, 257, 1000, 65536)):
        joined = launch.attention_form(device, dtype, classes, width) != "streaming"
        reduction = launch.reduction_config(device, dtype, 32, classes, 8 * width, width, joined, False)
        if not joined:
            assert width % reduction.BD == 0
        assert (8 * width) % reduction.BD == 0
        assert reduction.BD >= 16
