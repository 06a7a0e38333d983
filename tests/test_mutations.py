"""Each trap of test_traps.py is put back into a copy of our code, and its test must fail:  pytest -m slow tests/test_mutations.py"""
import os
import re
import shutil
import subprocess
import sys

import pytest

from .conftest import ROOT

STEP = "* world_size / window.n_answer"
MUTATIONS = {                                           # trap: (file, ours, theirs)
    "mean_of_means": ("train.py", STEP, "* world_size / max(1, batch.n_answer) / len(window.batches)"),
    "divided_twice": ("train.py", STEP, STEP + " / len(window.batches)"),
    "not_divided": ("train.py", STEP, "* world_size / max(1, batch.n_answer)"),
    "leftover_window": ("train.py", STEP, "* world_size * len(window.batches) / window.n_answer / args.accumulation_steps"),
    "schedule_counts_windows": ("train.py", "lr_factor(n, len(steps), warmup", "lr_factor(n, len(steps) * args.accumulation_steps, warmup"),
    "no_answer_in_the_batch": ("finetune/loss.py", "return loss, batch.n_answer", "return loss / batch.n_answer * batch.n_answer, batch.n_answer"),
    "loss_without_a_graph": ("finetune/loss.py", "    logits = model(batch.tokens, rows=rows.to",
                             "    if not len(rows):\n        return torch.zeros(()), 0\n    logits = model(batch.tokens, rows=rows.to"),
    "validation_by_batches": ("finetune/evaluate.py", "(1, len(own), -scores[right][0], scores[right][1])",
                              "(1, 1 / len(group), -scores[right][0] / sum(len(examples[j][1]) for j in group), scores[right][1])"),
    "accuracy_of_free_text": ("finetune/evaluate.py", '"accuracy": hits / n', '"accuracy": sums.get("exact_match", hits) / n'),
    "shift_by_one": ("finetune/loss.py", "batch.labels.flatten().roll(-1)", "batch.labels.flatten().clone()"),
    "prompt_is_no_target": ("finetune/dataset.py", "([IGNORE] * len(prompt) + answer)", "(prompt + answer)"),
    "eos_is_a_target": ("finetune/batches.py", "pad_right(labels, IGNORE),",
                        "pad_right(labels, IGNORE).masked_fill(pad_right(tokens, self.pad_id) == self.pad_id, IGNORE),"),
    "eos_as_text": ("finetune/dataset.py", 'tokenizer.encode(example["output"], eos=True)', 'tokenizer.encode(example["output"] + "</s>")'),
    "eos_after_a_cut": ("finetune/dataset.py", "return (prompt + answer)[:max_seq_len],", "return (prompt + answer)[:max_seq_len - 1] + answer[-1:],"),
    "prompt_boundary": ("finetune/dataset.py", 'answer = tokenizer.encode(example["output"], eos=True)',
                        'whole = tokenizer.encode(format_prompt(example) + example["output"], bos=True, eos=True)\n'
                        '    prompt, answer = whole[:len(prompt)], whole[len(prompt):]'),
    "answer_cut_away": ("finetune/dataset.py", "[row for row in rows if row[1][-1] != IGNORE]", "rows"),
    "double_bos": ("finetune/dataset.py", "return tokenizer.encode(format_prompt(example), bos=True)",
                   "return [tokenizer.bos_id] + tokenizer.encode(format_prompt(example), bos=True)"),
    "token_by_token_decoding": ("llama/sampling.py", "    ids_so_far = []\n", "    yield from (tokenizer.decode([i]) for i in ids)\n    return\n"),
    "pad_id_of_minus_one": ("llama/tokenizer.py", "self.pad_id = self.eos_id", "self.pad_id = self.sp.pad_id()"),
    "order_without_coverage": ("finetune/batches.py", ".permutation(len(lengths))", ".integers(0, len(lengths), len(lengths))"),
    "each_epoch_in_the_same_order": ("finetune/batches.py", "default_rng((seed, epoch))", "default_rng(seed)"),
    "template_at_inference": ("generate.py", "    prompts = [encode_prompt(example, tokenizer) for",
                              '    prompts = [encode_prompt(example, tokenizer) + tokenizer.encode("\\n") for'),
    "alpha_over_r": ("lora/layers.py", "self.alpha / self.r", "self.alpha"),
    "alpha_and_r_lost": ("lora/adapter.py", 'LoRAConfig(**content["config"])', 'LoRAConfig(r=content["config"]["r"])'),
    "merge_in_16_bit": ("lora/layers.py", "(own + delta).to(like(self.base).dtype)", "own.to(like(self.base).dtype) + delta.to(like(self.base).dtype)"),
    "merge_drift": ("lora/layers.py", "self.own[0].to(self.base.weight)", "with_weight(self.base, self.base.weight - self.delta().to(self.base.weight.dtype))"),
    "double_merge": ("lora/layers.py", "        if self.merged:\n", "        if False:\n"),
    "adapter_silently_not_loaded": ("lora/adapter.py", "if expected != found:", "if False:"),
    "adapter_file_that_holds_the_base": ("lora/adapter.py", "model.state_dict().items() if is_lora(name)}", "model.state_dict().items()}"),
    "misspelt_target": ("lora/adapter.py", "if missing := targets - names:", "if not targets & names:"),
    "dropout_on_the_base_path": ("lora/layers.py", "        y = self.base(x)\n", "        x = self.dropout(x)\n        y = self.base(x)\n"),
    "gqa_adapter_width": ("lora/layers.py", "self.add_factors(base.in_features, base.out_features)", "self.add_factors(base.in_features, base.in_features)"),
    "tied_embeddings": ("lora/layers.py", "self.base = with_weight(self.base, merged)", "self.base.weight.data.copy_(merged)"),
    "adapter_in_16_bit": ("lora/layers.py", "torch.promote_types(like(self.base).dtype, torch.float32)", "like(self.base).dtype"),
    "adapter_before_the_seed": ("train.py", "            torch.manual_seed(args.seed)  ", "            pass  "),
    "reentrant_checkpointing": ("llama/model.py", "use_reentrant=False", "use_reentrant=True"),
    "copies_of_frozen_weights": ("train.py", "DTYPES[args.precision] if lora else torch.float32", "torch.float32"),
    "norms_under_autocast": ("train.py", 'enabled=args.method == "full" and args.precision', "enabled=args.precision"),
    "unscaling_fp16_gradients": ("lora/layers.py", "torch.promote_types(like(self.base).dtype, torch.float32)", "like(self.base).dtype"),
    "clip_before_unscale": ("train.py", "        scaler.unscale_(optimizer)", "        pass"),
    "schedule_on_skipped_steps": ("train.py", "            schedule.step()", "        schedule.step()"),
    "rope_tables_in_16_bit": ("llama/model.py", "layer(h, rope, attend)", "layer(h, rope.to(h.dtype).float(), attend)"),
    "norm_overflow_in_fp16": ("llama/model.py", "return F.rms_norm(x, self.weight.shape, self.weight, self.eps)",
                              "return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight"),
    "stream_promoted_to_fp32": ("llama/model.py", "return F.rms_norm(x, self.weight.shape, self.weight, self.eps)",
                                "return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)"),
    "logits_of_all_positions": ("finetune/loss.py", "model(batch.tokens, rows=rows.to(batch.tokens.device, non_blocking=True), layout=batch.layout)",
                                "model(batch.tokens, layout=batch.layout).flatten(0, 1)[rows]"),
    "optimizer_given_frozen_weights": ("lora/methods/lora_plus.py", "[p for p in model.parameters() if p.requires_grad]", "list(model.parameters())"),
    "stale_key_and_strictness": ("llama/checkpoint.py", "        check_keys(pieces, model, folder, file_name)", "        pass"),
    "shards_along_the_wrong_side": ("llama/checkpoint.py", "    for dim in range(len(shape)):", "    for dim in (0,):"),
    "a_pickle_in_a_file[checkpoint]": ("llama/files.py", "return SavedFile(path, mapped, summed).content()", "return torch.load(path, weights_only=False)"),
    "a_pickle_in_a_file[adapter]": ("lora/adapter.py", "weights_only=True", "weights_only=False"),
    "mean_of_rank_means": ("finetune/batches.py", "sum(count_answer(labels) for _, labels in rows), epoch)", "len(ranks) * sum(batch.n_answer for batch in batches), epoch)"),
    "no_sync_placement": ("train.py", "if world_size > 1 and i < len(window.batches) else nullcontext()", "if world_size > 1 and i > 1 else nullcontext()"),
    "freeze_after_wrapping": ("train.py", "    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model\n",
                              "    frozen = [p.requires_grad_() for p in model.parameters() if not p.requires_grad]\n"
                              "    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model\n"
                              "    [p.requires_grad_(False) for p in frozen]\n"),
    "soft_targets_grow_faint": ("finetune/distill.py", "self.weight * T ** 2 * soft", "self.weight * soft"),
    "soft_targets_of_padding": ("finetune/distill.py", "for each in answer_rows(batch))",
                                "for each in (torch.arange(batch.labels.numel()), batch.labels.flatten().roll(-1).clamp(min=0)))"),
    "a_word_that_the_teacher_rules_out": ("finetune/distill.py", "/ T).softmax(-1)  ", "/ T).log_softmax(-1).exp() + 0 * self.head(seen)  "),
    "evaluation_through_the_wrapper": ("train.py", "return evaluate(model, val_set", "return evaluate(parallel, val_set"),
}
TRAPS = re.findall(r"^def test_(\w+)", (ROOT / "tests/test_traps.py").read_text(), re.M)


def test_every_trap_has_its_mutation():
    assert sorted({trap.partition("[")[0] for trap in MUTATIONS}) == sorted(TRAPS)
    for path, ours, _ in MUTATIONS.values():
        assert ours in (ROOT / path).read_text(), (path, ours)


@pytest.mark.slow
@pytest.mark.parametrize("trap", MUTATIONS)
def test_the_trap_put_back_is_caught(trap, tmp_path):
    path, ours, theirs = MUTATIONS[trap]
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "out*", "__pycache__", ".pytest_cache"))
    (copy / path).write_text((copy / path).read_text().replace(ours, theirs))
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_traps.py::test_{trap}"],
                          cwd=copy, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 1, done.stdout[-2000:]                     # 1: a test failed; 2 and more: pytest itself did
    assert "NameError" not in done.stdout and "SyntaxError" not in done.stdout, done.stdout[-2000:]      # the trap, not a slip
