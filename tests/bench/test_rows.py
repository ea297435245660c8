"""Results files: checked, append-only, and read back as they were written."""

import dataclasses
import subprocess
from itertools import pairwise

import pytest

from fastcircuit.benchmarks import floors
from fastcircuit.benchmarks.compare import changes, compare
from fastcircuit.benchmarks.curves import curves, steepness
from fastcircuit.benchmarks.environment import changed, check_committed, environment, slug
from fastcircuit.benchmarks.pictures import PICTURES, draw_all
from fastcircuit.benchmarks.rows import append, latest, read
from fastcircuit.benchmarks.runner import Results
from fastcircuit.errors import InputError
from tests.bench.toys import row, toy


def test_round_trip_appends(tmp_path):
    first, second = row(), row(variant="torch.addmm", peak_bytes=12345678901, shape='a, "b"', quick=True)
    (path,) = append(tmp_path / "new", [first])
    before = path.read_bytes()
    assert append(tmp_path / "new", [second]) == [path]
    assert path.read_bytes().startswith(before)
    assert read(path) == read(path.parent) == [first, second]
    assert path.name == "cpu-toy.csv"
    assert [file.name for file in append(tmp_path, [row(device="cuda NVIDIA H200")])] == ["cuda-nvidia-h200.csv"]


def test_other_files_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "cpu-toy.csv"
    path.write_text("a,b\n1,2\n")
    for refused in (lambda: append(tmp_path, [row()]), lambda: read(path)):
        with pytest.raises(InputError, match=r"is no results file of this version \(column 'a'\)"):
            refused()
    assert path.read_text() == "a,b\n1,2\n"
    with pytest.raises(InputError, match="there are no results in"):
        read(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",10.0,", ",ten,", "line 2: p50_ms is 'ten'"),
        (",10.0,", ",nan,", "line 2: p50_ms is 'nan'"),
        (",False,", ",maybe,", "line 2: quick is 'maybe'"),
        (",10.0,", ",10.0,5,", "line 2: "),
        (",2026-01-01", "", "line 2: "),
    ],
)
def test_damaged_rows_are_named(tmp_path, old, new, message):
    (path,) = append(tmp_path, [row()])
    damaged = path.read_text().replace(old, new, 1)
    assert damaged != path.read_text()
    path.write_text(damaged)
    with pytest.raises(InputError, match=message):
        read(path)


def test_latest_row_of_each_key():
    old, new, other = row(p50_ms=1.0), row(p50_ms=2.0), row(variant="y")
    assert list(latest([old, other, new]).values()) == [new, other]


