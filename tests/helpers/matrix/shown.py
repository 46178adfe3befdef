"""Situations that tests elsewhere show: each names the test, which must be there and must run."""

from __future__ import annotations

from matrix.models import LORA, OTHERS, USE
from matrix.optimizers import AROUND
from matrix.rows import shown
from matrix.trainers import TRAINER, TRL

SAVED = "Saving, resuming, references"
T = "tests/training/"


# ------------------------------------------------------------------------------------ trainers

shown(
    TRAINER,
    "`optimizer_cls_and_kwargs=plan.optimizer_cls_and_kwargs(args)`",
    "works",
    "Learning rate, betas, epsilon and decay come from `args`. It ends where dense training ends "
    "whose frozen entries are put back after each step.",
    T + "test_trainers.py::test_evaluation_loss_is_that_of_dense_masked_training",
)
shown(
    TRAINER,
    "`resume_from_checkpoint=True`",
    "works",
    "With the same plan, bit for bit that of an uninterrupted run.",
    T + "test_trainers.py::test_trainer_resumes_bit_for_bit_and_refuses_other_units",
)
shown(
    TRAINER,
    "`resume_from_checkpoint=True` with other units",
    "refused",
    "Resume with the same units.",
    T + "test_trainers.py::test_trainer_resumes_bit_for_bit_and_refuses_other_units",
    "another plan",
)
shown(
    TRAINER,
    "`PlanCallback(plan, folder)`",
    "works",
    "It verifies at each checkpoint, saves the update and closes the plan.",
    T + "test_plan_callback.py::test_it_verifies_saves_and_closes",
)
shown(
    TRAINER,
    "`load_best_model_at_end=True`",
    "works",
    "The update is that of the best checkpoint.",
    T + "test_plan_callback.py::test_the_update_is_that_of_the_best_checkpoint",
)
shown(
    TRAINER,
    "a callback of yours that writes to a frozen weight, with `PlanCallback`",
    "refused",
    "The run ends at its next checkpoint. Nothing is saved.",
    T + "test_plan_callback.py::test_a_moved_weight_ends_the_run_at_the_next_save[1-2]",
    "frozen entries of model.norm.weight",
)
shown(
    TRAINER,
    "`ImportanceCallback`, `track_importance=True`",
    "works",
    "Each log has the mean importance of a group.",
    T + "test_trainers.py::test_importance_is_logged",
)
shown(
    TRAINER,
    "rows of a tied embedding (`rows=`), with resuming",
    "works",
    "`from_pretrained` reads each checkpoint.",
    T + "test_plan_callback.py::test_rows_of_a_tied_embedding_resume_bit_for_bit",
)

TAKES = T + "test_trl_trainers.py::test_each_takes_its_optimiser_from_its_arguments"
MADE = T + "test_trl_trainers.py::test_each_protects_the_adapter_that_it_makes"
NAMES = {
    "sft": "SFT",
    "dpo": "DPO",
    "kto": "KTO",
    "reward": "Reward (a classifier)",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "online_dpo": "Online DPO (`trl.experimental`)",
    "cpo": "CPO (`trl.experimental`)",
    "orpo": "ORPO (`trl.experimental`)",
}
for kind, name in NAMES.items():
    generates = " It generates while it trains." if kind in ("grpo", "rloo", "online_dpo") else ""
    shown(
        TRL,
        f"{name}, `optimizers=plan.optimizers(args)`",
        "works",
        f"Learning rate, betas, epsilon and decay come from `args`.{generates}",
        f"{TAKES}[{kind}]",
    )
for kind, name in NAMES.items():
    shown(
        LORA,
        f"{name}, `peft_config=` and `AdapterCallback(units)`",
        "works",
        "Protected entries are bit-equal after `merge_and_unload`.",
        f"{MADE}[{kind}]",
    )

