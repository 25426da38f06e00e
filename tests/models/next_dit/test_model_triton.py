"""lumina.NextDiT on the Triton kernels: the same outputs, gradients and training as on PyTorch."""

import pytest
import torch
from common import DEVICE, KERNEL_DTYPES, assert_as_accurate, compiled
from networks import cast, config, inputs, pair, randomise

from lumina import ContextDrop, NextDiT, RopeScaling

SMALL = dict(dim=48, multiple_of=64)
RAGGED = [(3, 4, 6), (3, 6, 4), (3, 10, 8)]


def both(dtype=torch.float32, **changes):
    """A random network, its weights numbers of `dtype`, in float64 with backend torch and in
    float32 with backend triton."""
    ours = pair(dtype, **changes)[0]
    triton = NextDiT(ours.config, backend="triton").to(DEVICE)
    triton.load_state_dict(ours.state_dict())
    return ours, triton


def outputs_and_gradients(model, arguments, settings):
    outs = model(*arguments, **settings)
    outs = outs if isinstance(outs, list) else list(outs)
    model.zero_grad()
    sum(
        (out * torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)).sum() for out in outs
    ).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {f"out {i}": out.detach() for i, out in enumerate(outs)} | grads


@pytest.mark.parametrize(
    "changes, size, settings",
    (
        ({}, (3, 6, 10), {}),
        (SMALL, (3, 6, 10), dict(context_drop=ContextDrop().at(0.0, 2))),
        (SMALL, RAGGED, dict(base_seqlen=5)),
        (SMALL, RAGGED, dict(rope_scaling=RopeScaling("time_aware", base_size=2))),
    ),
    ids=("plain", "drop", "ragged", "rope"),
)
def test_equals_torch(changes, size, settings):
    exact, triton = both(**changes)
    high = outputs_and_gradients(exact, inputs(*size), settings)
    arguments = cast(inputs(*size), torch.float32)
    low = outputs_and_gradients(exact.float(), arguments, settings)
    out = outputs_and_gradients(triton, arguments, settings)
    assert out.keys() == high.keys()
    for name, value in out.items():
        if name.endswith("ky_norm.bias"):
            # One vector added to all keys of a text changes no softmax: the gradient is 0.
            weight = out[name.replace("bias", "weight")]
            assert value.abs().max() <= 1e-6 * weight.abs().max()
        else:
            assert_as_accurate(name, value, low[name], high[name])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES[1:])
def test_is_as_accurate_as_torch_in_16_bits(dtype):
    """For the whole model a single number is compared, since individual rounding
    errors are random."""
    exact, triton = both(dtype, **SMALL)
    eager = NextDiT(exact.config, backend="torch").to(DEVICE)
    eager.load_state_dict(triton.state_dict())
    high = outputs_and_gradients(exact, inputs(3, 6, 10, dtype=dtype), {})
    errors = []
    for model in (eager, triton):
        out = outputs_and_gradients(model.to(dtype), cast(inputs(3, 6, 10, dtype=dtype), dtype), {})
        assert not out.pop("pad_token").any()  # it has no influence
        pairs = [(out[n], high[n]) for n in out if not n.endswith("ky_norm.bias")]
        relative = [(a - b).square().sum() / b.square().sum() for a, b in pairs]
        errors.append(torch.stack(relative).mean().sqrt().item())
    assert errors[1] <= 1.2 * errors[0], errors


def test_trains_as_torch():
    losses = {}
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        model = NextDiT(config(**SMALL, n_layers=1), backend=backend).to(DEVICE)
        randomise(model, torch.float32).float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        x, t, feats, mask = cast(inputs(3, 4, 6), torch.float32)
        noise, losses[backend] = torch.randn_like(x), []
        for step in range(6):
            time = (t + step / 20) % 1
            mix = time[:, None, None, None]
            loss = (
                (model(mix * x + (1 - mix) * noise, time, feats, mask) - (x - noise))
                .square()
                .mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    curves = torch.tensor(losses["triton"]), torch.tensor(losses["torch"])
    assert curves[1][-1] < 0.8 * curves[1][0]  # it learns
    torch.testing.assert_close(*curves, rtol=1e-3, atol=0)


def test_compiles_into_one_graph():
    _, triton = both(**SMALL)
    graphs = []
    fast = compiled(triton, graphs)
    for size in ((3, 4, 6), (3, 6, 8)):
        arguments = cast(inputs(*size), torch.float32)
        assert torch.equal(fast(*arguments), triton(*arguments))
    assert len(graphs) == 1


def test_a_layer_is_five_launches(monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launched = []
    for kind in (InterpretedFunction, JITFunction):
        run = kind.run

        def record(self, *args, run=run, **kwargs):
            launched.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(kind, "run", record)
    model = both(**SMALL)[1]
    x, t, *text = cast(inputs(3, 4, 6), torch.float32)
    with torch.no_grad():
        caption = model.encode_caption(*text)
        launched.clear()
        model(x, t, caption)
    layer = [
        "qk_norm_rope3d_kernel",
        "gqa_attention_fwd_kernel",
        "sandwich_norm_chain_fwd_kernel",
        "swiglu_fwd_kernel",
    ]
    chain, tail = "sandwich_norm_chain_fwd_kernel", "sandwich_norm_fwd_kernel"
    norm = "norm_modulate_fwd_kernel"
    assert launched == [norm, *layer, chain, *layer, tail, norm]
