"""What is particular to the C++ operators. Values and gradients at all the usual shapes stand in test_backends."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.library import opcheck

from rada.fused import RAdaHead
from rada_kernels import Params, rada_logits
from rada_kernels.backends import cpu
from rada_kernels.options import Wanted
from tests.kernels.forked import needs_fork
from tests.kernels.truth import assert_as_good_as_reference, make_case, results

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)


def instruction_sets() -> list[str]:
    """Those of this machine, best first."""
    if not cpu.INSTRUCTION_SET:
        return []
    families = ["amx_bf16", "avx512_bf16", "avx512", "avx2", "generic"], ["neon_bf16", "neon"]
    known = next(family for family in families if cpu.INSTRUCTION_SET in family)
    return known[known.index(cpu.INSTRUCTION_SET) :]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("save_bytes", ["0", "100000000"], ids=["recompute", "keep"])
@pytest.mark.parametrize(
    ("batch", "classes", "width", "heads"),
    [
        pytest.param(3, 97, 32, 2, id="several score blocks, the last one partial"),
        pytest.param(70, 31, 24, 2, id="several slices, rows of many images in a block"),
        pytest.param(2, 65, 130, 2, id="width and head width past whole panels"),
        pytest.param(2, 515, 12, 2, id="several chunks of score rows, the last block of three"),
    ],
)
def test_blocks_slices_and_what_is_kept(save_bytes, batch, classes, width, heads, monkeypatch, poisoned_empty):
    monkeypatch.setenv("RADA_SAVE_BYTES", save_bytes)
    case = make_case(batch, classes, width, heads)
    assert_as_good_as_reference(case, "cpu", torch.float32)
    assert_as_good_as_reference(
        make_case(batch, classes, width, heads, clear_gates=True, penalty="mse"), "cpu", torch.bfloat16
    )


@pytest.mark.parametrize("tile_bytes", ["1", "100000000"], ids=["stream", "hold"])
@pytest.mark.parametrize("queries", [("image",), ("text", "image"), ("rational",)], ids="+".join)
def test_chunks_of_score_rows(queries, tile_bytes, monkeypatch, poisoned_empty):
    """Each subset of kinds: what a pair's chunks carry from step to step."""
    monkeypatch.setenv("RADA_TILE_BYTES", tile_bytes)
    assert_as_good_as_reference(make_case(1, 515, 12, 2, queries=queries), "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("classes", "width"), [(65, 1152), (9, 1280), (3, 1536)])
def test_wide_embeddings_in_eight_heads(classes, width, dtype):
    """One image through the widths of large encoders: head widths of 144, 160 and 192."""
    case = make_case(1, classes, width, 8, scale=width / 4, penalty="mse", clear_gates=dtype != torch.float32)
    assert_as_good_as_reference(case, "cpu", dtype)


@pytest.mark.slow
def test_as_many_classes_as_imagenet21k():
    """21,841: scores stream. Against the `torch` backend in float64; errors of 3e-5 at most were seen."""
    case = make_case(1, 21841, 8, 1, clear_gates=True, penalty="mse")
    expected = results(case, "torch")
    for name, tensor in results(case.cast(torch.float32), "cpu").items():
        assert (tensor - expected[name]).norm() < 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_that_outgrow_the_first_block(dtype):
    """Later blocks of score rows exceed the first one's maximum by far more than float32's range of exponentials."""
    case = make_case(2, 96, 16, 2, scale=400.0, clear_gates=True, penalty="mse")
    case.text[:32] *= 1e-3  # with normalize=False: small scores in the first block
    case.options = type(case.options)(2, normalize=False, penalty="mse")
    case.text[32:] /= case.text[32:].norm(dim=-1, keepdim=True)
    case.image /= case.image.norm(dim=-1, keepdim=True)
    logits = results(case.cast(dtype), "cpu")["logits"]
    assert logits.isfinite().all()
    assert_as_good_as_reference(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "classes"), [(1, 70), (1, 1), (9, 70), (5, 3), (2, 515)])
def test_same_bits_again_at_every_thread_count(batch, classes, dtype, threads):
    case = make_case(batch, classes, 32, 4).cast(dtype)
    once = results(case, "cpu")
    for count in (1, 2, 3, 3):
        threads(count)
        for name, tensor in results(case, "cpu").items():
            assert torch.equal(tensor, once[name]), (name, count)
    if dtype == torch.float32:
        assert_as_good_as_reference(case, "cpu", dtype)


