"""Draw pictures with matplotlib: of a run, from its metrics.jsonl, or of a measured table.

    python -m finetune.pictures out            draw out/loss.png again, also while the run goes on
"""
from .console import run_command             # First: it ends a Ctrl-C while torch loads quietly.

import io
import json
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

from llama.files import write_whole

from .arguments import Parser, text
from .batches import split
from .errors import in_one_line, one_line_errors
from .folder import METRICS, PICTURE

# Okabe & Ito 2008, without yellow: colours that colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
# Lines differ in dashes and markers, bars in hatches, so that no one needs the colours.
DASHES = ("-", "--", "-.", ":")
MARKERS = "os^Dv<>P*"
HATCHES = ("", "////", "....", "xxxx", "----", "\\\\\\\\", "oo")
MANY_POINTS = 60                     # A longer line is thin, pale and without markers.
MAX_BLOCKS = 24                      # points of the smoothed loss
PANEL_WIDTH = 4.5                    # inches
PANEL_HEIGHT = 2.7
LEGEND_ROW = 0.17


class MissingPackage(ValueError):
    """matplotlib is not installed."""


class Panel(NamedTuple):
    """One plot of a picture: lines over numbers, or bars over words.

    title: what is seen.  x, y: what the axes are, with units.  lines: {label: [(x, y)]}, with y
    None for a value that is missing.
    log_x, log_y: use a logarithmic scale where x spans more than 4 times, y more than 20 times.
    from_zero: y begins at 0, for amounts that are compared; bars always do.
    """
    title: str
    x: str
    y: str
    lines: dict
    log_x: bool = True
    log_y: bool = False
    from_zero: bool = False

    @property
    def points(self) -> list:
        """Return the (x, y) of all lines."""
        points = []
        for line in self.lines.values():
            points += line
        return points

    @property
    def words(self) -> list:
        """Return the words on the x axis, in the order of the longest line; [] for numbers."""
        words = []
        for line in sorted(self.lines.values(), key=len, reverse=True):
            for x, _ in line:
                if isinstance(x, str) and x not in words:
                    words.append(x)
        return words

    def legend_columns(self, width: float) -> int:
        """Return how many labels fit beside each other below a panel of this width, in inches."""
        longest = max(map(len, self.lines), default=0)
        label_width = 0.6 + 0.075 * longest          # the sample of the line, then the text
        words_width = 1.3                            # Words may stand left of the axes.
        return max(1, int((width - words_width) // label_width))

    def height(self, width: float) -> float:
        """Return the inches that the panel and its legend need."""
        height = PANEL_HEIGHT
        if self.words:                               # Every bar has a row of its own.
            height = 1 + len(self.words) * (0.15 * len(self.lines) + 0.1)
        if len(self.lines) > 1:
            n_rows = math.ceil(len(self.lines) / self.legend_columns(width))
            height += LEGEND_ROW * (1 + n_rows)
        return height


def draw(path: str | Path, panels: list, command: str = ""):
    """Write the panels as a PNG, in two columns; the first of an odd number has a row of its own.

    command: what made the picture; it stands below the panels.
    Raises MissingPackage, or ValueError if there is no panel.
    """
    if not panels:
        raise ValueError(f"there is nothing to draw in {path}")
    try:
        from matplotlib.figure import Figure
        from PIL import Image        # It comes with matplotlib.
    except ImportError:
        raise MissingPackage("drawing needs matplotlib: pip install matplotlib") from None
    panels = [Panel(*panel) for panel in panels]
    rows = in_rows(panels)
    columns = max(map(len, rows))
    widths = [PANEL_WIDTH * columns / len(row) for row in rows]
    heights = []
    for row, width in zip(rows, widths, strict=True):
        heights.append(max(panel.height(width) for panel in row))
    figure = Figure((PANEL_WIDTH * columns, sum(heights) + 0.3), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, wspace=0.06)
    figure.supxlabel(textwrap.fill(command, 80 * columns), fontsize=7, x=0.01, ha="left")
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    for i, row in enumerate(rows):
        for k, panel in enumerate(row):
            place = grid[i, k] if len(row) == columns else grid[i, :]
            plot(figure.add_subplot(place), panel, widths[i])
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    # 64 colours take a third of the bytes.
    picture = Image.open(drawn).convert("RGB").quantize(64)
    write_whole(Path(path), lambda file: picture.save(file, "PNG", optimize=True))


def in_rows(panels: list[Panel]) -> list[list[Panel]]:
    """Return the panels in rows of two; the first of an odd number is alone."""
    if len(panels) % 2:
        return [panels[:1], *split(panels[1:], 2)]
    return split(panels, 2)


def plot(ax, panel: Panel, width: float = PANEL_WIDTH):
    """Draw a panel, of this width in inches, into axes of matplotlib."""
    if panel.words:
        plot_bars(ax, panel)
        ax.set(xlabel=panel.y, ylabel=panel.x)       # The bars lie, so that words have space.
        ax.grid(axis="x", alpha=0.3)
    else:
        plot_lines(ax, panel)
        scale_axes(ax, panel)
        ax.set(xlabel=panel.x, ylabel=panel.y)
        ax.grid(alpha=0.3)
    ax.set_axisbelow(True)
    ax.set_title(textwrap.fill(panel.title, 50), fontsize="medium")
    if len(panel.lines) > 1:
        # Below the x axis and its label it hides nothing.
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.8, frameon=False,
                  fontsize="small", handlelength=3, ncols=panel.legend_columns(width))


def plot_bars(ax, panel: Panel):
    """Draw a bar for each line at each word, with its value; "none" stands for a missing one."""
    thickness = 0.8 / len(panel.lines)
    for i, (label, points) in enumerate(panel.lines.items()):
        values = {word: value for word, value in points if is_number(value)}
        # The y axis points down, so that the first line is on top.
        places = [k - 0.4 + (i + 0.5) * thickness for k in range(len(panel.words))]
        lengths = [values.get(word) for word in panel.words]
        bars = ax.barh(places, [length or 0 for length in lengths], thickness, label=label,
                       color=COLOURS[i % len(COLOURS)], hatch=HATCHES[i % len(HATCHES)],
                       edgecolor="white", linewidth=0.5)
        texts = ["none" if length is None else short_number(length) for length in lengths]
        ax.bar_label(bars, texts, padding=2, fontsize=6)
    ax.set_yticks(range(len(panel.words)), [textwrap.fill(word, 22) for word in panel.words],
                  fontsize="small")
    ax.set_ylim(len(panel.words) - 0.5, -0.5)
    ax.margins(x=0.15)               # space for the numbers behind the bars


def short_number(value: float) -> str:
    """Return a number with up to three significant digits, or its whole part if that has more."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    shown = f"{value:,.{decimals}f}"
    return shown.rstrip("0").rstrip(".") if decimals else shown


def plot_lines(ax, panel: Panel):
    """Draw the lines; a cross near the panel's foot stands for a missing value."""
    n_crossed = 0                                    # lines with crosses
    has_unnamed_cross = False
    for i, (label, points) in enumerate(panel.lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        style = {"marker": MARKERS[i % len(MARKERS)], "ms": 4}
        if len(points) > MANY_POINTS:
            style = {"lw": 0.8, "alpha": 0.5 if len(panel.lines) > 1 else 1}
        measured = [point for point in points if point[1] is not None]
        if measured:
            ax.plot([x for x, _ in measured], [y for _, y in measured], color=colour, label=label,
                    ls=DASHES[i % len(DASHES)], **style)
        missing = [x for x, y in points if y is None]
        if missing:
            # Each line has its crosses at another height.  If it has nothing else, its name is
            # theirs.
            height = 0.04 + 0.05 * (n_crossed % 8)
            name = None if measured else label
            ax.plot(missing, [height] * len(missing), "x", ms=4, color=colour, label=name,
                    transform=ax.get_xaxis_transform())
            n_crossed += 1
            has_unnamed_cross = has_unnamed_cross or bool(measured)
    if has_unnamed_cross:
        ax.plot([], [], "x", ms=4, color="grey", label="no value")


def scale_axes(ax, panel: Panel):
    """Choose the scales and ticks of a panel of lines."""
    x_values = [x for x, _ in panel.points]
    y_values = [y for _, y in panel.points if y is not None]
    if panel.log_x and x_values and max(x_values) > 4 * min(x_values) > 0:
        # Counts get a tick at each doubling; learning rates, say, get one at 1, 10 and 100, or at
        # 1, 2 and 5 if they span little.
        is_count = min(x_values) >= 1
        is_wide = is_count or max(x_values) > 100 * min(x_values)
        ax.set_xscale("log", base=2 if is_count else 10)
        ax.xaxis.get_major_locator().set_params(subs=(1,) if is_wide else (1, 2, 5))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    elif all(isinstance(x, int) for x in x_values):
        ax.xaxis.get_major_locator().set_params(integer=True)
    if panel.log_y and y_values and max(y_values) > 20 * min(y_values) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    if panel.from_zero and not panel.log_y:
        ax.set_ylim(bottom=0)


def is_number(value: object) -> bool:
    """Return whether a value is a number, and neither infinite nor NaN."""
    return isinstance(value, (int, float)) and abs(value) < 1e30


def read_metrics(path: Path) -> list[dict]:
    """Return the rows of a metrics.jsonl in the order of their steps.

    Of two rows for one step the later counts, and a torn line does not.
    Raises FileNotFoundError, or ValueError if there is no row.
    """
    rows = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if is_number(row["step"]) and is_number(row["answer_tokens"]):
                rows[row["step"]] = row
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    if not rows:
        raise ValueError(f"{path} holds no step yet")
    return [rows[step] for step in sorted(rows)]


def points_of(rows: list[dict], field: str) -> list[tuple]:
    """Return [(step, value)] of the rows that have a number there."""
    return [(row["step"], row[field]) for row in rows if is_number(row.get(field))]


def smoothed_loss(rows: list[dict], size: int) -> list[tuple]:
    """Return [(middle step, loss)] of `size` steps each: the mean over all their answer tokens."""
    points = []
    for block in split([row for row in rows if is_number(row.get("loss"))], size):
        n_answer = sum(row["answer_tokens"] for row in block)
        total = sum(row["loss"] * row["answer_tokens"] for row in block)
        middle = sum(row["step"] for row in block) / len(block)
        points.append((middle, total / max(1, n_answer)))
    return points


def panels_of_a_run(rows: list[dict]) -> list[Panel]:
    """Return the panels of a run: loss, held-out classes, learning rate, gradient norm.

    A panel without a point is left out, and so is a line.
    """
    size = math.ceil(len(rows) / MAX_BLOCKS)
    skipped = [(row["step"], None) for row in rows
               if None in (row.get("loss", 0), row.get("grad_norm", 0))]
    loss = {"each step": points_of(rows, "loss")}
    if size > 1:
        loss[f"mean of {size} steps"] = smoothed_loss(rows, size)
    loss |= {"held out": points_of(rows, "val_loss"), "step skipped": skipped}
    classes = {"accuracy": points_of(rows, "val_accuracy"),
               "Matthews correlation": points_of(rows, "val_mcc")}
    panels = [
        run_panel("Loss at each step and on held-out examples", "nats per answer token", loss,
                  log_y=True),
        run_panel("Answers to held-out examples", "accuracy, correlation", classes),
        run_panel("Learning rate at each step", "learning rate", {"": points_of(rows, "lr")}),
        run_panel("Size of the gradient before clipping", "norm",
                  {"": points_of(rows, "grad_norm")})]
    return [panel for panel in panels if panel.lines]


def run_panel(title: str, y: str, lines: dict, log_y: bool = False) -> Panel:
    """Return a panel over the optimizer's steps, without the lines that have no point."""
    drawn = {label: points for label, points in lines.items() if points}
    return Panel(title, "optimizer step", y, drawn, log_x=False, log_y=log_y)


def draw_run(out: Path) -> Path:
    """Draw the loss.png of the run in folder `out` and return its path.

    Raises ValueError or OSError.
    """
    draw(out / PICTURE, panels_of_a_run(read_metrics(out / METRICS)))
    return out / PICTURE


def picture_of(out: Path) -> str:
    """Draw a run and return the picture's path, or why there is none and how to get one.

    Nothing is raised: a run must not fail for its picture.
    """
    command = f"python -m finetune.pictures {out}"
    try:
        return str(draw_run(out))
    except MissingPackage:
        return f"not drawn, because that needs matplotlib: pip install matplotlib, then {command}"
    except Exception as error:       # Packages that do not fit each other raise anything.
        return f"not drawn: {in_one_line(error)}; to try again: {command}"


def main(argv=None):
    """Draw the picture of a run's folder."""
    with one_line_errors("finetune.pictures"):
        parser = Parser(prog="python -m finetune.pictures", description=__doc__)
        parser.add_argument("out", metavar="DIR", type=text, help="a run's folder")
        print(draw_run(Path(parser.parse_args(argv).out)))


if __name__ == "__main__":
    run_command(main, "finetune.pictures")
