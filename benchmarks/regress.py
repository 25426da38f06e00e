"""Is anything slower than in an earlier report? `python -m benchmarks.regress BASE.json NEW.json`

Reads two files of `pytest benchmarks --benchmark-json=FILE` or of `benchmarks.report`, and compares
the variants of this package, "lumina-*". Exit code 1: one is slower; 2: the files are not
comparable.

Machines drift, and the variants of a case, which take turns, drift together. So a row is measured
in units of its references: eager PyTorch, torch.compile, other packages, the copy and the matrix
product, which do not change with this package. For batch b of a run,

    y_b = log(our median in b) - median over the references of log(their median in b).

The change is the mean y of the new run less that of the base, the lowest and the highest fifth of
the batches left out, in which something else ran. Its noise has two parts, added in quadrature: the
standard error of that difference, after Yuen, times a quantile of Student's t; and what differs
between runs of one commit and no batch shows (where a process has its code and its memory, what
else uses the machine's memory), times the normal quantile. The standard deviation of this part is
RUN_TO_RUN in each run, corrected by what the references' own changes are apart, as moderated
variances are (G. Smyth, Stat. Appl. Genet. Mol. Biol. 3, 2004): if those do not agree on how the
machine has changed, neither do ours and they. The quantiles are such that in 99 of 100 comparisons
no row exceeds its noise by chance. Slower or faster: the change is beyond both the noise and the
threshold, and the change of the time itself is beyond the threshold too, as references may have
changed instead. Same: it is not, and twice the threshold would have been beyond the noise.
"""

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, mean, median, variance

ALPHA = 0.01  # chance that noise makes any row slower
RUN_TO_RUN = 0.03  # ten runs of the quick ops on an idle CPU: 0.00 to 0.04, by op
WEIGHT = 10  # of that against the references of a row, in degrees of freedom


class BadInput(Exception):
    """Why two files cannot be compared."""


@dataclass
class Row:
    name: str
    group: str  # its case
    variant: str
    batches: list[float]  # medians, seconds
    ceilings: list[list[float]]  # those of the copy and the matrix product

    @property
    def ours(self) -> bool:
        return self.variant.startswith("lumina-")


@dataclass
class Change:
    base: Row
    new: Row
    ratio: float  # a log, as all three: of the time in units of the references
    noise: float  # that it has to exceed
    time_ratio: float

    def verdict(self, threshold: float) -> str:
        for sign, name in ((1, "slower"), (-1, "faster")):
            if min(sign * self.ratio, sign * self.time_ratio) > math.log1p(threshold):
                if sign * self.ratio > self.noise:
                    return name
        if self.noise > math.log1p(2 * threshold):
            return f"noise too large to see {2 * threshold:.0%}"
        return "same"


def read(path: str) -> tuple[str, dict[str, Row]]:
    """The device, and the rows by name."""
    try:
        report = json.loads(Path(path).read_text())
        machine = report["machine_info"]
        device = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
        return device, {row["fullname"]: parse(row) for row in report["benchmarks"]}
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(f"{path} is no report of these benchmarks: {error!r}") from error


def parse(row: dict) -> Row:
    info = row["extra_info"]
    batches = [float(seconds) for seconds in info["batch medians"]]
    if not min(batches) > 0 or len(batches) < 2:
        raise ValueError(f"{row['fullname']} needs two batches or more, of times above 0")
    ceilings = list((info["ceilings' batch medians"] or {}).values())  # backward has none
    return Row(row["fullname"], row["group"], info["variant"], batches, ceilings)