def test_the_operator_does_not_depend_on_the_thread_count(threads):
    arguments = operator_arguments(batch=7, classes=70)
    outcomes = []
    for count in (1, 2, 3):
        threads(count)
        written = [*arguments[3], *arguments[-2:]]
        for tensor in written:
            tensor.fill_(float("nan"))  # what is left of it equals nothing
        torch.ops.rada_cpu.forward(*arguments)
        outcomes.append([t.clone() for t in written])
    for outcome in outcomes[1:]:
        for tensor, once in zip(outcome, outcomes[0], strict=True):
            assert torch.equal(tensor, once)


@pytest.mark.parametrize("queries", [("image",), ("text", "rational"), ("image", "text", "rational")], ids="+".join)
def test_gradients_against_central_differences(queries):
    """In float32, by one direction through all inputs: steps of 1e-3, agreement to 1% of the derivative's size."""
    case = make_case(2, 9, 16, 2, queries=queries, penalty="mse", clear_gates=True).cast(torch.float32)
    case.weight = case.weight.float()
    grads = results(case, "cpu")
    names = ["image", "text", *(n for n in Params._fields[:12])]
    generator = torch.Generator().manual_seed(1)
    for name, leaf in zip(names, (case.image, case.text, *case.layers), strict=True):
        direction = torch.randn(leaf.shape, generator=generator)
        slope = (grads[f"grad {name}"].double() * direction).sum().item()
        size = grads[f"grad {name}"].double().norm().item()
        ends = []
        for step in (1e-3, -1e-3):
            kept = leaf.clone()
            leaf += step * direction
            params = Params(*case.layers, logit_scale=20.0)
            logits, penalty = rada_logits(case.image, case.text, params, case.options, "cpu")
            ends.append((case.weight.double() * logits).sum().item() + case.penalty_weight * penalty.item())
            leaf.copy_(kept)
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, abs=1e-2 * max(size, 1.0)), name


CHECK = """
import torch
from rada_kernels.backends import cpu
from tests.kernels.truth import assert_as_good_as_reference, make_case
assert cpu.INSTRUCTION_SET == {isa!r}, cpu.INSTRUCTION_SET
for shape in ((3, 37, 35, 5), (2, 97, 64, 2), (1, 1, 8, 1)):
    assert_as_good_as_reference(make_case(*shape), "cpu", torch.float32)
    assert_as_good_as_reference(make_case(*shape, clear_gates=True, penalty="mse"), "cpu", torch.bfloat16)
"""


@pytest.mark.parametrize("isa", instruction_sets()[1:])
def test_other_instruction_sets(isa):
    """One build serves older machines: every set of loops that this one can run."""
    subprocess.run([sys.executable, "-c", CHECK.format(isa=isa)], check=True, env=os.environ | {"RADA_CPU_ISA": isa})


