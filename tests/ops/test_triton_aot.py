"""Triton kernels compiled for GPUs that need not be here: the committed table, its bounds, and a part of it anew."""

import re

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import triton_aot as aot  # noqa: E402
from bench.cases import triton_launches  # noqa: E402

# Bytes a thread may spill (words on AMD), in configurations other than those compiled here.
MOST_SPILLED = 64
# What a release of Triton other than the table's may spill, in bytes (3.6: 80, where 3.9 spills nothing).
MOST_SPILLED_BY_ANOTHER = 128
# Registers a thread can address: NVIDIA's instructions have eight bits for one, CDNA's file two halves of 256.
MOST_REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
KEYS = ("arch", "launch", "source")


@pytest.fixture(scope="module")
def launches():
    return {arch: aot.all_launches(arch) for arch in aot.TARGETS}


def test_the_table_is_of_these_kernels(launches):
    """A kernel or a configuration that changed has to be compiled again: python -m bench.triton_aot."""
    expected = [aot.row(launch, arch) for arch in launches for launch in launches[arch].values()]
    assert [[row[key] for key in KEYS] for row in aot.table()] == [[row[key] for key in KEYS] for row in expected]


def test_little_spills_and_everything_fits():
    for row in aot.table():
        assert int(row["shared"]) <= aot.SHARED_LIMIT[row["arch"]], row
        assert int(row["spills"]) <= MOST_SPILLED, row
        assert int(row["registers"]) <= MOST_REGISTERS[row["arch"]], row


def test_products_spill_nothing():
    rows = [row for row in aot.table() if row["launch"].startswith("product ")]
    assert {row["arch"] for row in rows} == set(aot.TARGETS)
    assert {row["spills"] for row in rows} == {"0"}


def test_half_precisions_run_on_the_tensor_cores():
    for row in aot.table():
        if re.match(r"(read|row_products|backward|product) \*(bf|fp)16", row["launch"]):
            assert row["units"] != "vector", row


def test_every_tile_is_compiled(launches):
    from fastcircuit_kernels import live_product
    from fastcircuit_kernels import masked_read as kernels

    told = [launch.constants | launch.options for launch in launches["sm_90"].values()]
    tables = (kernels.READS, "BK"), (kernels.PRODUCTS, "BK"), (kernels.BACKWARDS, "BW"), (live_product.TILES, "BK")
    for table, summed in tables:
        for tile in {tile for tiles in table.values() for tile in tiles}:
            wanted = {"BM": tile.rows, summed: tile.inner, "BN": tile.columns, "num_warps": tile.num_warps}
            assert any(wanted.items() <= one.items() for one in told), tile


@pytest.mark.parametrize("arch", aot.TARGETS)
def test_compiling_again_gives_the_table(launches, arch):
    """What GPT-2 small is trained with in bfloat16: every op for sm_90, the masked read for the others."""
    table = {row["launch"]: row for row in aot.table() if row["arch"] == arch}
    names = triton_launches.MAIN if arch == "sm_90" else triton_launches.MAIN[:1]
    chosen = aot.all_launches(arch, {name: triton_launches.calls(False)[name] for name in names})
    for launch in chosen.values():
        compiled = aot.compile_for(launch, arch)
        _assert_addresses_are_64_bit(compiled.asm["ttir"])
        found, row = aot.usage(compiled), table[launch.name]
        of_this_triton = row["triton"] == triton.__version__
        assert found["shared"] <= aot.SHARED_LIMIT[arch]
        assert found["spills"] <= (0 if of_this_triton else MOST_SPILLED_BY_ANOTHER)
        assert found["registers"] <= MOST_REGISTERS[arch]
        if of_this_triton:
            assert {key: str(value) for key, value in found.items()} == {key: row[key] for key in found}


def _assert_addresses_are_64_bit(ttir):
    """Every offset that grows with the data is a 64-bit one; constants and arguments are as wide as they need to be."""
    known = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    known.update(re.findall(r"(%\w+): i32", re.search(r"tt\.func public .*", ttir)[0]))
    offsets = re.findall(r"tt\.addptr \S+, (\S+) : .*, (\S+) loc", ttir)
    assert offsets
    for name, kind in offsets:
        assert "i64" in kind or name in known, (name, kind)