def test_environment_says_where_and_with_what():
    about = environment("cpu")
    assert about["threads"] >= 1
    assert about["torch"]
    assert about["cpu_flags"]
    assert slug("cpu Intel(R) Xeon(R) Gold 6430, 2 cores") == "cpu-intel-xeon-gold-6430-2-cores"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with results and one file, everything committed; ``runs`` is ignored."""
    root = tmp_path / "checkout"
    (root / "bench" / "results").mkdir(parents=True)
    (root / ".gitignore").write_text("runs/\n")
    for file in ("bench/results/cpu.csv", "bench/NOTES.md"):
        (root / file).write_text("as committed\n")
    for command in ("init", "add .", "-c user.name=a -c user.email=a@b commit -m one"):
        subprocess.run(["git", *command.split()], cwd=root, check=True, capture_output=True)
    monkeypatch.setattr("fastcircuit.benchmarks.environment.ROOT", root)
    return root


def test_rows_that_are_kept_are_of_a_commit(checkout, tmp_path):
    (checkout / "bench" / "results" / "cpu.csv").write_text("more rows\n")
    check_committed(checkout / "bench" / "results")
    (checkout / "bench" / "NOTES.md").write_text("changed\n")
    assert changed() == ["bench/NOTES.md"]
    for elsewhere in (checkout / "runs" / "bench", tmp_path / "rows"):
        check_committed(elsewhere)
    for kept in ("bench/results", "bench/results/new", "rows"):
        with pytest.raises(InputError, match=r"are of a commit, and bench/NOTES\.md differs from it; commit first"):
            check_committed(checkout / kept)


def test_changes_have_noise_bands():
    old = [row(), row(variant="same"), row(variant="gone")]
    new = [row(p20_ms=4.5, p50_ms=5.0, p80_ms=5.5), row(variant="same", p20_ms=9.5, p50_ms=10.5, p80_ms=12.0)]
    faster, same = changes(old, new)
    assert (faster.verdict, same.verdict) == ("faster", "within noise")
    assert (faster.speedup, faster.low, faster.high) == (2.0, 9 / 5.5, 11 / 4.5)
    assert changes(new, old)[0].verdict == "slower"


def test_files_to_compare(tmp_path):
    append(tmp_path / "a", [row()])
    append(tmp_path / "b", [row(p50_ms=5.0)])
    append(tmp_path / "c", [row(threads=1)])
    (change,) = compare(f"{tmp_path / 'a'}", f"{tmp_path / 'b'}", "ops")
    assert change.speedup == 2.0
    with pytest.raises(InputError, match="no case in common on the same device"):
        compare(f"{tmp_path / 'a'}", f"{tmp_path / 'c'}", "ops")
    with pytest.raises(InputError, match="compare two files or two commits"):
        compare(f"{tmp_path / 'a'}", "main", "ops")
    with pytest.raises(InputError, match="nothing is neither a results file nor a commit"):
        compare("nothing", "nothing", "ops")


def test_exponents():
    assert steepness({1.0: 3.0, 2.0: 12.0, 4.0: 48.0, 8.0: 192.0}) == pytest.approx(2.0)
    assert steepness({1.0: 3.0, 2.0: 6.0, 4.0: 12.0, 8.0: 24.0, 16.0: 480.0}) == pytest.approx(1.0, abs=0.5)
    assert steepness({0.0: 1.0, 0.5: 2.0}) is None
    case = toy(axis="tokens", exponents=(0.8, 1.2))
    points = [
        row(suite="toy", name="sleep", shape="small", axis="tokens", variant=f"{x}", p50_ms=x**2.0) for x in (1, 2, 4)
    ]
    (curve,) = curves(points, [case])
    assert curve.exponent == pytest.approx(2.0)
    assert "p50_ms grows with tokens to the 2.00; accepted: 0.8 to 1.2" in curve.problem()
    assert curves(points)[0].problem() is None


@pytest.fixture
def floors_file(tmp_path):
    """Floors of 3.0 for two variants."""
    path = tmp_path / "floors.json"
    rows = [
        row(suite="toy", name="sleep", shape="small"),
        row(suite="toy", name="sleep", shape="small", variant="slow"),
    ]
    assert floors.update(Results(rows), [toy(ours=("fastcircuit",))], path) == 1
    return path


@pytest.mark.parametrize(
    ("ratio", "high", "doubtful", "dropped"),
    [(3.0, 3.2, False, False), (2.41, 2.5, False, False), (2.3, 2.5, True, False), (2.2, 2.35, True, True)],
)
def test_a_drop_is_one_beyond_noise(floors_file, ratio, high, doubtful, dropped):
    now = row(suite="toy", name="sleep", shape="small", ratio=ratio, ratio_high=high, p50_ms=1e9)
    (found,) = floors.check(Results([now]), floors_file)
    assert (found.floor, found.is_doubtful, found.has_dropped) == (3.0, doubtful, dropped)


def test_floors_are_a_machines_own(floors_file):
    with pytest.raises(InputError, match="there are no floors for avx512f, 4 threads; record them on a quiet machine"):
        floors.check(Results([row(cpu_flags="avx2 avx512f", threads=4)]), floors_file)
    floors.update(
        Results([dataclasses.replace(row(suite="toy", name="sleep", shape="small"), threads=4)]), [toy()], floors_file
    )
    assert len(floors._read(floors_file)) == 2


def test_pictures_of_what_there_is(tmp_path):
    work = {"flops": 10**9, "bytes": 10**8, "matmul_gflops": 200.0, "stream_gbs": 20.0}
    rows = [
        row(name="masked_read forward", **work),
        row(name="masked_read forward", variant="torch.addmm", ratio=1.0, **work),
        *(row(suite="scaling", axis="tokens", variant=f"{x}", shape="tokens: x", peak_bytes=x * 10**6) for x in (1, 2)),
        *(row(suite="scaling", axis="sparsity", variant=f"{x}", shape="sparsity: x") for x in (0, 0.5)),
        *(row(suite="inference", variant=name, bound=bound) for name, bound in (("fastcircuit", 5.0), ("sdpa", None))),
    ]
    drawn, missing = draw_all(rows, tmp_path)
    assert missing == {}
    assert {path.name for path in drawn} == {f"{name}.{kind}" for name in PICTURES for kind in ("svg", "png")}
    for path in drawn:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") if path.suffix == ".png" else b"cpu toy, 2 threads, avx2 fma" in data
    _, missing = draw_all(rows[-2:], tmp_path / "again")
    assert missing == {"roofline": "ops", "memory": "scaling", "sparsity": "scaling"}
    assert (tmp_path / "again" / "latency.svg").read_bytes() == (tmp_path / "latency.svg").read_bytes()


def test_pictures_are_of_the_device_that_was_measured_last(tmp_path):
    files = [
        row(suite="inference", device=f"cpu {name}", date=date)
        for name, date in (("new", "2026-02-01"), ("old", "2026-01-31"))
    ]
    draw_all(files, tmp_path)
    assert b"cpu new, 2 threads" in (tmp_path / "latency.svg").read_bytes()


def labels_of(axis):
    """Where its labels are drawn, those of x and of y, in order."""
    axis.figure.draw_without_rendering()
    low, high = axis.get_xlim()
    across = [label.get_window_extent() for at, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
              if low <= at <= high]  # fmt: skip
    return across, [label.get_window_extent() for label in axis.get_yticklabels()]


def test_pictures_of_many_cases_can_be_read():
    """Labels apart and in the figure, whatever the ratios, in no more than a page or two."""
    shapes = [f"GPT-2 small, {batch} x 16" for batch in (1, 8, 32)]
    names = [f"prefill, {heads} heads, 12 MLPs" for heads in range(6)]
    variants = ("fastcircuit", "fastcircuit, compiled", "sdpa", "eager", "sdpa, compiled")
    rows = [
        row(suite="inference", name=name, shape=shape, variant=variant, baseline="sdpa", ratio_high=9000.0)
        for name in names
        for shape in shapes
        for variant in variants
    ]
    for name, tallest in (("speedups", 6.0), ("latency", 9.0)):
        figure = PICTURES[name][1](rows)
        assert figure.get_figheight() < tallest
        (across, down), width = labels_of(figure.axes[0]), figure.bbox.width
        assert all(left.x1 < right.x0 for left, right in pairwise(across))
        assert all(not a.overlaps(b) for a, b in pairwise(down))
        assert all(label.x0 >= 0 and label.x1 <= width for label in across + down)
