"""Every kernel a device may want to replace, as a plain function with an eager PyTorch default."""
