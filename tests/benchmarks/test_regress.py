"""benchmarks/regress.py on synthetic reports: what it calls slower, and how often it is wrong."""

import json
import math

import numpy as np
import pytest

from benchmarks import regress

OURS, REFERENCES = "lumina-cpu", ("eager", "compile")
PLANTED = 7  # the case whose row of ours is made slower


def rows(seed, noise, cases=60, slow=None, drift=0.0, runs=0.016, batches=9):
    """The "benchmarks" of a report. All standard deviations are those of logarithms of times.

    Args:
        noise: standard deviation of the batches.
        slow: case -> factor of our time, or one factor for all cases.
        drift: standard deviation of what the variants of a case share.
        runs: standard deviation of what the batches of a variant share.
    """
    rng, names = np.random.default_rng(seed), (OURS, *REFERENCES, "clone")
    logs = np.random.default_rng(0).uniform(-9, -2, (cases, len(names), 1))
    logs = logs + drift * rng.standard_normal((cases, 1, 1))
    logs = logs + runs * rng.standard_normal((cases, len(names), 1))
    logs = logs + noise * rng.standard_normal((cases, len(names), batches))
    for i in range(cases):
        logs[i, 0] += math.log(slow.get(i, 1.0) if isinstance(slow, dict) else slow or 1.0)
    return [
        {
            "fullname": f"bench.py::test[case{i}-{name}]",
            "group": f"case{i}",
            "extra_info": {
                "variant": name,
                "batch medians": np.exp(logs[i, j]).tolist(),
                "ceilings' batch medians": {"clone": np.exp(logs[i, -1]).tolist()},
            },
        }
        for i in range(cases)
        for j, name in enumerate(names[:-1])
    ]


def verdicts(base, new, threshold=0.1):
    """Name of the row -> verdict."""
    return {z.base.name: z.verdict(threshold) for z in changes(base, new)}


def changes(base, new):
    parsed = ({row.name: row for row in map(regress.parse, z)} for z in (base, new))
    return regress.changes(*parsed)


