"""The beginning of a BERT script against Megatron-LM core 0.12.1: it imports, and its model is not built."""

import torch
import torch.nn.functional as F

import megatron.legacy.model
from megatron.core import mpu, tensor_parallel
from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.enums import ModelType
from megatron.core.models.bert.bert_layer_specs import (
    bert_layer_local_spec,
    bert_layer_with_transformer_engine_spec,
)
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import average_losses_across_data_parallel_group


def model_provider(pre_process=True, post_process=True) -> megatron.legacy.model.BertModel | BertModel:
    args = get_args()
    if args.spec is None:
        spec = bert_layer_with_transformer_engine_spec
    else:
        spec = bert_layer_local_spec if args.spec[0] == "local" else import_module(args.spec)
    return BertModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        num_tokentypes=2,
        add_binary_head=args.bert_binary_head,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=True,
        pre_process=pre_process,
        post_process=post_process,
    )


def get_batch(data_iterator):
    keys = ["text", "types", "labels", "is_random", "loss_mask", "padding_mask"]
    data = next(data_iterator) if data_iterator is not None else None
    return tensor_parallel.broadcast_data(keys, data, torch.int64)


def loss_func(sentence_order, output_tensor):
    loss = F.cross_entropy(output_tensor.float(), sentence_order)
    return loss, {"lm loss": average_losses_across_data_parallel_group([loss])}


def forward_step(data_iterator, model):
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    return model(batch["text"]), lambda output: loss_func(batch["is_random"], output)


def train_valid_test_datasets_provider(train_val_test_num_samples):
    args = get_args()
    config = BERTMaskedWordPieceDatasetConfig(
        random_seed=args.seed, blend=get_blend_from_list(args.data_path), tokenizer=get_tokenizer()
    )
    return BlendedMegatronDatasetBuilder(
        BERTMaskedWordPieceDataset,
        train_val_test_num_samples,
        lambda: mpu.get_tensor_model_parallel_rank() == 0,
        config,
    ).build()


if __name__ == "__main__":
    print_rank_0("all names are there")
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        args_defaults={"tokenizer_type": "NullTokenizer"},
    )
