"""Where Triton's launchers launch, without a GPU: tensors that have a device and no memory, and a
driver of several GPUs that records launches."""

import pytest
import torch
from common import DEVICE, without_gpus
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import driver, interpreter, jit
from triton.runtime.errors import OutOfResources

from lumina_kernels import aot, backend, gqa_attention
from lumina_kernels.ops.gqa_attention import gqa_attention_fwd
from lumina_kernels.ops.swiglu import swiglu_fwd
from lumina_kernels.triton import _tune
from lumina_kernels.triton import gqa_attention as attention
from lumina_kernels.triton import gqa_attention_tiles as tiles
from lumina_kernels.triton import gqa_attention_trial as trial

GPUS = (80, 90, 100)  # by device number


class Machine:
    """Several GPUs: which one is current, how often that changed, and what was launched where."""

    def __init__(self):
        self.current, self.switches, self.launches = 0, 0, []

    def set_current(self, device) -> int:
        before, self.current = self.current, device
        self.switches += 1
        return before

    def run(self, kernel, *args, grid, warmup, **options):
        self.launches.append((self.current, kernel.fn.__name__, options))


class Driver(aot.OfflineDriver):
    def __init__(self, machine):
        super().__init__(GPUS[0])
        self.machine = machine

    def get_current_device(self):
        return self.machine.current

    def get_current_target(self):
        return aot.OfflineDriver(GPUS[self.machine.current]).target


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    monkeypatch.setattr(backend, "EMULATED", set())
    monkeypatch.setattr(_tune, "EMULATED", set())
    _tune._arch_of.cache_clear()
    monkeypatch.setattr(driver, "_active", Driver(found))
    for kernel in (interpreter.InterpretedFunction, jit.JITFunction):
        monkeypatch.setattr(kernel, "run", lambda kernel, *a, **k: found.run(kernel, *a, **k))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.current)
    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, found.set_current)
    yield found
    _tune._arch_of.cache_clear()


def heads(device, K=72, dtype=torch.bfloat16):
    return torch.empty(1, 64, 4, K, dtype=dtype, device=device)


def forward(device, K=72, dtype=torch.bfloat16):
    q, k, v = (heads(device, K, dtype) for _ in range(3))
    gqa_attention_fwd._run(q, k, v, None, 0.1, *[None] * 5, False, "triton")


@without_gpus
def test_a_kernel_runs_on_the_device_of_its_tensors_with_the_tiles_of_that_device(machine):
    with FakeTensorMode():
        forward("cuda:1")
        assert (machine.current, machine.switches) == (0, 2)  # there and back
        forward("cuda:0")
        assert machine.switches == 2  # it was current
    (first, _, there), (second, _, here) = machine.launches
    assert (first, second) == (1, 0)
    assert there["num_stages"] == 3 and here["num_stages"] == 2