PREPARED = T + "test_prepared_trainers.py::"
shown(
    LORA,
    "GRPO, `use_vllm=True`, `peft_config=` and `AdapterCallback(units)`",
    "works",
    "vLLM is given protected entries as they were.",
    PREPARED + "test_vllm_is_given_protected_units_as_they_were",
)
shown(
    TRL,
    "DPO, `ref_model=copy.deepcopy(model)`, made under the plan",
    "works",
    "With `sync_ref_model=True` too.",
    T + "test_silent_trainers.py::test_dpo_trains_what_the_plan_trains[True]",
)
for kind in ("dpo", "grpo", "rloo"):
    shown(
        TRL,
        f"{NAMES[kind]}, `sync_ref_model=True`",
        "works",
        "After `prepare_trainer(plan, trainer)`.",
        f"{PREPARED}test_a_reference_without_a_plan_is_brought_up_to_date[{kind}]",
    )
shown(
    TRL,
    "`sync_ref_model=True` without `prepare_trainer`",
    "refused",
    "Before the first step. Call `ssah.training.prepare_trainer(plan, trainer)`.",
    PREPARED + "test_a_trainer_that_was_not_prepared_is_refused_before_its_first_step",
    "args.sync_ref_model is True",
)
for case, name in (
    ("grpo-colocate-freeze", 'GRPO, `use_vllm=True`, `vllm_mode="colocate"`'),
    ("grpo-server-train_only", 'GRPO, `use_vllm=True`, `vllm_mode="server"`'),
    ("rloo-colocate-train_only", "RLOO, `use_vllm=True`"),
):
    shown(
        TRL,
        name,
        "works",
        "After `prepare_trainer`, vLLM is given whole weights. Shown with TRL's own sync; vLLM "
        "itself was not run.",
        f"{PREPARED}test_vllm_is_given_whole_weights_by_their_names[{case}]",
    )
shown(
    TRL,
    "Online DPO, `use_vllm=True`",
    "works",
    "The same.",
    PREPARED + "test_online_dpo_gives_vllm_whole_weights",
)
for mode in ("freeze", "train_only"):
    shown(
        TRL,
        f"`BEMACallback` under `{mode}`",
        "works",
        "After `prepare_trainer`. The average has every frozen weight bit for bit.",
        f"{PREPARED}test_bema_averages_what_trains_and_keeps_the_rest[{mode}]",
    )
UNPREPARED = PREPARED + "test_what_cannot_be_prepared_is_refused_and_nothing_changed"
for case, situation, message, words in (
    (
        "another_engine",
        "`use_vllm=True` in a trainer that sends weights in another way",
        "sends weights to vLLM in a way that is not known here",
        "Use `use_vllm=False`.",
    ),
    (
        "another_process",
        "Async GRPO (`trl.experimental`), whose vLLM runs on its own",
        "sends weights to vLLM in a way that is not known here",
        "Use GRPO.",
    ),
    (
        "adapters",
        "`peft_config=` on the plan's model",
        "has put adapters",
        "Leave out the plan, and use `AdapterCallback`.",
    ),
    (
        "other_model",
        "a trainer that has another model than the plan",
        "than the plan",
        "Give both the same model.",
    ),
    (
        "another_reference",
        "`sync_ref_model=True` with a reference of another kind",
        "ref_model has nothing for",
        "Both models must have the same parameters.",
    ),
):
    shown(TRL, situation, "refused", words, f"{UNPREPARED}[{case}]", message)
for case, situation, message, words in (
    (
        "several_gpus",
        "a trainer on several GPUs in one process",
        "copy the model to 2 GPUs",
        "Set `CUDA_VISIBLE_DEVICES=0`, or use `torchrun`.",
    ),
    (
        "fsdp",
        "a trainer with an FSDP plugin and an optimiser of its own",
        "shard the model with FSDP after its plan",
        "That is, with another optimiser than `plan.optimizer_cls_and_kwargs(args)`. Give it that.",
    ),
    (
        "deepspeed",
        "a trainer with DeepSpeed",
        "shard the model with DeepSpeed after its plan",
        "Use FSDP2, or DDP.",
    ),
):
    shown(OTHERS, situation, "refused", words, f"{UNPREPARED}[{case}]", message)

# ------------------------------------------------------------------------------- around a step

