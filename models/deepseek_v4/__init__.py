"""DeepSeek-V4: configuration, checkpoint format, weight recipes and modules."""
