"""Multi-latent attention."""

from megatron.training.arguments.flag import Group, value

GROUP = Group(
    "mla",
    (
        value("--q-lora-rank", type=int, help="rank of the query compression"),
        value("--kv-lora-rank", type=int, default=32, help="rank of the key/value compression"),
        value("--qk-head-dim", type=int, default=128, help="non-rotary head width"),
        value("--qk-pos-emb-head-dim", type=int, default=64, help="rotary head width"),
        value("--v-head-dim", type=int, default=128, help="value head width"),
        value("--rotary-scaling-factor", type=float, default=1.0, help="YaRN factor"),
        value("--mscale", type=float, default=1.0, help="YaRN magnitude scale"),
        value("--mscale-all-dim", type=float, default=1.0, help="YaRN magnitude scale over all dims"),
    ),
)
