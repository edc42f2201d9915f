"""Pictures of simulated runs, as SVG: who was on which GPU when, and how long requests waited.

matplotlib draws them; it is an optional extra and imported only when pictures are asked for. The same runs give the
same files, byte for byte, with one release of matplotlib, whatever its settings on this account are.
"""

from __future__ import annotations

import colorsys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scheduler.errors import Rejected
from scheduler.simulation.report import Played, first_tokens_s, waits_s
from scheduler.simulation.simulator import Occupation, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scheduler.units import DeviceId

Color = tuple[float, float, float]
Span = tuple[float, float]
"""From and to, in seconds from the start."""

WIDTH_IN = 11.0
_LEAST_S = 0.01
"""Where the logarithmic time axis begins; what is shorter is drawn there."""
_FEW_COLORS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #17becf #bcbd22 #636363".split()
_LINES = ("-", "--", ":", "-.")
_STEPS = 2000
"""Times are drawn to one in so many parts of the axis, however long the trace; what is shorter is still seen."""
_SETTINGS = {
    "svg.hashsalt": "arriero",
    "svg.fonttype": "path",
    "text.parse_math": False,  # names may hold dollars
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def require_matplotlib() -> None:
    """Raises Rejected that says how to install it where it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise Rejected(f"pictures are drawn by matplotlib ({error}); install it with: pip install matplotlib") from None


def write_plots(folder: Path, played: Sequence[Played], models: Sequence[str]) -> list[Path]:
    """Write `occupancy-RUN.svg` for each run and `times.svg` for all; `models` in the order of their colours.

    Returns the files. Raises Rejected when one cannot be written.
    """
    colors = dict(zip(models, _colors(len(models)), strict=True))
    with _settings():
        pictures = {f"occupancy-{_in_a_file(each)}.svg": occupancy(each, colors) for each in played}
        pictures["times.svg"] = times(played)
        files = []
        for name, figure in pictures.items():
            files.append(folder / name)
            try:
                figure.savefig(files[-1], format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.15)
            except OSError as error:
                raise Rejected(f"{files[-1]}: {error.strerror or error}") from None
    return files


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def _in_a_file(played: Played) -> str:
    cluster = played.cluster.replace("/", "-")
    return f"{cluster}-{played.policy}" if cluster else played.policy


def _printable(text: str, most: int = 40) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


# ---------------------------------------------------------------------- who was on which GPU


def occupancy(played: Played, colors: Mapping[str, Color]) -> Figure:
    """A row per GPU, with a lane for each replica that is on it at the same time. Bars are pale while the replica is
    only loaded, and strong where it answers."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke

    run, end_s = played.run, max(played.run.duration_s, 1.0)
    there: dict[DeviceId, list[Occupation]] = {gpu: [] for gpu in run.gpus}
    for occupation in run.occupations:
        if occupation.from_s < end_s:
            there[occupation.gpu].append(occupation)
    lanes = {gpu: _lanes(found) for gpu, found in there.items()}
    n_lanes = sum(max(1, len(each)) for each in lanes.values())
    lane_in = min(0.24, max(0.05, 40.0 / max(1, n_lanes)))
    figure = Figure(figsize=(WIDTH_IN, max(1.0, lane_in * (n_lanes + 0.6 * len(lanes)))))
    axes = figure.add_subplot()
    unit_s, unit = _unit(end_s)
    labels, ticks, top, size = [], [], 0.0, min(7.0, lane_in * 72 * 0.5)
    for number, (gpu, found) in enumerate(lanes.items()):
        rows = max(1, len(found))
        if number % 2 == 0:
            axes.axhspan(top - 0.3, top + rows + 0.3, color="0.96", linewidth=0, zorder=0)
        ticks.append(top + rows / 2)
        labels.append(_printable(f"{gpu.replace('/', ' ')}  {played.cards.get(gpu, '')}".strip()))
        for lane, occupations in enumerate(found):
            _bars(axes, occupations, (top + lane + 0.06, 0.88), colors, end_s, unit_s)
            for each in occupations if size >= 5 else ():
                width_in = (min(each.to_s, end_s) - each.from_s) / end_s * WIDTH_IN * 0.75
                if width_in > size / 72 * 0.62 * (len(each.model) + 1):
                    middle = (each.from_s + min(each.to_s, end_s)) / 2 / unit_s
                    text = axes.text(
                        middle, top + lane + 0.52, each.model, ha="center", va="center", size=size, color="0.1"
                    )
                    text.set_path_effects([withStroke(linewidth=1.6, foreground="white", alpha=0.85)])
        top += rows + 0.6
    axes.set_yticks(ticks, labels, size=min(8.5, max(4.0, lane_in * 72)))
    axes.set_ylim(max(1.0, top) - 0.3, -0.3)
    axes.set_xlim(0, end_s / unit_s)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"time since the trace began ({unit})")
    axes.grid(axis="x", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"Replicas on GPUs: {_printable(played.name, 80)}", loc="left")
    if not lanes:
        axes.text(0.5, 0.5, "this cluster has no GPUs", ha="center", va="center", transform=axes.transAxes)
    seen = {occupation.model for found in there.values() for occupation in found}
    keys = [Patch(facecolor=color, label=_printable(name)) for name, color in colors.items() if name in seen]
    keys += [Patch(facecolor="0.8", label="pale: loaded"), Patch(facecolor="0.35", label="strong: answers")]
    _legend_below(figure, axes, keys)
    return figure