for case, situation, message, words in (
    (
        "test_an_optimiser_of_another_model_is_refused[fused]",
        "the optimiser of another model's plan",
        "another model than the plan's",
        "Make plan, optimiser and loss with one model.",
    ),
    (
        "test_adapters_that_take_all_gradients_are_named[fused]",
        "adapters that were added after the plan",
        "requires_grad=False",
        "peft switches all other gradients off. Train adapters without a plan.",
    ),
    (
        "test_state_of_other_shapes_is_refused[dense-options0]",
        "an optimiser of torch that resumes a run without a plan",
        "has shape",
        "Resume with the plan that it was saved under.",
    ),
    (
        "test_state_of_other_shapes_is_refused[other units-options0]",
        "an optimiser of torch that resumes a run with other units",
        "has shape",
        "The same.",
    ),
):
    shown(AROUND, situation, "refused", words, f"{T}test_silent_steps.py::{case}", message)
shown(
    AROUND,
    "`LBFGS`, and steps with a closure",
    "works",
    "",
    T + "test_silent_steps.py::test_gradients_that_a_closure_makes_are_waited_for",
)
shown(
    AROUND,
    "a checkpoint of `torch.optim.AdamW` in `MaskedAdamW`",
    "works",
    "It goes on where torch would.",
    T + "test_silent_steps.py::test_a_checkpoint_of_torch_goes_on_bit_for_bit_as_near_as_rounding",
)

# ----------------------------------------------------------------------------------- the model

ORDINARY = T + "test_ordinary_model.py::"
SILENT = T + "test_silent.py::"
for situation, words, node in (
    (
        "autocast",
        "Gradients stay float32, as without a plan.",
        ORDINARY + "test_autocast_as_torch_does[llama_bias]",
    ),
    (
        "gradient accumulation",
        "",
        ORDINARY + "test_accumulation_checkpointing_and_modes",
    ),
    ("`torch.compile(fullgraph=True)`", "", ORDINARY + "test_compiles_whole[llama_bias]"),
    (
        "`copy.deepcopy(model)`",
        "The copy has a plan of its own.",
        ORDINARY + "test_deepcopy_trains_on_its_own",
    ),
    (
        "`torch.func.functional_call`",
        "It keeps nothing of what it is given.",
        SILENT + "test_functional_call_computes_with_what_it_lends_and_keeps_nothing[freeze-llama]",
    ),
    (
        "`torch.func.grad`",
        "",
        SILENT + "test_gradients_of_torch_func_are_those_of_backward[freeze-llama]",
    ),
    (
        "an average that is swapped in by `p.data = ...`",
        "",
        SILENT + "test_swapped_memory_is_what_the_model_computes_with[freeze-False]",
    ),
    (
        "the same in a compiled model",
        "",
        SILENT + "test_swapped_memory_is_what_the_model_computes_with[freeze-True]",
    ),
    (
        "`torch.optim.swa_utils.AveragedModel` (EMA)",
        "Frozen entries stay bit-equal.",
        SILENT + "test_an_average_by_parameters_is_that_of_a_model_without_a_plan",
    ),
    (
        '`hasattr(module, "weight")`',
        "It is False for what is split.",
        T + "test_plan_edges.py::test_a_split_weight_is_no_attribute[freeze-llama]",
    ),
    (
        "tokens that were added before the plan",
        "",
        T + "test_rows.py::test_tokens_that_were_added_train_alone",
    ),
    (
        "rows of a tied embedding and head",
        "They stay one weight.",
        T + "test_rows.py::test_twenty_steps_move_nothing_but_the_rows[tied-True-freeze-stretches]",
    ),
    (
        "parameters that required no gradient before `freeze`",
        "They stay, and are verified.",
        T + "test_keep.py::test_what_required_no_gradient_stays_and_is_verified",
    ),
    (
        "mixtures of experts",
        "Mixtral, Qwen2-MoE and gpt-oss.",
        T + "test_masked_experts.py::"
        "test_training_equals_dense_training_with_the_frozen_put_back[mixtral-freeze]",
    ),
    (
        "a model that was quantised, after `model.dequantize()`",
        "",
        "tests/models/test_quantised_use.py::test_what_the_refusal_advises_works[bnb-nf4]",
    ),
):
    shown(USE, situation, "works", words, node)
