"""Pictures of lines, where matplotlib is installed: of a run, from its metrics.jsonl, and of any table.

    python -m finetune.pictures out            draw out/loss.png again, or while the run goes on
"""
import argparse
import io
import json
import textwrap
from pathlib import Path
from typing import NamedTuple

from llama.files import write_whole

from .arguments import Parser, text
from .batches import split
from .errors import in_one_line, one_line_errors
from .run import METRICS, PICTURE

COLOURS = "#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9"     # Okabe & Ito 2008, without yellow
DASHES, MARKERS = ("-", "--", "-.", ":"), "os^Dv<>P*"
MANY = 60                            # a line of more points than this is thin, pale and without markers
BLOCKS = 24                          # points of the smoothed loss, at most


class Panel(NamedTuple):
    """x and y say what the axes are, with units; lines are {label: [(x, y)]}, x numbers or words.

    Where y is None a cross stands at the panel's foot.  log_x, log_y: where x spans more than 4 times, y more than 20.
    from_zero: y begins there, for amounts that are compared.
    """
    title: str
    x: str
    y: str
    lines: dict
    log_x: bool = True
    log_y: bool = False
    from_zero: bool = False


def draw(path, panels, said=""):
    """Write the panels as a PNG, two beside each other, the first of an odd number alone; `said` stands above, small.

    Lines differ in dashes and markers, so that they can be told apart in black and white.  Raises ValueError without
    matplotlib or panels.
    """
    if not panels:
        raise ValueError(f"there is nothing to draw in {path}")
    try:
        from matplotlib.figure import Figure  # here, for nothing else needs it
        from PIL import Image  # which comes with it
    except ImportError as error:
        raise ValueError(f"{error}: pip install matplotlib") from None
    columns = min(2, len(panels))
    alone = columns == 2 and len(panels) % 2
    down = -(-(len(panels) + alone) // columns)
    figure = Figure((4.5 * columns, 2.8 * down), layout="constrained")
    figure.suptitle(textwrap.fill(said, 75 * columns), fontsize=7)
    grid = figure.add_gridspec(down, columns)
    for i, panel in enumerate(panels):
        plot(figure.add_subplot(grid[0, :] if alone and i == 0 else grid[divmod(i + alone, columns)]), Panel(*panel))
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=120)
    few = Image.open(drawn).convert("RGB").quantize(64)          # colours: a third of the bytes
    write_whole(Path(path), lambda file: few.save(file, "PNG", optimize=True))


def plot(ax, panel):
    for i, (label, points) in enumerate(panel.lines.items()):
        colour, there = COLOURS[i % len(COLOURS)], [point for point in points if point[1] is not None]
        look = dict(marker=MARKERS[i % len(MARKERS)], ms=4)
        if len(points) > MANY:
            look = dict(lw=0.8, alpha=0.5 if len(panel.lines) > 1 else 1)
        if there:
            ax.plot(*zip(*there), color=colour, label=label, ls=DASHES[i % len(DASHES)], **look)
        if missing := [x for x, y in points if y is None]:
            ax.plot(missing, [0.04] * len(missing), "x", color=colour, transform=ax.get_xaxis_transform(),
                    label=None if there else label)
    across, up = ([place[k] for points in panel.lines.values() for place in points if place[k] is not None] for k in (0, 1))
    if any(isinstance(x, str) for x in across):
        for name in ax.get_xticklabels():
            name.set(rotation=20, ha="right", rotation_mode="anchor")
    elif panel.log_x and across and max(across) > 4 * min(across) > 0:
        counts = min(across) >= 1
        ax.set_xscale("log", base=2 if counts else 10)
        ax.xaxis.get_major_locator().set_params(subs=(1,) if counts else (1, 2, 5))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    elif all(isinstance(x, int) for x in across):
        ax.xaxis.get_major_locator().set_params(integer=True)
    if panel.log_y and up and max(up) > 20 * min(up) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    if panel.from_zero and not panel.log_y:
        ax.set_ylim(bottom=0)
    ax.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    ax.grid(alpha=0.3)
    if len(panel.lines) > 1:
        ax.legend(fontsize="small", handlelength=3, **dict(loc="upper left", bbox_to_anchor=(1, 1)) if len(panel.lines) > 4 else {})


def is_number(value):
    return isinstance(value, (int, float)) and abs(value) < 1e30                # so neither nan nor infinite


def read_metrics(path):
    """The rows of a metrics.jsonl, dicts, in the order of their steps; of two of one step the later.  A torn line is none.

    Raises FileNotFoundError, or ValueError where there is no row at all.
    """
    rows = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if is_number(row["step"]) and is_number(row["answer_tokens"]):
                rows[row["step"]] = row
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
    if not rows:
        raise ValueError(f"{path} holds no step yet")
    return [rows[step] for step in sorted(rows)]


def points(rows, field):
    """[(step, value)] of the rows where there is one: null stands for what was not finite."""
    return [(row["step"], row[field]) for row in rows if is_number(row.get(field))]


def smoothed(rows, size):
    """[(middle, loss)] of each `size` steps, one after another: the mean over all their answer tokens."""
    measured = [row for row in rows if is_number(row.get("loss"))]
    return [(sum(row["step"] for row in some) / len(some),
             sum(row["loss"] * row["answer_tokens"] for row in some) / max(1, sum(row["answer_tokens"] for row in some)))
            for some in split(measured, size)]


def panels_of_a_run(rows):
    """What there is of loss, held-out classes, learning rate and gradient norm, over the optimizer's steps."""
    size = -(-len(rows) // BLOCKS)
    skipped = [(row["step"], None) for row in rows if None in (row.get("loss", 0), row.get("grad_norm", 0))]
    drawn = [("loss", "nats an answer token", {
                 "each step": points(rows, "loss"), f"mean of {size} steps": smoothed(rows, size) if size > 1 else [],
                 "held out": points(rows, "val_loss"), "step skipped": skipped}),
             ("held-out classes", "share, correlation", {
                 "accuracy": points(rows, "val_accuracy"), "Matthews correlation": points(rows, "val_mcc")}),
             ("schedule", "learning rate", {"": points(rows, "lr")}),
             ("gradient", "norm, before clipping", {"": points(rows, "grad_norm")})]
    drawn = [(title, y, {label: line for label, line in lines.items() if line}) for title, y, lines in drawn]
    return [Panel(title, "optimizer step", y, lines, log_x=False, log_y=title == "loss") for title, y, lines in drawn if lines]


def draw_run(out):
    """Draw the loss.png of the run in folder `out`; return its path.  Raises ValueError or OSError."""
    draw(out / PICTURE, panels_of_a_run(read_metrics(out / METRICS)))
    return out / PICTURE


def picture_of(out):
    """The same at the end of a run, which fails for no picture: the path, or why there is none and how to get one."""
    try:
        return draw_run(out)
    except Exception as error:                                   # a package that does not fit its others raises anything
        return f"none: {in_one_line(error)}, then python -m finetune.pictures {out}"


def main(argv=None):
    with one_line_errors("finetune.pictures"):
        parser = Parser(prog="finetune.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("out", metavar="DIR", type=text, help="a run's folder")
        print(draw_run(Path(parser.parse_args(argv).out)))


if __name__ == "__main__":
    main()
