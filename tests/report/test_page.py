"""The page in a real headless Chromium: pointer, keyboard, filters, search, zoom, dark mode, hostile names."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_browser import chromium
from report_samples import GPT2, HOSTILE, STORIES, random_circuit

from fastcircuit.circuit import Circuit
from fastcircuit.report import draw

SMALL = random_circuit(GPT2, 40, model={"name": HOSTILE}, task="ioi")
GROUPED = random_circuit(STORIES, 40)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``opened(circuit)`` is the circuit's page; afterwards it must have asked for nothing and thrown nothing."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    requests: list[str] = []
    problems: list[str] = []

    def opener(circuit: Circuit, scheme: str = "light") -> Any:
        draw(circuit, tmp_path / "circuit.html")
        page = context.new_page()
        page.emulate_media(color_scheme=scheme)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto((tmp_path / "circuit.html").as_uri())
        return page

    yield opener
    context.close()
    assert not problems
    assert [url for url in requests if not url.startswith("file:")] == []


def node(page: Any, name: str) -> Any:
    return page.locator(f'g.node[aria-label^="{name},"]')


def listed(page: Any) -> set[str]:
    return set(page.locator("#panel li button").all_inner_texts())


def edges_at(circuit: Circuit, name: str) -> set[str]:
    into = {
        f"{writer} → {reader}"
        for writer, reader in circuit.edges
        if reader.startswith((f"{name}.", f"{name} ")) or reader == name
    }
    return into | {f"→ {reader}" for writer, reader in circuit.edges if writer == name}


def a_head(circuit: Circuit) -> str:
    return next(name for name in circuit.nodes if ".h" in name and not name.startswith("a0."))


def test_draws_every_edge_and_hostile_names_stay_text(opened: Callable[..., Any]) -> None:
    page = opened(SMALL)
    assert page.locator("#edges path").count() == SMALL.num_edges
    assert "</script><b>x</b>" in page.locator("h1").inner_text()
    assert page.locator("b").count() == 0


def test_hover_lists_and_lights_the_nodes_edges(opened: Callable[..., Any]) -> None:
    page, name = opened(SMALL), a_head(SMALL)
    node(page, name).hover()
    assert page.locator("#panel h2").inner_text() == name
    assert listed(page) == edges_at(SMALL, name)
    assert page.locator("#edges path.lit").count() == len(edges_at(SMALL, name))
    assert float(page.locator("#edges path:not(.lit)").first.evaluate("e => getComputedStyle(e).strokeOpacity")) < 0.1
    page.mouse.move(5, 5)
    assert page.locator("#edges path.lit").count() == 0


def test_click_pins_and_escape_lets_go(opened: Callable[..., Any]) -> None:
    page, name = opened(SMALL), a_head(SMALL)
    node(page, name).click()
    node(page, "resid_post").hover()
    assert page.locator("#panel h2").inner_text() == name
    page.keyboard.press("Escape")
    page.mouse.move(5, 5)
    assert page.locator("#panel h2").inner_text() == "Nothing selected"


def test_type_and_layer_filters(opened: Callable[..., Any]) -> None:
    page = opened(SMALL)
    page.uncheck("#types input[value=output]")
    rest = [edge for edge in SMALL.edges if edge[1] != "resid_post"]
    assert page.locator("#edges path").count() == len(rest)
    assert page.locator("#edges path.edge-output").count() == 0
    page.select_option("#from", "0")
    rest = [edge for edge in rest if "embeds" not in edge[0]]
    assert page.locator("#edges path").count() == len(rest)
    page.select_option("#to", "-1")
    assert "No edge" in page.locator("#notice").inner_text()
    page.click("button[type=reset]")
    page.wait_for_function(f"document.querySelectorAll('#edges path').length === {SMALL.num_edges}")


def test_search_marks_and_enter_goes_there(opened: Callable[..., Any]) -> None:
    page, name = opened(SMALL), a_head(SMALL)
    layer = name.partition(".")[0] + "."
    page.fill("#search", layer)
    assert page.locator(".node.hit").count() == len([n for n in SMALL.nodes if n.startswith(layer)])
    page.fill("#search", "nothing-like-it")
    assert page.locator("#found").inner_text() == "no nodes"
    page.fill("#search", f"{name}.q")  # a reader's name finds its node
    page.press("#search", "Enter")
    assert page.locator(".node.pinned").get_attribute("aria-label").startswith(name + ",")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"


def test_keyboard_walks_between_nodes_and_pins(opened: Callable[..., Any]) -> None:
    page = opened(SMALL)
    page.locator("#to").focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.getAttribute('aria-label').split(',')[0]"
    assert page.evaluate(focused) == "tok_embeds"
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) in SMALL.nodes[2:]
    page.keyboard.press("Enter")
    assert page.locator(".node.pinned").count() == 1
    assert listed(page)


def test_wheel_zooms_at_the_pointer_drag_pans_and_fit_returns(opened: Callable[..., Any]) -> None:
    page = opened(SMALL)
    whole = page.locator("#drawing").get_attribute("viewBox")
    box = node(page, "resid_post").bounding_box()
    at = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*at)
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"document.getElementById('drawing').getAttribute('viewBox') !== '{whole}'")
    now = node(page, "resid_post").bounding_box()
    assert now["width"] > 1.1 * box["width"]
    assert abs(now["x"] + now["width"] / 2 - at[0]) < 2
    page.mouse.move(40, 500)
    page.mouse.down()
    page.mouse.move(140, 540, steps=3)
    page.mouse.up()
    assert abs(node(page, "resid_post").bounding_box()["x"] - now["x"] - 100) < 2
    page.click("#fit")
    assert page.locator("#drawing").get_attribute("viewBox") == whole


def test_a_query_head_lists_the_keys_it_shares(opened: Callable[..., Any]) -> None:
    reader = next(reader for _, reader in GROUPED.edges if reader.endswith(".k"))
    layer, head = reader.split(".")[:2]
    page = opened(GROUPED)
    node(page, f"{layer}.kv{head[1:]}").hover()
    shared = listed(page)
    assert any(text.endswith(reader) for text in shared)
    about = page.locator("#panel p").first.inner_text()
    mate = about.partition("shared by ")[2].split(", ")[0]
    node(page, mate).hover()
    assert shared <= listed(page)


def test_dense_circuits_draw_one_node_at_a_time_and_say_so(opened: Callable[..., Any]) -> None:
    page = opened(Circuit.full(GPT2))
    assert page.locator("#edges path").count() == 0
    assert "too many" in page.locator("#notice").inner_text()
    node(page, "m11").hover()
    assert page.locator("#edges path").count() == 2 + 12 * 13 - 1 + 1
    page.select_option("#to", "1")
    page.mouse.move(5, 5)
    assert page.locator("#edges path").count() == 12 * 3 * 2 + 14 + 12 * 3 * 15 + 27


def test_dark_scheme_is_dark(opened: Callable[..., Any]) -> None:
    page = opened(SMALL, scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
    assert page.locator(".label").first.evaluate("e => getComputedStyle(e).fill") == "rgb(232, 236, 241)"


def test_labels_fit_their_boxes(opened: Callable[..., Any]) -> None:
    page = opened(GROUPED)
    script = """() => [...document.querySelectorAll('.node')].filter(node => {
        const box = node.querySelector('rect').getBBox(), text = node.querySelector('text').getBBox();
        return text.x < box.x + 2 || text.x + text.width > box.x + box.width - 2;
    }).length"""
    assert page.evaluate(script) == 0