QUANTISED = "tests/models/test_quantised_use.py::test_training_pruning_and_updates_are_refused"
for scheme, name in (
    ("bnb-8bit", "bitsandbytes, 8 bits"),
    ("bnb-nf4", "bitsandbytes, 4 bits"),
    ("torchao-int8", "torchao"),
    ("gguf", "GGUF, packed"),
):
    shown(
        USE,
        f"a quantised base: {name}",
        "refused",
        "Dequantise it, or train an adapter on it ([adapters](lora.md)).",
        f"{QUANTISED}[{scheme}]",
        "must hold a plain floating-point",
    )
for situation, message, words, node in (
    (
        "an average that writes to the values of `state_dict()`",
        "of a state_dict() was written to",
        "It is a warning at the next use: those values are copies. Use `AveragedModel`.",
        SILENT + "test_writes_to_a_state_dict_are_warned_of[llama]",
    ),
    (
        "a plan inside `with ssah.ablate(...)`",
        "with ssah.ablate",
        "The zeros would become the weights.",
        "tests/interventions/test_temporary.py::test_a_plan_inside_ablate_is_refused[freeze]",
    ),
    (
        "a weight that is NaN or infinite",
        "is NaN or infinite",
        "Load another checkpoint.",
        "tests/models/test_finite.py::test_a_plan_is_refused",
    ),
    (
        "a projection that is pruned or parametrised by torch",
        "is no parameter",
        "Make that change final first.",
        "tests/units/test_projections.py::test_a_computed_weight_is_not_changed",
    ),
    (
        "an update of a weight between forward and backward",
        "modified by an inplace operation",
        "Call `backward()` before the step.",
        ORDINARY + "test_a_change_between_forward_and_backward_is_noticed",
    ),
    (
        "`plan.verify()` after a frozen parameter was put elsewhere",
        "no longer where it was",
        "Make such changes before the plan.",
        T + "test_silent_verify.py::test_verify_names_what_is_no_longer_in_its_place",
    ),
):
    shown(USE, situation, "refused", words, node, message)

# ----------------------------------------------------------------------------------- processes

RANKS = T + "test_silent_ranks.py::test_two_ranks"
SHARDS = T + "test_fsdp2_trainer.py::"
WRAPPED = "tests/models/test_wrappers.py::"
for situation, words, node in (
    (
        "DistributedDataParallel",
        "Gradients of what trains alone are sent.",
        "tests/attribution/test_ranks.py::test_ddp_sends_trained_gradients_alone",
    ),
    (
        "DistributedDataParallel, compared with one process",
        "All ranks end alike.",
        RANKS + "[equal_plans]",
    ),
    (
        "DPO under `torchrun`, two processes, `sync_ref_model=True`",
        "After `prepare_trainer`. All ranks end alike.",
        RANKS + "[under_a_trainer]",
    ),
    ("a model and a plan of its own on each rank", "", RANKS + "[plans_of_their_own]"),
    (
        "`fully_shard` (FSDP2), then the plan",
        "With `plan.optimizer()`, checkpoints by torch.distributed.checkpoint, and other numbers "
        "of ranks.",
        "tests/attribution/test_ranks.py::test_sharded_by_fully_shard",
    ),
    (
        "the plan, then a Trainer with FSDP2 (`fsdp_version: 2`)",
        "With the plan's optimiser. It ends where one process does; the update and the checkpoints "
        "have the original names and shapes.",
        SHARDS + "test_trainer_shards_after_the_plan",
    ),
    (
        "the same, resumed on other numbers of ranks",
        "Full and sharded checkpoints.",
        SHARDS + "test_any_number_of_ranks_resumes[freeze-fsdp0]",
    ),
    (
        "the plan, then `Accelerator.prepare` with FSDP2",
        "With `plan.optimizer()`, made after the `Accelerator`. Mixtures of experts too.",
        SHARDS + "test_two_ranks[under_accelerate]",
    ),
):
    shown(OTHERS, situation, "works", words, node)
