"""finetune/pictures.py: what of metrics.jsonl is drawn, by hand; how lines and bars differ; and that no run fails for a picture."""
import json
import sys

import pytest

import train
from finetune import pictures
from finetune.pictures import draw, Panel, panels_of_a_run, plot, points_of, read_metrics, short_number, smoothed_loss


LOSS, LR, NORM = "Loss at each step and on held-out examples", "Learning rate at each step", "Size of the gradient before clipping"


def rows(*losses, **more):
    return [dict(step=i, loss=loss, lr=0.1, grad_norm=None if loss is None else 2.0, answer_tokens=i) | more
            for i, loss in enumerate(losses, 1)]


def test_metrics_are_read_whatever_a_run_left(tmp_path):
    """A line cut short by a kill, one overwritten, one of a resumed run that came twice, one out of order."""
    path = tmp_path / "metrics.jsonl"
    one, two, three = rows(3.0, 2.0, None)
    path.write_text("\n".join([json.dumps(three), json.dumps(one | {"loss": 9.0}), json.dumps(one), "", "[1]", '"step"', "{}",
                               json.dumps(two), '{"step": 4, "lo', "\0\0"]))
    assert read_metrics(path) == [one, two, three]
    assert points_of([one, two, three], "loss") == [(1, 3.0), (2, 2.0)]                          # null: it was not finite
    assert points_of([one, two | {"val_loss": float("nan")}, three | {"val_loss": 1.5}], "val_loss") == [(3, 1.5)]
    path.write_text('{"step": 1')
    with pytest.raises(ValueError, match="metrics.jsonl holds no step yet"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "other.jsonl")


def test_smoothing_is_a_mean_over_answer_tokens():
    """Of steps 1, 2 | 3, 5 | 6, step 4 having none: (1 x 6 + 2 x 3) / 3, (3 x 2 + 5 x 10) / 8, 1, each at its middle."""
    assert smoothed_loss(rows(6.0, 3.0, 2.0, None, 10.0, 1.0), 2) == [(1.5, 4.0), (4.0, 7.0), (6.0, 1.0)]


def test_panels_hold_what_there_is():
    few = panels_of_a_run(rows(3.0, None, 2.0))
    assert [panel.title for panel in few] == [LOSS, LR, NORM] and all(panel.x == "optimizer step" for panel in few)
    assert few[0].lines == {"each step": [(1, 3.0), (3, 2.0)], "step skipped": [(2, None)]}
    assert few[2].lines == {"": [(1, 2.0), (3, 2.0)]}
    many = rows(*[1.0] * 100)
    many[49] |= dict(grad_norm=None)                                      # an overflow: its loss was finite
    many[99] |= dict(val_loss=1.5, val_accuracy=0.75, val_mcc=0.5)
    loss, classes, *_ = panels_of_a_run(many)
    assert list(loss.lines) == ["each step", "mean of 5 steps", "held out", "step skipped"]
    assert len(loss.lines["mean of 5 steps"]) == 20 and loss.lines["step skipped"] == [(50, None)]
    assert classes.lines == {"accuracy": [(100, 0.75)], "Matthews correlation": [(100, 0.5)]}
    assert [panel.title for panel in panels_of_a_run(rows(None, None))] == [LOSS, LR]                     # none was finite


def test_lines_differ_without_colour():
    """In dashes and markers, twelve of them; a line of many points is thin; x doubles where it spans more than 4 times."""
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots(1, 2)
    plot(axes[0], Panel("family", "r", "nats", {str(i): [(1, i), (4, i), (8, None)] for i in range(12)}))
    drawn = [line for line in axes[0].lines if line.get_marker() != "x"]
    assert len({(line.get_linestyle(), line.get_marker()) for line in drawn}) == 12 and len({line.get_color() for line in drawn[:7]}) == 7
    assert [list(line.get_xdata()) for line in axes[0].lines if line.get_marker() == "x"] == [*[[8]] * 12, []]
    assert axes[0].get_xscale() == "log" and axes[0].get_yscale() == "linear" and [text.get_text() for text in axes[0].get_legend().get_texts()] == [*map(str, range(12)), "no value"]
    plot(axes[1], Panel("run", "step", "nats", {"": [(i, 1 / i) for i in range(1, 100)]}, log_x=False, log_y=True))
    assert axes[1].get_xscale() == "linear" and axes[1].get_yscale() == "log" and axes[1].get_legend() is None
    assert axes[1].lines[0].get_marker() == "None" and axes[1].lines[0].get_linewidth() < drawn[0].get_linewidth()
    plot(axes[1], Panel("long run", "step", "nats", {name: [(i, 2.0) for i in range(100)] for name in "abcd"}))
    assert len({line.get_linestyle() for line in axes[1].lines[1:]}) == 4


