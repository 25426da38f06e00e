"""The page docs/coverage.md: what `patch` does to every model of `models`.

python tests/dropin/write_coverage.py
"""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"
MAIN = (
    "lumina_next_shared", "lumina2", "z_image", "flux", "sd35", "pixart", "dit", "qwen_image",
    "wan", "hidream",
)  # fmt: skip
COLUMNS = {
    "attentions": {"attention", "text"}, "norms": {"norm"}, "rotations": {"rotation"},
    "residuals": {"residual"}, "activations": {"glu", "gelu"},
}  # fmt: skip
HEAD = f"""\
# What `patch` replaces

One small model of each class of diffusers, and some of them with other options, by torch {{}} and
diffusers {{}}. A cell is *replaced / found*, over the blocks that ran: attentions, norms with their
modulation, rotary embeddings of queries and keys (of both, where one op turns them), residuals with
their gate or with the norm after them, gated units and GELUs. The ten models in bold have to be
whole. `python tests/dropin/write_coverage.py` writes this page.

*Not seen* are calls of `scaled_dot_product_attention` that no graph of a block has: Dynamo broke
the graph there, or they are outside of the repeated blocks. Attentions that models write out as
products of matrices are not counted at all.

| class | model | {" | ".join(COLUMNS)} | left |
|---|---|{"---:|" * len(COLUMNS)}---|
"""


class CountAttentions(TorchFunctionMode):
    """Counts the calls of scaled_dot_product_attention."""

    calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += function is F.scaled_dot_product_attention
        return function(*args, **kwargs or {})


def line(name: str, model: nn.Module, report, attentions: int) -> str:
    """The row of a model that has run once, and calls so many attentions when it is not patched."""
    rows, cells, left = report.rows(), [], Counter()
    for words in COLUMNS.values():
        sites = [row for row in rows for _ in words.intersection(row["kind"].split())]
        cells.append(f"{sum(row['op'] is not None for row in sites)}/{len(sites)}")
    for row in rows:
        if row["op"] is None:
            left[f"{row['kind']}: {row['reason'][:60]}"] += 1
    in_graphs = [row for row in rows for _ in COLUMNS["attentions"] & {*row["kind"].split()}]
    left["attention: not seen"] = attentions - sum(row["calls"] for row in in_graphs)
    left["block: unfused"] = sum(report.unfused.values())
    left["block: not run"] = len(report.not_run)
    reasons = "; ".join(f"{n} {what}" for what, n in left.items() if n > 0)
    return _row(type(model).__name__, f"**{name}**" if name in MAIN else name, *cells, reasons)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head() -> str:
    """The page above its rows; another version of torch or diffusers has other graphs."""
    return HEAD.format(torch.__version__.partition("+")[0], diffusers.__version__)


def parsed(page: str) -> dict[str, list[str]]:
    """The cells of each model by its name, without class and name."""
    rows = [row.strip("| ").split(" | ") for row in page.splitlines() if row.startswith("| ")]
    return {name.strip("*"): [*cells, ""][: len(COLUMNS) + 1] for _, name, *cells in rows[1:]}


def totals(rows: Iterable[list[str]]) -> list[str]:
    """The sum of each column."""
    columns = list(zip(*rows, strict=True))[: len(COLUMNS)]
    pairs = [[map(int, cell.split("/")) for cell in column] for column in columns]
    return ["/".join(map(str, map(sum, zip(*column, strict=True)))) for column in pairs]


@torch.no_grad()
def main() -> None:
    from models import MODELS, make, output

    from lumina_kernels.output import replace
    from lumina_kernels.patching import patch

    torch.set_num_threads(1)
    page = head()
    for name in MODELS:
        torch._dynamo.reset()
        model, inputs = make(name)
        with CountAttentions() as count:
            output(model, inputs)
        report = patch(model)
        output(model, inputs)
        page += line(name, model, report, count.calls) + "\n"
        print(page.splitlines()[-1], flush=True)
    page += _row("all", "", *totals(parsed(page).values()), "") + "\n"
    replace(PAGE, lambda path: path.write_text(page))


if __name__ == "__main__":
    sys.exit(main())
