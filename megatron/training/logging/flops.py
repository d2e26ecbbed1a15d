"""Floating-point operations of a training step, as published throughput figures count them."""

from argparse import Namespace


def num_floating_point_operations(args: Namespace, batch_size: int) -> float:
    """Multiply-adds (counted as two) of forward and backward over ``batch_size`` sequences.

    Matrix products of attention, MLP and logits; causal attention counts half its square; embedding
    look-ups and norms count nothing. With s, h, L, a, g, f, V for sequence, hidden, layers, heads, query
    groups, MLP width, vocabulary, r = kv_channels * a / h and m = 3/2 for gated MLPs (else 1)::

        batch * s * (12 h f m L + 12 L h^2 r (1 + g/a + s/(2h)) + 6 h V)

    The factor 12 is 3 passes (forward, input gradient, weight gradient) x 2 products x 2 operations.
    """
    s, h, layers, heads = args.seq_length, args.hidden_size, args.num_layers, args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    projection = args.kv_channels * heads / h
    gate = 1.5 if args.swiglu or args.glu_gate_last else 1.0
    mlp = 12 * h * args.ffn_hidden_size * gate * layers
    attention = 12 * layers * h * h * projection * (1 + groups / heads + s / (2 * h))
    logits = 6 * h * args.padded_vocab_size
    return batch_size * s * (mlp + attention + logits)
