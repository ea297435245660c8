"""``fastcircuit info``."""

import torch


def test_info(run, answer):
    found = answer("info")
    assert set(found) == {"versions", "devices", "backends", "instruction_sets", "architectures", "models", "tasks"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["reference"] is None
    code, out, err = run("info")
    assert (code, err) == (0, "")
    assert all(name in out for name in (*found["models"], *found["tasks"]))
