"""Distillation: learn from what a larger model holds likely, beside what is right.  Another loss_fn, no other loop.

Deleting this page, its lines in train.py and `distillation` in preflight.py leaves training on the answers alone.
"""
import hashlib

import torch
import torch.nn as nn

from llama.checkpoint import sampled

from .loss import CHUNK, answer_rows, in_chunks, summed_cross_entropy


def check_teacher(teacher_folder, teacher, student_folder, student):
    """Raise ValueError where teacher and student do not read the same tokens.

    teacher, student: (ModelArgs, Tokenizer).
    """
    teacher_args, teacher_tokenizer = teacher
    student_args, student_tokenizer = student
    same_names = pieces(student_tokenizer) == pieces(teacher_tokenizer)
    if same_names and student_args.vocab_size == teacher_args.vocab_size:
        return
    names = "the same" if same_names else "others"
    raise ValueError(f"--teacher {teacher_folder} has {teacher_args.vocab_size} tokens and "
                     f"{student_folder} {student_args.vocab_size}, {names} by name: distillation "
                     "compares token by token; give both the same tokenizer.model and vocab_size")


def pieces(tokenizer):
    return [tokenizer.sp.id_to_piece(i) for i in range(tokenizer.vocab_size)]


class Distillation:
    """loss_fn(model, batch) -> (sum, count), of each answer token

        L = (1 - w) (-log p_s[target]) + w T^2 KL(q_t || q_s),      q = softmax(z / T)

    with z_s, z_t the logits (V,) of student and teacher where that token is predicted, p_s = softmax(z_s) (Hinton, Vinyals
    & Dean 2015, section 2).  By z_s the second term's gradient is w T (q_s - q_t), which shrinks as 1 / T^2 without the
    T^2: so T can change and w still means the same.  In nats, in fp32 (or fp64).

    teacher: a model whose last layer is `output`, in the dtype it computes in; it is frozen here, and stays in eval mode.
    Its logits are never there whole: it gives the (R, D) that `output` reads, and each chunk of rows makes its own.
    """

    def __init__(self, teacher, temperature=2.0, weight=0.5):
        self.origin, self.temperature, self.weight = getattr(teacher, "origin", {}), temperature, weight
        self.teacher, self.head = teacher.eval().requires_grad_(False), teacher.output
        self.teacher.output = nn.Identity()

    def __call__(self, model, batch):
        rows, targets = (each.to(batch.tokens.device, non_blocking=True) for each in answer_rows(batch))
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):      # it is in the compute dtype already
            seen = self.teacher(batch.tokens, rows=rows, layout=batch.layout)                      # (R, D) of the teacher
        logits = model(batch.tokens, rows=rows, layout=batch.layout)                               # (R, V) of the student
        return in_chunks(self.loss, logits, targets, seen), batch.n_answer

    def loss(self, logits, targets, seen):
        """Sum over R rows of logits (R, V), targets (R,) and seen (R, D): a chunk of them."""
        wide, T = torch.promote_types(logits.dtype, torch.float32), self.temperature
        hard = summed_cross_entropy(logits, targets)
        with torch.no_grad(), torch.autocast(seen.device.type, enabled=False):
            q = (self.head(seen).to(wide) / T).softmax(-1)       # not its log: where a teacher says never, 0 log 0 is 0
        soft = nn.functional.kl_div((logits.to(wide) / T).log_softmax(-1), q, reduction="sum")
        return (1 - self.weight) * hard + self.weight * T ** 2 * soft

    def memory(self, tokens, answers, width, beside):
        """{"teacher": bytes} that it adds to a step's peak: its weights, what `output` reads, and of a chunk its logits and,
        in fp32, their softmax; or what its largest block computes with, if that is more than those and `beside`, all
        that the student then takes: when the one computes, the other has not begun.

        tokens, answers: of the largest micro-batch.  width: bytes of a number in the teacher's dtype."""
        args, parameters = self.teacher.args, {*self.teacher.parameters(), *self.head.parameters()}
        own = sum(t.nbytes for t in (*parameters, *self.teacher.buffers(), *self.head.buffers()))
        at_head = answers * args.dim * width + min(answers, CHUNK) * args.vocab_size * (width + 4)
        in_block = tokens * 3 * (args.dim + args.hidden_dim) * width
        return {"teacher": own + max(at_head, in_block - beside)}

    def fingerprint(self):
        """What tells one teacher from another: its base's fingerprint, and a digest of its adapter and, as that fingerprint is a
        merged adapter's base's too, of some numbers of each of its matrices."""
        digest, config = hashlib.sha256(), getattr(self.teacher, "lora_config", None)
        if config:
            digest.update(repr((config.method, config.r, float(config.alpha), sorted(config.options.items()))).encode())
        for part in (self.teacher, self.head):
            for name, tensor in part.state_dict().items():
                whole = name.rpartition(".")[2].startswith("lora_")
                digest.update(tensor.float().numpy(force=True).tobytes() if whole else sampled(tensor))
        return f"{self.origin.get('fingerprint')}+{digest.hexdigest()[:16]}"