for situation, message, words, node in (
    (
        "DistributedDataParallel with other units on each rank",
        "rank 1 trains other units than rank 0",
        "Draw units with one seed, or load them.",
        RANKS + "[other_units]",
    ),
    (
        "DistributedDataParallel that starts from other weights on each rank",
        "rank 1 has other frozen weights than rank 0",
        "Load the same checkpoint.",
        RANKS + "[other_weights]",
    ),
    (
        "`trainer.evaluate()` before `trainer.train()`, several processes",
        "each rank would train by itself",
        "accelerate takes the model for one that it has wrapped. Evaluate afterwards.",
        RANKS + "[evaluated_before]",
    ),
    (
        "the plan, then `fully_shard`",
        "shard the model first, and make the plan then",
        "The other order works.",
        RANKS + "[sharded_afterwards]",
    ),
    (
        "a sharded model with other units on each rank",
        "rank 1 trains other units than rank 0",
        "Draw units with one seed, or load them.",
        RANKS + "[sharded_with_other_units]",
    ),
    (
        "a sharded model with `torch.optim.AdamW`, or with `max_norm=`",
        "must be None (clip with ",
        "The plan's own optimiser knows what trains.",
        "tests/attribution/test_ranks.py::test_what_a_sharded_model_refuses",
    ),
    (
        "a Trainer with FSDP2, with other units on each rank",
        "rank 1 trains other units ",
        "On every rank, before anything trains.",
        SHARDS + "test_two_ranks[refuse]",
    ),
    (
        "a Trainer with FSDP1 or DeepSpeed, or on several GPUs in one process",
        "about to be sharded by",
        "By name, as the plan's optimiser is asked for. Use FSDP2 or DDP.",
        SHARDS + "test_what_no_plan_can_follow_is_refused_by_name",
    ),
    (
        "FSDP1",
        "sharded by FSDP1",
        "Use `fully_shard`.",
        WRAPPED + "test_what_fsdp1_holds_is_refused[True-True]",
    ),
    (
        "DeepSpeed's ZeRO stage 3",
        "partitioned by DeepSpeed's ZeRO stage 3",
        "Use `fully_shard`.",
        WRAPPED + "test_what_deepspeed_partitions_is_refused[True]",
    ),
    (
        "`torch.nn.DataParallel` of a model under a plan",
        "CUDA_VISIBLE_DEVICES",
        "Start one process for each GPU with `torchrun`.",
        WRAPPED + "test_data_parallel_replicas_of_a_planned_model_are_refused",
    ),
    (
        "a plan of what DDP wraps: `freeze(ddp, units)`",
        "pass model.module, and make a plan before",
        "Make the plan, then wrap the model.",
        WRAPPED + "test_wrappers_are_refused_by_name[DDP]",
    ),
    (
        "a plan of what `torch.compile` wraps",
        "model._orig_mod",
        "Pass the model, or compile it in place.",
        WRAPPED + "test_wrappers_are_refused_by_name[torch.compile]",
    ),
):
    shown(OTHERS, situation, "refused", words, node, message)

# ------------------------------------------------------------------------------------ adapters

ADAPTERS = T + "test_adapters.py::"
MERGED = ADAPTERS + "test_merged_weights_of_protected_units_are_those_before"
for situation, words, node in (
    (
        "LoRA, `protect_adapter`",
        "Protected entries are bit-equal after merging.",
        MERGED + "[llama-float32-freeze]",
    ),
    ("LoRA in bfloat16", "The same.", MERGED + "[llama-bfloat16-freeze]"),
    (
        "LoRA on some units alone (`only=True`)",
        "Everything else is bit-equal.",
        MERGED + "[llama-float32-only]",
    ),
    (
        "QLoRA (a 4-bit base)",
        "The adapter adds exactly zero to protected units.",
        ADAPTERS + "test_four_bit_base_adds_exactly_zero_to_protected_units",
    ),
    ("MiSS on projections into units", "", ADAPTERS + "test_miss_on_projections_into_units"),
    (
        "LoRA on the attention and the routed experts of a mixture (`target_parameters`)",
        "Each expert has its own protected units.",
        ADAPTERS + "test_adapters_of_experts_keep_their_units[qwen3_moe-freeze]",
    ),
    (
        "a protected adapter, saved and loaded",
        "It loads without this library.",
        ADAPTERS + "test_a_saved_adapter_loads_without_this_library",
    ),
    (
        "`freeze(peft_model.get_base_model(), units)`, adapters on queries and keys",
        "The adapters go on training alone.",
        T + "test_keep.py::test_adapters_go_on_training_alone",
    ),
):
    shown(LORA, situation, "works", words, node)
