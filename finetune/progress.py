"""Lines for people about a run that goes on."""


def progress(row, steps, seconds):
    """One line for people, whole and of fixed columns, so that it reads well in a log file too."""
    left = round(seconds / row["step"] * (steps - row["step"]))
    columns = [f"step {row['step']:>{len(str(steps))}}/{steps}", f"epoch {row['epoch']:.2f}", f"loss {row['loss']:.4f}",
               f"lr {row['lr']:.1e}", f"grad norm {row['grad_norm']:.2f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    if row["peak_memory_mb"] is not None:
        columns.append(f"{row['peak_memory_mb']:,.0f} MiB")
    columns.append(f"{left // 60}:{left % 60:02} left")
    if "val_loss" in row:
        columns.append(held_out(row))
    return " | ".join(columns)


def held_out(row):
    """What was found on held-out examples, as columns of that line."""
    classes = f" | accuracy {row['val_accuracy']:.1%} | MCC {row['val_mcc']:.3f}" if "val_accuracy" in row else ""
    return f"held-out loss {row['val_loss']:.4f}{classes}"
