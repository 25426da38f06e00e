"""Is anything slower than in an earlier report? `python -m benchmarks.regress BASE.json NEW.json`

Reads two files of `pytest benchmarks --benchmark-json=FILE` or of `benchmarks.report`, and compares
the variants of this package, "lumina-*". The exit code is 1 if one is slower, and 2 if the files
cannot be compared.

Machines drift, and because the variants of a case run in interleaved rounds, they drift together.
So our times are taken relative to references that do not change with this package: eager PyTorch,
torch.compile, other packages, the copy and the matrix product. For batch b of a run,

    y_b = log(our median in b) - median over the references of log(their median in b).

The change is the mean of y in the new run minus that in the base run. Both means are trimmed: they
leave out the lowest and the highest fifth of the batches, in which other processes may have run.

The noise of the change has two parts, added in quadrature. The first is the standard error of the
difference of trimmed means (Yuen) times a quantile of Student's t. The second covers differences
between runs of the same commit that no batch shows, such as the addresses of code and data and what
else uses the memory bus; it is a standard deviation times a normal quantile. A run contributes
RUN_TO_RUN to that deviation, and the prior is updated with the variance of the references' own
changes, as in moderated variances (G. Smyth, Stat. Appl. Genet. Mol. Biol. 3, 2004): if the
references disagree on how the machine has changed, our relative times are uncertain too. The
quantiles are chosen such that in 99 of 100 comparisons no row exceeds its noise by chance.

Verdicts: "slower" or "faster" if the change exceeds the noise and the threshold, and the change of
the time itself exceeds the threshold as well, because the references may have changed instead.
Otherwise "same" if a change of twice the threshold would have exceeded the noise.
"""

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean, median

ALPHA = 0.01  # probability that noise makes any row slower
RUN_TO_RUN = 0.03  # ten runs of the quick ops on an idle CPU gave 0.00 to 0.04, by op
WEIGHT = 10  # of RUN_TO_RUN against the references of a row, in degrees of freedom


class BadInput(Exception):
    """Why two files cannot be compared."""


@dataclass
class Row:
    case: str
    variant: str
    batches: list[float]  # medians, seconds
    ceilings: list[list[float]]  # batch medians of the copy and the matrix product

    @property
    def name(self) -> str:
        """Not the test's full name: that changes when a file moves."""
        return f"{self.case} {self.variant}"

    @property
    def ours(self) -> bool:
        return self.variant.startswith("lumina-")


@dataclass
class Change:
    """What changed from one run to the other; the last three are natural logarithms."""

    base: Row
    new: Row
    ratio: float  # of the times relative to the references
    noise: float  # that the ratio has to exceed
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
        rows = map(parse, report["benchmarks"])
        return device, {row.name: row for row in rows}
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(f"{path} is not a report of these benchmarks: {error!r}") from error


def parse(row: dict) -> Row:
    info = row["extra_info"]
    batches = [float(seconds) for seconds in info["batch medians"]]
    if not min(batches) > 0 or len(batches) < 2:
        raise ValueError(f"{row['fullname']} needs two batches or more, of times above 0")
    # Cases whose bytes and FLOPs are not counted have no ceilings; older reports say null.
    ceilings = list((info["ceilings' batch medians"] or {}).values())
    return Row(row["group"], info["variant"], batches, ceilings)


def changes(base: dict[str, Row], new: dict[str, Row]) -> list[Change]:
    """The changes of our rows that are in both files.

    Raises:
        BadInput: there are none, or the variants of a case were not measured together.
    """
    cases = defaultdict(list)
    for name in base.keys() & new.keys():
        cases[base[name].case].append(name)
    ours = [name for name in base if name in new and base[name].ours]
    if not ours:
        raise BadInput("no variant of this package is in both files")
    level, result = (1 - ALPHA) ** (1 / len(ours)), []
    for name in ours:
        others = [other for other in cases[base[name].case] if not base[other].ours]
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
    """Logarithm of the ratio of the times."""
    return trimmed(map(math.log, new))[0] - trimmed(map(math.log, base))[0]


def run_to_run(drifts: list[float]) -> float:
    """Variance between runs that no batch shows, given the references' changes."""
    freedom = max(0, len(drifts) - 1)
    observed = variance(drifts) if freedom > 0 else 0.0
    return (WEIGHT * 2 * RUN_TO_RUN**2 + freedom * observed) / (WEIGHT + freedom)


def relative(row: Row, others: list[Row]) -> list[float]:
    """y of every batch."""
    references = [*(z.batches for z in others), *row.ceilings]
    if any(len(batches) != len(row.batches) for batches in references):
        raise BadInput(f"not a report of these benchmarks: {row.case} has unequal batch counts")
    return [
        math.log(own) - (median(map(math.log, z)) if z else 0.0)
        for own, *z in zip(row.batches, *references, strict=True)
    ]


def trimmed(values: Iterable[float]) -> tuple[float, float, int]:
    """Mean without a fifth at each end, its variance, and the degrees of freedom of the variance
    (K. Yuen, Biometrika 61, 1974)."""
    values = sorted(values)
    n, cut = len(values), len(values) // 5
    kept = values[cut : n - cut]
    winsorised = [min(max(value, kept[0]), kept[-1]) for value in values]
    return fmean(kept), variance(winsorised) * (n - 1) / len(kept) / (len(kept) - 1), len(kept) - 1


def variance(values: list[float]) -> float:
    """Of a sample. That of the standard library computes with fractions, for a thousand times as
    long."""
    center = fmean(values)
    return math.fsum((value - center) ** 2 for value in values) / (len(values) - 1)


def student(level: float, freedom: float) -> float:
    """Quantile of Student's t, by Wallace's approximation."""
    z = NormalDist().inv_cdf(level) * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(z * z / freedom))


def compare(base_path: str, new_path: str, threshold: float) -> bool:
    """Prints the table and returns whether any row is slower."""
    (device, base), (new_device, new) = read(base_path), read(new_path)
    if device != new_device:
        raise BadInput(f"different devices: {device}; {new_device}")
    rows, counts = changes(base, new), Counter()
    print("| row | base, ms | new, ms | ratio | relative to references | noise | verdict |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        verdict = row.verdict(threshold)
        counts[verdict] += 1
        before, after = (f"{1e3 * median(z.batches):.4g}" for z in (row.base, row.new))
        ratios = (f"{math.exp(z):.3f}" for z in (row.time_ratio, row.ratio))
        noise = f"{math.expm1(row.noise):.1%}"
        print("|", " | ".join((row.base.name, before, after, *ratios, noise, verdict)), "|")
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
