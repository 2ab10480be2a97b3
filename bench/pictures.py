"""python -m bench.pictures: writes docs/img/*.svg from bench/results (pip install '.[bench]').

Each file has the numbers that it shows as JSON in its metadata, for tests/test_pictures.py. The same numbers give the same
bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

from . import figures

STYLE = {
    "svg.hashsalt": "pcp-mla",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "axes.edgecolor": "#888888",
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "figure.facecolor": "white",  # opaque, so that pages with a dark background show it as it is
    "savefig.facecolor": "white",
    "legend.frameon": False,
}
COLOURS = {
    "seed path": "#8c8c8c",
    "virtual rows": "#d98719",
    "pcp-mla": "#1c63b7",
    "pcp-mla, collective": "#7fb0e6",
    "pcp-mla, peers": "#1c63b7",
    "vLLM, PCP 2": "#8c8c8c",
    "with pcp-mla": "#1c63b7",
    "vLLM, TP 2": "#d98719",
    "copy": "#4c9a6a",
    "GEMM": "#1c63b7",
    "FlashAttention 3": "#d98719",
    "attention": "#1c63b7",
    "collective": "#c2504a",
    "exchange": "#d98719",
    "up-projection": "#4c9a6a",
    "copies and indices": "#8c8c8c",
}


def thousands(value: float, _: Any = None) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def curves(shown: dict[str, Any], what: str, before: str, after: str) -> Any:
    """A panel a case, both axes logarithmic; above each point of ``before`` how many times as long it takes as ``after``."""
    figure, axes = plt.subplots(1, len(shown["panels"]), figsize=(8.6, 3.6), sharey=True)
    for axis, (title, series) in zip(axes, shown["panels"].items(), strict=True):
        for name, points in series.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLOURS[name], label=name)
        for (x, slow), (_, fast) in zip(series[before], series[after], strict=True):
            label = f"{slow / fast:.2f}x"
            axis.annotate(label, (x, slow), (-3, 7), textcoords="offset points", ha="center", fontsize=8, color=COLOURS[after])
        axis.set(xscale="log", yscale="log", title=title, xlabel="tokens")
        axis.set_xticks([x for x, _ in series[after]])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(thousands))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.margins(x=0.08, y=0.12)
    axes[0].set_ylabel(what)
    axes[-1].legend(loc="lower right")
    return figure


def layer(shown: dict[str, Any]) -> Any:
    return curves(shown, "one layer, 16 heads: GPU time, µs", "seed path", "pcp-mla")


def ttft(shown: dict[str, Any]) -> Any:
    return curves(shown, "time to first token, ms", "vLLM, PCP 2", "with pcp-mla")


def shares(shown: dict[str, Any]) -> Any:
    bars = shown["bars"][::-1]
    figure, axis = plt.subplots(figsize=(8.6, 0.27 * len(bars) + 1.1))
    for place, bar in enumerate(bars):
        axis.barh(place, 100 * bar["share"], color=COLOURS[bar["of"]], height=0.66)
        axis.text(100 * bar["share"] + 1, place, f"{bar['share']:.0%}  ({bar['us']:.0f} µs)", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [bar["op"] for bar in bars])
    axis.set(xlim=(0, 125), xticks=range(0, 101, 20), xlabel="rate, %")
    axis.grid(axis="y", visible=False)
    meant = {"copy": "a copy of its bytes", "GEMM": "the matrix product alone"}
    for name in ("copy", "GEMM", "FlashAttention 3"):
        axis.barh(0, 0, color=COLOURS[name], label=f"of {meant.get(name, name)}")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return figure


def efficiency(shown: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(8.6, 3.2))
    width = 0.8 / len(shown["bars"])
    for number, (name, values) in enumerate(shown["bars"].items()):
        places = [x + (number - (len(shown["bars"]) - 1) / 2) * width for x in range(len(values))]
        axis.bar(places, values, width, color=COLOURS[name], label=name)
        for x, value in zip(places, values, strict=True):
            axis.text(x, value + 0.01, f"{value:.2f}", ha="center", fontsize=6.5)
    axis.set_xticks(range(len(shown["tokens"])), [f"{name} tokens" for name in shown["tokens"]])
    axis.set(ylim=(0, 1.28), yticks=[0, 0.25, 0.5, 0.75, 1], ylabel="ours on one GPU / (2 x time on two)")
    axis.grid(axis="x", visible=False)
    axis.legend(ncols=4, loc="upper left")
    return figure


def timeline(shown: dict[str, Any]) -> Any:
    """A lane a path, one above the other, over the same time."""
    paths = shown["paths"]
    figure, axis = plt.subplots(figsize=(8.6, 0.62 * len(paths) + 1.1))
    for place, path in enumerate(reversed(paths.values())):
        axis.barh(place, path["us"], color="#f0f0f0", height=0.62)
        for what, start, length in path["spans"]:
            axis.barh(place, length, left=start, color=COLOURS[what], height=0.62, linewidth=0)
        axis.text(path["us"], place, f" {len(path['spans'])} launches, {path['us']:.0f} µs", va="center", fontsize=8)
    axis.set_yticks(range(len(paths)), list(paths)[::-1])
    axis.set(xlim=(0, 1.25 * max(path["us"] for path in paths.values())), xlabel="µs since both ranks were ready, GPU of rank 0")
    axis.grid(axis="y", visible=False)
    for what in figures.KINDS:
        axis.barh(0, 0, color=COLOURS[what], label=what)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(figures.KINDS), fontsize=8, columnspacing=1.2, handlelength=1.2)
    return figure


DRAWN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "layer": layer,
    "shares": shares,
    "ttft": ttft,
    "efficiency": efficiency,
    "timeline": timeline,
}


def draw(name: str, shown: dict[str, Any], folder: Path) -> None:
    """FOLDER/<name>.svg."""
    with plt.rc_context(STYLE):
        figure = DRAWN[name](shown)
        figure.text(0.995, 0.005, shown["source"], ha="right", va="bottom", fontsize=6.5, color="#777777")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        about = {"Date": None, "Creator": None, "Format": None, "Type": None, "Description": json.dumps(shown)}
        figure.savefig(folder / f"{name}.svg", metadata=about)
        plt.close(figure)


if __name__ == "__main__":
    figures.IMAGES.mkdir(exist_ok=True)
    for name, shown in figures.numbers():
        draw(name, shown, figures.IMAGES)