def changes(base: dict[str, Row], new: dict[str, Row]) -> list[Change]:
    """Our rows of both files.

    Raises:
        BadInput: there is none, or the variants of a case have not been measured together.
    """
    cases = defaultdict(list)
    for name in base.keys() & new.keys():
        cases[base[name].group].append(name)
    ours = [name for name in base if name in new and base[name].ours]
    if not ours:
        raise BadInput("no variant of this package is in both files")
    level, result = (1 - ALPHA) ** (1 / len(ours)), []
    for name in ours:
        others = [other for other in cases[base[name].group] if not base[other].ours]
        before, after = (relative(z[name], [z[other] for other in others]) for z in (base, new))
        means, variances, freedoms = zip(trimmed(before), trimmed(after), strict=True)
        within = math.sqrt(sum(variances)) * student(level, sum(freedoms))
        drifts = [change(base[other].batches, new[other].batches) for other in others]
        drifts += map(change, base[name].ceilings, new[name].ceilings)
        between = math.sqrt(run_to_run(drifts)) * NormalDist().inv_cdf(level)
        noise, ratio = math.hypot(within, between), means[1] - means[0]
        time_ratio = change(base[name].batches, new[name].batches)
        result.append(Change(base[name], new[name], ratio, noise, time_ratio))
    return result


def change(base: list[float], new: list[float]) -> float:
    """Log ratio of the times."""
    return trimmed(map(math.log, new))[0] - trimmed(map(math.log, base))[0]


def run_to_run(drifts: list[float]) -> float:
    """Variance of a change that no batch shows, given those of the references."""
    freedom = max(0, len(drifts) - 1)
    apart = variance(drifts) if freedom else 0.0
    return (WEIGHT * 2 * RUN_TO_RUN**2 + freedom * apart) / (WEIGHT + freedom)


def relative(row: Row, others: list[Row]) -> list[float]:
    """y of every batch."""
    references = [*(z.batches for z in others), *row.ceilings]
    if any(len(batches) != len(row.batches) for batches in references):
        raise BadInput(f"no report of these benchmarks: {row.group} has not one number of batches")
    return [
        math.log(own) - (median(map(math.log, z)) if z else 0.0)
        for own, *z in zip(row.batches, *references, strict=True)
    ]


def trimmed(values: Iterable[float]) -> tuple[float, float, int]:
    """Mean without a fifth at each end, its variance and the degrees of freedom of that (K. Yuen,
    Biometrika 61, 1974)."""
    values = sorted(values)
    n, cut = len(values), len(values) // 5
    kept = values[cut : n - cut]
    winsorised = [min(max(value, kept[0]), kept[-1]) for value in values]
    return mean(kept), variance(winsorised) * (n - 1) / len(kept) / (len(kept) - 1), len(kept) - 1


def student(level: float, freedom: float) -> float:
    """Quantile of Student's t, by Wallace's approximation."""
    z = NormalDist().inv_cdf(level) * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(z * z / freedom))


def compare(base_path: str, new_path: str, threshold: float) -> bool:
    """Prints the table; whether any row is slower."""
    (device, base), (new_device, new) = read(base_path), read(new_path)
    if device != new_device:
        raise BadInput(f"different devices: {device}; {new_device}")
    rows, counts = changes(base, new), Counter()
    print("| row | base, ms | new, ms | ratio | in units of its references | noise | verdict |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        verdict = row.verdict(threshold)
        counts[verdict] += 1
        before, after = (f"{1e3 * median(z.batches):.4g}" for z in (row.base, row.new))
        ratios = (f"{math.exp(z):.3f}" for z in (row.time_ratio, row.ratio))
        name, noise = f"{row.base.group} {row.base.variant}", f"{math.expm1(row.noise):.1%}"
        print("|", " | ".join((name, before, after, *ratios, noise, verdict)), "|")
    for path, one, other in ((base_path, base, new), (new_path, new, base)):
        for name in one:
            if name not in other:
                print(f"only in {path}: {name}")
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    print(f"{len(rows)} rows on {device}: {total}")
    return counts["slower"] > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", metavar="BASE.json")
    parser.add_argument("new", metavar="NEW.json")
    parser.add_argument("--threshold", type=float, default=0.1, help="default: %(default)s")
    args = parser.parse_args()
    try:
        return int(compare(args.base, args.new, args.threshold))
    except BadInput as error:
        print(f"regress: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