COUPLED = ADAPTERS + "test_what_couples_units_is_refused_and_nothing_changed"
for situation, message, words, node in (
    ("DoRA", "couples rows and columns", "Use plain LoRA.", COUPLED + "[dora]"),
    (
        '`init_lora_weights="pissa"`',
        "changes protected units already",
        "Start with a fresh adapter.",
        COUPLED + "[pissa]",
    ),
    ("`lora_bias=True`", "lora_bias=True", "Leave it off.", COUPLED + "[bias]"),
    (
        "`modules_to_save` with protected units",
        "modules_to_save",
        "It trains them whole. Take them out.",
        COUPLED + "[saved whole]",
    ),
    (
        "MiSS on a projection out of units",
        "MiSS on a projection out of units",
        "Leave it out of `target_modules`.",
        ADAPTERS + "test_miss_out_of_units_is_refused",
    ),
    (
        "IA3 and other kinds",
        "must be LoRA or MiSS of a linear projection",
        "They scale whole rows and columns. Use LoRA.",
        ADAPTERS + "test_other_adapters_and_models_are_refused",
    ),
    (
        "`plan.verify()` while an adapter is active on what is frozen",
        "has frozen entries, and the adapter",
        "Take the adapter off.",
        T + "test_silent_verify.py::test_verify_names_adapters_on_what_is_frozen",
    ),
):
    shown(LORA, situation, "refused", words, node, message)

# ---------------------------------------------------------------------- saving and references

for situation, words, node in (
    (
        "`plan.save_pretrained`, `ssah.load_update`",
        "Bit for bit the trained model.",
        T + "test_updates.py::test_merges_exactly",
    ),
    ("`plan.push_to_hub`", "", T + "test_updates.py::test_push_to_hub"),
    (
        "`load_state_dict` of an ordinary checkpoint under the plan",
        "",
        ORDINARY + "test_state_dict_loads_into_and_out_of_a_plan[llama_tied]",
    ),
    (
        "`plan.close()`",
        "An ordinary model again, with what was trained.",
        ORDINARY + "test_close_gives_the_ordinary_model_back[llama_bias]",
    ),
    (
        "`with plan.disabled():` as the reference of DPO",
        "No second model.",
        T + "test_disabled.py::test_preferences_train_as_with_a_second_model",
    ),
    (
        "DPO, `precompute_ref_log_probs=True` in the place of a reference",
        "As with a second model.",
        T + "test_plan_callback.py::test_dpo_trainer_needs_no_second_model",
    ),
    (
        "`plan.original_named_parameters()`",
        "Names, shapes and values from before the plan, for a weight sync of your own.",
        T + "test_plan_edges.py::test_names_and_values_of_before_the_plan[freeze-llama]",
    ),
    (
        "`ssah finetune`, interrupted and called again",
        "",
        T + "test_run_folders.py::test_a_run_goes_on_from_its_own_checkpoint",
    ),
    (
        "`ssah finetune` under `torchrun` (DDP)",
        "One process writes and tells, and all end alike, as one process does. Also interrupted.",
        T + "test_finetune_ranks.py::test_processes_train_what_one_process_trains",
    ),
    (
        "`ssah finetune` under `accelerate launch` with FSDP2",
        "The same, with full checkpoints.",
        T + "test_finetune_ranks.py::test_sharded_processes_train_what_one_process_trains",
    ),
):
    shown(SAVED, situation, "works", words, node)
for situation, message, words, node in (
    (
        "`load_update` into another base",
        "weights differ",
        "Nothing is changed. Load it into the base that it was trained from.",
        T + "test_updates.py::test_refuses_what_it_does_not_belong_to",
    ),
    (
        "`plan.disabled()` after training began, without `keep_originals()`",
        "no longer those that the plan was made with",
        "Call `plan.keep_originals()` right after the plan is made.",
        T + "test_disabled.py::test_values_that_are_gone_are_not_made_up",
    ),
    (
        "a step, a save or a backward pass inside `plan.disabled()`",
        "leave the block of plan.disabled() first",
        "Do it after the block.",
        T + "test_disabled.py::test_what_would_be_lost_or_wrong_inside_is_refused",
    ),
):
    shown(SAVED, situation, "refused", words, node, message)
