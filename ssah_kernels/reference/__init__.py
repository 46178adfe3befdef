"""The specification of each operator: plain PyTorch in float64, slow and always right."""