def test_unknown_instruction_set_is_named():
    code = "from rada_kernels.backends import cpu; print(cpu.MISSING)"
    environment = os.environ | {"RADA_CPU_ISA": "avx1024"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "does not load: RADA_CPU_ISA: got avx1024; this machine takes one of " in out.stdout
    assert instruction_sets()[-1] in out.stdout


def test_errors_hold_no_path_of_the_machine_that_built():
    """torch's check names its source file: ours from the repository on, torch's headers from their folder on."""
    with pytest.raises(RuntimeError, match=r", rada_kernels/csrc/operators.cpp:\d+, threads: got 0"):
        torch.ops.rada_cpu.record_tasks(0)
    if "RADA_CPU_LIBRARY" not in os.environ:  # sanitizers keep paths of their own
        built = cpu.LIBRARY.read_bytes()
        assert b"torch/csrc/stable/" in built
        assert b"/torch/csrc/stable/" not in built


def test_a_library_of_another_version_is_passed_over():
    """An editable install whose sources have moved on: the torch backend serves, and the reason is said."""
    code = (
        "import torch; torch.ops.load_library = lambda path: None;\n"
        "from rada_kernels.backends import cpu; print(cpu.MISSING)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "another version" in out.stdout
    assert "install again" in out.stdout


# Linux gives no tile registers while a signal stack is too small for them.
SMALL_SIGNAL_STACK = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8192)), None) == 0
import torch
from rada_kernels.backends import cpu
print(cpu.INSTRUCTION_SET or cpu.MISSING)
print(cpu.usable(torch.bfloat16, torch.device("cpu"), 64, 8)[1])
"""


@pytest.mark.skipif(cpu.INSTRUCTION_SET != "amx_bf16", reason="there are no tile registers to refuse")
@pytest.mark.parametrize("wanted", ["", "amx_bf16"])
def test_tile_registers_that_the_kernel_refuses(wanted):
    """The next instruction set serves, and the reason is said; who asks for AMX by name gets the reason alone."""
    environment = os.environ | {"RADA_CPU_ISA": wanted}
    out = subprocess.run(
        [sys.executable, "-c", SMALL_SIGNAL_STACK], capture_output=True, text=True, env=environment, check=True
    ).stdout
    served, said = out.splitlines()[0], out.splitlines()[-1]
    reason = "the kernel gives no AMX tile registers: "
    if wanted:
        assert f"RADA_CPU_ISA: got amx_bf16 ({reason}" in served
    else:
        assert served == "avx512_bf16"
    assert reason in said


@pytest.mark.skipif(not cpu.REFUSED, reason="this machine runs every instruction set of the library")
def test_an_instruction_set_that_the_machine_lacks_is_refused_with_the_reason():
    for refused in cpu.REFUSED.split("; "):
        name, reason = refused.removeprefix("not ").split(": ", 1)
        code = "from rada_kernels.backends import cpu; print(cpu.MISSING)"
        environment = os.environ | {"RADA_CPU_ISA": name}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert f"got {name} ({reason})" in out.stdout


def test_missing_library_is_said():
    code = "from rada_kernels import usable_backends; import torch\n"
    code += "print(usable_backends(torch.float32, torch.device('cpu'), 64, 8)['cpu'])"
    environment = os.environ | {"RADA_CPU_LIBRARY": "no_such_library.so"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "(False, 'no_such_library.so was not built" in out.stdout


def test_double_and_other_devices_are_left_to_others():
    assert cpu.usable(torch.float64, CPU, 64, 8) == (
        False,
        "dtype torch.float64: it takes one of torch.float32, torch.bfloat16, torch.float16",
    )
    assert not cpu.usable(torch.float32, torch.device("cuda"), 64, 8)[0]


def test_several_python_threads_at_once():
    case = make_case(4, 40, 32, 4).cast(torch.float32)
    expected = results(case, "cpu")

    def work(_):
        for _ in range(5):
            for name, tensor in results(case, "cpu").items():
                assert torch.equal(tensor, expected[name]), name

    with ThreadPoolExecutor(4) as workers:
        list(workers.map(work, range(4)))  # raises what a worker raised


def turns_of_another_thread(call) -> int:
    """How often this thread gets its turn in the second and third quarter of a call that another one makes."""
    ends, turns = [], []

    def work():
        ends.append(time.perf_counter())
        call()
        ends.append(time.perf_counter())

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        turns.append(time.perf_counter())
        time.sleep(1e-3)
    start, end = ends
    return sum(start + (end - start) / 4 < turn < end - (end - start) / 4 for turn in turns)


def test_the_gil_is_released(threads):
    threads(1)
    forward = operator_arguments(batch=32, classes=300, width=128)
    assert turns_of_another_thread(lambda: torch.ops.rada_cpu.forward(*forward)) > 3
    if os.name == "posix":  # what the count is where the lock is held: PyDLL's calls keep it
        assert turns_of_another_thread(lambda: ctypes.PyDLL(None).usleep(200_000)) == 0


@pytest.mark.parametrize("flush", [False, True])
def test_subnormal_numbers_are_zero_inside_and_as_before_outside(flush, threads):
    """In the thread that calls and in those of torch's pool."""
    threads(3)
    smallest = torch.finfo(torch.float32).smallest_normal
    arguments = operator_arguments(batch=70, classes=31, width=12, normalize=False)
    arguments[0].fill_(1e-20), arguments[1].fill_(1e-20)  # their products are subnormal
    try:
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor has no such mode")
        torch.ops.rada_cpu.forward(*arguments)
        assert not arguments[-2].view(torch.int32).any()  # as bits: who flushes sees no difference
        halves = torch.full((1 << 20,), smallest) / 2
        assert (halves.view(torch.int32) == 0).any() == flush
        assert (halves.view(torch.int32)[0] == 0) == flush  # the caller's share
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "classes"),
    [
        pytest.param(5, 9, id="weights read in place"),
        pytest.param(9, 9, id="weights packed"),
        pytest.param(70, 31, id="gradients summed over several slices"),
    ],
)
def test_16_bits_are_read_exactly_and_written_with_one_rounding(batch, classes, dtype, monkeypatch, poisoned_empty):
    """Strided parameters and features, too: everything as if it had been converted before and after."""
    monkeypatch.setattr(cpu, "HAS_BFLOAT16", False)
    case = make_case(batch, classes, 88, 4, penalty="mse").cast(dtype)
    grads = torch.randn(classes, batch).t(), torch.randn(1).expand(batch)

    def gradients(image, text, layers):
        params = Params(*layers, case.scale.float())
        sums, deviation, kept = cpu.forward(image, text, params, case.options, True)
        return [
            sums, deviation, *cpu.backward(*grads, image, text, params, kept, case.options, Wanted(True, True, True))
        ]  # fmt: skip

    narrow = [t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in case.layers]
    got = gradients(case.image.t().contiguous().t(), case.text, narrow)
    expected = gradients(case.image.float(), case.text.float(), [layer.float() for layer in case.layers])
    for mine, wide in zip(got, expected, strict=True):
        assert torch.equal(mine, wide.to(mine.dtype))
    assert got[2].dtype == got[-1].dtype == dtype


