"""Pre-training and evaluation of MiCL models, run from the checkout: `accelerate launch -m training.pretrain ...`."""
