"""``fastcircuit compare``."""

from fastcircuit.circuit import Circuit
from fastcircuit.graph import Graph


def test_compare_writes_intersection_and_union(run, answer):
    graph = Graph(2, 2, 1, "split")
    a, b = (Circuit.from_edges(graph, graph.edges[part]) for part in (slice(0, 6), slice(4, 9)))
    a.save("a.json")
    b.save("b.json")
    found = answer("compare", "a.json", "b.json", "--intersection", "both.json", "--union", "either.json")
    assert (found["first"], found["second"], found["intersection"], found["union"]) == (6, 5, 2, 9)
    assert Circuit.load("both.json") == a & b
    assert Circuit.load("either.json") == a | b
    code, out, err = run("compare", "a.json", "b.json")
    assert (code, err) == (0, "")
    assert "expected by chance" in out


def test_circuits_over_different_graphs_are_refused(refuses):
    Circuit.full(Graph(2, 2, 1, "split")).save("other.json")
    refuses("compare {run}/circuit.json other.json --union u.json", "over different graphs")


def test_circuits_are_run_on_tasks(shelf, finished, run, answer):
    whole = Circuit.full(Circuit.load(finished / "circuit.json").graph)
    whole.save("whole.json")
    arguments = ["compare", finished / "circuit.json", "whole.json", "--model", shelf / "gpt2"]
    rows = answer(*arguments, "--tasks", shelf / "pairs.jsonl")["tasks"]
    by = {row["circuit"]: row for row in rows}
    assert list(by) == ["full model", "circuit.json", "whole.json", "intersection", "union"]
    kls = Circuit.load(finished / "circuit.json").metrics["test"]["kl"]
    assert by["circuit.json"]["kl"] == by["intersection"]["kl"] == kls
    code, out, _ = run(*arguments, "--tasks", shelf / "pairs.jsonl")
    assert code == 0
    assert "intersection" in out


def test_tasks_want_a_model(refuses):
    refuses("compare {run}/circuit.json {run}/circuit.json --tasks ioi", "give both")
    refuses("compare {run}/circuit.json {run}/circuit.json --model {shelf}/gpt2 --tasks iou", "no task 'iou'")