def slower(*args):
    return {name for name, verdict in verdicts(*args).items() if verdict == "slower"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the command on two reports, or on two files with the given texts, and
    returns (exit code, stdout, stderr)."""

    def command(base, new, *options):
        paths = [tmp_path / "base.json", tmp_path / "new.json"]
        for path, content in zip(paths, (base, new), strict=True):
            if content is not None:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setattr("sys.argv", ["regress", *map(str, paths), *options])
        code = regress.main()
        return code, *capsys.readouterr()

    return command


def report(benchmarks, **machine):
    machine = {"processor": "abacus", "threads": 2} | machine
    return {"machine_info": machine, "benchmarks": benchmarks}


@pytest.mark.parametrize("batches", [3, 9])
@pytest.mark.parametrize("noise", [0.01, 0.03, 0.1])
def test_equal_code_is_not_slower(noise, batches):
    """By noise alone about one report in 100 has a slower row; with the threshold fewer have."""
    wrong = {0.0: 0, 0.1: 0}
    for i in range(150):
        base = rows(2 * i, noise, batches=batches)
        found = changes(base, rows(2 * i + 1, noise, drift=0.3, batches=batches))
        for threshold in wrong:
            wrong[threshold] += any(change.verdict(threshold) == "slower" for change in found)
    assert wrong[0.0] < 6 and wrong[0.1] < 4


@pytest.mark.parametrize(
    ("noise", "batches", "power"), [(0.01, 9, 80), (0.05, 48, 75), (0.005, 3, 75)]
)
def test_a_slowdown_of_20_percent_is_seen(noise, batches, power):
    seen = wrong = 0
    for i in range(100):
        base = rows(2 * i, noise, batches=batches)
        new = rows(2 * i + 1, noise, slow={PLANTED: 1.2}, drift=0.02, batches=batches)
        found = slower(base, new)
        seen += f"case{PLANTED} {OURS}" in found
        wrong += len(found - {f"case{PLANTED} {OURS}"})
    assert seen >= power and wrong < 4


def test_too_much_noise_is_not_called_the_same():
    result = verdicts(rows(0, 0.15), rows(1, 0.15, slow={PLANTED: 1.2}))
    assert set(result.values()) == {"noise too large to see 20%"}
    assert set(verdicts(rows(0, 0.01), rows(1, 0.01)).values()) == {"same"}


def test_drift_of_the_machine_and_of_ours():
    base, new = rows(0, 0.01), rows(1, 0.01)
    for row in new:
        scale(row, 1.4)
    assert set(verdicts(base, new).values()) == {"same"}
    assert len(slower(base, rows(1, 0.01, slow=1.4))) == 60
    assert set(verdicts(rows(1, 0.01, slow=1.4), base).values()) == {"faster"}


def test_one_changed_reference_does_not_move_the_others():
    """It adds to their noise, because the machine may have changed for some variants only."""
    base, new = (rows(i, 0.01, runs=0.0) for i in range(2))
    for row in new:
        scale(row, 0.5 if "compile" in row["fullname"] else 1.0)
    assert set(verdicts(base, new).values()) == {"noise too large to see 20%"}


def test_variance_between_runs():
    """The prior has 10 degrees of freedom, n references have n - 1."""
    prior, drifts = 2 * 0.03**2, [0.06, 0.40, 0.36]
    assert regress.run_to_run([]) == regress.run_to_run([0.3]) == pytest.approx(prior)
    expected = (10 * prior + 2 * np.var(drifts, ddof=1)) / 12
    assert regress.run_to_run(drifts) == pytest.approx(expected)


def test_changed_references_alone_make_nothing_slower():
    base, new = rows(0, 0.01), rows(1, 0.01)
    for row in new:
        scale(row, 0.7)
        if OURS in row["fullname"]:
            row["extra_info"]["batch medians"] = [z / 0.7 for z in batch_medians(row)]
    assert min(change.ratio for change in changes(base, new)) > 0.2
    assert not slower(base, new)


def test_without_references_times_are_compared_as_they_are():
    base, new = ([row for row in rows(i, 0.01) if OURS in row["fullname"]] for i in range(2))
    assert not slower(base, new)
    for row in base + new:
        row["extra_info"]["ceilings' batch medians"] = None
    for row in new:
        scale(row, 1.4)
    assert len(slower(base, new)) == 60


def batch_medians(row):
    return row["extra_info"]["batch medians"]


def scale(row, factor):
    """Multiplies the times of a variant and of the copy."""
    info = row["extra_info"]
    info["batch medians"] = [factor * seconds for seconds in batch_medians(row)]
    if info["ceilings' batch medians"]:
        clone = info["ceilings' batch medians"]["clone"]
        info["ceilings' batch medians"] = {"clone": [factor * z for z in clone]}


def test_one_disturbed_batch_hides_nothing():
    base, new = rows(0, 0.01), rows(1, 0.01, slow={PLANTED: 1.3})
    for row in new:
        if OURS in row["fullname"]:
            row["extra_info"]["batch medians"][4] *= 2
    assert slower(base, new) == {f"case{PLANTED} {OURS}"}


def test_the_trimmed_mean():
    """Of nine values, the variance replaces the lowest and the highest by their neighbours."""
    values = [100.0, 1, 2, 3, 4, 5, 6, 7, -100]
    mean, variance, freedom = regress.trimmed(values)
    winsorised = [1, 1, 2, 3, 4, 5, 6, 7, 7]
    assert (mean, freedom) == (4, 6)
    assert variance == pytest.approx(np.var(winsorised, ddof=1) * 8 / 7 / 6)
    assert regress.trimmed([1.0, 2, 6])[::2] == (3, 2)


def test_rows_are_found_again_after_their_file_has_moved(run):
    base, new = report(rows(0, 0.01)), report(rows(1, 0.01, slow={PLANTED: 1.5}))
    for row in new["benchmarks"]:
        row["fullname"] = f"ops/{row['fullname']}"
    code, out, _ = run(base, new)
    assert code == 1 and out.splitlines()[-1] == "60 rows on abacus, 2 threads: 59 same, 1 slower"


def test_output_and_exit_code(run):
    base, new = report(rows(0, 0.01, cases=4)), report(rows(1, 0.01, cases=5, slow={1: 1.3}))
    base["benchmarks"] += rows(0, 0.01, cases=6)[-3:]
    code, out, err = run(base, new)
    lines = out.splitlines()
    assert code == 1 and not err
    assert [line for line in lines if "slower" in line] == [lines[3], lines[-1]]
    assert lines[3].startswith("| case1 lumina-cpu | ") and float(lines[3].split("|")[4]) > 1.2
    assert lines[-1] == "4 rows on abacus, 2 threads: 3 same, 1 slower"
    only = [line.split("/")[-1] for line in lines if line.startswith("only in")]
    names = (OURS, *REFERENCES)
    assert only == [f"base.json: case5 {z}" for z in names] + [
        f"new.json: case4 {z}" for z in names
    ]
    assert run(base, new, "--threshold", "0.4")[0] == 0
    assert run(base, base)[0] == 0


def batches_of(*seconds):
    row = rows(0, 0.01)[0]
    return row | {"extra_info": row["extra_info"] | {"batch medians": seconds}}


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (None, "No such file"),
        ("", "not a report"),
        ("[1]", "not a report"),
        ("\x00", "not a report"),
        ({"benchmarks": []}, "machine_info"),
        (report([{"fullname": "x", "group": None, "stats": {"median": 1.0}}]), "extra_info"),
        (report([]), "no variant of this package is in both files"),
        (report(rows(0, 0.01), threads=8), "abacus, 2 threads; abacus, 8 threads"),
        (report(rows(0, 0.01), gpu="NVIDIA H200"), "NVIDIA H200"),
        (report([batches_of(0.0, 1.0)]), "of times above 0"),
        (report([batches_of(1.0)]), "two batches"),
        (report([batches_of("much", 1.0)]), "not a report"),
        (report([batches_of(1.0, 1.0), *rows(0, 0.01)[1:]]), "unequal batch counts"),
    ],
)
def test_bad_input_is_one_line(run, new, message):
    code, out, err = run(report(rows(0, 0.01)), new)
    assert code == 2 and not out
    assert err.startswith("regress: ") and err.count("\n") == 1 and message in err


def test_quantiles():
    """Against tables: Wallace's approximation is at most 7 % too large, and never too small."""
    table = {(0.995, 5): 4.032, (0.9995, 10): 4.587, (0.9999, 4): 13.034, (0.9999, 20): 4.539}
    for (level, freedom), t in table.items():
        assert t * 0.999 < regress.student(level, freedom) < t * 1.07
