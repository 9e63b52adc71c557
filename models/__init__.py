"""The models: plain PyTorch modules over flat tokens `[T, ...]`, readable beside the paper.

With each model come its config, the map of checkpoint names to weights, and the recipes that pack them.
"""
