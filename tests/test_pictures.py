"""finetune/pictures.py: what of metrics.jsonl is drawn, and that no run fails for a picture."""
import json
import sys

import pytest

import train
from finetune import pictures, printed
from finetune.pictures import (Panel, draw, panels_of_a_run, points_of, read_metrics,
                               smoothed_loss)

LOSS = "Loss at each step and on held-out examples"
LR = "Learning rate at each step"
NORM = "Size of the gradient before clipping"


def rows(*losses):
    made = []
    for i, loss in enumerate(losses, 1):
        norm = None if loss is None else 2.0
        made.append({"step": i, "loss": loss, "lr": 0.1, "grad_norm": norm, "answer_tokens": i})
    return made


def texts(things):
    return [thing.get_text() for thing in things]


def test_metrics_are_read_whatever_a_run_left(tmp_path):
    """A line cut short by a kill, one overwritten, one that came twice, one out of order."""
    path = tmp_path / "metrics.jsonl"
    one, two, three = rows(3.0, 2.0, None)
    lines = [json.dumps(row) for row in (three, one | {"loss": 9.0}, one, two)]
    path.write_text("\n".join([*lines[:3], "", "[1]", '"step"', "{}", lines[3],
                               '{"step": 4, "lo', "\0\0"]))
    assert read_metrics(path) == [one, two, three]
    assert points_of([one, two, three], "loss") == [(1, 3.0), (2, 2.0)]
    measured = [one, two | {"val_loss": float("nan")}, three | {"val_loss": 1.5}]
    assert points_of(measured, "val_loss") == [(3, 1.5)]
    path.write_text('{"step": 1')
    with pytest.raises(ValueError, match="metrics.jsonl holds no step yet"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "other.jsonl")


def test_smoothing_is_a_mean_over_answer_tokens():
    """Of steps 1, 2 | 3, 5 | 6, as step 4 has none, each at its middle."""
    smoothed = smoothed_loss(rows(6.0, 3.0, 2.0, None, 10.0, 1.0), 2)
    assert smoothed == [(1.5, (1 * 6 + 2 * 3) / 3), (4.0, (3 * 2 + 5 * 10) / 8), (6.0, 1.0)]


def test_panels_hold_what_there_is():
    few = panels_of_a_run(rows(3.0, None, 2.0))
    assert [panel.title for panel in few] == [LOSS, LR, NORM]
    assert all(panel.x == "optimizer step" for panel in few)
    assert few[0].lines == {"each step": [(1, 3.0), (3, 2.0)], "step skipped": [(2, None)]}
    assert few[2].lines == {"": [(1, 2.0), (3, 2.0)]}
    many = rows(*[1.0] * 100)
    many[49]["grad_norm"] = None                     # an overflow: its loss was finite
    many[99] |= {"val_loss": 1.5, "val_accuracy": 0.75, "val_mcc": 0.5}
    loss, classes, *_ = panels_of_a_run(many)
    assert list(loss.lines) == ["each step", "mean of 5 steps", "held out", "step skipped"]
    assert len(loss.lines["mean of 5 steps"]) == 20
    assert loss.lines["step skipped"] == [(50, None)]
    expected = {"accuracy": [(100, 0.75)], "Matthews correlation": [(100, 0.5)]}
    assert classes.lines == expected
    assert [panel.title for panel in panels_of_a_run(rows(None, None))] == [LOSS, LR]


@pytest.mark.parametrize("n_panels", [1, 2, 3, 4])
def test_no_label_runs_into_another(n_panels, monkeypatch, tmp_path):
    """Of a picture with long words, many lines and a long command; and it is written whole."""
    Text = pytest.importorskip("matplotlib.text").Text
    boxes = {}
    draw_text = Text.draw

    def noted(text, renderer):
        if text.get_visible() and text.get_text().strip():
            boxes[text] = text.get_window_extent(renderer)
            whole = text.get_figure().bbox
            assert whole.x0 <= boxes[text].x0 and boxes[text].x1 <= whole.x1, text
            assert whole.y0 <= boxes[text].y0 and boxes[text].y1 <= whole.y1, text
        draw_text(text, renderer)

    monkeypatch.setattr(Text, "draw", noted)
    words = ["at once", "at once, checkpointing", "accumulated", "accumulated, checkpointing"]
    bars = {f"full, autocast {i}": [(word, 1234.5 * (i + 1)) for word in words] for i in range(5)}
    lines = {f"method {i}": [(10 ** (k / 2 - 5), k or None) for k in range(11)] for i in range(7)}
    bars = Panel("Peak memory above the bare process", "", "MiB", bars)
    lines = Panel("Held-out loss against the learning rate", "learning rate",
                  "nats per answer token", lines, log_y=True)
    command = "python -m benchmarks ablation --shape 135m " * 6
    path = tmp_path / "some.png"
    draw(path, [bars, lines, lines, bars][:n_panels], command)
    assert len(boxes) > 20
    seen = []
    for text, box in boxes.items():
        assert not any(box.overlaps(other) for other in seen), text
        seen.append(box)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and list(tmp_path.iterdir()) == [path]


def test_a_run_ends_well_without_a_picture(base, data, tmp_path, monkeypatch, capsys):
    """A line says how to get it, and another run's picture does not stay as this one's."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("args.json", "loss.png"):
        (out / name).write_text("another's")
    monkeypatch.setattr(printed, "picture_of", pictures.picture_of)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    train.main(["--checkpoint", str(base), "--data", str(data), "--out", str(out), "--r", "4",
                "--max-steps", "1", "--overwrite"])
    again = f"python -m finetune.pictures {out}"
    *_, line = [each for each in capsys.readouterr().out.splitlines() if "picture" in each]
    assert line.startswith("picture   ")
    assert line.endswith(f": pip install matplotlib, then {again}")
    assert not (out / "loss.png").exists()
    monkeypatch.setattr(pictures, "draw", lambda *_: 1 / 0)
    assert f": division by zero; to try again: {again}" in pictures.picture_of(out)


def test_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        pictures.main([str(tmp_path / "nowhere")])
    assert capsys.readouterr().err.startswith("finetune.pictures: ")
    with pytest.raises(ValueError, match="nothing to draw in some.png"):
        draw("some.png", [])
    pytest.importorskip("matplotlib")
    lines = [json.dumps(row) + "\n" for row in rows(3.0, None, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    pictures.main([str(tmp_path)])
    path = tmp_path / "loss.png"
    assert capsys.readouterr().out == f"{path}\n" and path.exists()
