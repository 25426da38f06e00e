"""Folders of the original release that are damaged, odd or made to harm."""

import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from checkpoint_cases import CONFIG, network, refused

from lumina.checkpoints import checkpoint

HUGE = "9" * 400


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("allocated"))


def original(folder, state=None, name="consolidated.00-of-01.pth", **args):
    folder.mkdir(exist_ok=True)
    args = {"model": "NextDiT_2B_GQA_patch2", "qk_norm": True, **args}
    torch.save(Namespace(**args), folder / "model_args.pth")
    if state is not None:
        torch.save(state, folder / name)
    return folder / name


def repack(file, change, compression=zipfile.ZIP_STORED):
    """Write the records of a .pth anew, each as `change(name, data)` says."""
    with zipfile.ZipFile(file) as archive:
        records = [(r.filename, archive.read(r)) for r in archive.infolist()]
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records:
            archive.writestr(name, change(name, data))


def test_storage_cut_short_inside_the_zip(tmp_path):
    file = original(tmp_path, network().state_dict())
    whole = file.read_bytes()
    repack(file, lambda name, data: data)
    assert checkpoint._open(tmp_path, None).config == CONFIG  # packed anew it is a checkpoint
    for key in ("data/0", "data/7"):
        for keep in (0, 4, -4):
            file.write_bytes(whole)
            repack(file, lambda n, data, k=key, m=keep: data[:m] if n.endswith(k) else data)
            refused(tmp_path, "its tensors do not have the sizes of its records")
    file.write_bytes(whole)
    repack(file, lambda name, data: data, zipfile.ZIP_DEFLATED)
    refused(tmp_path, "00-of-01.pth")


def test_tensors_that_are_not_stored_in_full(tmp_path):
    state = network().state_dict()
    wide = torch.zeros(1).expand(10**6, 10**6)
    original(tmp_path, {**state, "x_embedder.weight": wide})
    refused(tmp_path, "must store every tensor in full: its tensors are of 4000")
    one = torch.zeros(10**4)
    original(tmp_path, {**state, **{f"layers.{i}.x": one for i in range(100)}})
    refused(tmp_path, "must store every tensor in full")


def test_tensors_of_other_kinds(tmp_path):
    state = network().state_dict()
    for odd in (
        torch.empty(48, device="meta"),
        torch.zeros(48).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(48), 1.0, 0, torch.qint8),
    ):
        original(tmp_path, {**state, "pad_token": odd})
        refused(tmp_path, "00-of-01.pth")
    original(tmp_path, {**state, 3: torch.zeros(1)})
    refused(tmp_path, "must hold tensors by name, got dict")
    original(tmp_path, OrderedDict(state, a=[torch.zeros(1)]))
    refused(tmp_path, "must hold tensors by name, got OrderedDict")


def test_numbers_of_layers(tmp_path):
    state = network().state_dict()
    for name, message in {
        "layers.999999999.x": "n_layers must be a whole number in [1, 16777216], got 1000000000",
        f"layers.{HUGE}.x": "is not part of this network",
        "layers.1000000.attention.gate": "the network has n_layers=1000001",
    }.items():
        original(tmp_path, {**state, name: torch.zeros(1)})
        refused(tmp_path, message)


def test_numbers_of_shards(tmp_path):
    state = network().state_dict()
    original(tmp_path / "zero", state, "consolidated.00-of-00.pth")
    refused(
        tmp_path / "zero", "has no consolidated.00-of-0N.safetensors or .pth; ", FileNotFoundError
    )
    refused(tmp_path / "zero", "consolidated.00-of-00.pth, model_args.pth", FileNotFoundError)
    original(tmp_path / "many", state, "consolidated.00-of-99999999.pth")
    refused(
        tmp_path / "many", "consolidated.01-of-99999999.pth does not exist; ", FileNotFoundError
    )
    original(tmp_path / "more", state, f"consolidated.00-of-{'9' * 150}.pth")
    refused(tmp_path / "more", "consolidated.01-of-999", FileNotFoundError)
    original(tmp_path / "odd", state, "consolidated.05-of-02.pth")
    refused(tmp_path / "odd", "consolidated.00-of-02.pth does not exist; ", FileNotFoundError)


@pytest.mark.parametrize(
    "args, message",
    [
        (dict(model="NextDiT_patch0"), None),
        (dict(model="NextDiT_patch" + HUGE), None),
        (dict(model=["x"]), "must name a model, got a list"),
        (dict(model=torch.zeros(3)), "must name a model, got a Tensor"),
        (dict(qk_norm=torch.ones(3)), "model_args.pth says qk_norm="),
        (dict(qk_norm="yes"), "model_args.pth says qk_norm=yes"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_arguments(args, message, tmp_path, monkeypatch):
    original(tmp_path, network().state_dict(), **args)
    if message:
        refused(tmp_path, message)
    else:  # no patch is named: it is 2
        monkeypatch.undo()
        assert checkpoint.load(tmp_path).config == CONFIG


def test_shards_of_several_dtypes(tmp_path):
    state = network().state_dict()
    for dtype in (torch.float16, torch.float8_e5m2):
        original(tmp_path, state, "consolidated.00-of-02.pth")
        original(tmp_path, {k: t.to(dtype) for k, t in state.items()}, "consolidated.01-of-02.pth")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refused(tmp_path, "")
