"""docs/pipelines.md: its code runs, its commands are ones, its table has every parameter."""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest

import lumina
from lumina.cli.arguments import build_parser
from lumina.pipelines.call import Options

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "pipelines.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
NAMES = {"lumina-next": "lumina_next", "lumina-image-2": "lumina2", "z-image-turbo": "z_image"}
LETTERS = {"N": "LuminaPipeline", "2": "Lumina2Pipeline", "Z": "ZImagePipeline"}


def test_every_python_block_runs(tiny, tmp_path, monkeypatch):
    """In one namespace, with tiny checkpoints under the names of the released ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lumina.pipelines.ZImagePipeline, "_sigmas", few_steps)
    for name, family in NAMES.items():
        tiny.write(family, name)
    names = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "pipelines.md", "exec"), names)
    assert {file.name for file in tmp_path.glob("*.png")} == {
        "apple.png", "apple-2.png", "apple-z.png"
    }  # fmt: skip
    assert [names[name].size for name in ("panorama", "wide", "high")] == [
        (192, 64), (64, 32), (32, 64)
    ]  # fmt: skip
    assert type(names["pipe"].transformer.layers[0].attention.qkv.weight).__name__ == "Int8Tensor"


def few_steps(pipe, steps, sigmas, ours):
    """The tiny Z-Image has the released size, as its class has no other."""
    return [1.0, 0.5]


def test_every_command_is_one():
    lines = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    parser = build_parser("python -m lumina")
    for line in lines:
        words = shlex.split(line)
        if words[:2] == ["hf", "download"]:
            assert words[-1] in NAMES
        else:
            assert words[:3] == ["python", "-m", "lumina"]
            parser.parse_args(words[3:])
    assert len(lines) == 11


def table():
    """(names, letters, defaults) of the rows of the parameters."""
    lines = TEXT[TEXT.index("## Parameters") : TEXT.index("`Pipeline.from_pretrained(folder")]
    for line in re.findall(r"^\| (`.*?) \|$", lines, re.MULTILINE):
        names, letters, defaults, _ = line.split(" | ", 3)
        yield re.findall(r"`(\w+)`", names), letters.split(), re.findall("`(.*?)`", defaults)


@pytest.mark.parametrize("letter", LETTERS)
def test_every_parameter_is_in_the_table(letter):
    call = inspect.signature(getattr(lumina.pipelines, LETTERS[letter]).__call__).parameters
    wanted = {name: p.default for name, p in call.items() if name not in ("self", "ours")}
    wanted |= {field.name: field.default for field in dataclasses.fields(Options)}
    if letter != "N":
        del wanted["regions"]
    told = {}
    for names, letters, defaults in table():
        if letter in letters:
            place = letters.index(letter) if len(defaults) > 1 else 0
            told |= {name: eval(defaults[place]) for name in names}
    assert told == wanted


def test_our_own_are_marked():
    own = {field.name for field in dataclasses.fields(Options)}
    rows = re.findall(r"^\| (`[^|]*`)\* \|", TEXT, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == own
