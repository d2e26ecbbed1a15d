"""Pretrain a GPT model: a model, a batch, a loss."""

from functools import partial

import megatron.core.device_backends  # before torch: explains what it cannot load

# isort: split
import torch

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.utils import StragglerDetector
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.data.batch import stage_needs_data
from megatron.training.entry import run_main
from megatron.training.memory_limits import check_memory
from megatron.training.model_setup import has_transformer_engine_names, layer_spec_from_args
from megatron.training.shared_storage import storage_domain
from megatron.training.tokenizer import num_token_ids
from megatron.training.utils import (
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_blend_and_blend_per_split,
    naming_source_of_data,
)

# A loss this many times the largest one seen so far counts as a spike (--check-for-spiky-loss).
SPIKY_LOSS_FACTOR = 10


def model_provider(pre_process: bool = True, post_process: bool = True) -> GPTModel:
    """The GPT model the arguments describe."""
    args = get_args()
    check_memory(args)
    print_rank_0("building GPT model ...")
    config = core_transformer_config_from_args(args)
    layers, has_te_names = layer_spec_from_args(args, config), has_transformer_engine_names(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=layers,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        mtp_block_spec=get_gpt_mtp_block_spec(config, layers, has_te_names),
    )


def get_batch(data_iterator):
    """Tokens, labels, loss mask, attention mask (None = causal) and positions of one micro-batch."""
    batch = get_batch_on_this_cp_rank(get_batch_on_this_tp_rank(data_iterator))
    return tuple(batch.values())


def loss_func(loss_mask: torch.Tensor, output_tensor: torch.Tensor):
    """Sum of the losses of the unmasked tokens.

    Args:
        loss_mask: [b, s], 1 where a token counts, else 0. Not for fractional weights: their sum is the
            number of tokens, and is cut to an integer.
        output_tensor: [b, s] per-token losses.

    Returns:
        (sum, number of tokens, {"lm loss": (sum, number of tokens)}).
    """
    args = get_args()
    loss_mask = loss_mask.reshape(-1).float()
    # [2]: sum, count
    totals = torch.stack([(output_tensor.float().reshape(-1) * loss_mask).sum(), loss_mask.sum()])
    # Context-parallel ranks each hold a part of every sequence.
    totals = reduce_from_tensor_model_parallel_region(totals, parallel_state.get_context_parallel_group())
    loss, num_tokens = totals[0], totals[1].detach().to(torch.int64)

    machine = get_rerun_state_machine()
    checked = args.check_for_nan_in_loss_and_grad or args.check_for_spiky_loss
    # On the host, so that several questions wait for the device once.
    value = loss.detach().cpu() if checked else None
    if args.check_for_nan_in_loss_and_grad:
        machine.validate_result(
            value, rejection_func=torch.isnan, message="found NaN in local forward loss calculation"
        )
        machine.validate_result(
            value, rejection_func=torch.isinf, message="found Inf in local forward loss calculation"
        )
    if args.check_for_spiky_loss:
        machine.validate_result(
            value,
            rejection_func=partial(
                machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            fatal=False,
        )
    reported = totals.detach().clone()
    if parallel_state.get_data_parallel_world_size() > 1:
        torch.distributed.all_reduce(reported, group=parallel_state.get_data_parallel_group())
    return loss, num_tokens, {"lm loss": (reported[0], reported[1])}


def forward_step(data_iterator, model: GPTModel):
    """Per-token losses of the next micro-batch, and the function that sums them."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    detector = StragglerDetector()
    with detector(bdata=True):
        tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator)
    timers("batch-generator").stop()
    with detector:
        losses = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return losses, partial(loss_func, loss_mask)


def is_dataset_built_on_rank() -> bool:
    """Tensor rank 0 of the stages that compute with data reads it; the others receive it."""
    return stage_needs_data(get_args()) and parallel_state.get_tensor_model_parallel_rank() == 0


def core_gpt_dataset_config_from_args(args) -> GPTDatasetConfig:
    """Dataset settings from the arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        # A plain causal mask need not be stored: [s, s] booleans per sample, remade in every layer.
        create_attention_mask=args.create_attention_mask_in_dataloader and args.reset_attention_mask,
        s3_cache_path=args.s3_cache_path,
        vocab_size=num_token_ids(get_tokenizer(), args),
    )
    config.storage_domain = storage_domain(args, config.data_prefixes())
    return config


def train_valid_test_datasets_provider(train_val_test_num_samples):
    """Training, validation and test sets of the requested sizes."""
    args = get_args()
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    with naming_source_of_data(args):
        datasets = BlendedMegatronDatasetBuilder(
            MockGPTDataset if args.mock_data else GPTDataset,
            train_val_test_num_samples,
            is_dataset_built_on_rank,
            core_gpt_dataset_config_from_args(args),
        ).build()
    print_rank_0("> finished creating GPT datasets ...")
    return datasets


def main() -> None:
    """Train with the command line's arguments."""
    train_valid_test_datasets_provider.is_distributed = True  # pyright: ignore[reportFunctionMemberAccess]
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        model_family="gpt",
    )


if __name__ == "__main__":  # a copy of this file is a program
    run_main(main)
