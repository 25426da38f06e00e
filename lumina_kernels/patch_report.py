"""What `patch` did to a model: what was found, what became of it, and why the rest was left."""

from collections import Counter
from dataclasses import asdict, dataclass, field

from torch.fx import Graph, Node


@dataclass(frozen=True)
class Site:
    """A norm, rotation, attention, residual, gated unit or GELU in a graph."""

    # What was there: "norm", "rotation", "attention", "residual", "glu", "gelu", "softmax", two of
    # them in one op as "residual and norm", or a "graph" that could not be captured.
    kind: str
    node: str  # in the captured graph
    op: str | None  # that computes it now, or None
    reason: str | None  # why it was left, or None
    backend: str | None = None  # of the op


# What is named as left where nothing took its place; an rsqrt is the one of a norm written out.
KINDS = {
    "scaled_dot_product_attention": "attention", "layer_norm": "norm", "rms_norm": "norm",
    "rsqrt": "norm", "gelu": "gelu", "silu": "glu", "softmax": "softmax",
}  # fmt: skip
PARTS = {"glu": "mul", "softmax": "matmul"}  # by what it has to be used to count as one


def left(graph: Graph, refused: dict[Node, Site]) -> list[Site]:
    """What is still in a graph after the pass, by which new nodes have their meta["by"]."""
    sites = [s for n, s in refused.items() if n.users and s.kind not in KINDS.values()]
    for node in graph.nodes:
        if (kind := KINDS.get(_op(node))) is None or "by" in node.meta:
            continue
        below, users = [node], {_op(u) for n in (node, *node.users) for u in n.users}
        if kind in PARTS and PARTS[kind] not in users:
            continue
        for n in below:  # the match that it was part of
            below += [user for user in n.users if len(below) < 20]
        reasons = [refused[n].reason for n in below if n in refused]
        sites.append(Site(kind, node.name, None, (*reasons, "not recognised")[0]))
    return sites


def _op(node: Node) -> str:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


@dataclass
class Captured:
    """A rewritten graph, and how often each block has run it."""

    sites: list[Site]
    calls: Counter = field(default_factory=Counter)


@dataclass
class Report:
    """What `patch` did to a model, by the graphs that its blocks have run so far.

    A block that has not run yet has no graph: run the model once before reading. `str(report)` is a
    table, one line for blocks and sites that fared alike; `to_dict()` is all of it.
    """

    blocks: list[str] = field(default_factory=list)  # one in two places by its first name
    graphs: list[Captured] = field(default_factory=list)
    unfused: Counter = field(default_factory=Counter)  # calls that ran a block as it was

    @property
    def fused(self) -> int:
        """Calls so far of what has taken the place of something: an op, or torch.addcmul where it
        is enough. What `verify=True` calls to compare does not count."""
        return sum(row["calls"] for row in self.rows() if row["op"])

    def rows(self) -> list[dict]:
        """One row for each block and site that it has run."""
        return [
            {"module": path, **asdict(site), "calls": calls}
            for graph in self.graphs
            for path, calls in graph.calls.items()
            for site in graph.sites
        ]

    @property
    def not_run(self) -> list[str]:
        return [b for b in self.blocks if not any(b in graph.calls for graph in self.graphs)]

    def to_dict(self) -> dict:
        return {
            "sites": self.rows(), "unfused_calls": dict(self.unfused), "not_run": self.not_run
        }  # fmt: skip

    def __str__(self) -> str:
        alike: dict[tuple, dict[str, list[int]]] = {}
        for row in self.rows():
            key = row["kind"], row["op"] or "left", row["backend"] or "", row["reason"] or ""
            alike.setdefault(key, {}).setdefault(row["module"], []).append(row["calls"])
        merged: dict[tuple, list[str]] = {}
        for (*key, reason), modules in alike.items():
            for path, calls in modules.items():
                merged.setdefault((*key, len(calls), sum(calls), reason), []).append(path)
        head = "module", "what was there", "is now", "backend", "sites", "calls", "why it was left"
        lines = [head, *((_span(paths), *map(str, key)) for key, paths in merged.items())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pad = (zip(line, widths, strict=True) for line in lines)
        table = ["  ".join(x.ljust(w) for x, w in line).rstrip() for line in pad]
        table += [f"not run yet, or compiled otherwise: {_span(self.not_run)}"] * bool(self.not_run)
        table += [f"{n} calls of {path} ran it unfused" for path, n in self.unfused.items()]
        return "\n".join(table)


def _span(paths: list[str]) -> str:
    """`layers.0, layers.1, layers.2` as `layers.0..2`."""
    numbers: dict[str, list[int]] = {}
    for path in paths:
        stem, _, number = path.rpartition(".")
        numbers.setdefault(stem, []).append(int(number))
    return ", ".join(
        f"{stem}.{min(ns)}..{max(ns)}" if len(ns) == max(ns) - min(ns) + 1 > 1
        else ", ".join(f"{stem}.{n}".lstrip(".") for n in ns)
        for stem, ns in numbers.items()
    )  # fmt: skip
