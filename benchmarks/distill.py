"""What does a teacher add?  Students of three kinds, each trained with and without --teacher."""
import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.arguments import number, text
from finetune.examples import read_examples
from finetune.folder import ADAPTER
from finetune.options import DEMO
from llama.checkpoint import PARAMS, TOKENIZER, read_params

from .runs import flag_words
from .tables import Table, list_of, markdown, report, run_fresh, spread
from .training import HELD_OUT, Task, add_training_flags, examine, finish_run, task_of

TEMPERATURE = 2
WEIGHT = 0.5
SMALL = {"dim": 128, "n_layers": 2}                  # sizes of the random students
WAYS = ("alone", "distilled")
# Measures, with the heads of their columns and how they are printed.
TITLES = {"loss": "held-out loss", "exact_match": "right to the letter", "accuracy": "accuracy",
          "mcc": "MCC"}
FORMS = {"loss": ".3f", "exact_match": ".1%", "accuracy": ".1%", "mcc": ".3f"}


@dataclass(frozen=True)
class Student:
    """A model to train: its name in the table, and the flags of train.py that make it."""
    name: str
    flags: dict


@dataclass(frozen=True)
class DistillTable:
    """What all rows of the table have in common.

    task: base, examples and precision.  adapter: the teacher's, if it was given.  epochs: of the
    students.
    """
    table: Table
    task: Task
    adapter: str | None
    epochs: int

    @property
    def teacher(self) -> str:
        """The folder of the teacher's base."""
        return self.task.checkpoint or str(DEMO)

    @property
    def folder(self) -> Path:
        """The folder of all that is made for the table."""
        return self.table.out / "distill"

    @property
    def teacher_run(self) -> Path:
        """The folder in which the teacher is trained, another one for all that it depends on."""
        key = json.dumps([flags_with_data(self.task), self.table.conditions])
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        return self.folder / f"teacher-{digest}"

    @property
    def teacher_adapter(self) -> str:
        return self.adapter or str(self.teacher_run / ADAPTER)

    def cell(self, name: str, way: str, function: Callable, flags: list) -> dict:
        """Return function(flags, questions) as a cell of the table."""
        settings = {"name": name, "way": way, "flags": flags}
        questions = self.task.questions
        result = self.table.cell(settings, lambda: run_fresh(function, flags, questions))
        title = f"{name}, {way}" if way else name
        report(f"{title}: held-out loss {result['loss']:.4f}, right {result['exact_match']:.1%}")
        return result

    def teach(self) -> dict:
        """Return the teacher's cell; if it was not given, train it."""
        if self.adapter:
            flags = {"checkpoint": self.teacher, "adapter": self.adapter,
                     "precision": self.task.precision}
            return self.cell("teacher", "", examine_file, flag_words(flags))
        flags = [*flags_with_data(self.task), "--out", str(self.teacher_run)]
        result = self.cell("teacher", "", train_and_examine, flags)
        if not Path(self.teacher_adapter).exists():  # The cell is saved, and the run was deleted.
            run_fresh(train_and_examine, flags, self.task.questions)
        return result

    def learn(self, student: Student, way: str, lr: float, seed: int) -> dict:
        """Return a student's cell; its result also tells the learning rate."""
        flags = {"epochs": self.epochs, "batch_size": 32, "accumulation_steps": 1,
                 "share_prefix": True, "method": "full", "lr": lr, "seed": seed}
        if way == "distilled":
            flags |= {"teacher": self.teacher, "teacher_adapter": self.teacher_adapter,
                      "distill_temperature": TEMPERATURE, "distill_weight": WEIGHT}
        data_flags = flags_with_data(replace(self.task, checkpoint=None))
        argv = [*flag_words(student.flags), *data_flags, *flag_words(flags)]
        return self.cell(student.name, way, train_in_temporary_folder, argv) | {"lr": lr}


def flags_with_data(task: Task) -> list:
    """Return a task's flags, with the demo's examples named if there are no others."""
    if task.data:
        return task.flags()
    return replace(task, data=str(DEMO / "train.json"), val_data=HELD_OUT).flags()


def add_flags(parser):
    add_training_flags(parser)
    flag = parser.add_argument
    flag("--adapter", metavar="PATH", type=text,
         help="the teacher's adapter, over --checkpoint (default: a LoRA is trained first)")
    flag("--epochs", metavar="N", type=number(int, 1), default=6,
         help="epochs of the students (default: 6; on the demo's answers alone they only get worse "
              "after that)")
    flag("--seeds", metavar="N,...", type=list_of(number(int, 0)), default=[0, 1, 2],
         help="random seeds, one run each (default: 0,1,2)")
    flag("--lrs", metavar="F,...", type=list_of(number(float, 0, open_low=True)),
         default=[1e-3, 3e-3], help="learning rates to choose from (default: 1e-3,3e-3)")


