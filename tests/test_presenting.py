"""Tables and pictures of results."""

import pytest

from modular_t5.presenting import markdown_table, plot_curves


def test_a_markdown_table_lines_up():
    assert markdown_table(["a", "bb"], [["long", "1"]]) == "| a    | bb |\n|------|---:|\n| long |  1 |"


def test_curves(tmp_path):
    log = [{"step": step, "eval_2x3/2x3_loss": 1 / step} for step in (1, 2, 3)] + [{"step": 3, "train_loss": 0.5}]
    plot_curves(log, {"eval_2x3/2x3_loss": "2x3/2x3"}, tmp_path / "curves.png", title="A title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="there is no eval_3x2/3x2_loss in the log; it has eval_2x3/2x3_loss, step, train_loss"):
        plot_curves(log, {"eval_3x2/3x2_loss": "3x2/3x2"}, tmp_path / "curves.png")
