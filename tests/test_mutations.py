"""Each trap of test_traps.py is put back into a copy of our code, and its test must fail.

pytest -m slow tests/test_mutations.py
"""

import ast
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from .helpers import ONE_THREAD, ROOT

LOSS = "loss_sum / window.n_answer"
LOGITS = "model(batch.tokens, rows=rows, layout=batch.layout)"
NORM = "F.rms_norm(x, self.weight.shape, self.weight, self.eps)"
WRAPPING = "ddp_model = job.sharding.wrapped(model)"

# trap: (file, code, what stands there with the trap), compared as syntax trees, so that line breaks
# and quotes do not matter.  Code is statements, an expression, or an argument `name=value`.
MUTATIONS = {
    "mean_of_means": ("train.py",
        LOSS, "loss_sum / max(1, batch.n_answer) / len(window.batches)"),
    "divided_twice": ("train.py", LOSS, f"{LOSS} / len(window.batches)"),
    "not_divided": ("train.py", LOSS, "loss_sum / max(1, batch.n_answer)"),
    "leftover_window": ("train.py",
        "loss_share = accumulate_gradients(ddp_model, job.loss_fn, window, precision, ranks)",
        """
        share = len(window.batches) / options.accumulation_steps
        loss_fn = lambda *each: (job.loss_fn(*each)[0] * share, None)
        loss_share = accumulate_gradients(ddp_model, loss_fn, window, precision, ranks)
        """),
    "schedule_counts_windows": ("train.py",
        "lr_factor(run.progress.updates, n_steps, warmup, options.schedule)",
        "lr_factor(run.progress.updates, n_steps * options.accumulation_steps, warmup, "
        "options.schedule)"),
    "no_answer_in_the_batch": ("finetune/loss.py",
        "return loss, batch.n_answer",
        "return loss / batch.n_answer * batch.n_answer, batch.n_answer"),
    "loss_without_a_graph": ("finetune/loss.py",
        f"logits = {LOGITS}",
        f"""
        if not len(rows):
            return torch.zeros(()), 0
        logits = {LOGITS}
        """),
    "validation_by_batches": ("finetune/evaluate.py",
        """
        table["tokens"][i] = count_targets(questions[i].targets[right])
        table["nats"][i] = -answer_scores[right].log_p
        """,
        """
        table["tokens"][i] = 1 / len(group)
        table["nats"][i] = (
            -answer_scores[right].log_p / sum(len(questions[j].answers[0]) for j in group))
        """),
    "accuracy_of_free_text": ("finetune/measures.py",
        'values |= class_measures(sums["confusion"], sums["examples"])',
        """
        values |= class_measures(sums["confusion"], sums["examples"])
        values["accuracy"] = values.get("exact_match", values["accuracy"])
        """),
    "shift_by_one": ("finetune/loss.py",
        "batch.labels.flatten().roll(-1)", "batch.labels.flatten().clone()"),
    "prompt_is_no_target": ("finetune/dataset.py",
        "n_masked = len(ids)", "n_masked = 0"),
    "eos_is_a_target": ("finetune/batches.py",
        "pad_right(labels, IGNORE)",
        "pad_right(labels, IGNORE).masked_fill(pad_right(tokens, self.pad_id) == self.pad_id, "
        "IGNORE)"),
    "eos_as_text": ("finetune/templates/alpaca.py",
        "Piece(answer, is_target=True, eos=True)",
        "Piece(answer + '</s>', is_target=True)"),
    "eos_after_a_cut": ("finetune/dataset.py",
        "tokens[:max_seq_len], labels[:max_seq_len]",
        "tokens[:max_seq_len - 1] + tokens[-1:], labels[:max_seq_len - 1] + labels[-1:]"),
    "prompt_boundary": ("finetune/dataset.py",
        "return tokens, labels",
        """
        n_prompt = labels.count(IGNORE)
        text = "".join(piece.text for piece in pieces)
        tokens = tokenizer.encode(text, bos=pieces[0].bos, eos=pieces[-1].eos)
        return tokens, [IGNORE] * n_prompt + tokens[n_prompt:]
        """),
    "answer_cut_away": ("finetune/dataset.py",
        "count_answer(row[1]) > 0", "True"),
    "double_bos": ("finetune/dataset.py",
        "ids = tokenizer.encode(piece.text, bos=piece.bos, eos=piece.eos)",
        """
        ids = [tokenizer.bos_id] * piece.bos
        ids += tokenizer.encode(piece.text, bos=piece.bos, eos=piece.eos)
        """),
    "token_by_token_decoding": ("llama/sampling.py",
        "tokenizer.decode(ids_so_far)",
        '"".join(tokenizer.decode([token]) for token in ids_so_far)'),
    "pad_id_of_minus_one": ("llama/tokenizer.py",
        "self.pad_id = self.eos_id", "self.pad_id = self.sp.pad_id()"),
    "order_without_coverage": ("finetune/batches.py",
        "np.random.default_rng((seed, epoch)).permutation(len(lengths))",
        "np.random.default_rng((seed, epoch)).integers(0, len(lengths), len(lengths))"),
    "each_epoch_in_the_same_order": ("finetune/batches.py",
        "np.random.default_rng((seed, epoch))", "np.random.default_rng(seed)"),
    "template_at_inference": ("finetune/answers.py",
        "encode_prompt(example, self.tokenizer, self.template)",
        'encode_prompt(example, self.tokenizer, self.template) + self.tokenizer.encode("\\n")'),
    "alpha_over_r": ("lora/lora_layer.py", "self.alpha / self.r", "self.alpha"),
    "alpha_and_r_lost": ("lora/files.py",
        'LoRAConfig(**content["config"])', 'LoRAConfig(r=content["config"]["r"])'),
    "merge_in_16_bit": ("lora/lora_layer.py",
        "(weight + delta).to(reference_tensor(self.base).dtype)",
        "weight.to(reference_tensor(self.base).dtype) + "
        "delta.to(reference_tensor(self.base).dtype)"),
    "merge_drift": ("lora/lora_layer.py",
        "self.original_base[0].to(self.base.weight)",
        "with_weight(self.base, self.base.weight - self.delta().to(self.base.weight.dtype))"),
    "double_merge": ("lora/lora_layer.py",
        """
        if self.merged:
            raise ValueError("the adapter is already merged; a second merge would add it twice")
        """,
        "pass"),
    "adapter_silently_not_loaded": ("lora/files.py", "in_model or in_file", "False"),
    "adapter_file_that_holds_the_base": ("lora/adapter.py",
        """
        if is_lora(name):
            tensors[name] = tensor
        """,
        "tensors[name] = tensor"),
    "misspelt_target": ("lora/adapter.py",
        "missing = targets - names", "missing = set() if targets & names else targets"),
    "dropout_on_the_base_path": ("lora/layers.py",
        "y = self.base(x)",
        """
        x = self.dropout(x)
        y = self.base(x)
        """),
    "gqa_adapter_width": ("lora/layers.py",
        "self.trainable_zeros(base.out_features, r)", "self.trainable_zeros(base.in_features, r)"),
    "tied_embeddings": ("lora/lora_layer.py",
        "self.base = with_weight(self.base, merged)", "self.base.weight.data.copy_(merged)"),
    "adapter_in_16_bit": ("lora/lora_layer.py", "at_least_fp32(base.dtype)", "base.dtype"),
    "adapter_before_the_seed": ("finetune/job.py", "torch.manual_seed(job.options.seed)", "pass"),
    "reentrant_checkpointing": ("llama/model.py", "use_reentrant=False", "use_reentrant=True"),
    "copies_of_frozen_weights": ("finetune/job.py",
        "job.precision.dtype if job.lora else torch.float32", "torch.float32"),
    "norms_under_autocast": ("finetune/job.py",
        'enabled=name != "fp32" and lora is None', 'enabled=name != "fp32"'),
    "unscaling_fp16_gradients": ("lora/lora_layer.py", "at_least_fp32(base.dtype)", "base.dtype"),
    "clip_before_unscale": ("train.py", "precision.scaler.unscale_(optimizer)", "pass"),
    "schedule_on_skipped_steps": ("train.py", "run.progress.updates", "step - 1"),
    "rope_tables_in_16_bit": ("llama/model.py",
        "layer(h, rope, attend)", "layer(h, rope.to(h.dtype).float(), attend)"),
    "norm_overflow_in_fp16": ("llama/model.py",
        NORM, "x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight"),
    "stream_promoted_to_fp32": ("llama/model.py",
        NORM, "F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)"),
    "logits_of_all_positions": ("finetune/loss.py",
        LOGITS, "model(batch.tokens, layout=batch.layout).flatten(0, 1)[rows]"),
    "optimizer_given_frozen_weights": ("lora/methods/lora_plus.py",
        "[p for p in model.parameters() if p.requires_grad]", "list(model.parameters())"),
    "stale_key_and_strictness": ("llama/checkpoint.py", "stored.check_keys(model)", "pass"),
    "shards_along_the_wrong_side": ("llama/checkpoint.py", "range(len(shape))", "(0,)"),
    "a_pickle_in_a_file[checkpoint]": ("llama/files.py",
        "pickled = read_pickle(path, summed)", "return torch.load(path, weights_only=False)"),
    "a_pickle_in_a_file[adapter]": ("lora/files.py", "weights_only=True", "weights_only=False"),
    "mean_of_rank_means": ("finetune/batches.py",
        """
        n_tokens = sum(len(tokens) for tokens, _ in rows)
        n_answer = sum(count_answer(labels) for _, labels in rows)
        """,
        """
        n_tokens = sum(len(tokens) for tokens, _ in rows)
        n_answer = len(ranks) * sum(batch.n_answer for batch in batches)
        """),
    "no_sync_placement": ("train.py", "is_last or ranks.size == 1", "i == 1 or ranks.size == 1"),
    "freeze_after_wrapping": ("train.py",
        WRAPPING,
        f"""
        frozen = [p.requires_grad_() for p in model.parameters() if not p.requires_grad]
        {WRAPPING}
        [p.requires_grad_(False) for p in frozen]
        """),
    "soft_targets_grow_faint": ("finetune/distill.py",
        "self.weight * T ** 2 * soft", "self.weight * soft"),
    "soft_targets_of_padding": ("finetune/distill.py",
        "answer_rows(batch)",
        "(torch.arange(batch.labels.numel()), batch.labels.flatten().roll(-1).clamp(min=0))"),
    "a_word_that_the_teacher_rules_out": ("finetune/distill.py",
        "(self.head(features).to(loss_dtype) / T).softmax(-1)",
        "(self.head(features).to(loss_dtype) / T).log_softmax(-1).exp() + 0 * self.head(features)"),
    "evaluation_through_the_wrapper": ("train.py",
        "functools.partial(evaluate, model, job.val_set, min(tokens_per_batch, SCORING_TOKENS), "
        "precision.autocast, ranks.rank, ranks.size)",
        "functools.partial(evaluate, ddp_model, job.val_set, min(tokens_per_batch, SCORING_TOKENS),"
        " precision.autocast, ranks.rank, ranks.size)"),
}


