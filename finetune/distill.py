"""Distillation: learn from a larger model's probabilities and from the right answers.

For the training loop it is another loss_fn.  To remove it, delete this file and the lines that name
the teacher or the distillation in folder.py, job.py, memory.py, options.py, preflight.py, run.py,
same_run.py and shard.py.
"""
import hashlib

import torch
import torch.nn as nn

from llama.checkpoint import load_checkpoint, read_params, sample_bytes
from llama.model import ModelArgs
from llama.peft import adapter_at
from llama.tokenizer import Tokenizer
from lora import add_lora, load_adapter, read_adapter
from lora.loftq import quantizer

from .batches import Batch, to_device
from .loss import CHUNK, answer_rows, in_chunks, summed_cross_entropy


def check_teacher(folder: str, student_args: ModelArgs, student_tokenizer: Tokenizer):
    """Raise ValueError if the teacher in `folder` and the student do not have the same tokens."""
    teacher_args, teacher_tokenizer = read_params(folder)
    same_texts = pieces(student_tokenizer) == pieces(teacher_tokenizer)
    if same_texts and student_args.vocab_size == teacher_args.vocab_size:
        return
    texts = "the same texts" if same_texts else "other texts"
    raise ValueError(f"--teacher {folder} has {teacher_args.vocab_size} tokens and --checkpoint "
                     f"has {student_args.vocab_size}, with {texts}: distillation compares token by "
                     "token; give both the same tokenizer.model and vocab_size")


def load_teacher(folder: str, adapter_path: str | None, dtype: torch.dtype, device: torch.device,
                 max_seq_len: int, init: str, *, sharding=None) -> nn.Module:
    """Return the teacher with its adapter, in this dtype.

    init: "checkpoint"; or "random", which adds the adapter's layers without its values and is for
    models on the meta device.
    sharding: see load_checkpoint.
    Raises FileNotFoundError or ValueError for files that do not fit.
    """
    content = None
    base_info = {}
    if adapter_path:
        args, _ = read_params(folder)
        content = adapter_at(adapter_path, args)
        base_info = read_adapter(content)["base"] or {}
    quantize = base_info.get("quantize", "none")
    teacher, _ = load_checkpoint(folder, base_info.get("layers"), dtype, device, max_seq_len, init,
                                 convert=quantizer(quantize, content), sharding=sharding)
    if content and init == "checkpoint":
        load_adapter(teacher, content)
    elif content:                                    # layers only, on the meta device
        add_lora(teacher, read_adapter(content)["config"])
    if base_info:                                    # unknown for a PEFT folder
        teacher.origin["adapter_template"] = base_info.get("template") or "alpaca"
    return teacher


def pieces(tokenizer: Tokenizer) -> list[str]:
    """Return the text of each token."""
    return [tokenizer.sp.id_to_piece(i) for i in range(tokenizer.vocab_size)]


class Distillation:
    """The loss_fn of a student: (sum of L over answer tokens, their number), where for each token

        L = (1 - w) (-log p_s[target]) + w T^2 KL(q_t || q_s),      q = softmax(z / T)

    z_s and z_t are the logits (V,) of student and teacher where that token is predicted, and p_s is
    softmax(z_s) (Hinton, Vinyals & Dean 2015, section 2).  L is in nats, in fp32 (or fp64).
    Without the factor T^2 the gradient of the second term would shrink as 1 / T^2, and each T would
    need another w.

    teacher: a model whose last layer is `output`, in the dtype that it computes in.  It is frozen
    here and stays in eval mode.  Its logits are never all in memory: the teacher returns the input
    of `output`, (R, D), and `loss` computes the logits of one chunk of rows at a time.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 2.0, weight: float = 0.5):
        self.teacher = teacher.eval().requires_grad_(False)
        self.head = teacher.output
        self.teacher.output = nn.Identity()
        self.origin = getattr(teacher, "origin", {})
        self.adapter_template = self.origin.get("adapter_template")      # None: unknown
        self.temperature = temperature
        self.weight = weight

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
        device = batch.tokens.device
        rows, targets = (to_device(part, device) for part in answer_rows(batch))
        # The teacher is in the compute dtype already.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            features = self.teacher(batch.tokens, rows=rows, layout=batch.layout)  # (R, D)
        logits = model(batch.tokens, rows=rows, layout=batch.layout)               # (R, V)
        return in_chunks(self.loss, logits, targets, features), batch.n_answer

    def loss(self, logits: torch.Tensor, targets: torch.Tensor,
             features: torch.Tensor) -> torch.Tensor:
        """Return the sum of L over R rows.

        logits (R, V): the student's.  targets (R,) int64.  features (R, D): the teacher's.
        """
        T = self.temperature
        loss_dtype = torch.promote_types(logits.dtype, torch.float32)
        hard = summed_cross_entropy(logits, targets)
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            # kl_div gets q_t, not its logarithm: where q_t is 0, that would give 0 x inf.
            q_t = (self.head(features).to(loss_dtype) / T).softmax(-1)
        log_q_s = (logits.to(loss_dtype) / T).log_softmax(-1)
        soft = nn.functional.kl_div(log_q_s, q_t, reduction="sum")
        return (1 - self.weight) * hard + self.weight * T ** 2 * soft

    def memory(self, tokens: int, answers: int, itemsize: int,
               student_bytes: int) -> dict[str, int]:
        """Return {"teacher": bytes} that the teacher adds to the peak memory of a step.

        tokens, answers: their numbers in the largest micro-batch.  itemsize: of the teacher's
        dtype.  student_bytes: what the student's own forward and loss take.

        These are the teacher's weights plus the larger of two sums.  At the head: its features, and
        the logits and the fp32 softmax of one chunk.  In a block: the tensors of its largest layer
        minus student_bytes, because the student begins when the teacher has finished.
        """
        args = self.teacher.args
        tensors = {*self.teacher.parameters(), *self.head.parameters(), *self.teacher.buffers(),
                   *self.head.buffers()}
        weights = sum(tensor.nbytes for tensor in tensors)
        chunk = min(answers, CHUNK)
        head_bytes = answers * args.dim * itemsize + chunk * args.vocab_size * (itemsize + 4)
        block_bytes = tokens * 3 * (args.dim + args.hidden_dim) * itemsize
        return {"teacher": weights + max(head_bytes, block_bytes - student_bytes)}

    def fingerprint(self) -> str:
        """Return a text that is different for different teachers.

        It is the base's fingerprint and a digest of the adapter and of some numbers of each tensor.
        The fingerprint alone cannot tell a base from the same base with a merged adapter.
        """
        digest = hashlib.sha256()
        config = getattr(self.teacher, "lora_config", None)
        if config:
            options = sorted(config.options.items())
            settings = (config.method, config.r, float(config.alpha), options)
            digest.update(repr(settings).encode())
        for part in (self.teacher, self.head):
            for name, tensor in part.state_dict().items():
                if name.rpartition(".")[2].startswith("lora_"):
                    digest.update(tensor.float().numpy(force=True).tobytes())
                else:
                    digest.update(sample_bytes(tensor))
        return f"{self.origin.get('fingerprint')}+{digest.hexdigest()[:16]}"