def students_of(checkpoint: str, folder: Path) -> list:
    """Return three Students: a quarter of the teacher's blocks, a transformer, and an LSTM.

    The last two are small and start from random weights; their folders are made in `folder`.
    """
    sizes, tokenizer = read_params(checkpoint)
    n_blocks = max(1, sizes.n_layers // 4)
    small = SMALL | {"vocab_size": sizes.vocab_size}
    transformer = make_model_folder(folder / "transformer", tokenizer,
                                    small | {"n_heads": 4, "multiple_of": 32})
    lstm = make_model_folder(folder / "lstm", tokenizer, small | {"rnn": "lstm"})
    return [
        Student(f"the teacher's first {n_blocks} of {sizes.n_layers} blocks",
                {"checkpoint": checkpoint, "layers": n_blocks}),
        Student("a transformer, 2 blocks of 128, random",
                {"init": "random", "checkpoint": transformer}),
        Student("an LSTM, 2 layers of 128, random", {"init": "random", "checkpoint": lstm}),
    ]


def make_model_folder(folder: Path, tokenizer, params: dict) -> str:
    """Make a folder from which --init random can begin; return its path."""
    folder.mkdir(exist_ok=True)
    (folder / TOKENIZER).write_bytes(tokenizer.model)
    (folder / PARAMS).write_text(json.dumps(params))
    return str(folder)


def examine_file(flags: list, questions: str) -> dict:
    """Return what `examine` finds of generate.py's answers to a file of examples."""
    return examine(flags, read_examples(questions))


def train_and_examine(argv: list, questions: str) -> dict:
    """Run train.py; return what `examine` finds of the model that it leaves."""
    options, _ = finish_run([*argv, "--overwrite"])
    if options.method == "full":
        flags = {"checkpoint": options.out, "adapter": "none"}
    else:
        flags = {"adapter": Path(options.out) / ADAPTER}
    return examine_file(flag_words(flags | {"precision": options.precision}), questions)


def train_in_temporary_folder(argv: list, questions: str) -> dict:
    """Do the same in a folder that is then deleted."""
    with tempfile.TemporaryDirectory() as out:
        return train_and_examine([*argv, "--out", out], questions)


def make(args, table: Table) -> list:
    """Train the students in both ways; return lines of Markdown.

    Each row's learning rate is the one of --lrs with the lowest held-out loss for the first seed.
    """
    if args.adapter and not args.checkpoint:
        raise ValueError("--adapter is the teacher's, over a --checkpoint; name that too")
    distill_table = DistillTable(table, task_of(args), args.adapter, args.epochs)
    read_examples(distill_table.task.questions)      # Refuse a wrong file before the first run.
    distill_table.folder.mkdir(exist_ok=True)
    results = {("teacher", ""): [distill_table.teach()]}
    for student in students_of(distill_table.teacher, distill_table.folder):
        for way in WAYS:
            firsts = [distill_table.learn(student, way, lr, args.seeds[0]) for lr in args.lrs]
            best = min(firsts, key=lambda result: result["loss"])
            others = [distill_table.learn(student, way, best["lr"], seed)
                      for seed in args.seeds[1:]]
            results[student.name, way] = [best, *others]
    measures = ["loss", "exact_match"]
    if "accuracy" in results["teacher", ""][0]:
        measures += ["accuracy", "mcc"]
    choices = ", ".join(f"{lr:g}" for lr in args.lrs)
    n_seeds = "1 seed" if len(args.seeds) == 1 else f"{len(args.seeds)} seeds"
    note = (f"(temperature {TEMPERATURE}, weight {WEIGHT}; {n_seeds}; ±: the largest distance of a "
            f"seed from the mean; learning rate of each row: the one of {choices} with the lowest "
            f"held-out loss for seed {args.seeds[0]})")
    return [*table_lines(results, measures), "", *change_lines(results, measures[-1]), "", note]


def table_lines(results: dict, measures: list) -> list:
    """Return the table as Markdown; results: {(student, way): its cells}."""
    header = ["model", "trained", "learning rate", "parameters"]
    header += [TITLES[measure] for measure in measures]
    rows = []
    for (name, way), cells in results.items():
        lr = f"{cells[0]['lr']:g}" if "lr" in cells[0] else ""
        row = [name, way, lr, f"{cells[0]['parameters']:,}"]
        row += [spread(values_of(cells, measure), FORMS[measure]) for measure in measures]
        rows.append(row)
    return markdown(header, rows)


def change_lines(results: dict, measure: str) -> list:
    """Return a line per student: what the teacher changed in the means of loss and a measure."""
    lines = []
    for name, way in results:
        if way == "distilled":
            changes = {}
            for which in ("loss", measure):
                distilled = statistics.mean(values_of(results[name, "distilled"], which))
                changes[which] = distilled - statistics.mean(
                    values_of(results[name, "alone"], which))
            lines.append(f"What the teacher changed in {name}: held-out loss "
                         f"{changes['loss']:+.3f}, {TITLES[measure]} {changes[measure]:+.3f}.")
    return lines


def values_of(cells: list, measure: str) -> list:
    return [cell[measure] for cell in cells]
