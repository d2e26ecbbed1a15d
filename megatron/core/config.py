"""Switch read by ``experimental_fn`` and ``experimental_cls``; users assign it, no flag does."""

ENABLE_EXPERIMENTAL = False
