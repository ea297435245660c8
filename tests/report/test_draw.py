"""Drawings: what the layout promises, and that each format holds what it should."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from itertools import combinations
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from report_samples import GPT2, HOSTILE, STORIES, random_circuit

from fastcircuit.circuit import Circuit
from fastcircuit.errors import InputError
from fastcircuit.graph import Graph
from fastcircuit.report import draw
from fastcircuit.report.components import READER_KINDS
from fastcircuit.report.layout import Layout
from fastcircuit.report.layout import layout as fresh_layout
from fastcircuit.report.page import _script_safe
from fastcircuit.report.placement import Links, place
from fastcircuit.report.style import DARK, LIGHT, edge_style

SVG = "{http://www.w3.org/2000/svg}"
ABOUT = {"model": {"name": "gpt2"}, "task": "ioi", "metrics": {"test": {"kl": 0.21, "accuracy": 0.89}, "seconds": 3.0}}
CIRCUITS = {
    "stories": random_circuit(STORIES, 30, **ABOUT),
    "stories-many": random_circuit(STORIES, 500),
    "gpt2": random_circuit(GPT2, 30, **ABOUT),
    "gpt2-many": random_circuit(GPT2, 500),
    "no-embeddings": random_circuit(Graph(3, 4, 1, "none"), 12),
    "unpruned": Circuit(STORIES, np.random.default_rng(0).random(STORIES.num_edges) < 0.02),
    "empty": Circuit(STORIES, np.zeros(STORIES.num_edges, dtype=bool)),
    "one-head": Circuit.full(Graph(1, 1, 1, "joint")),
}


@pytest.fixture(params=CIRCUITS)
def circuit(request: pytest.FixtureRequest) -> Circuit:
    return CIRCUITS[request.param]


@cache
def layout(circuit: Circuit) -> Layout:
    """One layout serves all the tests that only look at it."""
    return fresh_layout(circuit)


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


class TestLayout:
    def test_nodes_do_not_overlap_and_lie_inside(self, circuit: Circuit) -> None:
        placed = layout(circuit)
        assert not [(a.name, b.name) for a, b in combinations(placed.nodes, 2) if overlap(a.box, b.box)]
        for left, top, right, bottom in (node.box for node in placed.nodes):
            assert 0 <= left < right <= placed.width
            assert 0 <= top < bottom <= placed.height

    def test_every_edge_once_between_the_right_nodes(self, circuit: Circuit) -> None:
        placed = layout(circuit)
        assert placed.edges.ids.tolist() == np.flatnonzero(circuit.keep).tolist()
        ends = zip(placed.edges.writer, placed.edges.reader, circuit.edges, strict=True)
        for writer, reader, (writer_name, reader_name) in ends:
            assert placed.nodes[writer].name == writer_name
            assert reader_name in placed.nodes[reader].readers

    def test_edges_climb_from_their_writer_to_their_port(self, circuit: Circuit) -> None:
        placed = layout(circuit)
        for index, curve in enumerate(placed.edges.curves):
            writer, reader = placed.nodes[placed.edges.writer[index]], placed.nodes[placed.edges.reader[index]]
            port = dict(reader.ports)[READER_KINDS[placed.edges.kind[index]]]
            np.testing.assert_allclose(curve[0], [writer.x, writer.box[1]])
            np.testing.assert_allclose(curve[3], [port, reader.box[3]])
            assert (np.diff(curve[:, 1]) < 0).all()

    def test_rows_go_up_with_the_layers(self, circuit: Circuit) -> None:
        placed = layout(circuit)
        heights = sorted({(node.layer, node.kind == "mlp", -node.y) for node in placed.nodes if node.kind != "mlp"})
        assert [height for *_, height in heights] == sorted(height for *_, height in heights)
        rows = {(node.layer, node.kind == "mlp"): node.y for node in placed.nodes}
        assert [rows[key] for key in sorted(rows)] == sorted(rows.values(), reverse=True)
        for node in placed.nodes:
            band = next(band for band in placed.bands if band.layer == node.layer)
            assert band.top < node.box[1] < node.box[3] < band.bottom

    def test_untouched_components_are_left_out_but_for_an_empty_circuit(self) -> None:
        names = {node.name for node in layout(CIRCUITS["gpt2"]).nodes}
        assert names == set(CIRCUITS["gpt2"].nodes) | {"tok_embeds", "pos_embeds", "resid_post"}
        assert len(layout(CIRCUITS["empty"]).nodes) == 1 + 5 * (8 + 4 + 1) + 1

    def test_a_shared_key_lands_on_its_key_value_node_beside_its_heads(self) -> None:
        edges = [("embeds", "a1.h1.k"), ("a1.h3", "resid_post"), ("a1.h2", "resid_post"), ("embeds", "a1.h2.q")]
        placed = layout(Circuit.from_edges(STORIES, edges))
        (group,) = placed.groups
        assert [placed.nodes[member].name for member in group] == ["a1.kv1", "a1.h2", "a1.h3"]
        assert dict(placed.nodes[group[0]].ports).keys() == {"k"}
        assert not overlap(placed.nodes[group[0]].box, placed.nodes[group[1]].box)

    def test_sweeps_untangle_what_can_be_untangled(self) -> None:
        scrambled = np.random.default_rng(0).permutation(8)
        none = np.zeros(8)
        links = Links(np.arange(8), 8 + scrambled, none, none)
        x = place([list(range(8)), list(range(8, 16))], np.full(16, 40.0), links, 0.0, (10.0, 10.0))
        assert (np.diff(x[8 + scrambled]) * np.diff(x[:8]) > 0).all()

    def test_sparse_circuits_keep_lines_off_nodes(self) -> None:
        placed = layout(CIRCUITS["gpt2"])
        t = np.linspace(0, 1, 60)[:, None]
        behind = 0
        for index, (a, b, c, d) in enumerate(placed.edges.curves):
            points = (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d
            ends = (placed.edges.writer[index], placed.edges.reader[index])
            others = [node.box for number, node in enumerate(placed.nodes) if number not in ends]
            behind += any(((points > box[:2]) & (points < box[2:])).all(axis=1).any() for box in others)
        assert behind <= 0.1 * len(placed.edges)

    def test_same_circuit_same_drawing(self) -> None:
        first, second = fresh_layout(CIRCUITS["stories"]), fresh_layout(CIRCUITS["stories"])
        assert first.nodes == second.nodes
        assert np.array_equal(first.edges.curves, second.edges.curves)


def read_svg(circuit: Circuit, folder: Path, **options: object) -> ElementTree.Element:
    draw(circuit, folder / "c.svg", **options)
    return ElementTree.parse(folder / "c.svg").getroot()


def paths(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [path for path in root.iter(f"{SVG}path") if "legend-line" not in path.get("class", "")]


def words(root: ElementTree.Element) -> str:
    return " ".join("".join(text.itertext()) for text in root.iter(f"{SVG}text"))


class TestSvg:
    def test_one_path_per_edge_with_its_name(self, circuit: Circuit, tmp_path: Path) -> None:
        names = [path.findtext(f"{SVG}title") for path in paths(read_svg(circuit, tmp_path))]
        assert names == [f"{writer} → {reader}" for writer, reader in circuit.edges]

    def test_has_a_title_a_description_and_a_caption(self, tmp_path: Path) -> None:
        root = read_svg(CIRCUITS["gpt2"], tmp_path)
        assert root.findtext(f"{SVG}title") == "ioi in gpt2"
        size = f"{CIRCUITS['gpt2'].num_edges} of 32,936 edges"
        assert size in (root.findtext(f"{SVG}desc") or "")
        for part in ("ioi in gpt2", size, "interchange", "test: kl 0.21 · accuracy 0.89"):
            assert part in words(root)
        assert "seconds" not in words(root)

    def test_the_caption_says_when_the_output_bias_is_kept(self, tmp_path: Path) -> None:
        circuit = dataclasses.replace(CIRCUITS["stories"], ablation="zero", output_bias="kept")
        assert "zero ablation, output bias kept" in words(read_svg(circuit, tmp_path))

    def test_empty_circuit_says_so(self, tmp_path: Path) -> None:
        assert "no edges" in words(read_svg(CIRCUITS["empty"], tmp_path))

    def test_weights_make_lines_thicker(self, tmp_path: Path) -> None:
        circuit = CIRCUITS["gpt2"]
        weights = np.zeros(GPT2.num_edges)
        weights[np.flatnonzero(circuit.keep)[3]] = -2.0
        widths = [float(path.get("stroke-width", "0")) for path in paths(read_svg(circuit, tmp_path, weights=weights))]
        assert widths[3] == max(widths) > 2 * widths[0]

    def test_full_gpt2_is_drawn_and_called_dense(self, tmp_path: Path) -> None:
        root = read_svg(Circuit.full(GPT2), tmp_path)
        assert len(paths(root)) == 32936
        assert "Dense" in words(root)

    def test_odd_names_are_only_text(self, tmp_path: Path) -> None:
        root = read_svg(Circuit(GPT2, CIRCUITS["gpt2"].keep, {"name": HOSTILE}, task="a" * 5000), tmp_path)
        assert "</script><b>x</b>" in words(root)
        assert not list(root.iter(f"{SVG}script"))
        assert len(words(root)) < 6000


class TestPng:
    @pytest.mark.parametrize("name", ["stories", "empty"])
    def test_is_a_picture_of_the_scene(self, name: str, tmp_path: Path) -> None:
        draw(CIRCUITS[name], tmp_path / "c.png")
        image = matplotlib.image.imread(tmp_path / "c.png")
        height, width = image.shape[:2]
        placed = layout(CIRCUITS[name])
        assert 2 * placed.width < width < 2 * placed.width + 100
        assert 2 * placed.height < height < 2 * placed.height + 400
        assert 0.01 < (image[..., :3] < 0.9).any(axis=2).mean() < 0.6
        border = np.concatenate([image[:8].reshape(-1, 4), image[-8:].reshape(-1, 4)])
        assert (border[:, :3] == 1).all(), "something is clipped at the edge"

    def test_odd_names_are_no_formulas(self, tmp_path: Path) -> None:
        draw(Circuit(GPT2, CIRCUITS["gpt2"].keep, {"name": HOSTILE + " $\\frac{$ 模型"}), tmp_path / "c.png")


class TestPage:
    def test_hostile_names_cannot_leave_their_place(self, tmp_path: Path) -> None:
        draw(Circuit(GPT2, CIRCUITS["gpt2"].keep, {"name": HOSTILE}), tmp_path / "c.html")
        text = (tmp_path / "c.html").read_text(encoding="utf-8")
        assert text.count("</script>") == 2
        assert "<b>" not in text
        assert "${" not in re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL).replace("${name}", "")

    def test_data_cannot_end_its_script(self) -> None:
        text = _script_safe({"name": "</script><!--<b>&"})
        assert not set("<>&") & set(text)
        assert json.loads(text) == {"name": "</script><!--<b>&"}

    def test_holds_every_edge_and_asks_for_nothing(self, tmp_path: Path) -> None:
        draw(CIRCUITS["gpt2-many"], tmp_path / "c.html")
        text = (tmp_path / "c.html").read_text(encoding="utf-8")
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
        assert found is not None
        data = json.loads(found[1])
        edges = [
            (data["nodes"][writer]["name"], data["readers"][reader]["name"])
            for writer, reader in zip(data["edges"]["writer"], data["edges"]["reader"], strict=True)
        ]
        assert edges == CIRCUITS["gpt2-many"].edges
        assert not re.search(r"(src|href)=|url\(|@import|fetch\(", text)


class TestInput:
    @pytest.mark.parametrize("name", ["c.pdf", "c", "svg"])
    def test_other_suffixes_name_the_accepted_ones(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"\.svg, \.png, \.html"):
            draw(CIRCUITS["gpt2"], tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_weights_must_fit_the_graph(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="32936"):
            draw(CIRCUITS["gpt2"], tmp_path / "c.svg", weights=[1.0])

    def test_too_many_edges_to_draw(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="draw a sparser one"):
            draw(Circuit.full(Graph(24, 16, 16)), tmp_path / "c.svg")


def test_lines_thin_out_but_never_vanish() -> None:
    styles = [edge_style(count) for count in (0, 30, 500, 5000, 100_000)]
    assert styles == sorted(styles, reverse=True)
    assert styles[-1] >= (0.4, 0.06)


# Severity-1 matrices of Machado, Oliveira and Fernandes (2009), on linear RGB.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_reader_colours_differ_to_the_colour_blind(palette: dict[str, str], blindness: str) -> None:
    colours = []
    for kind in READER_KINDS:
        srgb = np.array([int(palette[kind][at : at + 2], 16) / 255 for at in (1, 3, 5)])
        linear = np.clip(
            np.array(BLINDNESS[blindness]) @ np.where(srgb > 0.04045, ((srgb + 0.055) / 1.055) ** 2.4, srgb / 12.92),
            0,
            1,
        )
        colours.append(_lab(linear))
    assert min(np.linalg.norm(a - b) for a, b in combinations(colours, 2)) > 12  # 2.3 is just noticeable


def _lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