FORKED = """
import hashlib, os, torch
from rada_kernels import Params
from rada_kernels.backends import cpu
from rada_kernels.options import Wanted
from tests.kernels.forked import in_forked_child
from tests.kernels.truth import make_case

THREADS = 3
torch.set_num_threads(1)
cases = [make_case(3, 40, 256, 4).cast(dtype) for dtype in cpu.DTYPES]
torch.set_num_threads(THREADS)

def count():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

def compute(case):
    params = Params(*case.layers, case.scale.float())
    sums, deviation, kept = cpu.forward(case.image, case.text, params, case.options, True)
    everything = Wanted(True, True, True)
    grads = cpu.backward(sums, deviation, case.image, case.text, params, kept, case.options, everything)
    return [hashlib.sha256(t.view(torch.uint8).numpy()).hexdigest() for t in (sums, deviation, *grads)]

def compute_in_child(case):
    before = count()
    results = compute(case)
    return results, count() - before

outcomes = []
# The parent has only imported, has run torch's operators alone, has run these.
for start in (lambda: None, lambda: (torch.randn(512, 512) @ torch.randn(512, 512)).exp(), lambda: compute(cases[0])):
    start()
    for case in cases:
        outcomes.append((case, *in_forked_child(compute_in_child, case)))
for case, results, started in outcomes:
    assert results == compute(case), case.image.dtype
    assert not count() or started >= THREADS, started
"""


@needs_fork
@pytest.mark.parametrize("isa", instruction_sets())
def test_forked_children(isa):
    """Every dtype, in parents that have run nothing or something: no call waits for threads that the child lacks, and
    each one runs on as many as it was told.
    """
    subprocess.run([sys.executable, "-c", FORKED], check=True, env=os.environ | {"RADA_CPU_ISA": isa})


