"""Do all data-parallel replicas hold the same weights?"""

import hashlib

import torch

from megatron.core import accelerator


def check_param_hashes_across_dp_replicas(model: list[torch.nn.Module], cross_check: bool = False) -> bool:
    """Compare the bytes of all parameters over the data-parallel ranks.

    Args:
        model: model chunks of this rank.
        cross_check: True when every rank needs the common answer; otherwise a rank compares itself with
            data-parallel rank 0 alone.

    Returns:
        True when the parameters are equal bit for bit.
    """
    from megatron.core import parallel_state  # which imports this package

    digest = hashlib.sha1()
    for chunk in model:
        for param in chunk.parameters():
            digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy())
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(accelerator.current_device())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    gathered = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, own, group=group)
    if not cross_check:
        return torch.equal(gathered[0], own)
    return all(torch.equal(gathered[0], other) for other in gathered)
