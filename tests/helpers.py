"""What several test files share."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("llama", "lora", "finetune", "benchmarks")


def shipped(*rooms):
    """Return the .py files of these rooms, as paths from ROOT; by default all that is shipped."""
    files = [] if rooms else list(ROOT.glob("*.py"))
    for room in rooms or ROOMS:
        files += ROOT.glob(f"{room}/**/*.py")
    return sorted(str(path.relative_to(ROOT)) for path in files)
