"""Small helpers."""

import logging
import warnings

import pytest
import torch

import megatron.core
from megatron.core import config, utils
from megatron.core.errors import ConfigError, MegatronError
from tests.unit_tests.test_public_names import problems_in


def test_package_exports():
    assert megatron.core.mpu is megatron.core.parallel_state
    assert megatron.core.__version__ == "0.12.1"
    assert megatron.core.InferenceParams(2, 8).max_sequence_length == 8
    assert {"Timers", "DistributedDataParallel", "tensor_parallel"} <= set(dir(megatron.core))
    with pytest.raises(AttributeError, match="no_such_name"):
        megatron.core.no_such_name  # noqa: B018


def test_divide():
    assert utils.divide(12, 4) == 3
    with pytest.raises(ConfigError, match="12 is not divisible by 5"):
        utils.divide(12, 5)


def test_versions():
    assert utils.is_torch_min_version("2.0")
    assert not utils.is_torch_min_version(torch.__version__, check_equality=False)
    assert utils.is_torch_min_version(torch.__version__)
    assert not utils.is_te_min_version("0.0.1")
    assert not utils.is_fa_min_version("0.0.1")


def test_te_version_can_be_replaced(monkeypatch):
    from packaging.version import Version

    monkeypatch.setattr(utils, "get_te_version", lambda: Version("1.9"))
    assert utils.is_te_min_version("1.8")
    assert not utils.is_te_min_version("1.9", check_equality=False)


def test_wrapped_models():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.nothing = None

    inner = torch.nn.Linear(2, 2)
    inner.config, inner.model_type, inner.nothing = "config", "type", 5
    wrapped = Wrapper(Wrapper(inner))
    assert utils.get_model_config(wrapped) == "config"
    assert utils.get_model_type(wrapped) == "type"
    assert utils.get_model_xattn(wrapped) is False
    assert utils.get_attr_wrapped_model(wrapped, "config", return_model_obj=True) is inner
    assert utils.get_attr_wrapped_model(wrapped, "nothing") is None
    assert utils.get_attr_wrapped_model(wrapped, "nothing", allow_none=False) == 5
    with pytest.raises(ConfigError, match="'absent'"):
        utils.get_attr_wrapped_model(wrapped, "absent")
    with pytest.raises(ConfigError, match="list of 1"):
        utils.get_attr_wrapped_model([wrapped], "config")
    assert utils.is_submodule(inner, wrapped)
    assert not utils.is_submodule(wrapped, wrapped)
    assert utils.is_submodule(wrapped, wrapped, strict=False)


def test_experimental_switch(monkeypatch):
    @utils.experimental_fn(introduced_with_version="1.0")
    def function():
        return 3

    @utils.experimental_cls(introduced_with_version="1.0")
    class Class:
        pass

    for use in (function, Class):
        with pytest.raises(utils.ExperimentalNotEnabledError, match=r"since 1\.0"):
            use()
    monkeypatch.setattr(config, "ENABLE_EXPERIMENTAL", True)
    assert function() == 3
    assert isinstance(Class(), Class)


def test_memory_buffer_grows_and_is_shared():
    buffer = utils.GlobalMemoryBuffer()
    first = buffer.get_tensor([2, 3], torch.float32, "a")
    assert first.shape == (2, 3)
    assert buffer.get_tensor([4], torch.float32, "a").data_ptr() == first.data_ptr()
    assert buffer.get_tensor([4], torch.float32, "b").data_ptr() != first.data_ptr()
    assert buffer.get_tensor([100], torch.float32, "a").numel() == 100


def test_viewless_tensors():
    base = torch.arange(6.0, requires_grad=True) * 1
    view = base.view(2, 3)
    with pytest.raises(AssertionError, match="hint"):
        utils.assert_viewless_tensor(view, "hint")
    for keep_graph in (True, False):
        out = utils.make_viewless_tensor(view, requires_grad=True, keep_graph=keep_graph)
        assert out._base is None
        assert out.data_ptr() == view.data_ptr()
        assert (out.grad_fn is not None) == keep_graph
    assert utils.make_viewless_tensor(base, True, True) is base
    out = utils.make_viewless_tensor(view, True, False)
    utils.safely_set_viewless_tensor_data(out, torch.zeros(1))
    assert out.numel() == 1


def test_wrapped_tensor_opens_once():
    tensor = torch.ones(1)
    box = utils.WrappedTensor(tensor)
    assert box.unwrap() is tensor
    with pytest.raises(MegatronError, match="before"):
        box.unwrap()


def test_initialisers():
    torch.manual_seed(1)
    weight = torch.empty(400, 400)
    assert float(utils.init_method_normal(0.3)(weight).std()) == pytest.approx(0.3, rel=0.02)
    assert float(utils.scaled_init_method_normal(0.3, 8)(weight).std()) == pytest.approx(0.075, rel=0.02)
    assert float(utils.xavier_uniform_init_method(weight).abs().max()) <= (6 / 800) ** 0.5
    assert utils.init_method_normal(0.3) == utils.init_method_normal(0.3)


def test_multi_tensor_operations():
    tensors = [torch.tensor([3.0]), torch.tensor([[4.0, 12.0]])]
    flag = torch.zeros(1)
    norm, each = utils.local_multi_tensor_applier(utils.local_multi_tensor_l2_norm, flag, [tensors], True)
    assert norm.item() == pytest.approx(13.0)
    assert each.tolist() == pytest.approx([3.0, 160**0.5])
    out = [torch.zeros(1).half(), torch.zeros(1, 2)]
    utils.local_multi_tensor_applier(utils.local_multi_tensor_scale, flag, [tensors, out], 0.5)
    assert out[0].item() == 1.5
    assert out[1].tolist() == [[2.0, 6.0]]


def test_single_rank_logging(caplog):
    with caplog.at_level(logging.INFO):
        utils.log_single_rank(logging.getLogger("x"), logging.INFO, "seen %d", 1)
    assert caplog.messages == ["seen 1"]


def test_old_name_of_the_inference_context():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert utils.deprecate_inference_params(None, 3) == 3
    assert "old name" in str(caught[0].message)
    assert utils.deprecate_inference_params(4, None) == 4


# Modules that lie in no package of the core.
TOP = (
    "config",
    "config_logger",
    "enums",
    "jit",
    "model_parallel_config",
    "num_microbatches_calculator",
    "optimizer_param_scheduler",
    "package_info",
    "packed_seq_params",
    "parallel_state",
    "process_groups_config",
    "rerun_state_machine",
    "timers",
    "utils",
)


def test_defaults_are_the_original_ones() -> None:
    assert problems_in(*(f"megatron.core.{name}" for name in TOP)) == []