def _bars(
    axes: Axes,
    occupations: Iterable[Occupation],
    place: tuple[float, float],
    colors: Mapping[str, Color],
    end_s: float,
    unit_s: float,
) -> None:
    """The replicas of one lane; `place` is its lower edge and its height."""
    by_model: dict[str, list[Occupation]] = defaultdict(list)
    for each in occupations:
        by_model[each.model].append(each)
    least_s = end_s / _STEPS
    for model, found in by_model.items():
        color = colors[model]
        pale: Color = tuple(0.35 * part + 0.65 for part in color)  # type: ignore[assignment]
        spans = _merged(((each.from_s, min(each.to_s, end_s)) for each in found), least_s / 4)
        busy = _merged((span for each in found for span in each.busy), least_s)
        for parts, fill, edge_pt in ((spans, pale, 0.4), (busy, color, 0.0)):
            bars = [(begin / unit_s, max(end - begin, 2 * least_s) / unit_s) for begin, end in parts]
            axes.broken_barh(bars, place, facecolor=fill, edgecolor=color, linewidth=edge_pt)


def _lanes(occupations: Iterable[Occupation]) -> list[list[Occupation]]:
    """Replicas in as few lanes as hold them without overlap, each in the first that is free."""
    lanes: list[list[Occupation]] = []
    for each in sorted(occupations, key=lambda each: (each.from_s, each.to_s, each.model)):
        for lane in lanes:
            if lane[-1].to_s <= each.from_s + 1e-6:
                lane.append(each)
                break
        else:
            lanes.append([each])
    return lanes


def _merged(spans: Iterable[Span], gap_s: float) -> list[Span]:
    """In order of time, with no overlap; spans no more than `gap_s` apart are one."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1] + gap_s:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


# ---------------------------------------------------------------------- how long requests waited


def times(played: Sequence[Played]) -> Figure:
    """The share of all requests that waited no longer than so many seconds, for a slot and for the first token.

    Requests that were refused never got there: the curve of a run that refused some ends below 100%.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(WIDTH_IN, 4.2), layout="constrained")
    panels: list[tuple[Axes, str, Callable[[Run], list[float]]]] = [
        (figure.add_subplot(1, 2, 1), "Wait for a slot", waits_s),
        (figure.add_subplot(1, 2, 2), "Time to the first token", first_tokens_s),
    ]
    clusters = list(dict.fromkeys(each.cluster for each in played))
    policies = list(dict.fromkeys(each.policy for each in played))
    colors = _colors(max(len(clusters), len(policies)))
    lines: list[Any] = []
    for axes, title, seconds in panels:
        lines = []
        longest_s = 1.0
        for each in played:
            policy = policies.index(each.policy)
            color = colors[clusters.index(each.cluster) if len(clusters) > 1 else policy]
            xs, ys = _curve(seconds(each.run), len(each.run.outcomes))
            longest_s = max(longest_s, *xs)
            lines += axes.step(
                xs, ys, where="post", label=_printable(each.name, 60), color=color,
                linestyle=_LINES[policy % len(_LINES)], linewidth=1.6 if policy else 2.8, alpha=1 if policy else 0.5,
            )  # fmt: skip
        for line in lines:  # on to the edge: nobody waited longer
            line.set_data([*line.get_xdata(), longest_s * 1.3], [*line.get_ydata(), line.get_ydata()[-1]])
        axes.set_xscale("log")
        axes.set_xlim(_LEAST_S, longest_s * 1.3)
        axes.set_ylim(0, 101)
        axes.set_yticks([0, 25, 50, 75, 95, 100])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"≤ {s:g}" if s <= _LEAST_S else f"{s:,.10g}"))
        axes.grid(color="0.88", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left")
        axes.set_xlabel("seconds since the request came")
    panels[0][0].set_ylabel("requests that waited no longer (%)")
    columns = _columns(line.get_label() for line in lines)
    if 1 < len(clusters) <= columns:  # a column for each
        columns = len(clusters)
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, handlelength=3)
    return figure


def _curve(seconds: Sequence[float], n_requests: int) -> tuple[list[float], list[float]]:
    """Steps of the cumulative curve: seconds, and per cent of `n_requests`."""
    ordered = sorted(max(each, _LEAST_S) for each in seconds)
    stride = max(1, len(ordered) // _STEPS)
    kept = [*range(stride - 1, len(ordered), stride)]
    if ordered and kept[-1] != len(ordered) - 1:
        kept.append(len(ordered) - 1)
    return [_LEAST_S, *(ordered[i] for i in kept)], [0.0, *(100 * (i + 1) / n_requests for i in kept)]


# ---------------------------------------------------------------------- colours, units, legends


def _colors(count: int) -> list[Color]:
    """Ten that are told apart easily; beyond, hues around the circle in three shades."""
    if count <= len(_FEW_COLORS):
        return [_rgb(code) for code in _FEW_COLORS[:count]]
    shades = ((0.42, 0.75), (0.58, 0.6), (0.3, 0.55))
    return [colorsys.hls_to_rgb(i / count, *shades[i % len(shades)]) for i in range(count)]


def _rgb(code: str) -> Color:
    red, green, blue = (int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _unit(longest_s: float) -> tuple[float, str]:
    """A unit in which so long a time is a handy number: its seconds, and its name."""
    for unit_s, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if longest_s > 3 * unit_s:
            return unit_s, name
    return 1.0, "seconds"


def _columns(labels: Iterable[object]) -> int:
    """Of a legend below a picture."""
    return max(1, min(8, int(WIDTH_IN * 12 / (6 + max((len(str(label)) for label in labels), default=1)))))


def _legend_below(figure: Figure, axes: Axes, keys: list[Any]) -> None:
    below = -0.5 / (figure.get_size_inches()[1] * 0.77)  # half an inch, in heights of the axes
    columns = _columns(key.get_label() for key in keys)
    axes.legend(handles=keys, loc="upper left", bbox_to_anchor=(0, below), ncols=columns, borderaxespad=0)
