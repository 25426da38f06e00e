"""What a pass found, what became of it, and why the rest was left."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Site:
    """A norm, rotation, attention, gate or gated unit in a graph."""

    kind: str  # what was there: "norm", "rotation", "attention", "residual", "glu", "gelu"
    node: str  # in the captured graph
    op: str | None  # that computes it now, or None
    reason: str | None  # why it was left, or None


@dataclass
class Captured:
    """A rewritten graph, and how often each block has run it."""

    sites: list[Site]
    calls: Counter = field(default_factory=Counter)


@dataclass
class Report:
    """What `patch` did to a model, by the graphs that its blocks have run so far.

    A block that has not run yet has no graph: run the model once before reading. `str(report)` is a
    table, one line for each block and kind of site that fared alike; `to_dict()` is all of it.
    """

    blocks: list[str]
    graphs: list[Captured] = field(default_factory=list)
    unfused: Counter = field(default_factory=Counter)  # calls that ran the block as it was

    @property
    def fused(self) -> int:
        """Calls of ops so far."""
        return sum(
            site.op is not None for graph in self.graphs for site in graph.sites
            for _ in range(graph.calls.total())
        )  # fmt: skip

    def rows(self) -> list[dict]:
        """One row for each block and site that it has run."""
        return [
            {
                "module": path,
                "kind": site.kind,
                "op": site.op,
                "reason": site.reason,
                "calls": calls,
            }
            for graph in self.graphs
            for path, calls in graph.calls.items()
            for site in graph.sites
        ]

    def to_dict(self) -> dict:
        never = [b for b in self.blocks if not any(b in g.calls for g in self.graphs)]
        return {"sites": self.rows(), "unfused_calls": dict(self.unfused), "not_run": never}

    def __str__(self) -> str:
        counts = Counter(
            (row["kind"], row["op"] or "left", row["reason"] or "", row["module"])
            for row in self.rows()
        )
        merged: dict[tuple, list[str]] = {}
        for (kind, op, reason, module), n in counts.items():
            merged.setdefault((kind, op, reason, n), []).append(module)
        lines = [("module", "what was there", "is now", "sites", "why it was left")]
        for (kind, op, reason, n), modules in merged.items():
            lines.append((_span(modules), kind, op, str(n), reason))
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        table = [
            "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        never = self.to_dict()["not_run"]
        table += [f"not run yet: {_span(never)}"] if never else []
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
        else ", ".join(f"{stem}.{n}" for n in ns)
        for stem, ns in numbers.items()
    )  # fmt: skip
