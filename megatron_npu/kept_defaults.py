"""Replaceable functions whose default is right on an NPU, and why.

A test holds every default here to operations that torch_npu has kernels for.
"""

_CORE = "megatron.core."

KEPT_DEFAULTS = {
    _CORE + "fusions.fused_bias_dropout.dropout": "F.dropout is the NPU's fused kernel",
    _CORE + "fusions.embeddings.embedding_lookup": "torch's lookup and its dense backward have NPU kernels",
    _CORE
    + "fusions.fused_bias_dropout.bias_dropout_add": "made of F.dropout and additions; no fused operator",
    _CORE
    + "fusions.fused_layer_norm.layer_norm": "F.layer_norm is the NPU's fused kernel, forward and backward",
    _CORE + "fusions.matmul.accumulate_weight_gradient": "torch_npu has no matmul that adds into fp32",
    _CORE + "fusions.multi_tensor.count_zeros": "count_nonzero has an NPU kernel",
    _CORE
    + "fusions.multi_tensor.l2_norm": "foreach norms have an NPU kernel that takes all gradients at once",
    _CORE + "fusions.multi_tensor.scale_gradients": "foreach products have an NPU kernel",
}
