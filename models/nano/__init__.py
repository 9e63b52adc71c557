"""deepseek-v4-nano: the bundled, really trained DeepSeek-V4 model; its training, quantisation and export."""
