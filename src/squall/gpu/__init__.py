"""Programs on GPUs, by PyTorch: needs `squall[torch]`."""