WORKSPACE = """
import re, resource
from pathlib import Path
import torch
from tests.kernels.test_cpu_operators import operator_arguments

def mapped():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
small, large = operator_arguments(), operator_arguments(batch=1, classes=2040, width=16, heads=1)
torch.ops.rada_cpu.forward(*small)
before = mapped()
torch.ops.rada_cpu.forward(*large)
first = mapped()
torch.ops.rada_cpu.forward(*large)
assert 4 * (mapped() - first) < first - before, (mapped() - first, first - before)
free = re.search(r"LazyFree: *(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())
assert not free or int(free[1]) > 16 << 10, free
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted on Linux")
def test_a_large_workspace_stays_for_the_next_call():
    """It is not mapped anew, and between calls the system may take it."""
    subprocess.run([sys.executable, "-c", WORKSPACE], check=True)


def operator_arguments(batch=3, classes=5, width=16, heads=4, dtype=torch.float32, **options):
    """Of torch.ops.rada_cpu.forward."""
    case = make_case(batch, classes, width, heads, **options).cast(dtype)
    params = Params(*case.layers, case.scale.float())
    kept = cpu.empty_saved(case.image, case.text, case.options, save=True)
    arguments = cpu.operator_arguments(case.image, case.text, params, case.options, kept)
    return [*arguments, torch.empty(batch, classes), torch.empty(batch)]


def backward_arguments(forward):
    """Of torch.ops.rada_cpu.backward, after a forward pass with these arguments."""
    torch.ops.rada_cpu.forward(*forward)
    image, text, layers, *shared, sums, deviation = forward
    grads = torch.randn_like(sums), torch.randn_like(deviation)
    return [
        image, text, layers, *shared, *grads, [torch.empty_like(t) for t in layers], torch.empty_like(image),
        torch.empty_like(text),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_opcheck(dtype):
    opcheck(torch.ops.rada_cpu.forward.default, operator_arguments(dtype=dtype))
    opcheck(torch.ops.rada_cpu.backward.default, backward_arguments(operator_arguments(dtype=dtype)))


def test_a_functional_trace_keeps_the_calls():
    """What is written into counts as a result: without that, a trace has no use for the call."""
    forward = operator_arguments()
    backward = backward_arguments(forward)
    kept, sums = forward[3], forward[-2]
    *_, grad_layers, grad_image, _ = backward

    def both():
        kept_, sums_, grads, grad = [t.clone() for t in kept], sums * 0, [t * 0 for t in grad_layers], grad_image * 0
        torch.ops.rada_cpu.forward(*forward[:3], kept_, *forward[4:11], sums_, forward[-1].clone())
        torch.ops.rada_cpu.backward(*backward[:3], kept_, *backward[4:-3], grads, grad, backward[-1].clone())
        return [*kept_, sums_, *grads, grad]

    for traced, eager in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(), both(), strict=True):
        assert torch.equal(traced, eager)
        assert eager.any()


def at_odd_offset(argument):
    """Tensors as views that begin in the middle of a 4-byte word where their elements have two bytes."""
    if isinstance(argument, list):
        return [at_odd_offset(t) for t in argument]
    if not isinstance(argument, torch.Tensor):
        return argument
    view = argument.new_empty(argument.numel() + 1)[1:].view(argument.shape)
    return view.copy_(argument)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_views_at_odd_offsets(dtype):
    """Every tensor argument, one at a time: the same bits as at an even one."""
    forward = operator_arguments(dtype=dtype, heads=2)
    backward = backward_arguments(forward)
    for operator, arguments in ((torch.ops.rada_cpu.forward, forward), (torch.ops.rada_cpu.backward, backward)):
        operator(*arguments)
        for position, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor | list):
                continue
            moved = [*arguments[:position], at_odd_offset(argument), *arguments[position + 1 :]]
            outputs = [i for i, a in enumerate(operator.default._schema.arguments) if a.alias_info]
            expected = [[t.clone() for t in as_list(arguments[i])] for i in outputs]
            for i in outputs:
                for tensor in as_list(moved[i]):
                    tensor.fill_(-1)
            operator(*moved)
            for i, tensors in zip(outputs, expected, strict=True):
                for got, tensor in zip(as_list(moved[i]), tensors, strict=True):
                    assert torch.equal(got, tensor), (operator, position, i)


def as_list(argument):
    return argument if isinstance(argument, list) else [argument]


@pytest.mark.parametrize(
    ("position", "wrong", "name"),
    [
        (0, torch.randn(3, 16, dtype=torch.float64), "image:"),
        (0, torch.randn(3, 16, dtype=torch.bfloat16), "text:"),
        (1, torch.randn(5, 8), "text:"),
        (1, torch.empty(0, 16), "image, text:"),
        (2, [torch.randn(16, 16)], "layers"),
        (2, [torch.randn(16, 16), torch.randn(16, dtype=torch.float64)] * 6, "layers"),
        (3, [torch.empty(0)] * 7, "saved"),
        (3, [torch.empty(0)] * 4 + [torch.empty(3, 5, 16)] + [torch.empty(0)] * 3, "saved"),
        (3, [torch.empty(0, dtype=torch.bfloat16)] * 8, "saved"),
        (4, 5, "num_heads"),
        (8, 0, "queries"),
        (9, 3, "penalty"),
        (11, torch.empty(3, 4), "sums"),
        (12, torch.empty(3, dtype=torch.float64), "deviation"),
    ],
)
def test_bad_arguments_are_named(position, wrong, name):
    arguments = operator_arguments()
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=name):
        torch.ops.rada_cpu.forward(*arguments)


def test_training_follows_the_reference():
    """Same seed, with and without the kernels: equal loss curves and parameters."""
    curves, heads = {}, {}
    for backend in ("reference", "cpu"):
        torch.manual_seed(0)
        head = RAdaHead(32, 4, backend=backend, penalty="mse")
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
        image, text, label = torch.randn(64, 32), torch.randn(10, 32), torch.randint(10, (64,))
        curves[backend] = []
        for _ in range(40):
            logits, penalty = head(image, text, 20.0, return_penalty=True)
            loss = torch.nn.functional.cross_entropy(logits, label) + penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[backend].append(loss.item())
        heads[backend] = head
    assert curves["cpu"][-1] < 0.8 * curves["cpu"][0]
    torch.testing.assert_close(curves["cpu"], curves["reference"], rtol=1e-3, atol=1e-3)
    for mine, plain in zip(heads["cpu"].parameters(), heads["reference"].parameters(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=2e-2, atol=2e-3)