def test_words_get_bars():
    """One for each line at each word, told apart by hatches and by place; where there is no value it says "none"."""
    ax = pytest.importorskip("matplotlib.figure").Figure().subplots()
    lines = {"full": [("bf16", None)], "lora": [("fp32", 2000), ("bf16", 0.5)], "dora": [("fp32", 3)]}
    plot(ax, Panel("Peak memory", "", "MiB", lines))
    assert [name.get_text() for name in ax.get_yticklabels()] == ["fp32", "bf16"]
    full, lora, dora = ax.containers
    assert [[bar.get_width() for bar in bars] for bars in (full, lora, dora)] == [[0, 0], [2000, 0.5], [3, 0]]
    assert [text.get_text() for text in ax.texts] == ["none", "none", "2,000", "0.5", "3", "none"]
    assert len({bars[0].get_hatch() for bars in ax.containers}) == len({bars[0].get_facecolor() for bars in ax.containers}) == 3
    edges = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bars in ax.containers for bar in bars)
    assert all(above <= below + 1e-9 for (_, above), (below, _) in zip(edges, edges[1:]))
    assert full[0].get_y() < lora[0].get_y() < dora[0].get_y() < full[1].get_y() and ax.yaxis_inverted() and ax.get_xlim()[0] == 0
    assert ax.get_xlabel() == "MiB" and len(ax.get_legend().get_texts()) == 3


@pytest.mark.parametrize("value, shown", [(0, "0"), (1234.4, "1,234"), (3000, "3,000"), (99.96, "100"), (12.34, "12.3"), (1, "1"), (0.5, "0.5"), (0.0004567, "0.000457"), (-2.5, "-2.5")])
def test_three_digits(value, shown):
    assert short_number(value) == shown


@pytest.mark.parametrize("panels", [1, 2, 3, 4])
def test_no_label_runs_into_another(panels, monkeypatch, tmp_path):
    """Of a picture with long words, many lines and a long command, each visible text has space of its own."""
    Text = pytest.importorskip("matplotlib.text").Text
    drawn, honest = {}, Text.draw

    def noted(text, renderer):
        if text.get_visible() and text.get_text().strip():
            drawn[text] = text.get_window_extent(renderer), text.get_figure().bbox.frozen()
        honest(text, renderer)
    monkeypatch.setattr(Text, "draw", noted)
    words = ["at once", "at once, checkpointing", "accumulated", "accumulated, checkpointing"]
    bars = Panel("Peak memory above the bare process", "", "MiB", {f"full, autocast {i}": [(word, 1234.5 * (i + 1)) for word in words] for i in range(5)})
    lines = Panel("Held-out loss against the learning rate", "learning rate", "nats per answer token",
                  {f"method {i}": [(10 ** (k / 2 - 5), k if k else None) for k in range(11)] for i in range(7)}, log_y=True)
    draw(tmp_path / "some.png", [bars, lines, lines, bars][:panels], "python -m benchmarks ablation --shape 135m " * 6)
    assert len(drawn) > 20
    for i, (text, (box, whole)) in enumerate(drawn.items()):
        assert whole.x0 <= box.x0 and whole.y0 <= box.y0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, text
        assert not [other for other in list(drawn)[:i] if box.overlaps(drawn[other][0])], text


@pytest.mark.parametrize("n", [1, 3])
def test_a_picture_is_written_whole(n, tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "some.png", [("a", "x", "y", {"b": [(1, 2), (2, 3)]})] * n, "said")
    assert (tmp_path / "some.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and len(list(tmp_path.iterdir())) == 1


def test_a_run_ends_well_without_a_picture(base, data, tmp_path, monkeypatch, capsys):
    """No matplotlib: a line says how to get it, and another run's picture does not stay as this one's.  A broken one: a line."""
    run = ["--checkpoint", str(base), "--data", str(data), "--out", str(tmp_path / "run"), "--r", "4", "--max-steps", "1", "--overwrite"]
    (tmp_path / "run").mkdir()
    for name in "args.json", "loss.png":
        (tmp_path / "run" / name).write_text("another's")
    monkeypatch.setattr(train, "picture_of", pictures.picture_of)
    for name in "matplotlib", "matplotlib.figure":
        monkeypatch.setitem(sys.modules, name, None)
    train.main(run)
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("picture")]
    assert line == f"picture   not drawn, because that needs matplotlib: pip install matplotlib, then python -m finetune.pictures {tmp_path / 'run'}"
    assert not (tmp_path / "run" / "loss.png").exists()
    monkeypatch.setattr(pictures, "draw", lambda *_: 1 / 0)
    assert pictures.picture_of(tmp_path / "run").startswith("not drawn: division by zero; to try again: python -m finetune.pictures ")


def test_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3.0, None, 2.0)))
    with pytest.raises(SystemExit) as left:
        pictures.main([str(tmp_path / "nowhere")])
    assert left.value.code == 2 and capsys.readouterr().err.startswith("finetune.pictures: ")
    with pytest.raises(ValueError, match="nothing to draw in some.png"):
        draw("some.png", [])
    pytest.importorskip("matplotlib")
    pictures.main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'loss.png'}\n" and (tmp_path / "loss.png").exists()
