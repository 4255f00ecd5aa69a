"""A run's curves as pictures: matplotlib without a display, loaded when the first one is drawn."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN, EVAL, GREY = "#2f6fb3", "#d97706", "#6b7280"
# Text becomes outlines, so that a picture looks the same on every machine; nothing in the file depends on the hour.
_STYLE: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "einkorn",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": GREY,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
}
SMOOTH_FROM = 40  # with more points, the curve is shown as it is (pale) and smoothed


def series(events: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the events that have the number `name`."""
    found = [(event["step"], event[name]) for event in events if isinstance(event.get(name), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over about a twentieth of the curve around each point, as far to either side, so that nothing moves."""
    last, reach = len(values) - 1, max(1, len(values) // 40)
    means = []
    for i in range(len(values)):
        side = min(reach, i, last - i)
        means.append(sum(values[i - side : i + side + 1]) / (2 * side + 1))
    return means


def loss_chart(events: Sequence[dict[str, Any]]) -> "Figure | None":
    """Training and evaluation loss over steps, or None where neither was logged."""
    steps, losses = series(events, "loss")
    eval_steps, eval_losses = series(events, "eval_loss")
    if not steps and not eval_steps:
        return None

    def draw(axes: Any) -> None:
        _curve(axes, steps, losses, label="training")
        if eval_steps:
            axes.plot(eval_steps, eval_losses, color=EVAL, marker="o", markersize=4, label="evaluation")
            axes.legend()

    return _figure("Loss", draw, size=(6.4, 3.4))


def chart(events: Sequence[dict[str, Any]], name: str, *, title: str) -> "Figure | None":
    """One number over steps in half the width, or None where it was not logged."""
    steps, values = series(events, name)
    return _figure(title, lambda axes: _curve(axes, steps, values), size=(5, 2.8)) if steps else None


def as_png(figure: "Figure") -> bytes:
    """The picture as PNG, 1,280 pixels wide for one of 6.4 inches."""
    return _saved(figure, format="png", dpi=200)


def as_data_uri(figure: "Figure") -> str:
    """The picture as SVG inside a `data:` address, for an `img` that needs no file."""
    svg = _saved(figure, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _figure(title: str, draw: Callable[[Any], None], *, size: tuple[float, float]) -> "Figure":
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure


def _curve(axes: Any, steps: Sequence[int], values: Sequence[float], *, label: str | None = None) -> None:
    if len(steps) > SMOOTH_FROM:
        axes.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=1)
        axes.plot(steps, smoothed(values), color=TRAIN, linewidth=1.8, label=label)
    else:
        axes.plot(steps, values, color=TRAIN, linewidth=1.8, marker="o" if len(steps) == 1 else None, label=label)


def _saved(figure: "Figure", **options: Any) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, **options)
    return buffer.getvalue()