def normal(code):
    """Return code as ast.unparse writes it, so that line breaks and quotes do not matter."""
    return ast.unparse(ast.parse(textwrap.dedent(code).strip()))


def mutated(code, before, after):
    """Return (code with `before` replaced by `after`, number of places)."""
    code = normal(code)
    before = normal(before)
    after = normal(after)
    if "\n" not in before + after:                   # It may be a part of a line.
        if before not in code:                       # It may be an argument, name=value.
            before = before.replace(" = ", "=", 1)
            after = after.replace(" = ", "=", 1)
        return code.replace(before, after), code.count(before)
    lines = [re.escape(line) for line in before.splitlines()]
    pattern = "^( *)" + "\n\\1".join(lines) + "$"
    return re.subn(pattern, lambda match: textwrap.indent(after, match[1]), code, flags=re.M)


def mutated_copy(folder, path, before, after):
    """Copy the tree to `folder` with `before` replaced by `after` in the file at `path`."""
    left_out = shutil.ignore_patterns(".git", "out*", "__pycache__", ".pytest_cache")
    shutil.copytree(ROOT, folder, ignore=left_out)
    trapped, _ = mutated((folder / path).read_text(), before, after)
    (folder / path).write_text(trapped)
    return folder


TRAPS = re.findall(r"^def test_(\w+)", (ROOT / "tests/test_traps.py").read_text(), re.M)


def test_every_trap_has_its_mutation():
    assert sorted({trap.partition("[")[0] for trap in MUTATIONS}) == sorted(TRAPS)


@pytest.mark.parametrize("trap", MUTATIONS)
def test_a_mutation_finds_its_place(trap):
    """Once at least, in code that compiles and is another than before."""
    path, before, after = MUTATIONS[trap]
    code = (ROOT / path).read_text()
    trapped, n_places = mutated(code, before, after)
    assert n_places, f"{path} has nowhere: {before}"
    compile(trapped, path, "exec")
    assert ast.dump(ast.parse(trapped)) != ast.dump(ast.parse(code))


@pytest.mark.slow
@pytest.mark.parametrize("trap", MUTATIONS)
def test_the_trap_put_back_is_caught(trap, tmp_path):
    folder = mutated_copy(tmp_path / "copy", *MUTATIONS[trap])
    test = f"tests/test_traps.py::test_{trap}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        cwd=folder,
        capture_output=True,
        text=True,
        env=ONE_THREAD,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout[-2000:]  # 2 and more: pytest itself failed.
    slips = "NameError", "SyntaxError"  # It must be the trap that fails.
    assert not any(slip in done.stdout for slip in slips), done.stdout[-2000:]
