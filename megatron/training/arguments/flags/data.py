"""Datasets and loaders."""

from megatron.training.arguments.flag import Group, off_switch, switch, value

GROUP = Group(
    "data and dataloader",
    (
        value("--data-path", nargs="*", help="dataset prefix, list of prefixes, or weight/prefix pairs"),
        value("--split", help="train,valid,test proportions"),
        value("--train-data-path", nargs="*", help="separate training blend"),
        value("--valid-data-path", nargs="*", help="separate validation blend"),
        value("--test-data-path", nargs="*", help="separate test blend"),
        value("--data-args-path", help="file holding the --data-path words"),
        value("--per-split-data-args-path", help="JSON file with train/valid/test blends"),
        value("--data-cache-path", help="directory for index caches"),
        off_switch("--no-mmap-bin-files", "mmap_bin_files", help="read .bin with file reads instead of mmap"),
        switch("--mock-data", help="synthetic data"),
        value("--seq-length", type=int, help="tokens per sample"),
        value("--encoder-seq-length", type=int, help="encoder tokens (exclusive with --seq-length)"),
        value("--decoder-seq-length", type=int, help="decoder tokens"),
        value("--mask-prob", type=float, default=0.15, help="token masking probability (BERT/T5)"),
        value("--short-seq-prob", type=float, default=0.1, help="chance of a shorter sequence (BERT/T5)"),
        value("--num-workers", type=int, default=2, help="data loader processes"),
        switch("--reset-position-ids", help="restart positions after end-of-document"),
        switch("--reset-attention-mask", help="block attention across documents"),
        switch("--eod-mask-loss", help="no loss on end-of-document tokens"),
        off_switch(
            "--no-create-attention-mask-in-dataloader",
            "create_attention_mask_in_dataloader",
            help="do not build the mask tensor",
        ),
        value("--num-dataset-builder-threads", type=int, default=1, help="threads building blended datasets"),
        value("--s3-cache-path", help="cache for S3 index files"),
        off_switch(
            "--no-data-sharding",
            "data_sharding",
            help="cyclic loader: shuffle over all data instead of per-rank shard",
        ),
    ),
)