@without_gpus
def test_an_error_leaves_the_device_as_it_was(machine, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a launcher's")

    monkeypatch.setattr(machine, "run", fail)
    with FakeTensorMode(), pytest.raises(ValueError, match="a launcher's"):
        x = torch.empty(8, device="cuda:2")
        swiglu_fwd._run(x, x, "triton")
    assert (machine.current, machine.switches) == (0, 2)


@without_gpus
def test_tiles_that_do_not_fit_are_refused_by_name(machine, monkeypatch):
    def fail(*args, **kwargs):
        raise OutOfResources(262144, 232448, "shared memory")

    monkeypatch.setattr(machine, "run", fail)
    with FakeTensorMode(), pytest.raises(NotImplementedError) as caught:
        forward("cuda:1", K=256)
    assert str(caught.value) == (
        "backend 'triton' has no tiles of gqa_attention for a head_dim of 256 in torch.bfloat16 on "
        "sm_90: shared memory 262144 of 232448"
    )


@pytest.mark.parametrize("arch", aot.SHARED_KIB)
@pytest.mark.parametrize("kind", ("fwd", "dq", "dkv"))
def test_the_tiles_of_the_operands_fit_the_shared_memory(kind, arch):
    """A bound from below, for all head_dims: `aot` has the sizes that the compiler comes to."""
    for K in range(8, 257, 8):
        for dtype in (torch.float16, torch.float32):
            for bias, more in ((False, False), (True, False), (False, True), (True, True)):
                options = tiles.options_on(arch, kind, K, dtype, bias, more)
                rows, keys, stages = (options[x] for x in ("BLOCK_M", "BLOCK_N", "num_stages"))
                # Loops keep a buffer a stage for wgmma, else one less. The others are held.
                buffers = stages if arch // 10 in (9, 10) else max(1, stages - 1)
                looped = 2 * (rows if kind == "dkv" else keys) * buffers
                held = {"fwd": rows, "dq": 2 * rows, "dkv": 2 * keys}[kind]
                width = sum(width for _, width in tiles.head_cuts(K))
                needed = (held + looped) * width * dtype.itemsize
                assert needed <= aot.SHARED_KIB[arch] << 10, (K, dtype, bias, more, options)


def attend(text=False, bias=False, mask=False, own=False, K=24):
    """A call, and one of its backward."""
    q, k, v = (torch.randn(1, 8, count, K, device=DEVICE) for count in (2, 1, 1))
    options = {"key_mask": torch.arange(8, device=DEVICE)[None] % 3 != 1} if mask else {}
    if text:
        options |= {"text_k": k, "text_v": v, "text_gate": q[0, 0, :, 0].clone()}
    if own:
        options["text_mask"] = torch.eye(8, device=DEVICE)[None] == 0
    if bias:
        options["bias"] = torch.randn(bias, device=DEVICE)
    q.requires_grad_()
    gqa_attention(q, k, v, **options, backend="triton").sum().backward()


@pytest.fixture
def on_trial(monkeypatch):
    """Attention is tried here; gives the errors found."""
    monkeypatch.setattr(attention, "_is_on_trial", lambda q: True)
    monkeypatch.setattr(trial, "SIZES", (2, 9, 35, 18))  # some tiles of 16 and 32
    monkeypatch.setattr(trial, "_errors", {})
    return trial._errors


@pytest.mark.parametrize(
    "given",
    (
        {},
        {"text": True, "mask": True},
        {"text": True, "own": True},
        {"bias": (2, 8, 8)},
        {"bias": 8},
    ),
)
def test_attention_is_tried_once_a_variant(on_trial, given, monkeypatch):
    trials = []

    def counted(*args, run=trial._trial):
        trials.append(run(*args))
        return trials[-1]

    monkeypatch.setattr(trial, "_trial", counted)
    attend(**given)
    attend(**given)
    assert len(trials) == 2 and max(trials) < 1e-5  # forward alone, then with its gradient
    assert len(on_trial) == 2


def test_a_product_that_is_compiled_wrong_is_refused(on_trial, monkeypatch):
    def wrong(*args, run=attention.gqa_attention_bwd):
        dq, dk, *others = run(*args)
        return dq, 1.1 * dk, *others

    monkeypatch.setattr(attention, "gqa_attention_bwd", wrong)
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            attend(K=72)
        assert str(caught.value) == (
            "this version of Triton miscompiles gqa_attention for this GPU (head_dim 72, "
            "torch.float32): the relative error is 0.1. Use a newer Triton, or backend='torch' or "
            "'cuda'"
        )


@without_gpus
def test_only_gpus_of_that_kind_are_tried(machine, monkeypatch):
    tried = []
    monkeypatch.setattr(attention, "prove", lambda *args: tried.append(machine.current))
    with FakeTensorMode():
        for device in ("cuda:0", "cuda:1", "cuda:2"):
            forward(device)
    assert tried == [2]
    assert not attention._is_on_trial(torch.empty(1))  # in aot, whose tensors are on the CPU
