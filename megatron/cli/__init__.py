"""The programs behind the scripts at the root of the repository and in ``tools/``, and ``megatron-npu``.

Each script imports the module of its name here, so that an installation without a checkout has them all.
"""
