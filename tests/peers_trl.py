"""TRL's SFTTrainer for tests/peers.py: its own loop, timed by a callback."""
import time
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.measure import Peaks
from benchmarks.request import Request

ROW_TOKENS = 512                                     # of a packed row
EXAMPLES_PER_ROW = 4                                 # as many as Alpaca's rows of 512 tokens hold


@dataclass
class StepTimes(TrainerCallback):
    """The seconds of every step, and the real tokens of every batch in the order of the steps."""
    peaks: Peaks
    began: float = 0.0
    seconds: list = field(default_factory=list)
    tokens: list = field(default_factory=list)

    def on_step_begin(self, args, state, control, **_):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self.began)
        self.peaks.end("step")

    def counting(self, collate):
        """Return a collator that also notes how many tokens of each batch are not padding."""
        def collate_and_count(examples):
            batch = collate(examples)
            mask = batch.get("attention_mask")
            n_tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
            self.tokens.append(n_tokens)
            return batch
        return collate_and_count


def train_by_trl(request: Request, rows: list, peaks: Peaks, model) -> dict:
    """Train on the rows in their order; return {tokens_per_second, loss: the last logged}.

    request.batching: "padded" is TRL's default.  Weights are in request.precision, without autocast
    over them, as for the other peers.
    """
    peaks.end("weights")
    times = StepTimes(peaks)
    is_packing = request.batching == "packing"
    batch = max(1, request.batch // EXAMPLES_PER_ROW) if is_packing else request.batch
    with TemporaryDirectory() as out:
        settings = SFTConfig(
            out,
            use_cpu=request.device == "cpu",
            bf16=False,
            per_device_train_batch_size=batch,
            max_steps=request.warm + request.steps,
            max_length=ROW_TOKENS if is_packing else None,
            packing=is_packing,
            padding_free=request.batching == "padding-free",
            gradient_checkpointing=request.checkpointing,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True)
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=request.dropout, task_type="CAUSAL_LM",
                          target_modules=["q_proj", "v_proj"])
        examples = [{"input_ids": tokens, "labels": labels} for tokens, labels in rows]
        trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(examples),
                             processing_class=bare_tokenizer(), peft_config=lora, callbacks=[times])
        trainer.data_collator = times.counting(trainer.data_collator)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    n_tokens = sum(times.tokens[request.warm:request.warm + request.steps])
    return {"tokens_per_second": n_tokens / sum(times.seconds[request.warm:]), "loss": losses[-1]}


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows its special tokens alone, as the rows are ids already."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
                                   bos_token="<s>", eos_token="</s>", pad_token="</s>")
