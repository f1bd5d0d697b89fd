from __future__ import annotations

from unisono.report.figure import Figure


def test_a_figure_without_colours_of_the_theme_has_the_legend_that_plotly_draws() -> None:
    named = [{"name": "a", "line": {"color": "--blue"}}, {"name": "b", "marker": {"color": "--red"}}]
    ours = Figure(data=named, layout={})
    assert ours.legend() == [("--blue", "a"), ("--red", "b")]
    assert ours.as_json()["layout"] == {"showlegend": False}
    for colour in (None, "red", "--red);background:url(//evil)", 3):
        theirs = Figure(data=[named[0], {"name": "b", "marker": {"color": colour}}], layout={})
        assert theirs.legend() == []
        assert theirs.as_json()["layout"] == {}
