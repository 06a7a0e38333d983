"""Lines that a run prints: of each step, and what was measured on held-out examples."""
from .folder import ADAPTER
from .hardware import peak_memory_mb
from .pictures import picture_of


def progress_line(row: dict, n_steps: int, seconds_left: float | None) -> str:
    """Return a step's row as one line of fixed columns."""
    columns = [
        f"step {row['step']:>{len(str(n_steps))}}/{n_steps}",
        f"epoch {row['epoch']:.2f}",
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.1e}",
        f"grad norm {row['grad_norm']:.2f}",
        f"{row['tokens_per_second']:,.0f} tokens/s",
    ]
    if row["peak_memory_mb"] is not None:
        columns.append(f"{row['peak_memory_mb']:,.0f} MiB")
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        columns.append(f"{minutes}:{seconds:02} left")
    if "val_loss" in row:
        columns.append(held_out_columns(row))
    return " | ".join(columns)


def held_out_columns(row: dict) -> str:
    """Return what was measured on held-out examples as columns of the progress line."""
    text = f"held-out loss {row['val_loss']:.4f}"
    if "val_accuracy" in row:
        text += f" | accuracy {row['val_accuracy']:.1%} | MCC {row['val_mcc']:.3f}"
    return text


def saved_line(job, out) -> str:
    """Return what a run has saved in its folder, and which command answers with it."""
    if job.lora is None:
        flags = "" if job.template == "alpaca" else f" --template {job.template}"
        return (f"saved     {out}; now: python generate.py --checkpoint {out} --adapter none"
                f"{flags}")
    usage = f"now: python generate.py --adapter {out / ADAPTER}"
    if job.options.init == "random":
        usage = "trained over random weights, which are not saved: generate.py cannot use it"
    return f"saved     {out / ADAPTER}; {usage}"


def report_end(out, device, seconds: float, ranks):
    """Print what the run took, and draw its picture where matplotlib is installed."""
    peak = peak_memory_mb(device)
    memory = f", peak memory {peak:,.0f} MiB" if peak else ""
    print(f"total     {max(0, seconds):.1f} s{memory}")
    if ranks.is_first:
        print(f"picture   {picture_of(out)}")
