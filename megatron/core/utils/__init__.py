"""Small helpers used across the library, and by user scripts under this path."""

from megatron import unbuilt
from megatron.core.utils.arithmetic import divide, ensure_divisibility
from megatron.core.utils.batch import get_batch_on_this_cp_rank
from megatron.core.utils.experimental import (
    ExperimentalNotEnabledError,
    experimental_cls,
    experimental_fn,
)
from megatron.core.utils.initializers import (
    init_method_normal,
    scaled_init_method_normal,
    xavier_uniform_init_method,
)
from megatron.core.utils.logging_helpers import log_on_each_pipeline_stage, log_single_rank
from megatron.core.utils.multi_tensor import (
    local_multi_tensor_applier,
    local_multi_tensor_l2_norm,
    local_multi_tensor_scale,
)
from megatron.core.utils.replicas import check_param_hashes_across_dp_replicas
from megatron.core.utils.straggler import StragglerDetector
from megatron.core.utils.tensors import (
    GlobalMemoryBuffer,
    MakeViewlessTensor,
    WrappedTensor,
    assert_viewless_tensor,
    drain_embedding_wgrad_compute,
    get_data_parallel_group_if_dtensor,
    get_full_tensor_if_necessary,
    make_viewless_tensor,
    prepare_input_tensors_for_wgrad_compute,
    safely_set_viewless_tensor_data,
    to_local_if_dtensor,
)
from megatron.core.utils.versions import (
    get_fa_version,
    get_te_version,
    get_torch_version,
    is_fa_min_version,
    is_te_min_version,
    is_torch_min_version,
)
from megatron.core.utils.wrapped_models import (
    deprecate_inference_params,
    get_attr_wrapped_model,
    get_model_config,
    get_model_type,
    get_model_xattn,
    is_submodule,
)

__getattr__ = unbuilt.names_of(__name__)
